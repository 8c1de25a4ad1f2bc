"""A teacher in a bucket labels otherwise than the same one on a disk, or cannot be opened by its library."""

from __future__ import annotations

from pathlib import Path

import buckets
import pytest
import torch

from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.scenes import draw_scene
from autolabel.manifests.teachers import BadTeacher, TeacherName
from autolabel.teacher.checkpoints import save_checkpoint
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.networks.build import build

_CODE = """
import torch

class Teacher:
    classes = ("road", "sky")
    gives = "logits"

    def __init__(self, device):
        pass

    def predict(self, images):
        light = images.float().mean(dim=1, keepdim=True) / 255
        return torch.cat([light, 1 - light], dim=1)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["checkpoint", "folder of transformers", "python"])
def test_a_teacher_in_a_bucket_labels_as_on_a_disk(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "checkpoint":
        here, name = tmp_path / "net.pt", "net.pt"
        save_checkpoint(here, build("hrnet18s_plain", 19), arch="hrnet18s_plain", space=CITYSCAPES)
    elif kind == "python":
        (tmp_path / "mine.py").write_text(_CODE)
        here, name = tmp_path / "mine.py", "mine.py:Teacher"
    else:
        from small_transformers import save

        save(tmp_path / "net", "segformer", CITYSCAPES.names)
        here, name = tmp_path / "net", "net"
    image = draw_scene(0, height=96, width=192).image
    with buckets.place() as place:
        buckets.upload(tmp_path, f"{place.url}/teachers")
        local = TeacherName.of(f"{here}:Teacher" if kind == "python" else here)
        there = TeacherName.of(f"{place.url}/teachers/{name}")
        assert there.digest() == local.digest()
        assert there.places[0].kind == local.places[0].kind
        assert str(there).removeprefix("hf:") == f"{place.url}/teachers/{name}"
        found, expected = (load_teacher(name, device="cpu").logits(image, scales=(1.0,)) for name in (there, local))
        assert torch.equal(found, expected)
        with pytest.raises(BadTeacher, match=r"s3://.*/nothing.onnx does not exist"):
            load_teacher(f"{place.url}/nothing.onnx", device="cpu")
