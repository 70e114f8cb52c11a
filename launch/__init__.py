"""Launching of a run's components with nemo-run, on this machine or on a Slurm cluster; imports no torch."""
