# The training job watches the judging job.
rlpt_hand_over() {
    case $(rlpt_state judging) in PENDING | REQUEUE*) touch "$rlpt_shared/handover" ;; esac
    if [ -e "$rlpt_shared/handover" ]; then
        # Losing the buffer together with its job is no failure: the run resumes from its last checkpoint.
        if [ "$code" = @NO_BUFFER_CODE@ ]; then code=@STOPPED_CODE@; fi
        if [ "$code" = @STOPPED_CODE@ ]; then
            touch "$rlpt_shared/held"
            rlpt_hold=hold
        fi
    fi
}
rlpt_watch() {
    while sleep @INTERVAL@; do
        case $(rlpt_state judging) in
        gone) rlpt_ended "$(rlpt_job judging)" @NO_TEACHER_CODE@ ;;
        PENDING | REQUEUE*) touch "$rlpt_run/@STOP_FILE@" ;;
        esac
    done
}
rlpt_watch &
rlpt_watching=$!
