"""Blocks, their names, the paged pool's bookkeeping; later tiers and the compute-or-load planner. No torch."""
