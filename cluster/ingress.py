"""The Serve deployment that clients talk to: the OpenAI surface over a Dispatcher. Imports no torch."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.cache_api import add_cache
from cluster.caches import Caches
from cluster.canary import Canary
from cluster.config import KvrayConfig
from cluster.connections import http_server
from cluster.credentials import callers, cluster_secret
from cluster.dispatch import Dispatcher, DispatchOptions
from cluster.fleet import FleetWatch, ReplicaMetadata
from cluster.listener import take_listener
from cluster.openai.app import create_app
from cluster.openai.backend import GenerationDefaults, HttpLimits, ServedModel
from cluster.openai.constraints import PRETTY
from cluster.openai.metrics import HttpMetrics, tenant_labels
from cluster.openai.surface import Surface
from cluster.placement_page.endpoints import PlacementPage, add_placement_page
from cluster.prefixes import Prefixes
from cluster.ray_dashboard.letter_boxes import LetterBoxes, RayKeyValues
from cluster.route_api import add_routes
from cluster.route_log import RouteLog
from cluster.routes import Routes
from cluster.span_export import SpanExport
from cluster.span_recorder import SpanEdge, SpanRecorder
from cluster.status import fleet_status
from cluster.stored_responses import stored_responses
from kvcache.names import tenant_number
from messages.errors import WorkerError
from messages.fleet import Role, WorkerInfo
from text.json_file import read_json
from text.tokenizer import Tokenizer
from transport.channel import ChannelConfig

logger = logging.getLogger(__name__)

_ROLES: dict[str, Role] = {"Decode": "decode", "Prefill": "prefill"}  #: by deployment
_LAST_SPANS_S = 2.0  #: for spans that still wait when an ingress ends
_FLEET_TIMEOUT_S = 600.0  #: for the first decode worker: a large model loads for minutes


@serve.ingress(None)
class Ingress:
    """One replica of the HTTP surface."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: KvrayConfig,
        app_name: str,
        roles: list[str],
        inner: list[DeploymentHandle],
        listener: str | None,
        prepare: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Wait until a decode worker is there: what the model is, only a worker knows.

        `inner` ties the other deployments to this application; nothing is called on them. `listener` names a socket to
        accept requests from besides those that come through Serve. `prepare` is told this process's name.
        """
        self._config = config
        ingress_id = serve.get_replica_context().replica_id.unique_id
        with prepare(f"ingress-{ingress_id}"):
            await self._start(ingress_id, roles, app_name, listener)
        # What is there by now stays: no full collection looks at it again, which would hold the loop for 0.1 s.
        gc.collect()
        gc.freeze()

    async def _start(self, ingress_id: str, roles: list[str], app_name: str, listener: str | None) -> None:
        config = self._config
        if not config.http.access_log:
            logging.getLogger("cluster.access").setLevel(logging.WARNING)
        counts = config.observability.level == "on"
        self._log = RouteLog(config.observability.explained_requests, {}) if counts else None
        self._metrics = HttpMetrics(
            ingress_id,
            tenants=tenant_labels(
                {tenant_number(tenant.name): tenant.name for tenant in config.tenants.members},
                config.observability.tenant_metrics,
            ),
            is_counting=counts,
        )
        self._open_spans(ingress_id)
        self._dispatcher = Dispatcher(
            DispatchOptions(
                ingress_id=ingress_id,
                secret=cluster_secret(config.network.secret_file),
                channel=ChannelConfig(heartbeat_s=config.network.heartbeat_s, lost_after_s=config.network.lost_after_s),
                request_timeout_s=config.http.request_timeout_s,
                max_ttft_s=config.http.max_ttft_s,
                tells_stats=counts,
            ),
            self._metrics.values,
            self._log,
            self._spans,
        )
        if self._log is not None:
            canary = Canary(self._dispatcher, self._log.predicted_blocks)
            canary.start()
            self._dispatcher.count_with(canary.stats)
        self._responses = stored_responses(self._dispatcher, config.responses, ingress_id)
        self._has_worker = asyncio.Event()
        watch = FleetWatch(app_name)
        for deployment in roles:
            watch.start(deployment, functools.partial(self._on_workers, _ROLES[deployment]))
        watch.start("Router", self._on_routers)
        self._watch = watch
        model_dir = Path(config.model.path)
        self._tokenizer = Tokenizer.load(
            model_dir, chat_template=config.model.chat_template, rules=config.model.tokenizer_rules
        )
        async with asyncio.timeout(_FLEET_TIMEOUT_S):
            await self._has_worker.wait()
        info = next(info for info in self._dispatcher.fleet.values() if info.role == "decode")
        self._app = self._create_app(_served_model(config, model_dir, info, self._tokenizer))
        if config.observability.level == "on":
            self._letter_boxes = LetterBoxes(RayKeyValues(), self._app.router)
            self._letter_boxes.start()
        self._serving: asyncio.Task[None] | None = None
        if listener is not None:
            ended = self._metrics.connections_ended
            server = http_server(self._app, config.connections, lambda reason: ended.labels(reason).inc())
            self._serving = asyncio.create_task(server.serve(sockets=[take_listener(listener)]))

    def _open_spans(self, ingress_id: str) -> None:
        """Begin to send spans, if somebody wants them."""
        self._export: SpanExport | None = None
        self._spans: SpanRecorder | None = None
        endpoint = self._config.observability.otlp_endpoint
        if endpoint is not None:
            resource = {"service.name": "kvray", "service.version": package_version("kvray")}
            self._export = SpanExport(endpoint, {**resource, "service.instance.id": ingress_id})
            self._spans = SpanRecorder(self._export.put)

    def __del__(self) -> None:
        """Send the last spans: Serve calls this when the replica has drained, and nothing else."""
        if (export := getattr(self, "_export", None)) is not None:
            export.close(_LAST_SPANS_S)

    async def check_health(self) -> None:
        """Raise if this ingress hears nothing any more: Serve calls this every second, and then replaces it."""
        if self._serving is not None and self._serving.done():
            raise WorkerError("the HTTP server ended")

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the HTTP application; Serve calls this after the constructor."""
        return self._app

    def _create_app(self, model: ServedModel) -> FastAPI:
        http = self._config.http
        app = create_app(
            backend=self._dispatcher,
            model=model,
            tokenizer=self._tokenizer,
            version=package_version("kvray"),
            callers=callers(self._config),
            limits=HttpLimits(
                max_body_bytes=http.max_body_bytes,
                max_tokenize_bytes=http.max_tokenize_bytes,
                max_choices=http.max_choices,
                grammar_timeout_s=http.grammar_timeout_s,
                uses_priority=http.client_priority == "use",
                json_whitespace=PRETTY if http.json_layout == "pretty" else "",
                takes_chat_template=http.client_chat_template == "use",
            ),
            allowed_origins=http.allowed_origins,
            tool_parser=self._config.model.tool_parser,
            reasoning_parser=self._config.model.reasoning_parser,
            metrics=self._metrics,
            responses=self._responses,
            extend=self._add_more,
            **({"on_reply_id": self._log.name_reply} if self._log is not None else {}),
        )

        if self._spans is not None:
            app.add_middleware(SpanEdge, recorder=self._spans)

        @app.get("/status", summary="What is running where, for `kvray status`")
        async def status() -> dict[str, Any]:
            return await fleet_status(self._dispatcher, self._metrics.values())

        return app

    def _add_more(self, app: FastAPI, surface: Surface) -> None:
        caches = Caches(self._dispatcher)
        add_cache(app, surface, caches, Prefixes(self._dispatcher, caches))
        max_kept = self._config.observability.explained_requests
        add_routes(app, surface, Routes(self._dispatcher, self._log, surface.model.name, max_kept))
        observed = self._config.observability
        preview_chars = observed.prompt_preview_chars if observed.level == "on" else 0
        add_placement_page(app, PlacementPage(self._dispatcher, surface, preview_chars))

    def _on_workers(self, role: Role, replicas: ReplicaMetadata) -> None:
        infos = [msgspec.convert(metadata, WorkerInfo) for metadata in replicas.values()]
        self._dispatcher.set_workers(role, infos)
        if role == "decode" and infos:
            self._has_worker.set()

    def _on_routers(self, replicas: ReplicaMetadata) -> None:
        self._dispatcher.set_routers([str(metadata["address"]) for metadata in replicas.values()])


