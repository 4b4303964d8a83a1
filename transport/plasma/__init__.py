"""The road "plasma": Ray's object store, into which an actor on the owner's node puts what it reads there."""
