"""The paged pool's bytes: tensors over it, device memory, checksums."""
