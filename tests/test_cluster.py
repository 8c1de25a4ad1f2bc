"""The cluster file is one that Ray accepts. If this fails, `ray up` fails after the machines have been paid for."""

from __future__ import annotations

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[1] / "ray_cluster.yaml"


def test_rays_own_schema_accepts_the_cluster_file() -> None:
    validate_config(prepare_config(yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))))


def test_no_port_is_opened_and_every_node_asks_for_the_token() -> None:
    cluster = yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))
    starts = [
        line
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in cluster[key]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line and "RAY_USAGE_STATS_ENABLED=0" in line for line in starts)
    assert "0.0.0.0" not in " ".join(starts)
