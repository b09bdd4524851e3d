"""Megatron runs on the CPU in these tests; the runtime has to be in place before Megatron is imported."""

from megatron_l0moe.runtime import cpu

cpu.install()
