"""Launching a run's components with nemo-run, on this machine or on a Slurm cluster. Imports no torch."""
