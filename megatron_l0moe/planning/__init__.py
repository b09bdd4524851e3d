"""Parameters, FLOPs, memory and speed bounds as formulas. No torch."""
