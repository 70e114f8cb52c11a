# Start of the job that trains.
if [ "$rlpt_part" = run ]; then rm -f "$rlpt_shared"/failed/* "$rlpt_shared/buffer.json"; fi
rm -f "$rlpt_shared"/failed/trainer-* "$rlpt_shared"/{judged.json,@DONE@,@STOPPED@} "$rlpt_run/@STOP_FILE@"
rlpt_step() { sed -n 's/.*"step": \([0-9]*\).*/\1/p' "$rlpt_run/@HEARTBEAT@" 2>/dev/null || echo 0; }
# Whether the trainer of this start left the file $1.
rlpt_left() { [ "$(cat "$rlpt_shared/$1" 2>/dev/null)" = "$RLPT_START" ]; }
rlpt_first_step=$(rlpt_step)

rlpt_request_stop() {
    echo "$1; requesting a checkpoint"
    touch "$rlpt_run/@STOP_FILE@"
}
trap 'rlpt_request_stop "time limit is near"' USR1
trap 'rlpt_terminated=1; rlpt_request_stop "the job received SIGTERM"' TERM

rlpt_end() {
    # Steps end with 0 both when the trainer is done and when it stopped as requested.
    if [ "$code" = 0 ] && ! rlpt_left "@DONE@"; then
        if rlpt_left "@STOPPED@"; then
            code=@STOPPED_CODE@
        else
            echo "error: the trainer was terminated before it was done"
            code=@TERMINATED_CODE@
        fi
    fi
    if [ -n "${rlpt_terminated:-}" ] && [ "$code" = @STOPPED_CODE@ ]; then
        echo "stopped after SIGTERM; run the same rlpt launch command to resume"
        code=@TERMINATED_CODE@
    fi
    if [ "$rlpt_part" = training ]; then rlpt_hand_over; fi
    # One start without a step is bad luck. Two mean that the time is too short, and a third would be no better.
    if [ "$code" != @STOPPED_CODE@ ] || [ "$(rlpt_step)" != "$rlpt_first_step" ]; then
        rm -f "$rlpt_shared/idle"
    elif [ ! -e "$rlpt_shared/idle" ]; then
        touch "$rlpt_shared/idle"
    else
        rm -f "$rlpt_shared/idle"
        echo "error: two starts in a row ended before their first step; raise slurm.time or lower slurm.stop_lead"
        code=@STALLED_CODE@
    fi
    if [ "$code" = @STOPPED_CODE@ ]; then rlpt_requeue; fi
    if [ "$rlpt_part" = training ]; then rlpt_end_of_pair; fi
}
