"""Device and precision of a run are settled where it will be computed, and what is not there is refused at once.

No GPU is needed: torch and the cluster are asked through functions that these tests stand in for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.settings import build_job
from autolabel.pipeline import prepare
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.prepare import Request, settle
from autolabel.pipeline.progress import Meter
from autolabel.pipeline.run import choose_engine
from autolabel.pipeline.units import Tally

H100, A100, T4 = {"NVIDIA H100": "bfloat16"}, {"NVIDIA A100": "bfloat16"}, {"Tesla T4": "float32"}
CLUSTER = {"address": "10.0.0.1:6379"}


@pytest.fixture
def settled(city: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Request]:
    """A function that settles a job; `here` and `there` are the GPUs of this machine and of the cluster."""

    def make(*, here: dict[str, str] | None = None, there: dict[str, str] | None = None, **settings: Any) -> Request:
        gpus = list(here or {})
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(
            prepare, "pick_precision",
            lambda name, device: name if name != "auto" else (here or {}).get(
                gpus[torch.device(device).index or 0], "float32"
            ) if device.startswith("cuda") else "float32",
        )  # fmt: skip
        monkeypatch.setattr(prepare, "gpu_precisions", lambda: here)
        monkeypatch.setattr(prepare, "cluster_gpus", lambda address, folder: len(there or {}))
        monkeypatch.setattr(prepare, "ask_gpus", lambda address, folder, question: there)
        paths = {"manifest": city / "coarse.parquet", "teacher": tmp_path / "t.pt", "out": tmp_path / "run"}
        return settle(build_job(LabelJob, {**paths, **settings}), "0" * 64, tmp_path)[0]

    return make


def test_a_clusters_precision_is_that_of_its_gpus_and_not_of_the_drivers_machine(
    settled: Callable[..., Request],
) -> None:
    for here in ({}, T4):
        recipe = settled(here=here, there=H100 | A100, **CLUSTER).recipe
        assert (recipe.device, recipe.precision) == ("cuda", "bfloat16")
    assert settled(there=T4, **CLUSTER).recipe.precision == "float32"
    recipe = settled(here=H100, **CLUSTER).recipe
    assert (recipe.device, recipe.precision) == ("cpu", "float32")


def test_gpus_that_differ_are_refused_unless_a_precision_is_named(settled: Callable[..., Request]) -> None:
    for settings in ({"there": H100 | T4, **CLUSTER}, {"here": H100 | T4}):
        with pytest.raises(ValueError, match=r"^the GPUs differ .*\(NVIDIA H100: bfloat16, Tesla T4: float32\)"):
            settled(**settings)
        assert settled(**settings, precision="float16").recipe.precision == "float16"
    assert settled(here=T4 | H100, engine="local").recipe.precision == "float32"  # the first one is used


def test_one_gpu_of_several_is_named_and_the_recipe_keeps_its_kind(settled: Callable[..., Request]) -> None:
    request = settled(here=T4 | H100, device="cuda:1")
    assert (request.device, request.recipe.device, request.recipe.precision) == ("cuda:1", "cuda", "bfloat16")
    assert choose_engine(request)[0] == "local"


@pytest.mark.parametrize(
    ("gpus", "settings", "message"),
    [
        (0, {"device": "cuda"}, "device 'cuda' was asked for, but torch finds no GPU here: use cpu"),
        (2, {"device": "cuda:7"}, "device 'cuda:7' was asked for, but torch finds 2 GPUs here: use cuda:0 to cuda:1"),
        (1, {"device": "mps"}, "device 'mps' was asked for, but torch finds no GPU of Apple here: use cpu"),
        (1, {"device": "xpu"}, "device 'xpu': expected auto, cpu, cuda, cuda:N or mps"),
        (
            2, {"device": "cuda:1", "engine": "ray"},
            "device 'cuda:1': it is one GPU, and Ray gives each worker its own: give --device cuda, or leave out"
            " --engine ray, --workers and --address",
        ),
        (
            1, {"device": "mps", "workers": 2},
            "device 'mps': it is one GPU, and Ray gives each worker its own: give --device cuda, or leave out"
            " --engine ray, --workers and --address",
        ),
        (
            2, {"workers": 3},
            "workers 3: this machine has 2 GPUs, and each needs one; give --workers 2, the --address of a cluster, or"
            " --device cpu",
        ),
        (
            1, {"workers": 2, "engine": "ray"},
            "workers 2: this machine has 1 GPU, and each needs one; give --workers 1, the --address of a cluster, or"
            " --device cpu",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_there_is_refused_in_one_line_before_any_work(
    settled: Callable[..., Request], gpus: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        choose_engine(settled(here={f"GPU {n}": "bfloat16" for n in range(gpus)}, **settings))
    assert str(refusal.value) == message


def test_a_local_run_says_which_of_several_gpus_labels(settled: Callable[..., Request]) -> None:
    tail = " of 2 GPUs does all the work; --engine ray uses all of them, --device cuda:N another"
    assert choose_engine(settled(here=T4 | H100, engine="local")) == ("local", f"cuda:0{tail}")
    assert choose_engine(settled(here=T4 | H100, device="cuda:1")) == ("local", f"cuda:1{tail}")
    assert choose_engine(settled(here=H100, engine="local")) == ("local", "")


def test_a_second_kind_of_gpu_in_a_run_is_told_once(tmp_path: Path) -> None:
    def budget(device: str) -> dict[str, Any]:
        return {"device": device, "precision": "bfloat16", "bytes_per_pixel": 9.0}

    said: list[str] = []
    for earlier in ([], [budget("NVIDIA H100")]):
        said.clear()
        meter = Meter(
            RunFolder(tmp_path), (), asked=9, wanted=9, before=Tally(), on_note=said.append, budgets=earlier
        )  # fmt: skip
        for device in ("NVIDIA H100", "NVIDIA H100", "NVIDIA A100", "NVIDIA H100", "NVIDIA A100"):
            meter.budget(budget(device))
        assert said == [
            "NVIDIA A100 labels a run that NVIDIA H100 has labelled too, both in bfloat16: kernels of two kinds of GPU"
            " round differently, so rare pixels may differ"
        ]
    assert [one["device"] for one in meter.budgets] == ["NVIDIA H100", "NVIDIA A100"]
