"""Corpus to training sets: reading, embedding, clustering, ordering, tokenising, indexing (paper section 3.1)."""
