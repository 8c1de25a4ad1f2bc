"""A connection to Ray: to a cluster that is named, or to a private Ray on this machine.

Both rooms that use Ray connect through this file: labelling with several workers, and training with several workers.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autolabel.manifests import notes
from autolabel.manifests.locations import BucketPath
from autolabel.manifests.machine import cores
from autolabel.manifests.wording import counted

_A_LITTLE = 0.001  # of a GPU, for a question
_LONGEST = 36  # characters of a private folder: sockets lie up to 67 deeper, and their path may have 103


class ClusterFailed(RuntimeError):
    """Ray cannot be started or reached; the message says why, and how to do without."""


def cluster_address(address: str | None) -> str | None:
    """Return the address of the cluster to use: the given one, else $RAY_ADDRESS (set inside a Ray job), else None."""
    return address or os.environ.get("RAY_ADDRESS") or None


def require_gpus(workers: int, gpus: int) -> None:
    """Raise ValueError if this machine has fewer GPUs than workers; only a cluster could bring more."""
    if workers > gpus:
        fewer = f"--workers {gpus}, " if gpus else ""
        raise ValueError(
            f"workers {workers}: this machine has {counted(gpus, 'GPU')}, and each needs one; give {fewer}the --address"
            " of a cluster, or --device cpu"
        )


@contextlib.contextmanager
def ray_session(
    address: str | None, folder: Path, *, workers: int | None = None, otherwise: str = "--engine local"
) -> Iterator[Any]:
    """Connect to a cluster, or start a private Ray on this machine with room for `workers`; end it on leaving.

    A connection that this process has already is used, and stays. `folder` becomes the workers' first import path, so
    it must hold no Python files; where it lies in a bucket, an empty one takes its place. A private Ray has its sockets
    and logs in a folder that no other user may enter. `otherwise` is the option that does without Ray, for the message.
    Raises ClusterFailed.
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
    with contextlib.ExitStack() as private:
        if not address:
            settings |= {"include_dashboard": False, "object_store_memory": 128 * 2**20}
            settings["num_cpus"] = max(workers or 1, cores())
            # Ray opens the folder that it is given to everybody, so it gets one inside.
            settings["_temp_dir"] = f"{private.enter_context(_private_folder(otherwise))}/s"
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints errors of nodes on stdout
            try:
                if isinstance(folder, BucketPath):
                    folder = Path(private.enter_context(tempfile.TemporaryDirectory()))
                with contextlib.chdir(folder):
                    ray.init(**settings)
            except (Exception, SystemExit) as error:  # a node that does not come up is a bare Exception
                where = f"the Ray cluster at {address}" if address else "a local Ray"
                reason = " ".join(str(error).split()) or repr(error)
                raise ClusterFailed(f"cannot start or reach {where} ({reason}); without Ray: {otherwise}") from error
            try:
                yield ray
            finally:
                ray.shutdown()


def _private_folder(otherwise: str) -> tempfile.TemporaryDirectory[str]:
    """Make a folder for sockets and logs that only this user may enter. Raises ClusterFailed.

    It lies in $RAY_TMPDIR, else in the system's folder of temporary files ($TMPDIR), or in /tmp if that has a path too
    long for sockets. Ray's own choice, /tmp/ray, is open to every user of the machine.
    """
    named = os.environ.get("RAY_TMPDIR")
    places = [named] if named else [tempfile.gettempdir(), "/tmp"]
    name = len("/ray-12345678")
    short = [place for place in places if sys.platform == "win32" or len(str(Path(place).resolve())) + name <= _LONGEST]
    try:
        return tempfile.TemporaryDirectory(prefix="ray-", dir=short[0], ignore_cleanup_errors=True)
    except IndexError:  # no place is short enough
        reason = f"{places[0]} is too long for the path of a socket: expected at most {_LONGEST - name} characters"
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
    raise ClusterFailed(
        f"cannot start a local Ray ({reason}); name another folder in $RAY_TMPDIR; without Ray: {otherwise}"
    )


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


def is_connected() -> bool:
    """True if this process is connected to a Ray already."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def draining_nodes(ray: Any) -> set[str]:
    """Return the ids of nodes that will be taken back: announced with `ray drain-node`, by an autoscaler or Kubernetes.

    Ray has no public name for the question; Ray Train asks it like this.
    """
    ask = getattr(ray._private.state.state, "get_draining_nodes", None)
    return set(ask()) if ask else set()


def cluster_gpus(address: str | None, folder: Path) -> int:
    """Return the number of GPUs that a cluster has now."""
    with ray_session(address, folder) as ray:
        return int(ray.cluster_resources().get("GPU", 0))


def ask_gpus(
    address: str | None, folder: Path, *, question: Callable[[], dict[str, str]], patience: float = 900.0
) -> dict[str, str]:
    """Ask a GPU of each kind that a cluster has now, or the first one that it brings; return all answers together.

    question: a function that the nodes can import. patience: seconds, as long as an autoscaler may need. Raises
    ValueError with the words of a node that raised it, ClusterFailed if a GPU does not answer.
    """
    with ray_session(address, folder) as ray:
        kinds = {
            next((name for name in node["Resources"] if name.startswith("accelerator_type:")), "")
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("GPU")
        }
        remote, answers = ray.remote(question), dict[str, str]()
        asked = {}
        for kind in kinds or {""}:
            needs = {"num_cpus": 0, "num_gpus": _A_LITTLE, "resources": {kind: _A_LITTLE} if kind else {}}
            asked[remote.options(**needs).remote()] = kind.rpartition(":")[2] or "a GPU"
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=min(30, patience))
        if late:
            names = ", ".join(asked[reference] for reference in late)
            notes.tell(f"waiting for {names} of the cluster, to learn its precision; at most {patience / 60:.0f} min")
            ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=patience)
        if late:
            raise ClusterFailed(
                f"no answer in {patience / 60:.0f} min from {names} of the cluster, whose precision --precision auto"
                " takes: give --precision bfloat16, float16 or float32"
            )
        for reference in ready:
            try:
                answers |= ray.get(reference)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", error)
                words = " ".join(str(cause).split())
                if isinstance(cause, ValueError):
                    raise ValueError(f"{asked[reference]} of the cluster: {words}") from error
                raise ClusterFailed(f"{asked[reference]} of the cluster cannot be asked: {words}") from error
        return answers
