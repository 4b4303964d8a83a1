"""Attention over the paged pool in Triton, for GPUs. On a CPU it runs interpreted, for tests."""
