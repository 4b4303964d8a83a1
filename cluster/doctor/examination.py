"""How each thing of a node is looked at, and all of them side by side, each within a limit of time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from cluster.config import KvrayConfig
from cluster.doctor import findings, gathering
from cluster.doctor.findings import Finding
from messages.errors import first_line

F = TypeVar("F")

LIMIT_S: Final = 15.0  #: for all of them together: they run side by side


class Examination(NamedTuple, Generic[F]):
    """How one thing is looked at: `gather` does, `judge` decides."""

    about: str
    gather: Callable[[KvrayConfig], F]
    judge: Callable[[F], Finding]


EXAMINATIONS: Final[tuple[Examination[Any], ...]] = (
    Examination("cpu", gathering.cpu_facts, findings.of_cpu),
    Examination("compiled", gathering.library_facts, findings.of_libraries),
    Examination("huge pages", gathering.huge_page_facts, findings.of_huge_pages),
    Examination("memory", gathering.memory_facts, findings.of_memory),
    Examination("/dev/shm", gathering.shared_memory_facts, findings.of_shared_memory),
    Examination("open files", gathering.file_limit_facts, findings.of_file_limit),
    Examination("ports", gathering.port_facts, findings.of_ports),
    Examination("clock", gathering.clock_facts, findings.of_clock),
    Examination("gpu", gathering.gpu_facts, findings.of_gpu),
    Examination("ucx", gathering.ucx_facts, findings.of_ucx),
    Examination("ray", gathering.ray_facts, findings.of_ray),
    Examination("secrets", gathering.secret_facts, findings.of_secrets),
    Examination("disk tier", gathering.disk_facts, findings.of_disk),
    Examination("remote tier", gathering.remote_facts, findings.of_remote),
    Examination("spans", gathering.span_facts, findings.of_spans),
)


def examine(config: KvrayConfig, wanted: Sequence[Examination[Any]], limit_s: float = LIMIT_S) -> list[Finding]:
    """Gather and judge all of `wanted`, side by side; who does not answer within `limit_s` is a finding of its own."""
    answers: queue.SimpleQueue[tuple[int, Finding]] = queue.SimpleQueue()

    def run(number: int, one: Examination[Any]) -> None:
        try:
            answers.put((number, one.judge(one.gather(config))))
        except Exception as error:  # noqa: BLE001 - of one of them: the others are to be told all the same
            answers.put((number, findings.broken(one.about, first_line(error))))

    for number, one in enumerate(wanted):
        threading.Thread(target=run, args=(number, one), name=one.about, daemon=True).start()
    found: dict[int, Finding] = {}
    end_s = time.monotonic() + limit_s
    while len(found) < len(wanted):
        try:
            number, finding = answers.get(timeout=max(0.0, end_s - time.monotonic()))
        except queue.Empty:
            break
        found[number] = finding
    return [found.get(number) or findings.late(one.about, limit_s) for number, one in enumerate(wanted)]
