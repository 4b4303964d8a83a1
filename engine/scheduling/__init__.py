"""What runs next, on which blocks: pure deciding, and the contract with who does it."""
