"""A handoff in; a stream of tokens out."""
