"""Native CPU kernels: paged attention, KV writes and fused elementwise operators, with their build and their loader."""
