"""UCX between two workers: tag messages, over whatever it finds between them."""
