# What the two jobs of a pair know about each other.
mkdir -p "$rlpt_shared/@ENDED@"
rm -f "$rlpt_shared/@ENDED@/$SLURM_JOB_ID"
rlpt_job() { cat "$rlpt_jobs/$1" 2>/dev/null; }
# State of the job of part $1, "gone" when Slurm no longer has it; nothing when Slurm does not answer.
rlpt_state() {
    local job answer
    job=$(rlpt_job "$1") || return
    if answer=$(squeue --noheader --format=%T --jobs="$job" 2>&1); then
        echo "${answer:-gone}"
    elif [[ $answer == *"Invalid job id"* ]]; then
        echo gone
    fi
}
# Record that job $1 ended for good, with exit code $2, unless it said so itself.
rlpt_ended() { [ -e "$rlpt_shared/@ENDED@/$1" ] || echo "$2" >"$rlpt_shared/@ENDED@/$1"; }
rlpt_end_of_pair() {
    kill "$rlpt_watching" 2>/dev/null
    # A stopped job that is requeued has not ended.
    if [ "$rlpt_may_requeue" = no ] || [ "$code" != @STOPPED_CODE@ ]; then rlpt_ended "$SLURM_JOB_ID" "$code"; fi
}
