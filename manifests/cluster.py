"""A connection to Ray: to a cluster that is named, or to a private Ray on this machine.

Both rooms that use Ray connect through this file: labelling with several workers, and training with several workers.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autolabel.manifests.machine import cores


class ClusterFailed(RuntimeError):
    """Ray cannot be started or reached; the message says why, and how to do without."""


def cluster_address(address: str | None) -> str | None:
    """Return the address of the cluster to use: the given one, else $RAY_ADDRESS (set inside a Ray job), else None."""
    return address or os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def ray_session(
    address: str | None, folder: Path, *, workers: int | None = None, otherwise: str = "--engine local"
) -> Iterator[Any]:
    """Connect to a cluster, or start a private Ray on this machine with room for `workers`; end it on leaving.

    A connection that this process has already is used, and stays. `folder` becomes the workers' first import path, so
    it must hold no Python files. `otherwise` is the option that does without Ray, for the message. Raises
    ClusterFailed.
    """
    connected = sys.modules.get("ray")
    if connected is None or not connected.is_initialized():
        connected, address = None, cluster_address(address)
    if address and address != "auto":
        _require_listener(address)
    if connected is not None:
        own = connected.get_runtime_context().gcs_address
        if address not in (None, "auto", own):
            raise ClusterFailed(f"this process is connected to the Ray at {own}, not to {address}: use a new process")
        yield connected
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine needs more than the usual 30
    if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        if not address:
            # Ray's ports listen on every interface, even for a private session; only this process knows the token.
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        elif _has_token():
            os.environ["RAY_AUTH_MODE"] = "token"
    import ray

    settings: dict[str, Any] = {"address": address or "local", "logging_level": "ERROR", "log_to_driver": False}
    if not address:
        settings |= {"include_dashboard": False, "object_store_memory": 128 * 2**20}
        settings["num_cpus"] = max(workers or 1, cores())
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints errors of nodes on stdout
        try:
            with contextlib.chdir(folder):
                ray.init(**settings)
        except (ConnectionError, RuntimeError, ValueError, SystemExit) as error:
            where = f"the Ray cluster at {address}" if address else "a local Ray"
            raise ClusterFailed(f"cannot start or reach {where} ({error}); without Ray: {otherwise}") from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return "RAY_AUTH_TOKEN" in os.environ or path.is_file()


def _require_listener(address: str) -> None:
    """Raise ClusterFailed if nothing listens there; Ray itself would try for a minute and then end the process."""
    if address.startswith("ray://"):
        raise ClusterFailed(
            f"{address} is a Ray Client address, which is not supported: use `ray job submit`, or run on a node of the"
            " cluster with --address auto"
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ClusterFailed(
            f"nobody listens at {address} ({error}): expected HOST:PORT of a running Ray cluster; leave out --address,"
            " and unset RAY_ADDRESS, for a private Ray on this machine"
        ) from error


def cluster_gpus(address: str, folder: Path) -> int:
    """Return the number of GPUs that a cluster has now."""
    with ray_session(address, folder) as ray:
        return int(ray.cluster_resources().get("GPU", 0))
