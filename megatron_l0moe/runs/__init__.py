"""A run folder: what its stages wrote, who may work in it, the processes started for it. No torch."""
