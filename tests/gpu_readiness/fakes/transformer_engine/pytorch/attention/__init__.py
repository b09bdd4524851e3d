"""transformer_engine.pytorch.attention."""
