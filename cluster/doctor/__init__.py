"""What a node lacks to run kvray well: facts are gathered, each within a limit of time, and judged by pure code."""
