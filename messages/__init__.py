"""What crosses a process: frozen, slotted values. Standard library and msgspec only."""
