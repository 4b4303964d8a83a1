"""Block names, the paged pool's bookkeeping, leases on blocks, and what computing or moving them costs. No torch."""
