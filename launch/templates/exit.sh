# How every batch script ends. rlpt_end, of the job's part, may change $code.
rlpt_requeue() {
    if [ "$rlpt_may_requeue" = no ]; then
        echo "stopped; run the same rlpt launch command to resume"
        return
    fi
    echo "requeued"
    scontrol "requeue${rlpt_hold:-}" "${SLURM_HET_JOB_ID:-$SLURM_JOB_ID}"
}

rlpt_exit() {
    local code=$?
    trap - EXIT
    set +e
    # Else bash reports components that were killed below the last words of the one that failed.
    disown -a
    # Newest first, so that the first failure, which caused the others, is printed last. Names hold no spaces.
    # shellcheck disable=SC2045
    for name in $(ls -t "$rlpt_shared/failed"); do cat "$rlpt_shared/failed/$name"; done
    if [ "$code" != 0 ] && [ -s "$rlpt_jobs/@EXIT_CODE_FILE@" ]; then code=$(cat "$rlpt_jobs/@EXIT_CODE_FILE@"); fi
    rlpt_end
    exit "$code"
}
trap rlpt_exit EXIT
