"""What requests end with at their ingress, when no worker says it."""

from __future__ import annotations

from messages.errors import CapacityError, ErrorInfo, WorkerError


def is_retryable(error: ErrorInfo) -> bool:
    """Tell whether another worker may do better: not where the request itself is at fault, nor at its deadline."""
    return error.kind == WorkerError.__name__ and error.status != 504


def timeout_error(stage: str) -> WorkerError:
    """Return what a request ends with that was `stage` when its deadline passed."""
    return WorkerError(
        f"the request did not end in time: it was {stage} when its deadline passed",
        code="timeout",
        status=504,
    )


def crash_error(worker_id: str, reason: str) -> WorkerError:
    """Return what a request ends with that was alone in the step in which its worker was lost."""
    return WorkerError(
        f"the worker {worker_id} was lost while it computed this request and no other: {reason}",
        code="worker_lost",
        status=500,
    )


def nobody_there() -> CapacityError:
    """Return what a request ends with that waited for a decode worker in vain."""
    return CapacityError(
        "no decode worker is there; one is being started", code="no_worker", status=503, retry_after_s=5.0
    )
