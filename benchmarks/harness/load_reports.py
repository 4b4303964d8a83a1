"""What many busy workers tell a router of their load in a second: bytes, and the router's processor time for them."""

from __future__ import annotations

import heapq
import random
import time

from kvcache.told_requests import ToldRequests, report_pause_s
from kvrouter.router import Router, WorkerJoined
from messages.fleet import KvEvents, LoadReport, WorkerInfo
from messages.price import ComputePrice
from messages.wire import decode, encode

NUM_SEQUENCES = 256  #: of each worker, all the time
SEQUENCE_S = 10.0  #: how long they last, on average
LISTS_PER_S = 48  #: as often a worker used to tell all requests that it had
_REPORT_S = 1.0
_SECONDS = 2.0


class ReportingWorker:
    """A worker whose sequences end at random, each followed by another; in simulated time."""

    def __init__(self, number: int) -> None:
        self.info = WorkerInfo(
            worker_id=f"decode-{number:08x}",
            role="decode",
            address=f"tcp://w{number}:1",
            node_id=f"n{number}",
            fingerprint=b"f",
            block_size=16,
            num_blocks=100_000,
            block_bytes=100_000,
            max_model_len=200_000,
            max_num_seqs=NUM_SEQUENCES,
            roads=("shm", "ucx", "socket"),
        )
        self._rng = random.Random(number)
        self._ends = [(self._lasting_s(), self._new_id()) for _ in range(NUM_SEQUENCES)]
        heapq.heapify(self._ends)
        self._told = ToldRequests()
        self._report_at_s = 0.0

    def reports(self, until_s: float) -> list[LoadReport]:
        """Return its reports: after each end or admission, at least one a second, at most as often as workers may."""
        reports: list[LoadReport] = []
        while True:
            at_s = max(self._report_at_s, min(self._ends[0][0], self._report_at_s + _REPORT_S))
            if at_s >= until_s:
                return reports
            while self._ends[0][0] <= at_s:
                ended_s, _ = heapq.heappop(self._ends)
                heapq.heappush(self._ends, (ended_s + self._lasting_s(), self._new_id()))
            ids = [request_id for _, request_id in self._ends]
            reports.append(self._told.told(self._report(), ids, ()))
            self._report_at_s = at_s + report_pause_s(NUM_SEQUENCES)

    def whole(self) -> LoadReport:
        """Return its report to one who subscribes."""
        return self._told.whole(self._report())

    def _lasting_s(self) -> float:
        return self._rng.expovariate(1 / SEQUENCE_S)

    def _new_id(self) -> str:
        return f"{self._rng.randbytes(16).hex()}-{self._rng.randbytes(4).hex()}-0"

    def _report(self) -> LoadReport:
        rng = self._rng
        return LoadReport(
            worker_id=self.info.worker_id,
            queued_s=rng.random(),
            queued_short_s=rng.random(),
            num_short=rng.randint(0, 8),
            num_waiting=0,
            num_running=NUM_SEQUENCES,
            free_blocks=rng.randint(10_000, 100_000),
            idle_blocks=rng.randint(1000, 10_000),
            reused_share=rng.random(),
            decode_step_s=0.02 * rng.random(),
            compute=ComputePrice(
                step_s=rng.random(),
                row_s=rng.random(),
                row_key_s=rng.random(),
                token_s=rng.random(),
                pair_s=rng.random(),
            ),
        )


def load_reports(num_workers: int) -> dict[str, float]:
    """Return the megabytes of a second's reports, with all requests in each as it was, and the router's ms for them."""
    workers = [ReportingWorker(number) for number in range(num_workers)]
    router = Router()
    for worker in workers:
        worker.reports(1.0)  # those that it began with are known
        router.on_event(WorkerJoined(worker.info), 1.0)
        router.on_event(KvEvents(worker_id=worker.info.worker_id, seq=0, cleared=True), 1.0)
        router.on_event(worker.whole(), 1.0)
    reports = [report for worker in workers for report in worker.reports(1.0 + _SECONDS)]
    random.Random(0).shuffle(reports)
    reports.sort(key=lambda report: report.seq)
    sent = [encode(report) for report in reports]
    begin_s = time.thread_time()
    for data in sent:
        report = decode(data)
        assert isinstance(report, LoadReport)
        router.on_event(report, 1.0)
    taken_s = time.thread_time() - begin_s
    assert router.stats().get("kvray_router_gaps_total", 0.0) == 0
    lists_mb = sum(len(encode(worker.whole())) for worker in workers) * LISTS_PER_S / 1e6
    return {"MB as lists": lists_mb, "MB": sum(map(len, sent)) / 1e6 / _SECONDS, "ms": 1e3 * taken_s / _SECONDS}
