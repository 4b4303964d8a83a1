"""vLLM's metrics (0.32), and how kvray says the same, for dashboards that are moved here."""

from __future__ import annotations

from typing import Final, NamedTuple


class Same(NamedTuple):
    """One metric of vLLM's in our words."""

    theirs: str  #: as it is scraped
    ours: str  #: a name, or an expression of PromQL; "": there is no such thing here
    remark: str = ""


SAME: Final = (
    Same(
        "vllm:num_requests_running", "kvray_sequences_running", "of a worker; `kvray_requests_running`: of an ingress"
    ),
    Same("vllm:num_requests_waiting", "kvray_sequences_waiting"),
    Same(
        "vllm:num_requests_waiting_by_reason", "kvray_sequences_waiting", "without the reason; `kvray explain` has it"
    ),
    Same("vllm:num_requests_kv_fetch_by_stage", "kvray_pulls_running", "pulls, whatever waits for them"),
    Same("vllm:kv_cache_usage_perc", "kvray_blocks_pinned / kvray_blocks", "what may be evicted counts as free"),
    Same("vllm:prefix_cache_queries_total", "sum without (source) (kvray_worker_prompt_tokens_total)", "in tokens"),
    Same("vllm:prefix_cache_hits_total", 'kvray_worker_prompt_tokens_total{source="device"}', "in tokens"),
    Same(
        "vllm:external_prefix_cache_queries_total",
        'sum without (source) (kvray_worker_prompt_tokens_total{source!="device"})',
        "in tokens",
    ),
    Same(
        "vllm:external_prefix_cache_hits_total",
        'sum without (source) (kvray_worker_prompt_tokens_total{source=~"peer|host|disk|remote"})',
        "in tokens",
    ),
    Same("vllm:prompt_tokens_total", "sum without (source) (kvray_prompt_tokens_total)"),
    Same(
        "vllm:prompt_tokens_by_source_total",
        "kvray_prompt_tokens_total",
        "`source`: device is local_cache_hit, computed is local_compute, peer, host, disk and remote are the rest",
    ),
    Same("vllm:prompt_tokens_cached_total", 'sum without (source) (kvray_prompt_tokens_total{source!="computed"})'),
    Same("vllm:prompt_tokens_cached_by_source_total", 'kvray_prompt_tokens_total{source!="computed"}', "peer is p2p"),
    Same("vllm:generation_tokens_total", "kvray_generation_tokens_total"),
    Same("vllm:num_preemptions_total", "kvray_preemptions_total"),
    Same("vllm:request_success_total", "kvray_choices_finished_total", "`reason` for `finished_reason`; errors, too"),
    Same("vllm:admission_rejections_total", 'kvray_choices_finished_total{reason="refused"}'),
    Same("vllm:time_to_first_token_seconds", "kvray_time_to_first_token_seconds", "of a request, once for all choices"),
    Same("vllm:inter_token_latency_seconds", "kvray_inter_token_latency_seconds", "between a choice's chunks"),
    Same("vllm:request_time_per_output_token_seconds", "kvray_request_time_per_output_token_seconds"),
    Same("vllm:e2e_request_latency_seconds", "kvray_request_latency_seconds", "of a request, once for all choices"),
    Same(
        "vllm:request_queue_time_seconds",
        "kvray_request_queue_time_seconds",
        'at its decode worker; `kvray_queue_seconds{role="prefill"}`: at prefill workers',
    ),
    Same(
        "vllm:request_prefill_time_seconds",
        "kvray_request_prefill_time_seconds",
        "a prefill worker's queue and the transfer included",
    ),
    Same("vllm:request_decode_time_seconds", "kvray_request_decode_time_seconds"),
    Same("vllm:request_inference_time_seconds", "kvray_request_inference_time_seconds"),
    Same("vllm:request_prompt_tokens", "kvray_request_prompt_tokens"),
    Same("vllm:request_generation_tokens", "kvray_request_generation_tokens"),
    Same(
        "vllm:request_prefill_kv_computed_tokens",
        'kvray_prompt_tokens_total{source="computed"}',
        "a counter, no histogram",
    ),
    Same("vllm:iteration_tokens_total", "kvray_steps_total", "steps without their sizes"),
    Same("vllm:nixl_bytes_transferred", "kvray_transfer_bytes_total", "by road; a counter"),
    Same("vllm:nixl_xfer_time_seconds", "kvray_transfer_seconds_total", "by road; a counter"),
    Same("vllm:nixl_num_failed_transfers_total", "kvray_transfers_failed_total", "by road"),
    Same("vllm:nixl_num_kv_expired_reqs_total", "kvray_leases_expired_total"),
    Same("vllm:kv_offload_store_bytes_total", "kvray_blocks_offloaded_total * kvray_block_bytes"),
    Same(
        "vllm:kv_offload_load_bytes_total",
        "kvray_transfer_bytes_total",
        "what comes from tiers and what comes from workers takes the same roads",
    ),
    Same("vllm:kv_block_lifetime_seconds", "", "evictions are counted by tier and reason: `kvray_evictions_total`"),
    Same("vllm:request_params_n", ""),
    Same("vllm:request_params_max_tokens", ""),
    Same("vllm:lora_requests_info", "", "no adapters are served"),
    Same("vllm:engine_sleep_state", "", "no worker sleeps"),
)
