"""The two traces that lie beside the repository, for tests that skip without them."""

from pathlib import Path

import pytest

_DIRECTORY = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"


def _found(name: str) -> Path:
    # A worktree of the repository may lie a storey deeper.
    for directory in (_DIRECTORY, _DIRECTORY.parent.parent.parent / "shared" / "traces"):
        if (directory / name).exists():
            return directory / name
    pytest.skip(f"there is no {name} in {_DIRECTORY}")


def agent_sessions() -> Path:
    """Return where sessions of agents lie; skips the test without them."""
    return _found("agent_sessions.jsonl.xz")


def mooncake() -> Path:
    """Return where the Mooncake trace lies; skips the test without it."""
    return _found("mooncake_conversation.jsonl")
