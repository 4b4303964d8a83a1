"""The policy as Serve calls it: whatever comes, it answers whole numbers, at once, and raises nothing."""

import inspect
import math
import time
from types import SimpleNamespace

import msgspec
import pytest
from ray.serve._private.autoscaling_state import ApplicationAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID, ReplicaMetricReport, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster import autoscaling_policy
from cluster.app import build
from cluster.autoscaling import Targets
from cluster.autoscaling_policy import ApplicationPolicy, DeploymentPolicy, FleetScaler, fleet_seen, rate
from messages.scaling import RouterScaling, WorkerScaling, finite

KWARGS = {"ttft_s": 2.0, "itl_s": 0.05, "grow_after_s": 0.0, "shrink_after_s": 60.0, "keeps_kv": True}
NOW_S = 1000.0
LOADED = WorkerScaling(
    queued_s=50.0, busy_s_total=20.0, num_waiting=9, num_running=4, max_num_seqs=4, used_share=0.5, step_s=0.01
)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time goes on by two seconds with each look at it."""
    times = iter(range(1, 10**6))
    monkeypatch.setattr(autoscaling_policy, "time", SimpleNamespace(monotonic=lambda: 2.0 * next(times)))
    monkeypatch.setattr(autoscaling_policy, "_scalers", {})


def context(name: str, told: dict[str, float], number: int = 1, **changes: object) -> SimpleNamespace:
    """What Serve tells of a deployment whose replicas all told the same, twice."""
    replicas = [f"{name}#{i}" for i in range(number)]
    first = SimpleNamespace(timestamp=NOW_S - 10.0, value=0.0)
    metrics = {
        key: {replica: [first, SimpleNamespace(timestamp=NOW_S, value=value)] for replica in replicas}
        for key, value in told.items()
    }
    return SimpleNamespace(
        **{
            "deployment_name": name,
            "app_name": "kvray",
            "current_num_replicas": number,
            "target_num_replicas": number,
            "running_replicas": replicas,
            "capacity_adjusted_min_replicas": 1,
            "capacity_adjusted_max_replicas": 4,
            "raw_metrics": metrics,
            "current_time": NOW_S,
            "config": SimpleNamespace(policy=SimpleNamespace(policy_kwargs=KWARGS)),
            **changes,
        }
    )


def fleet(**changes: object) -> dict[str, SimpleNamespace]:
    loaded = finite(LOADED)
    return {
        "p": context("Prefill", loaded, **changes),
        "d": context("Decode", loaded, **changes),
        "r": context("Router", finite(RouterScaling(**dict.fromkeys(RouterScaling.__struct_fields__, 5.0)))),
    }


def test_an_applications_policy_grows_what_is_loaded_and_leaves_the_router():
    policy = ApplicationPolicy()
    policy(fleet())
    numbers, state = policy(fleet())
    assert numbers == {"p": 2, "d": 2, "r": 1}
    assert state == {}


def test_deployments_policies_decide_as_one():
    policies = {key: DeploymentPolicy(**KWARGS) for key in "pdr"}
    for _ in range(6):
        numbers = {key: policies[key](of)[0] for key, of in fleet().items()}
    assert numbers == {"p": 2, "d": 2, "r": 1}
    assert len(autoscaling_policy._scalers) == 1


BROKEN = {
    "numbers that are none": {"capacity_adjusted_max_replicas": "many"},
    "no settings": {"config": None},
    "no metrics": {"raw_metrics": None},
    "metrics that raise": {"raw_metrics": property(lambda self: 1 / 0)},
    "no replicas": {"running_replicas": None},
    "a target without a time": {"current_time": None},
    "most is no number": {"capacity_adjusted_max_replicas": math.nan},
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_leaves_all_numbers_and_is_counted(changes):
    policy = ApplicationPolicy()
    for _ in range(3):
        numbers, _ = policy(fleet(target_num_replicas=3, **changes))
    assert numbers == {"p": 3, "d": 3, "r": 1}
    assert policy._scaler is not None
    assert policy._scaler.num_fallbacks == 3
    assert DeploymentPolicy(**KWARGS)(fleet(target_num_replicas=3, **changes)["d"]) == (3, {})


@pytest.mark.parametrize("contexts", [None, 7, {"d": None}, {}])
def test_contexts_that_are_none_change_nothing(contexts):
    assert ApplicationPolicy()(contexts) == ({}, {})


def test_numbers_that_are_not_finite_are_as_if_they_were_not_told():
    told = finite(LOADED) | {"queued_s": math.nan}
    seen = fleet_seen({"Prefill": context("Prefill", told)})
    assert seen.prefill is not None
    assert seen.prefill.workers == ()
    policy = ApplicationPolicy()
    for _ in range(5):
        numbers, _ = policy({"p": context("Prefill", told, 3)})
    assert numbers == {"p": 3}, "nobody is taken for idle"


def test_what_was_told_long_ago_does_not_count():
    seen = fleet_seen({"Decode": context("Decode", finite(LOADED), current_time=NOW_S + 60.0)})
    assert seen.decode is not None
    assert seen.decode.workers == ()


def test_rates_are_those_of_the_look_back():
    assert rate([(0.0, 5.0), (10.0, 25.0)]) == 2.0
    assert rate([(0.0, 5.0)]) == rate([]) == rate([(1.0, 0.0), (1.0, 9.0)]) == 0.0
    seen = fleet_seen({"Prefill": context("Prefill", finite(LOADED))})
    assert seen.prefill is not None
    assert seen.prefill.workers[0].busy_share == 1.0, "20 s in 10, at most all of them"


def test_a_deployment_that_is_gone_is_forgotten():
    scaler = FleetScaler()
    scaler.decide(list(fleet().values()))
    later = context("Decode", finite(LOADED), current_time=NOW_S + 100.0)
    scaler.decide([later])
    assert set(scaler._contexts) == {"Decode"}


def test_new_settings_begin_anew():
    scaler = FleetScaler()
    scaler.decide(list(fleet().values()))
    before = scaler._autoscaler
    changed = SimpleNamespace(policy=SimpleNamespace(policy_kwargs=KWARGS | {"ttft_s": 9.0}))
    scaler.decide(list(fleet(config=changed).values()))
    assert scaler._autoscaler is not before


def test_policies_are_not_asynchronous():
    assert not inspect.iscoroutinefunction(ApplicationPolicy.__call__)
    assert not inspect.iscoroutinefunction(DeploymentPolicy.__call__)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "x"])
def test_replicas_leave_out_what_is_no_finite_number(value):
    told = finite(msgspec.structs.replace(LOADED, queued_s=value))
    assert "queued_s" not in told
    assert all(isinstance(one, float) and math.isfinite(one) for one in told.values())


# ------------------------------------------------------------------------------------------------------- Serve's own


def deployed(document: dict) -> dict[str, AutoscalingConfig | None]:
    """What Serve is told of each deployment."""
    found = {}
    waiting = [build(document)]
    while waiting:
        bound = waiting.pop()._bound_deployment
        found[bound.name] = bound._deployment_config.autoscaling_config
        for one in bound.init_args:
            waiting += [
                inner for inner in (one if isinstance(one, list) else [one]) if hasattr(inner, "_bound_deployment")
            ]
    return found


def test_off_by_default():
    assert set(deployed({}).values()) == {None}


def test_settings_reach_serve():
    told = deployed({"autoscaling": {"max_prefill": 4, "itl_ms": 30}, "pools": {"prefill": 2, "decode": 3}})
    assert told["Ingress"] is None
    limits = {name: (one.min_replicas, one.max_replicas) for name, one in told.items() if one is not None}
    assert limits == {"Prefill": (2, 4), "Decode": (3, 3), "Router": (1, 1)}
    prefill = told["Prefill"]
    assert prefill is not None
    assert Targets(**prefill.policy.policy_kwargs).itl_s == 0.03
    assert (prefill.upscale_delay_s, prefill.downscale_delay_s) == (0.0, 0.0)


def test_serves_own_state_machine_takes_the_applications_policy():
    """The controller's class itself, with the policy as it comes out of a pickle there."""
    state = ApplicationAutoscalingState("kvray")
    state.register(AutoscalingPolicy(policy_function="cluster.autoscaling_policy:ApplicationPolicy"))
    present = {}
    for name, setting in deployed({"autoscaling": {"max_prefill": 3, "max_decode": 3, "grow_after_s": 0}}).items():
        if setting is None:
            continue
        key = DeploymentID(name=name, app_name="kvray")
        config = SimpleNamespace(autoscaling_config=setting, gang_scheduling_config=None)
        info = SimpleNamespace(
            deployment_config=config,
            target_capacity=None,
            target_capacity_direction=None,
            config_changed=lambda _: True,
        )
        present[key] = state.register_deployment(key, info, 1)
        replica = ReplicaID("a", deployment_id=key)
        state.update_running_replica_ids(key, [replica])
        if name != "Router":
            now_s = time.time()
            metrics = {
                named: [TimeStampedValue(now_s - 5.0, 0.0), TimeStampedValue(now_s, value)]
                for named, value in finite(LOADED).items()
            }
            state.record_request_metrics_for_replica(ReplicaMetricReport(replica, metrics, now_s))
    for _ in range(3):
        decided = state.get_decision_num_replicas(present)
    assert {key.name: number for key, number in decided.items()} == {"Prefill": 2, "Decode": 2, "Router": 1}
