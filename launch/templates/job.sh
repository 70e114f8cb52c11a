# Start of every batch script.

# No tracing from here on: traces fill the log.
{ set +vx; } 2>/dev/null
export RLPT_START="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
rlpt_part=@PART@
rlpt_may_requeue=@REQUEUE@
rlpt_run=@RUN@
rlpt_shared="$rlpt_run/@SHARED@"
rlpt_jobs="$rlpt_shared/@JOBS@"
mkdir -p "$rlpt_shared/failed" "$rlpt_jobs"
readlink "/proc/$$/fd/1" >"$rlpt_jobs/$rlpt_part.output"
rm -f "$rlpt_jobs/@EXIT_CODE_FILE@"
