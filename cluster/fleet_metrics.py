"""The numbers of workers, routers and ingresses as Prometheus knows them: families with a help text and a type.

They count under names with labels, `name{label="value"}` (messages.fleet.Stats); this is the one place that takes them
apart. Names that end in _total are counters, in _bucket, _sum or _count parts of a histogram, all others gauges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client.core import Metric

#: By the name of the family; units are in the names.
HELP: Final = {
    "kvray_block_bytes": "Bytes of one KV block, all layers",
    "kvray_block_size_tokens": "Tokens of one KV block",
    "kvray_blocks": "KV blocks of the worker's pool",
    "kvray_blocks_allocated_total": "KV blocks given out to be written",
    "kvray_blocks_evicted_total": "KV blocks whose content made room",
    "kvray_blocks_free": "KV blocks that hold nothing or may be evicted",
    "kvray_blocks_hit_total": "KV blocks given out that held their content already",
    "kvray_blocks_lent_total": "KV blocks that were offered to workers which asked for them by name",
    "kvray_blocks_offloaded_total": "KV blocks that the worker wrote into the arena of its node's cache",
    "kvray_offloads_dropped_total": "Sequences whose blocks were not offered to the node's cache, as too many waited",
    "kvray_blocks_pinned": "KV blocks that a sequence, a pull or a lease holds",
    "kvray_blocks_published_total": "KV blocks that were made readable to decode workers",
    "kvray_blocks_quarantined": "KV blocks that late bytes of an aborted pull may still land in",
    "kvray_blocks_recomputed_total": "KV blocks that were computed because they did not arrive whole and verified",
    "kvray_blocks_rejected_total": "Pulled KV blocks that were not used, by what was wrong with them",
    "kvray_blocks_taken_in_total": "KV blocks that were pulled from others before a sequence that runs wanted them",
    "kvray_cache_blocks_adopted": "KV blocks that the node cache found in its arena when it started",
    "kvray_cache_blocks_held": "KV blocks in the pool or the arena that have a name",
    "kvray_cache_bookkeeping_bytes": "Bytes that the node cache keeps about its arena's blocks",
    "kvray_cache_checked_total": "KV blocks that were verified because somebody wanted it, by tier",
    "kvray_cache_cleared_total": "KV blocks that were dropped because somebody wanted it, by tier",
    "kvray_cache_damaged_total": "KV blocks that were verified and did not have their checksum, by tier",
    "kvray_cache_duplicates_total": "KV blocks that came to the node cache a second time at once",
    "kvray_cache_granted_total": "KV blocks that workers were granted room for",
    "kvray_cache_lost_total": "KV blocks that a store was to bring and did not, by tier",
    "kvray_cache_missed_total": "KV blocks that were asked for and that no tier brought",
    "kvray_cache_offered_total": "KV blocks that were offered to who asked, by the tier where they lay",
    "kvray_cache_read_total": "KV blocks that came from a store into the arena, by tier",
    "kvray_cache_refused_total": "KV blocks that workers were refused room for, as it holds what is worth more",
    "kvray_cache_seen_again_total": "KV blocks that workers wanted room for and had wanted before",
    "kvray_cache_store_failures_total": "Times that a store failed or did not answer, by tier",
    "kvray_cache_prefetched_total": "KV blocks that were read from a store for sequences that still waited",
    "kvray_cache_tenant_bytes": "Bytes of KV blocks of a tenant, uncompressed, by tier",
    "kvray_cache_tenant_quota_bytes": "Bytes that KV blocks of a tenant may take, by tier",
    "kvray_cache_without_room_total": "KV blocks that were not read from a store, as the arena had no room",
    "kvray_cache_written_down_total": "KV blocks that went from the arena to a store, by tier",
    "kvray_cache_written_total": "KV blocks that workers wrote into the arena",
    "kvray_decode_step_seconds": "Median time of a step that only decodes",
    "kvray_disk_blocks": "KV blocks on the node's disk",
    "kvray_disk_bytes": "Bytes of the files of the node's disk tier",
    "kvray_disk_capacity_bytes": "Bytes that the node's disk tier may take",
    "kvray_disk_copied_blocks_total": "KV blocks on disk that were copied on, as what lay beside them was worth less",
    "kvray_disk_damaged_blocks_total": "KV blocks on disk that did not have their checksum, and were dropped",
    "kvray_disk_errors_total": "Errors of the node's disk",
    "kvray_disk_evicted_blocks_total": "KV blocks on disk that made room",
    "kvray_disk_lost_blocks_total": "KV blocks on disk that were lost with their file",
    "kvray_disk_read_blocks_total": "KV blocks that were read from disk",
    "kvray_disk_timeouts_total": "Calls that the node's disk did not answer in time",
    "kvray_disk_unusable_files": "Files in the directory of the disk tier that are nothing for this model",
    "kvray_disk_written_blocks_total": "KV blocks that were written to disk",
    "kvray_generated_tokens_total": "Tokens that the worker sampled",
    "kvray_leases": "Questions for KV whose blocks are held for who asked",
    "kvray_leases_expired_total": "Leases that ended because nobody renewed them",
    "kvray_preemptions_total": "Sequences whose blocks were taken for more senior ones",
    "kvray_prefill_prompts_total": "Prompts that decode workers asked for",
    "kvray_prefill_refused_total": "Prompts that a prefill worker refused or was lost with",
    "kvray_prefill_tokens_per_second": "Measured speed of prefill",
    "kvray_process_cpu_seconds_total": "Processor time of the worker's process",
    "kvray_pulls_failed_total": "Pulls of KV blocks that failed over every road",
    "kvray_pulls_running": "Pulls of KV blocks in progress",
    "kvray_queued_seconds": "Predicted time until all sequences decode, as the worker tells the router",
    "kvray_queued_tokens": "Tokens to be computed before all sequences decode",
    "kvray_remote_fallbacks_total": "Prompts that were computed here because no prefill worker's KV came",
    "kvray_remote_bytes": "Bytes of the KV blocks in the remote store as they lie there, compressed or plain",
    "kvray_remote_blocks": "KV blocks that are known to lie in the remote store",
    "kvray_remote_damaged_blocks_total": "KV blocks in the remote store that did not have their checksum",
    "kvray_remote_damaged_manifests_total": "Manifests in the remote store that could not be read",
    "kvray_remote_errors_total": "Errors of the remote store",
    "kvray_remote_is_readable": "Whether the remote store is in the plan for reads: 1 or 0",
    "kvray_remote_is_writable": "Whether the remote store is in the plan for writes: 1 or 0",
    "kvray_remote_manifests": "Manifests in the remote store that are known",
    "kvray_remote_missing_blocks_total": "KV blocks that were not where a manifest of the remote store says",
    "kvray_remote_plain_bytes": "Bytes of the KV blocks in the remote store as they are served",
    "kvray_remote_objects": "Objects in the remote store that hold blocks",
    "kvray_remote_read_blocks_total": "KV blocks that were read from the remote store",
    "kvray_remote_read_bytes_total": "Bytes of KV blocks that were read from the remote store, as they are served",
    "kvray_remote_read_stored_bytes_total": "Bytes of those that were read, as they lie there",
    "kvray_remote_removed_blocks_total": "KV blocks that were removed from the remote store",
    "kvray_remote_timeouts_total": "Calls that the remote store did not answer in time",
    "kvray_remote_unknown_codec_blocks_total": "KV blocks in the remote store that are compressed in an unknown way",
    "kvray_remote_unusable_folders": "Folders of the remote store that are nothing for this model",
    "kvray_remote_written_blocks_total": "KV blocks that were written to the remote store",
    "kvray_remote_written_bytes_total": "Bytes of KV blocks that were written to the remote store, as they are served",
    "kvray_remote_written_stored_bytes_total": "Bytes of those that were written, as they lie there",
    "kvray_requests_moved_total": "Times that a request was placed anew because its worker was lost or failed it",
    "kvray_requests_placed_total": "Placements of requests by who chose: the router, or rendezvous hashing without it",
    "kvray_road_bytes_per_second": "Measured speed of the road from a peer",
    "kvray_router_declined_total": "Prompts that were placed with prefill and computed by the decode worker after all",
    "kvray_router_forgotten_total": "Requests whose end nobody told the router, and no worker reported any more",
    "kvray_router_index_full_total": "Times that the index could tell no more holders apart, and a worker was left out",
    "kvray_router_gaps_total": "Gaps in what workers reported, each healed by a snapshot",
    "kvray_router_index_names": "Block names that the router knows",
    "kvray_router_kept_share": "Share of a worker's memory that holds blocks which nobody else keeps",
    "kvray_router_matched_tokens_total": "Prompt tokens, of those placed, that the chosen workers held",
    "kvray_router_placed_total": "Placements, of a decode worker alone or of a pair",
    "kvray_router_prompt_tokens_total": "Prompt tokens that the router placed, of the first prompt of each request",
    "kvray_router_refused_total": "Requests that the router refused, by the error",
    "kvray_router_warmed_blocks_total": "KV blocks that workers were asked to take in as they joined",
    "kvray_router_requests": "Requests that were placed and have not ended",
    "kvray_router_reservations": "Placements that their workers have not reported yet",
    "kvray_router_workers": "Workers that the router hears",
    "kvray_router_workers_out_of_step": "Workers whose snapshot the router waits for",
    "kvray_sequences_running": "Sequences in prefill or decode",
    "kvray_sequences_waiting": "Sequences that wait to be admitted",
    "kvray_spare_blocks_evicted_total": "KV blocks whose content made room and lies elsewhere",
    "kvray_step_seconds_total": "Time spent in steps",
    "kvray_steps_total": "Steps",
    "kvray_streams": "Sequences that the decode worker answers",
    "kvray_transfer_bytes_total": "Bytes pulled, by road",
    "kvray_transfer_seconds_total": "Time in which something was pulled, by road",
    "kvray_transfers_failed_total": "Transfers that failed, by road",
    "kvray_worker_prompt_tokens_total": "Prompt tokens by where their KV came from: pool, peer, tier, or computed",
}
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')
_PART_OF_HISTOGRAM: Final = re.compile("(.*)_(bucket|sum|count)")


def labels_of(text: str) -> dict[str, str]:
    """Return the labels in a name with labels."""
    return dict(_LABEL.findall(text))


def families(sources: Iterable[tuple[Mapping[str, str], Mapping[str, float]]]) -> list[Metric]:
    """Gather what `sources` count into families.

    Args:
        sources: for each the labels that all of its numbers get, and the numbers by name with labels.

    Returns:
        One family for each name; one whose name is not in HELP says only that.
    """
    found: dict[str, Metric] = {}
    for common, values in sources:
        for full_name, value in values.items():
            name, _, text = full_name.partition("{")
            part = _PART_OF_HISTOGRAM.fullmatch(name)
            kind = "histogram" if part else "counter" if name.endswith("_total") else "gauge"
            family_name = part[1] if part else name.removesuffix("_total")
            family = found.setdefault(family_name, Metric(family_name, HELP.get(name, "Not described"), kind))
            family.add_sample(name, {**common, **labels_of(text)}, value)
    return list(found.values())
