"""The cluster files are ones that Ray and KubeRay accept. If this fails, `ray up` fails when machines are paid for."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from conftest import ROOT
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli

from autolabel.cli import main
from autolabel.manifests.locations import BucketPath, location

pytestmark = pytest.mark.thorough

Tree = dict[str, Any]

AWS, GCP, OWN = (ROOT / name for name in ("ray_cluster.yaml", "docs/ray_cluster_gcp.yaml", "docs/ray_cluster_own.yaml"))
CLUSTERS = pytest.mark.parametrize("path", [AWS, GCP, OWN], ids=lambda path: path.stem)
RAYJOB = ROOT / "docs" / "rayjob.yaml"
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def load(path: Path) -> Tree:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def parse(command: click.Command, words: list[str]) -> tuple[click.Command, click.Context]:
    """What a command line is understood as; nothing is run. Raises click.UsageError."""
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    return command, command.make_context(command.name, words)


# --- `ray up` ---------------------------------------------------------------------------------------------------------


@CLUSTERS
def test_rays_own_schema_accepts_the_cluster_file(path: Path) -> None:
    validate_config(prepare_config(load(path)))


def change(*place: str, to: Any) -> Callable[[Tree], None]:
    """Puts a value at a place of a tree; `...` takes the key away."""

    def apply(tree: Any) -> None:
        for key in place[:-1]:
            tree = tree[int(key) if isinstance(tree, list) else key]
        if to is ...:
            del tree[place[-1]]
        else:
            tree[place[-1]] = to

    return apply


TYPES, TEACHER = "available_node_types", ("available_node_types", "teacher")


@pytest.mark.parametrize(
    ("path", "breaks"),
    [
        *((path, change("max_wokers", to=8)) for path in (AWS, GCP, OWN)),
        *((path, change("cluster_name", to=7)) for path in (AWS, GCP, OWN)),
        *((path, change("idle_timeout_minutes", to="ten")) for path in (AWS, GCP, OWN)),
        *((path, change("auth", "ssh_usr", to="me")) for path in (AWS, GCP, OWN)),
        *((path, change(*TEACHER, "node_config", to=...)) for path in (AWS, GCP)),
        *((path, change(*TEACHER, "min_worker", to=1)) for path in (AWS, GCP)),
        *((path, change(*TEACHER, "resources", "GPU", to="one")) for path in (AWS, GCP)),
        *((path, change(*TEACHER, "min_workers", to=9)) for path in (AWS, GCP)),
        *((path, change("head_node_type", to="haed")) for path in (AWS, GCP)),
        *((path, change("max_workers", to="all")) for path in (AWS, GCP)),
        (AWS, change("head_node", to={"InstanceType": "m6i.xlarge"})),
        (OWN, change("provider", "head_ip", to=...)),
        (OWN, change("provider", "worker_ips", to=...)),
        (OWN, change(TYPES, to={"teacher": {"node_config": {}, "resources": {}}})),
    ],
)
def test_rays_own_schema_rejects_a_mistake(path: Path, breaks: Callable[[Tree], None]) -> None:
    cluster = load(path)
    breaks(cluster)
    with pytest.raises((jsonschema.ValidationError, ValueError, click.ClickException)):
        validate_config(prepare_config(cluster))


@CLUSTERS
def test_no_port_is_opened_and_every_node_asks_for_the_token(path: Path) -> None:
    cluster = load(path)
    (head,) = (line for line in cluster["head_start_ray_commands"] if "ray start" in line)
    (worker,) = (line for line in cluster["worker_start_ray_commands"] if "ray start" in line)
    for line in (head, worker):
        assert {"RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0"} <= set(line.split())
        _, asked = parse(ray_cli, shlex.split(line[line.index("ray start") :])[1:])  # no option is misspelt
        assert asked.params["dashboard_host"] == "127.0.0.1"
    assert "RAY_JOB_STOP_WAIT_TIME_S=120" in head.split()
    assert "0.0.0.0" not in path.read_text(encoding="utf-8")
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"]
    assert any(".bashrc" in line and "RAY_AUTH_MODE=token" in line for line in cluster["setup_commands"])


@CLUSTERS
def test_nodes_install_this_package_and_its_pinned_versions(path: Path) -> None:
    cluster = load(path)
    place = {remote: local for remote, local in cluster["file_mounts"].items() if "auth_token" not in remote}
    assert place == {"~/autolabel": "."}  # the folder of constraints.txt, where `ray up` is typed
    installs = [line for line in cluster["setup_commands"] if "pip install" in line]
    assert [shlex.split(line)[2:] for line in installs] == [
        ["--constraint", "~/autolabel/constraints.txt", "ray[default]", "$HOME/autolabel[buckets]"]
    ]


@pytest.mark.parametrize("path", [AWS, GCP], ids=lambda path: path.stem)
def test_a_cloud_labels_on_gpus_that_may_be_taken_back_and_not_on_the_head(path: Path) -> None:
    cluster = load(path)
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["teacher"]["resources"]["GPU"] == 1
    assert "SPOT" in str(types["teacher"]["node_config"]).upper()
    assert types["teacher"]["min_workers"] == 0  # nothing is paid for while nothing is asked


def test_the_head_among_own_machines_labels_nothing() -> None:
    line = next(line for line in load(OWN)["head_start_ray_commands"] if "ray start" in line)
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(line.split())


@pytest.mark.parametrize("path", [AWS, GCP, OWN, RAYJOB], ids=lambda path: path.stem)
def test_placeholders_of_the_cluster_file_are_marked(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    invented = re.compile(
        r"PROJECT|REGISTRY|ami-0|region:|_zone:|head_ip:|worker_ips:|s3://drive|ACCOUNT|export AWS_|name: AWS_"
    )
    places = [at for at, line in enumerate(lines) if invented.search(line) and not line.lstrip().startswith("# ")]
    assert places
    assert [lines[at] for at in places if "EDIT" not in lines[at] + lines[at - 1]] == []


@pytest.mark.parametrize("path", [AWS, GCP, OWN], ids=lambda path: path.stem)
def test_workers_know_the_bucket_and_no_secret_is_in_the_file(path: Path) -> None:
    cluster, text = load(path), path.read_text(encoding="utf-8")
    kept = [line for line in cluster["setup_commands"] if line.endswith("> ~/storage.env")]
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    if path != GCP:  # whose metadata server says everything
        assert len(kept) == 1
        assert all(line.startswith(". ~/storage.env; ") for line in starts if "ray start" in line)
    if path != OWN:  # a role of the machine in place of a key
        assert {AWS: "IamInstanceProfile", GCP: "serviceAccounts"}[path] in (
            cluster["available_node_types"]["teacher"]["node_config"]
        )
    assert not re.search(r"(KEY_ID|SECRET\w*|PASSWORD|TOKEN)=[^…]", text)


@pytest.mark.parametrize(("path", "cloud"), [(AWS, "aws"), (GCP, "gcp")])
def test_every_spot_node_tells_ray_of_its_notice(path: Path, cloud: str) -> None:
    *_, line = load(path)["worker_start_ray_commands"]
    assert f"sh ~/autolabel/docs/spot_notice.sh {cloud} <" in line and line.endswith("&")
    assert {"RAY_AUTH_MODE=token", "RAY_ADDRESS=$RAY_HEAD_IP:6379"} <= set(line.split())


# --- the notice of a cloud --------------------------------------------------------------------------------------------

NOTICES = {  # what the metadata server answers before and after the notice; None for 404
    "aws": {
        "PUT /latest/api/token": ("t0ken", "t0ken"),
        "GET /latest/meta-data/spot/instance-action": (None, '{"action": "terminate", "time": "2026-11-26T17:02:00Z"}'),
    },
    "gcp": {"GET /computeMetadata/v1/instance/preempted": ("FALSE", "TRUE")},
    "azure": {
        "GET /metadata/instance/compute/name?api-version=2021-02-01&format=text": ("node-1", "node-1"),
        "GET /metadata/scheduledevents?api-version=2020-07-01": (
            '{"Events":[{"EventType":"Preempt","Resources":["node-11"]},'
            '{"EventType":"Reboot","Resources":["node-1"]}]}',
            '{"Events":[{"EventType":"Preempt","Resources":["node-0","node-1"]}]}',
        ),
    },
}
HEADERS = {
    "aws": ("X-aws-ec2-metadata-token", "t0ken"),
    "gcp": ("Metadata-Flavor", "Google"),
    "azure": ("Metadata", "true"),
}


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("cloud", NOTICES)
def test_the_notice_of_a_cloud_becomes_a_drain(cloud: str, tmp_path: Path) -> None:
    answers, asked = NOTICES[cloud], Counter[str]()

    class Metadata(BaseHTTPRequestHandler):
        """Answers as the cloud does: nothing is announced when it is asked for the first time."""

        def do_GET(self) -> None:
            what = f"{self.command} {self.path}"
            name, value = HEADERS[cloud]
            allowed = self.headers.get(name) == value or self.command == "PUT"
            body = answers[what][min(asked[what], 1)] if allowed else None
            asked[what] += 1
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write((body or "").encode())

        do_PUT = do_GET

        def log_message(self, format: str, *words: object) -> None:
            pass

    told = tmp_path / "told"
    fake = tmp_path / "ray"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {told}\n')
    fake.chmod(0o755)
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {"METADATA_SERVER": f"http://127.0.0.1:{server.server_port}", "PAUSE": "0"}
        path = f"{tmp_path}:{os.environ['PATH']}"
        script = ROOT / "docs" / "spot_notice.sh"
        subprocess.run(["sh", script, cloud], env={**os.environ, **where, "PATH": path}, check=True, timeout=30)
        server.shutdown()
    assert set(asked.values()) == {2}
    words = told.read_text().splitlines()
    parse(ray_cli, [*words])
    assert words[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    assert words[-1] == ("110" if cloud == "aws" else "25")


def test_the_name_of_the_cloud_must_be_said() -> None:
    done = subprocess.run(["sh", ROOT / "docs" / "spot_notice.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "expected aws, gcp or azure\n")


# --- KubeRay ----------------------------------------------------------------------------------------------------------


def closed(required: str = "", **fields: Tree) -> Tree:
    """An object with these fields and no others."""
    return {
        "type": "object", "properties": fields, "required": required.split(), "additionalProperties": False
    }  # fmt: skip


def several(item: Tree) -> Tree:
    return {"type": "array", "items": item}


TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
AMOUNTS = {  # of cpu, memory, GPUs
    "type": "object",
    "additionalProperties": {"type": ["integer", "string"], "pattern": r"^\d+(\.\d+)?([KMGTPE]i?|[munk])?$"},
}
POD = closed(
    "spec",
    spec=closed(
        "containers",
        serviceAccountName=TEXT,
        terminationGracePeriodSeconds=COUNT,
        nodeSelector=TEXTS,
        tolerations=several(closed(key=TEXT, operator=TEXT, value=TEXT, effect=TEXT)),
        containers=several(
            closed(
                "name",
                name=TEXT,
                image=TEXT,
                env=several(closed("name", name=TEXT, value=TEXT)),
                resources=closed(limits=AMOUNTS, requests=AMOUNTS),
                lifecycle=closed(preStop=closed(exec=closed(command=several(TEXT)))),
                volumeMounts=several(closed("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)),
            )
        ),
        volumes=several(
            closed("name", name=TEXT, persistentVolumeClaim=closed("claimName", claimName=TEXT, readOnly=FLAG))
        ),
    ),
)
# The fields that docs/rayjob.yaml uses, as KubeRay 1.5.1, 1.6.2 and 1.7.0 know them. Their CRDs were compared; where
# KUBERAY_CRD names one (a release's ray.io_rayjobs.yaml), a test below validates against all of it.
RAYJOB_FIELDS = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed("name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}),
    spec=closed(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        backoffLimit=COUNT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=closed(
            "headGroupSpec rayVersion",
            rayVersion=TEXT,
            authOptions=closed("mode", mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=closed(idleTimeoutSeconds=COUNT),
            headGroupSpec=closed("template", rayStartParams=TEXTS, template=POD),
            workerGroupSpecs=several(
                closed(
                    "groupName minReplicas maxReplicas template",
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=TEXTS,
                    template=POD,
                )
            ),
        ),
    ),
)


def mistakes(job: Tree, schema: Tree = RAYJOB_FIELDS) -> list[str]:
    return [
        f"{found.json_path}: {found.message[:200]}" for found in jsonschema.Draft7Validator(schema).iter_errors(job)
    ]


def test_kuberay_knows_every_field_of_the_job() -> None:
    assert mistakes(load(RAYJOB)) == []


CLUSTER = ("spec", "rayClusterSpec")
HEAD = (*CLUSTER, "headGroupSpec", "template", "spec", "containers", "0")
WORKERS = (*CLUSTER, "workerGroupSpecs", "0")
BROKEN = [
    change("kind", to="RayJobs"),
    change("apiVersion", to="ray.io/v2"),
    change("spec", "entrypoint", to=["autolabel", "generate"]),
    change("spec", "backofLimit", to=2),
    change("spec", "backoffLimit", to="2"),
    change("spec", "shutdownAfterJobFinishes", to="yes"),
    change(*CLUSTER, "rayVersion", to=2.6),
    change(*CLUSTER, "authOptions", "mode", to="password"),
    change(*CLUSTER, "authOption", to={"mode": "token"}),
    change(*CLUSTER, "enableInTreeAutoscaling", to=1),
    change(*CLUSTER, "headGroupSpec", to=...),
    change(*CLUSTER, "headGroupSpec", "rayStartParams", "num-cpus", to=0),
    change(*WORKERS, "minReplicas", to=...),
    change(*WORKERS, "maxReplicas", to="8"),
    change(*WORKERS, "template", "terminationGracePeriodSeconds", to=120),
    change(*WORKERS, "template", "spec", "terminationGracePeriodSeconds", to="2m"),
    change(*HEAD, "env", to=[{"name": "RAY_USAGE_STATS_ENABLED", "value": 0}]),
    change(*HEAD, "resources", "limits", "memory", to="8 GB"),
    change(*HEAD, "volumeMounts", to=[{"name": "data"}]),
]


@pytest.mark.parametrize("breaks", BROKEN)
def test_rays_schema_reports_a_mistake_in_the_job(breaks: Callable[[Tree], None]) -> None:
    job = load(RAYJOB)
    breaks(job)
    assert mistakes(job) != []


def test_the_job_runs_a_command_of_ours_on_as_many_gpus_as_it_may_have() -> None:
    spec = load(RAYJOB)["spec"]
    command, asked = parse(main, shlex.split(spec["entrypoint"])[1:])
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (command.name, asked.params["device"]) == ("generate", "cuda")
    assert asked.params["workers"] == (1, workers["maxReplicas"])
    containers = workers["template"]["spec"]["containers"]
    assert [c["resources"]["limits"]["nvidia.com/gpu"] for c in containers] == ["1"]
    places = [asked.params["source"], *asked.params["teachers"], asked.params["out"]]
    assert all(isinstance(location(place), BucketPath) for place in places)


def test_the_job_is_private_quiet_and_of_the_tested_version() -> None:
    cluster = load(RAYJOB)["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in CONSTRAINTS.splitlines()
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        env = {entry["name"]: entry["value"] for entry in container["env"]}
        assert env["RAY_USAGE_STATS_ENABLED"] == "0"
        assert env.get("RAY_JOB_STOP_WAIT_TIME_S", "120") == str(pod["terminationGracePeriodSeconds"])
        assert pod["serviceAccountName"] == "autolabel" and not {"volumes", "volumeMounts"} & {*pod, *container}
    _, _, drain = container["lifecycle"]["preStop"]["exec"]["command"]
    parse(ray_cli, shlex.split(drain.partition(" && ")[0])[1:])


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON schema in which fields that are not listed are forbidden."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(part) for key, part in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD names no file of KubeRay's CRD for RayJobs")
def test_kuberays_own_schema_agrees() -> None:
    crd = yaml.load(
        Path(os.environ["KUBERAY_CRD"]).read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # every API object's; not the CRD's to describe
    job = load(RAYJOB)
    assert mistakes(job, schema) == []
    for breaks in BROKEN[2:]:  # kind and version are matched before the schema
        broken = copy.deepcopy(job)
        breaks(broken)
        assert mistakes(broken, schema) != []


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", sorted(set(re.findall(r"^(?:\w+=\S+ )*(ray [a-z][^#&\n]*)", PAGE, flags=re.MULTILINE)))
)
def test_ray_understands_what_the_page_types(line: str) -> None:
    """And where it carries a command of ours behind `--`, so do we. tests/test_readme.py has the lines without Ray."""
    words, _, ours = (part.strip() for part in line.partition(" -- "))
    parse(ray_cli, [*shlex.split(words)[1:], *(["--", *shlex.split(ours)] if ours else [])])
    if ours:
        assert shlex.split(ours)[0] == "autolabel"
        parse(main, shlex.split(ours)[1:])
