"""For each alert what makes it fire, and what is just not enough: series as promtool writes them, a minute apart."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Two histories of the same numbers."""

    at: str  #: when the first history has made it fire, and the second has not
    fires: dict[str, str]
    silent: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)  #: of the alert, besides its severity
    replaces: str = ""  #: a series that is there otherwise


#: Of every history: a fleet that is watched.
WATCHED = {'kvray_ingress_has_router{ingress="i1"}': "1x600"}

_D1 = 'worker="d1",role="decode"'
_ERRORS = 'kvray_choices_finished_total{ingress="i1",reason="error"}'
_STOPS = 'kvray_choices_finished_total{ingress="i1",reason="stop"}'
_REFUSED = 'kvray_http_requests_total{ingress="i1",endpoint="/v1/chat/completions",status="429"}'
_ANSWERED = 'kvray_http_requests_total{ingress="i1",endpoint="/v1/chat/completions",status="200"}'
_QUEUE = 'kvray_queue_seconds_bucket{worker="p1",role="prefill",le="%s"}'
_RATIO = 'kvray_time_to_first_token_ratio_bucket{ingress="i1",le="%s"}'
_TTFT = 'kvray_time_to_first_token_seconds_%s{ingress="i1"}'
_WAITING = 'kvray_sequences_waiting{worker="%s",role="decode"}'
_CHECKED = 'kvray_canary_checked_blocks_total{ingress="i1"}'
_WRONG = 'kvray_canary_wrong_blocks_total{ingress="i1",kind="pool_only"}'
_MISSES = 'kvray_prompt_misses_total{ingress="i1",reason="%s"}'
_PROMPT = 'kvray_explained_prompt_tokens_total{ingress="i1"}'


def _stranded(num_leases: int) -> dict[str, str]:
    return {
        f"kvray_blocks_pinned{{{_D1}}}": "40x60",
        f"kvray_sequences_running{{{_D1}}}": "0x60",
        f"kvray_sequences_waiting{{{_D1}}}": "0x60",
        f"kvray_leases{{{_D1}}}": f"{num_leases}x60",
        f"kvray_pulls_running{{{_D1}}}": "0x60",
    }


def _stalled(steps: str) -> dict[str, str]:
    return {
        f"kvray_sequences_running{{{_D1}}}": "3x60",
        f"kvray_sequences_waiting{{{_D1}}}": "0x60",
        f"kvray_steps_total{{{_D1}}}": steps,
    }


