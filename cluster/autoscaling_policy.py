"""The autoscaling policy as Ray Serve calls it, in its controller: from replicas' numbers to `cluster.autoscaling`.

Serve's controller calls a policy ten times a second, between all else that it does. What a policy raises, that it is
asynchronous, or that it answers NaN stops the controller's round there, at the cost of other applications, and only its
log says so (findings/ray_serve_one_policy_stops_all_scaling.sh): whatever happens here is caught, counted, and answered
with the present numbers.

    an application from a serveConfigV2   applications[].autoscaling_policy is `ApplicationPolicy`, which sees all of
                                          its deployments at once
    `kvray serve`, `serve run`            Serve takes no policy for an application from those: each deployment has
                                          a `DeploymentPolicy`, and those of an application decide as one

What is aimed at is told to the deployments' policies (cluster/app.py), and read there by the application's.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from cluster.autoscaling import Asked, Autoscaler, FleetSeen, RoleSeen, Targets, Wanted, WorkerSeen
from messages.scaling import RouterScaling, WorkerScaling

logger = logging.getLogger("ray.serve")  # the one that the controller writes to its log

ROLES: Final = {"Prefill": "prefill", "Decode": "decode"}  #: deployment -> role
ROUTER: Final = "Router"
PERIOD_S: Final = 1.0  #: between two decisions, and between two reports of a replica
LOOK_BACK_S: Final = 30.0  #: rates are those of so long
_STALE_S: Final = 15.0  #: what a replica told that long ago does not count any more
_GONE_S: Final = 5.0
_SAY_AGAIN_S: Final = 60.0

_Numbers = TypeVar("_Numbers", WorkerScaling, RouterScaling)
Series = list[tuple[float, float]]  #: (time, value), oldest first


class FleetScaler:
    """Decides for one application, from what Serve knows of its deployments. Never raises.

    Attributes:
        num_fallbacks: decisions that fell back to the present numbers, since the start.
    """

    def __init__(self) -> None:
        self._contexts: dict[str, Any] = {}  #: deployment -> what Serve told of it last
        self._autoscaler: Autoscaler | None = None
        self._wanted: dict[str, Wanted] = {}  #: by role
        self._decided_s = -math.inf
        self._said_s = -math.inf
        self._counter: Any = None
        self.num_fallbacks = 0

    def decide(self, contexts: Sequence[Any]) -> dict[str, int]:
        """Return the number of replicas by deployment, of those whose contexts these are."""
        present = {context.deployment_name: int(context.target_num_replicas) for context in contexts}
        try:
            self._take(contexts)
            now_s = time.monotonic()
            if now_s - self._decided_s >= PERIOD_S:
                self._decided_s = now_s
                self._decide(now_s)
            return {name: self._number(name, number) for name, number in present.items()}
        except Exception as error:  # noqa: BLE001 - the edge: what is raised here stops the scaling of everybody
            self._fall_back(error)
            return present

    def _take(self, contexts: Sequence[Any]) -> None:
        """Take in what Serve tells now, and forget deployments of which it told nothing for a while: they are gone."""
        since_s = max((context.current_time for context in contexts), default=0.0) - _GONE_S
        self._contexts = {name: known for name, known in self._contexts.items() if known.current_time >= since_s}
        self._contexts |= {context.deployment_name: context for context in contexts}

    def _decide(self, now_s: float) -> None:
        targets = targets_in(self._contexts.values())
        if self._autoscaler is None or self._autoscaler.targets != targets:  # the application was deployed anew
            self._autoscaler = Autoscaler(targets)
        wanted = self._autoscaler.decide(fleet_seen(self._contexts), now_s)
        for role, (number, why) in wanted.items():
            context = next(self._contexts[name] for name, of in ROLES.items() if of == role)
            if number != context.target_num_replicas:
                logger.info("kvray: %s workers %d -> %d: %s", role, context.target_num_replicas, number, why)
        self._wanted = wanted

    def _number(self, name: str, present: int) -> int:
        wanted = self._wanted.get(ROLES.get(name, ""))
        return present if wanted is None else int(wanted.number)

    def _fall_back(self, error: Exception) -> None:
        """Count a decision that fell back, and say why, now and then."""
        self.num_fallbacks += 1
        self._wanted = {}  # what was decided before is not gone back to
        try:
            if time.monotonic() - self._said_s >= _SAY_AGAIN_S:
                self._said_s = time.monotonic()
                logger.error("kvray: the numbers of workers stay: %s: %s", type(error).__name__, error)
            if self._counter is None:
                from ray.util.metrics import Counter

                self._counter = Counter(
                    "kvray_autoscaling_fallbacks_total",
                    "Scaling decisions that failed and left all numbers as they were.",
                )
            self._counter.inc()
        except Exception as unsaid:  # noqa: BLE001 - the edge, as above
            logger.debug("kvray: %s is not counted: %s", error, unsaid)


class ApplicationPolicy:
    """Serve's application-level policy: `applications[].autoscaling_policy.policy_function` of a serveConfigV2."""

    def __init__(self) -> None:
        self._scaler: FleetScaler | None = None

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Return the number of replicas by deployment id, and no state."""
        try:
            if self._scaler is None:
                self._scaler = _in_this_process().FleetScaler()
            numbers = self._scaler.decide(list(contexts.values()))
            return {key: numbers[context.deployment_name] for key, context in contexts.items()}, {}
        except Exception:  # the edge: what is raised here stops the scaling of everybody
            logger.exception("kvray: the numbers of workers stay")
            return {}, {}


class DeploymentPolicy:
    """Serve's policy of one deployment of an application; all of an application's decide as one."""

    def __init__(self, **targets: Any) -> None:
        """Aim at `targets`, the fields of `cluster.autoscaling.Targets`."""
        self._targets = targets

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, and no state."""
        try:
            scaler = _in_this_process().scaler_of(context.app_name)
            return scaler.decide([context])[context.deployment_name], {}
        except Exception:  # the edge, as above
            logger.exception("kvray: the number of workers stays")
            return int(context.target_num_replicas), {}


