"""How the demo model was made: its text, its training, its evaluation."""
