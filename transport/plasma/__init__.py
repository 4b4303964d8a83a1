"""Ray's object store between two nodes: an actor on the owner's node reads its regions and puts them."""
