# Slurm also requeues a job whose node failed; only the job itself can forbid that.
scontrol update JobId="$SLURM_JOB_ID" Requeue=0
