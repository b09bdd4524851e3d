"""What a model is, from its config.json and by formula: sizes, parameters, FLOPs. No torch."""
