"""The stage `curate`: from a corpus to ordered sets of tokens (paper, section 3.1)."""
