"""The placement page: what lies where, how busy workers are, why a request went where it went; live, in a browser."""
