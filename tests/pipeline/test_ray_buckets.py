"""Workers on several nodes of Ray read images from a bucket and commit to it; any machine goes on with the run."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from buckets import place, upload
from conftest import labels_of, photograph, scanned
from ray.cluster_utils import Cluster

from autolabel.manifests import storage
from autolabel.manifests.locations import location
from autolabel.manifests.recipe import Machine
from autolabel.manifests.run.folder import Accounts, Run
from autolabel.manifests.samples import save_manifest
from autolabel.manifests.scan import scan
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.run import generate
from autolabel.pipeline.verify import verify

pytestmark = pytest.mark.slow

SMALL = {"object_store_memory": 80 * 2**20}


def test_nodes_of_ray_label_from_bucket_to_bucket_and_another_machine_goes_on(
    city: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph(city, tmp_path / "drive", [f"{n:02d}" for n in range(12)])
    local = LabelJob(scanned(city, tmp_path / "drive"), teacher, tmp_path / "run", scales=(1.0,), unit_size=2)
    generate(local)
    (tmp_path / "drive" / "teacher.pt").write_bytes(teacher.read_bytes())
    with place() as bucket:
        upload(tmp_path / "drive", bucket.url)
        root = location(bucket.url)
        space = Run.open(local.out).label_space
        save_manifest(root / "drive.parquet", scan(root, layout="folder", label_space=space)[0])
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL})
        try:
            for _ in range(2):  # raylets take their variables from here, and workers theirs from the raylets
                cluster.add_node(num_cpus=1, **SMALL)
            asked = LabelJob(
                root / "drive.parquet", root / "teacher.pt", root / "runs/auto", scales=(1.0,), unit_size=2,
                portion=Portion(limit=8), machine=Machine(workers=(2, 4), address=cluster.address),
            )  # fmt: skip
            assert generate(asked).accounts == Accounts(12, 8, 0, 4)
        finally:
            cluster.shutdown()
        assert len(set(Run.open(asked.out).statistics()["worker"].to_pylist())) == 2
        text = storage.read(asked.out / "run.json").decode()
        secret = bucket.environment()["AWS_SECRET_ACCESS_KEY"]
        assert not any(word in text for word in (platform.node(), str(tmp_path), os.getcwd(), secret))
        monkeypatch.chdir("/")
        monkeypatch.setattr(platform, "node", lambda: "another")
        rest = LabelJob(asked.manifest, asked.teacher, asked.out, scales=(1.0,), unit_size=2)
        result = generate(rest)
        assert (result.accounts, result.done) == (Accounts(12, 12, 0, 0), 4)
        assert not verify(asked.out).faults
        assert labels_of(asked.out) == labels_of(local.out)