_scalers: dict[str, FleetScaler] = {}


def scaler_of(app_name: str) -> FleetScaler:
    """Return the one of that application in this process."""
    return _scalers.setdefault(app_name, FleetScaler())


def _in_this_process() -> Any:
    """Return this module as everybody finds it: Serve ships a policy by value, with a copy of what it stands in."""
    return importlib.import_module("cluster.autoscaling_policy")


# ------------------------------------------------------------------------------------------------- what Serve tells


def targets_in(contexts: Iterable[Any]) -> Targets:
    """Find what is aimed at in the settings of a deployment."""
    told = next(context.config.policy.policy_kwargs for context in contexts if context.config.policy.policy_kwargs)
    return Targets(**told)


def fleet_seen(contexts: Mapping[str, Any]) -> FleetSeen:
    """Return what Serve's contexts, by deployment, say of a fleet."""
    roles = {role: role_seen(contexts[name]) for name, role in ROLES.items() if name in contexts}
    asked = None
    if ROUTER in contexts:
        asked = next(iter(_told(contexts[ROUTER], RouterScaling, _asked)), None)
    return FleetSeen(prefill=roles.get("prefill"), decode=roles.get("decode"), asked=asked)


def role_seen(context: Any) -> RoleSeen:
    """Return what Serve's context of a deployment says of its workers."""
    return RoleSeen(
        num_wanted=int(context.target_num_replicas),
        num_there=int(context.current_num_replicas),
        least=int(context.capacity_adjusted_min_replicas),
        most=int(context.capacity_adjusted_max_replicas),
        workers=tuple(_told(context, WorkerScaling, _worker)),
    )


def rate(series: Series) -> float:
    """Return by how much a number that only grows grew in a second; 0 where that cannot be told."""
    if len(series) < 2:
        return 0.0
    (begin_s, first), (end_s, last) = series[0], series[-1]
    return max(0.0, last - first) / (end_s - begin_s) if end_s > begin_s else 0.0


def _told(context: Any, kind: type[_Numbers], read: Any) -> list[Any]:
    """Return what `read` makes of each running replica that told all of `kind` lately."""
    metrics = context.raw_metrics
    names = [field.name for field in msgspec.structs.fields(kind)]
    found = []
    for replica in context.running_replicas:
        series = {name: _pairs(metrics.get(name, {}).get(replica, ())) for name in names}
        if all(series.values()) and context.current_time - series[names[0]][-1][0] < _STALE_S:
            found.append(read(series))
    return found


def _pairs(series: Iterable[Any]) -> Series:
    """Return times and values; nothing where a value is no finite number: then it was not told."""
    pairs = [(point.timestamp, point.value) for point in series]
    return pairs if all(math.isfinite(value) for _, value in pairs) else []


def _worker(series: Mapping[str, Series]) -> WorkerSeen:
    def last(name: str) -> float:
        return float(series[name][-1][1])

    return WorkerSeen(
        queued_s=max(0.0, last("queued_s")),
        busy_share=min(1.0, rate(series["busy_s_total"])),
        num_waiting=max(0.0, last("num_waiting")),
        num_running=max(0.0, last("num_running")),
        max_num_seqs=max(1.0, last("max_num_seqs")),
        used_share=min(1.0, max(0.0, last("used_share"))),
        step_s=max(0.0, last("step_s")),
        step_fixed_s=max(0.0, last("step_fixed_s")),
    )


def _asked(series: Mapping[str, Series]) -> Asked:
    per_s = {name: rate(values) for name, values in series.items()}
    num, tokens = per_s["num_asked_total"], per_s["prompt_tokens_total"]
    return Asked(
        prefill_s_per_s=per_s["prefill_asked_s_total"],
        decode_s_per_s=per_s["decode_asked_s_total"],
        ttft_s=per_s["ttft_s_total"] / num if num else 0.0,
        hit_share=min(1.0, per_s["matched_tokens_total"] / tokens) if tokens else 0.0,
    )
