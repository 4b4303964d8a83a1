"""A prompt in; published KV and a first token out."""
