"""A plain authenticated socket between two workers: what is there when nothing better is."""
