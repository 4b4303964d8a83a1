"""Blocks in a bucket or a shared directory: objects with runs of blocks, found by manifests, shared by clusters."""
