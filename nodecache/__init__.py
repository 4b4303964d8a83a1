"""The node cache: the host arena of a node, and the disk and remote tiers behind it. No torch, no Ray."""
