#!/usr/bin/env bash
# ray[serve] 2.60.0.
#
# The document that configures Serve (serveConfigV2 of a RayService, `serve deploy`, PUT /api/serve/applications/) is
# validated by ServeDeploySchema, whose models take keys that they do not have at nearly every level, and leave them out:
# a misspelt `route_prefix` serves under the default, a misspelt `max_replicas` or `label_selector` is not there. Only a few
# of its parts (logging_config, backpressure_config, controller_options) refuse them.
#
# Seen:
#   taken and left out: proxy_locaton, http_options/prot, applications/rout_prefix, deployments/max_ongoing_request, ray_actor_options/label_selecter, autoscaling_config/max_replica
#   refused: logging_config/log_lvel
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "ray[serve]==2.60.0"
cat > "$work/run.py" <<'P'
import copy
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema
DEPLOYMENT = {"name": "D", "ray_actor_options": {}, "autoscaling_config": {"min_replicas": 1}}
DOCUMENT = {"http_options": {}, "logging_config": {}, "applications": [{"import_path": "a:b", "deployments": [DEPLOYMENT]}]}
PLACES = {
    "proxy_locaton": lambda d: d,
    "http_options/prot": lambda d: d["http_options"],
    "applications/rout_prefix": lambda d: d["applications"][0],
    "deployments/max_ongoing_request": lambda d: d["applications"][0]["deployments"][0],
    "ray_actor_options/label_selecter": lambda d: d["applications"][0]["deployments"][0]["ray_actor_options"],
    "autoscaling_config/max_replica": lambda d: d["applications"][0]["deployments"][0]["autoscaling_config"],
    "logging_config/log_lvel": lambda d: d["logging_config"],
}
taken, refused = [], []
for name, place in PLACES.items():
    document = copy.deepcopy(DOCUMENT)
    place(document)[name.split("/")[-1]] = "EveryNode"
    try:
        ServeDeploySchema.model_validate(document)
        taken.append(name)
    except ValidationError:
        refused.append(name)
print("taken and left out:", ", ".join(taken))
print("refused:", ", ".join(refused))
assert refused == ["logging_config/log_lvel"], refused
P
"$work/venv/bin/python" "$work/run.py"