def _served_model(config: KvrayConfig, model_dir: Path, info: WorkerInfo, tokenizer: Tokenizer) -> ServedModel:
    generation = read_json(model_dir / "generation_config.json", is_optional=True)
    model_config = read_json(model_dir / "config.json")
    text_config = model_config.get("text_config") or model_config
    eos = generation.get("eos_token_id", text_config.get("eos_token_id"))
    eos_ids = [eos] if isinstance(eos, int) else [int(token) for token in eos or []]
    if tokenizer.eos_token_id is not None:
        eos_ids.append(tokenizer.eos_token_id)
    is_sampling = bool(generation.get("do_sample", True))
    return ServedModel(
        names=config.model.names,
        max_model_len=info.max_model_len,
        max_prompt_tokens=min(info.max_model_len - 1, info.num_blocks * info.block_size - 1),
        vocab_size=int(text_config["vocab_size"]),
        eos_token_ids=tuple(dict.fromkeys(eos_ids)),
        created_s=int(time.time()),
        defaults=GenerationDefaults(
            temperature=generation.get("temperature") if is_sampling else 0.0,
            top_p=generation.get("top_p"),
            top_k=generation.get("top_k"),
            min_p=generation.get("min_p"),
            repetition_penalty=generation.get("repetition_penalty"),
            max_new_tokens=generation.get("max_new_tokens"),
        ),
    )
