"""A transformers model made ready: loading, families, its attention, linears and fused layers."""
