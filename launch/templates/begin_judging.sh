# Start of the judging job of a pair.
rm -f "$rlpt_shared"/failed/{buffer,teacher,rewriter,judges}-* "$rlpt_shared/buffer.json"

rlpt_end() {
    if [ "$code" = @STOPPED_CODE@ ]; then rlpt_requeue; fi
    rlpt_end_of_pair
}
