"""JSON schemas, written in the part of the language that the grammar library follows; the rest is refused by name."""
