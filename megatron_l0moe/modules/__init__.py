"""Megatron-Core modules of the L0-MoE: gates, retention, L0 MLP, router, layer specs."""
