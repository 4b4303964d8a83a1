"""The road "ucx": tag messages, over whatever UCX finds between two workers."""
