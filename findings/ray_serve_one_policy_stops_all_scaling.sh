#!/usr/bin/env bash
# ray 2.60.0, Serve.
#
# An autoscaling policy that raises stops the controller's round at its application: those that were deployed after it are
# neither scaled nor brought up any more, whatever is right with them, for as long as it is there. Its own status stays
# RUNNING; only the controller's log tells.
#
# Seen (an application whose policy always wants two replicas, deployed after one whose policy raises; then without it):
#   beside it, after 10 s: the first RUNNING, the other DEPLOYING
#   without it: RUNNING, 2 replicas
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "ray[serve]==2.60.0"
cat > "$work/policies.py" <<'P'
import os

FAILS = os.path.join(os.path.dirname(__file__), "fails")  # once it is there


def wants_two(context):
    return 2, {}


def raises(context):
    if os.path.exists(FAILS):
        raise ValueError("this policy's own fault")
    return 1, {}
P
cat > "$work/run.py" <<'P'
import pathlib
import time

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy


def application(policy):
    setting = AutoscalingConfig(
        min_replicas=1,
        max_replicas=2,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(policy_function=f"policies:{policy}"),
    )

    @serve.deployment(autoscaling_config=setting, ray_actor_options={"num_cpus": 0})
    class Nothing:
        pass

    return Nothing.bind()


def replicas(name):
    deployment = serve.status().applications[name].deployments.get("Nothing")
    return 0 if deployment is None else deployment.replica_states.get("RUNNING", 0)


ray.init(address="local", include_dashboard=False, num_cpus=2, logging_level="ERROR")
serve.start(proxy_location="Disabled")
serve.run(application("raises"), name="bad", route_prefix=None)
pathlib.Path("fails").touch()
good = serve.RunTarget(target=application("wants_two"), name="good", route_prefix=None)
serve.run_many([good], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
time.sleep(10)
beside = {name: str(one.status.value) for name, one in serve.status().applications.items()}
serve.delete("bad")
ends_s = time.monotonic() + 30
while replicas("good") != 2 and time.monotonic() < ends_s:
    time.sleep(0.2)
without = (str(serve.status().applications["good"].status.value), replicas("good"))
serve.delete("good")
print(f"beside it {beside}, without it {without}", flush=True)
assert beside == {"bad": "RUNNING", "good": "DEPLOYING"}
assert without == ("RUNNING", 2)
P
cd "$work"
env -u RAY_ADDRESS RAY_USAGE_STATS_ENABLED=0 PYTHONPATH="$work" "$work/venv/bin/python" "$work/run.py"
