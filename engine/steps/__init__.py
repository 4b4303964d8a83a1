"""How steps reach a GPU: their inputs on their way beside the host, decode steps captured, by numbers of rows."""
