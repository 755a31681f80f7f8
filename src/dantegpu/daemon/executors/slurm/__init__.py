"""Executor `slurm`: an attempt is a job of a Slurm cluster, in the same sandbox as on a machine of its own."""
