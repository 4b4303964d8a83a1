"""Wires the rooms together: Serve application, OpenAI HTTP, command line, configuration, metrics."""
