# The judging job watches the training job.
rm -f "$rlpt_shared/handover"
# The trainer stops first, while it still has judges; then this job ends as well.
trap 'echo "time limit is near; requesting a checkpoint"; touch "$rlpt_shared/handover" "$rlpt_run/@STOP_FILE@"' USR1
trap 'exit @STOPPED_CODE@' USR2
rlpt_watch() {
    while sleep @INTERVAL@; do
        case $(rlpt_state training) in
        gone) rlpt_ended "$(rlpt_job training)" 0 ;;
        PENDING | REQUEUE*)
            if [ -e "$rlpt_shared/handover" ]; then
                touch "$rlpt_shared/held"
                scontrol hold "$(rlpt_job training)"
                kill -USR2 $$
            elif [ -e "$rlpt_shared/held" ]; then
                scontrol release "$(rlpt_job training)" && rm -f "$rlpt_shared/held"
            fi
            ;;
        esac
    done
}
rlpt_watch &
rlpt_watching=$!
