"""Experts as state dicts: selection of units, extraction, merging."""