CASES = {
    "KvrayNotScraped": Case(
        at="15m", fires={"kvray_ingress_has_router": "_x60"}, silent=WATCHED, replaces=next(iter(WATCHED))
    ),
    "KvrayNoDecodeWorker": Case(
        at="12m",
        fires={'kvray_fleet_workers{ingress="i1",role="decode"}': "2x9 0x20"},
        silent={
            'kvray_fleet_workers{ingress="i1",role="decode"}': "1x30",
            'kvray_fleet_workers{ingress="i1",role="prefill"}': "0x30",
        },
    ),
    "KvrayWorkerSilent": Case(
        at="10m",
        fires={
            'kvray_fleet_workers{ingress="i1",role="prefill"}': "3x30",
            'kvray_fleet_workers_answering{ingress="i1",role="prefill"}': "2x30",
        },
        silent={
            'kvray_fleet_workers{ingress="i1",role="prefill"}': "3x30",
            'kvray_fleet_workers_answering{ingress="i1",role="prefill"}': "3 2 2 3x30",
        },
        labels={"role": "prefill"},
    ),
    "KvrayWorkerStalled": Case(
        at="20m",
        fires=_stalled("0+100x5 500x40"),
        silent=_stalled("0+1x60"),
        labels={"worker": "d1", "role": "decode"},
    ),
    "KvrayRequestsFailing": Case(
        at="20m", fires={_ERRORS: "0+6x60", _STOPS: "0+94x60"}, silent={_ERRORS: "0+4x60", _STOPS: "0+96x60"}
    ),
    "KvrayRequestsRefused": Case(
        at="30m", fires={_REFUSED: "0+11x60", _ANSWERED: "0+89x60"}, silent={_REFUSED: "0+9x60", _ANSWERED: "0+91x60"}
    ),
    "KvrayRequestsMoving": Case(
        at="30m",
        fires={
            'kvray_requests_moved_total{ingress="i1"}': "0+3x60",
            'kvray_requests_placed_total{ingress="i1",by="router"}': "0+100x60",
        },
        silent={
            'kvray_requests_moved_total{ingress="i1"}': "0+1x60",
            'kvray_requests_placed_total{ingress="i1",by="router"}': "0+100x60",
        },
    ),
    "KvrayQueueLong": Case(
        at="30m",
        fires={_QUEUE % "5": "0+90x60", _QUEUE % "10": "0+100x60", _QUEUE % "+Inf": "0+100x60"},
        silent={_QUEUE % "5": "0+96x60", _QUEUE % "10": "0+100x60", _QUEUE % "+Inf": "0+100x60"},
        labels={"role": "prefill"},
    ),
    "KvrayFirstTokenLate": Case(
        at="60m",
        fires={
            _RATIO % "2": "0+40x90",
            _RATIO % "4": "0+100x90",
            _RATIO % "+Inf": "0+100x90",
            _TTFT % "sum": "0+300x90",
            _TTFT % "count": "0+100x90",
        },
        silent={  # three times as long as predicted, which was a hundredth of a second
            _RATIO % "2": "0+40x90",
            _RATIO % "4": "0+100x90",
            _RATIO % "+Inf": "0+100x90",
            _TTFT % "sum": "0+3x90",
            _TTFT % "count": "0+100x90",
        },
    ),
    "KvrayPreempting": Case(
        at="30m",
        fires={f"kvray_preemptions_total{{{_D1}}}": "0+9x60"},
        silent={f"kvray_preemptions_total{{{_D1}}}": "0+5x60"},
        labels={"worker": "d1"},
    ),
    "KvrayRouterLost": Case(
        at="10m",
        fires={'kvray_ingress_has_router{ingress="i2"}': "0x60"},
        silent={'kvray_ingress_has_router{ingress="i2"}': "1 1 1 1 1 1 1 0 0 1x60"},
    ),
    "KvrayRouterInert": Case(
        at="10m",
        fires={'kvray_router_inert{ingress="i1"}': "0x5 1x60"},
        silent={'kvray_router_inert{ingress="i1"}': "0x60"},
    ),
    "KvrayIndexWrong": Case(
        at="60m",
        fires={_CHECKED: "0+100x90", _WRONG: "0+6x90"},
        silent={_CHECKED: "0+100x90", _WRONG: "0+4x90"},
        labels={"kind": "pool_only"},
    ),
    "KvrayIndexOutOfStep": Case(
        at="10m",
        fires={'kvray_router_workers_out_of_step{worker="r1",role="router"}': "1x30"},
        silent={'kvray_router_workers_out_of_step{worker="r1",role="router"}': "2 2 1 1 0 0 0 1 1 0x30"},
    ),
    "KvrayIndexStale": Case(
        at="10m",
        fires={'kvray_router_oldest_report_seconds{worker="r1",role="router"}': "1+60x30"},
        silent={'kvray_router_oldest_report_seconds{worker="r1",role="router"}': "1.5x30"},
    ),
    "KvrayIndexFull": Case(
        at="10m",
        fires={'kvray_router_index_full_total{worker="r1",role="router"}': "0x5 1x30"},
        silent={'kvray_router_index_full_total{worker="r1",role="router"}': "1x30"},
    ),
    "KvrayLoadSkewed": Case(
        at="20m",
        fires={_WAITING % "d1": "30x60", _WAITING % "d2": "0x60", _WAITING % "d3": "1x60"},
        silent={_WAITING % "d1": "30x60", _WAITING % "d2": "20x60", _WAITING % "d3": "25x60"},
        labels={"role": "decode"},
    ),
    "KvrayDamagedTransfers": Case(
        at="10m",
        fires={f'kvray_blocks_rejected_total{{{_D1},reason="checksum"}}': "0x4 1x30"},
        silent={
            f'kvray_blocks_rejected_total{{{_D1},reason="checksum"}}': "0x30",
            f'kvray_blocks_rejected_total{{{_D1},reason="generation"}}': "0+5x30",
        },
        labels={"worker": "d1"},
    ),
    "KvrayDamagedStore": Case(
        at="10m",
        fires={  # a disk that is well hides no bucket that is not
            'kvray_disk_damaged_blocks_total{worker="c1",role="cache"}': "0x34",
            'kvray_remote_damaged_blocks_total{worker="c1",role="cache"}': "0x4 2x30",
        },
        silent={'kvray_disk_damaged_blocks_total{worker="c1",role="cache"}': "7x30"},
        labels={"worker": "c1"},
    ),
    "KvrayStoreFailing": Case(
        at="20m",
        fires={'kvray_cache_store_failures_total{worker="c1",role="cache",tier="disk"}': "0+1x60"},
        silent={'kvray_cache_store_failures_total{worker="c1",role="cache",tier="disk"}': "0x10 2x60"},
        labels={"worker": "c1", "tier": "disk"},
    ),
    "KvrayRemoteStoreOut": Case(
        at="30m",
        fires={
            'kvray_remote_is_readable{worker="c1",role="cache"}': "1x60",
            'kvray_remote_is_writable{worker="c1",role="cache"}': "0x60",
        },
        silent={
            'kvray_remote_is_readable{worker="c1",role="cache"}': "1x60",
            'kvray_remote_is_writable{worker="c1",role="cache"}': "1x20 0x5 1x60",
        },
    ),
    "KvrayTransfersFailing": Case(
        at="30m",
        fires={f'kvray_transfers_failed_total{{{_D1},road="ucx"}}': "0+1x60"},
        silent={f'kvray_transfers_failed_total{{{_D1},road="ucx"}}': "0x20 5x60"},
        labels={"worker": "d1", "road": "ucx"},
    ),
    "KvrayNoRoad": Case(
        at="10m",
        fires={f'kvray_peers{{{_D1},road="none"}}': "1x60"},
        silent={f'kvray_peers{{{_D1},road="socket",carriers="tcp"}}': "3x60"},
        labels={"worker": "d1"},
    ),
    "KvrayLeasesExpiring": Case(
        at="30m",
        fires={'kvray_leases_expired_total{worker="p1",role="prefill"}': "0+1x60"},
        silent={'kvray_leases_expired_total{worker="p1",role="prefill"}': "0x20 4x60"},
        labels={"worker": "p1"},
    ),
    "KvrayBlocksStranded": Case(at="20m", fires=_stranded(0), silent=_stranded(1), labels={"worker": "d1"}),
    "KvrayQuarantineLarge": Case(
        at="20m",
        fires={f"kvray_blocks_quarantined{{{_D1}}}": "60x60", f"kvray_blocks{{{_D1}}}": "1000x60"},
        silent={f"kvray_blocks_quarantined{{{_D1}}}": "40x60", f"kvray_blocks{{{_D1}}}": "1000x60"},
        labels={"worker": "d1"},
    ),
    "KvrayMemoryGrowing": Case(
        at="8h",
        fires={'kvray_process_resident_memory_bytes{worker="r1",role="router"}': "1e9+5e6x600"},
        silent={'kvray_process_resident_memory_bytes{worker="r1",role="router"}': "1e8+3e5x600"},
        labels={"worker": "r1", "role": "router"},
    ),
    "KvrayLoadingDoesNotPay": Case(
        at="3h",
        fires={_MISSES % "slower_than_computing": "0+300x300", _PROMPT: "0+1000x300"},
        silent={_MISSES % "slower_than_computing": "0+100x300", _PROMPT: "0+1000x300"},
    ),
    "KvrayCacheTooSmall": Case(
        at="4h",
        fires={_MISSES % "evicted": "0+300x300", _PROMPT: "0+1000x300"},
        silent={_MISSES % "evicted": "0+100x300", _MISSES % "never_seen": "0+900x300", _PROMPT: "0+1000x300"},
    ),
}
