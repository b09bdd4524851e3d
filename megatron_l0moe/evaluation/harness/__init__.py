"""Benchmarks by lm-eval: their tasks, its process, and programs that models wrote, run in a sandbox."""
