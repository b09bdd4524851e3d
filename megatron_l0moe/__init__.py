"""Turn a pretrained dense LLM into an L0-MoE: experts cut out of its FFNs by learned L0 masks (ACL 2025)."""

__version__ = "0.1.0"
