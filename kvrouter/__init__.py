"""Which workers should serve this prompt, and where its blocks already are."""
