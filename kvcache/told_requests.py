"""The requests of a worker as its subscribers know them: reports say what came and went, not time and again all."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from messages.fleet import LoadReport

_LEAST_S = 0.02
_SEQUENCES = 32  #: so many make a report half as frequent: of many, one more or less says little


class ToldRequests:
    """What was told of a worker's requests, to all who subscribe to it alike."""

    def __init__(self) -> None:
        self._seq = 0
        self._ids: set[str] = set()
        self._declined: set[str] = set()
        self._finished: set[str] = set()  # since the last report

    def finish(self, request_id: str) -> None:
        """Take in that a request's last token is there: it may be gone before the next report."""
        self._finished.add(request_id)

    def told(self, report: LoadReport, ids: Iterable[str], declined: Iterable[str]) -> LoadReport:
        """Return the next report for all subscribers, with what came and went of a worker's requests since the last."""
        now, now_declined = set(ids), set(declined)
        passed = self._finished - now - self._ids  # came and went: who reserved for them is to know
        self._seq += 1
        changed = msgspec.structs.replace(
            report,
            seq=self._seq,
            is_whole=False,
            request_ids=tuple((now - self._ids) | passed),
            ended_ids=tuple((self._ids - now) | passed),
            declined_ids=tuple(now_declined - self._declined),
        )
        self._ids, self._declined = now, now_declined
        self._finished.clear()
        return changed

    def whole(self, report: LoadReport) -> LoadReport:
        """Return the report for one who subscribes, with all requests as the others know them."""
        return msgspec.structs.replace(
            report,
            seq=self._seq,
            is_whole=True,
            request_ids=tuple(self._ids),
            declined_ids=tuple(self._declined),
        )


def report_pause_s(num_sequences: int) -> float:
    """Return the seconds between two reports at least, of a worker with so many sequences."""
    return _LEAST_S * (1 + num_sequences / _SEQUENCES)
