"""A Ray cluster that is there: which one, whether it lets us in, and at which niceness it would run workers."""

from __future__ import annotations

import logging
import socket
from typing import Any, Final

from cluster.config import named_ray_address, ray_auth_mode, ray_token, recorded_ray_address, use_ray_token
from messages.errors import ConfigError

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S: Final = 3.0  #: for a Ray head to take a connection
_ANSWER_TIMEOUT_S: Final = 10.0  #: for it to answer, and for a node to run a task while workers start on it
_CHECK_ALIVE: Final = "/ray.rpc.NodeInfoGcsService/CheckAlive"


def cluster_to_join() -> str | None:
    """Return the address of the Ray cluster that is there, host:port; None: start one.

    Raises:
        ConfigError: the operator names a cluster that does not answer.
    """
    named = named_ray_address()
    if named == "local":
        return None
    address = named or recorded_ray_address()
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S):
            return address
    except (OSError, ValueError, OverflowError) as error:
        if named is not None:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"RAY_ADDRESS: no Ray cluster answers at {address}: {reason}") from None
        logger.debug("the cluster that `ray start` recorded at %s is gone: %s", address, error)
        return None


def check_credentials(address: str) -> None:
    """Have Ray's token sent if the cluster at `address` wants one; call it before Ray is imported.

    Ray itself turns authentication on where a token file lies, for an address that it found, and never for one that it
    was given; and it tells of a wrong choice after 20 s, without the word token. So the cluster is asked.

    Raises:
        ConfigError: the cluster wants a token that is not there, is another one, or was forbidden.
    """
    if not _wants_token(address, ""):
        return
    if ray_auth_mode() == "disabled":
        raise ConfigError(f"the Ray cluster at {address} wants a token: RAY_AUTH_MODE=disabled forbids one, unset it")
    found = ray_token()
    if found is None:
        raise ConfigError(
            f"the Ray cluster at {address} wants a token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the one that it "
            "was started with"
        )
    source, token = found
    if _wants_token(address, token):
        raise ConfigError(f"the Ray cluster at {address} wants another token than the one in {source}")
    use_ray_token()


def _wants_token(address: str, token: str) -> bool:
    """Tell whether the cluster refuses whoever shows `token` ("" for none)."""
    import grpc

    shown = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(_CHECK_ALIVE)(b"", timeout=_ANSWER_TIMEOUT_S, metadata=shown)
        except grpc.RpcError as error:
            # Anything else, TLS for one, is for Ray to get along with.
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


class NicenessCheck:
    """Asks every node of a joined cluster at which niceness its workers run: the raylet's environment decides that."""

    def __init__(self, ray: Any) -> None:
        """Ask, and do not wait: Ray is connected, and starts a process per node for the answer."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        def niceness() -> int:
            import os

            return os.nice(0)

        self._ray = ray
        self._answers = {
            ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))(
                niceness
            ).remote(): node["NodeManagerAddress"]
            for node in ray.nodes()
            if node["Alive"]
        }

    def warn(self) -> None:
        """Log a warning where workers are not run at 0; a node that does not answer in time is passed over."""
        answered, _ = self._ray.wait(
            list(self._answers), num_returns=len(self._answers), timeout=_ANSWER_TIMEOUT_S, fetch_local=False
        )
        for answer in answered:
            try:
                niceness = self._ray.get(answer, timeout=_ANSWER_TIMEOUT_S)
            except self._ray.exceptions.RayError as error:
                logger.debug("niceness of %s: %s", self._answers[answer], error)
                continue
            if niceness > 0:
                logger.warning(
                    "Ray on %s runs workers at niceness %d, behind everything else on that machine: start it with "
                    "RAY_worker_niceness=0 in its environment",
                    self._answers[answer],
                    niceness,
                )
