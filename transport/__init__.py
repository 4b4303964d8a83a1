"""Moves registered bytes and control messages between processes and hosts. Knows no token."""
