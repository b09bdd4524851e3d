"""The chain as jobs of a Slurm cluster."""
