"""What every replica of ours does before anything else."""

from __future__ import annotations

from cluster.logs import configure_logging
from cluster.warden import start_warden


def prepare_replica(level: str, style: str) -> None:
    """Log from `level` on, in `style`, and have this process killed if it ever stands still."""
    configure_logging(level, style)
    start_warden()
