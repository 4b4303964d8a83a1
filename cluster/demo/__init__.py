"""The demo model's directory, and the conversation that `kvray demo` holds with it (tools/demo_model made it)."""
