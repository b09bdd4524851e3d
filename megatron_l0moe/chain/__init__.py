"""The chain of stages of a run: what comes next, here or as jobs of a cluster. No torch."""
