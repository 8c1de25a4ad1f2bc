"""Networks are compiled for images of any size, and nothing falls back where that fails.

If this fails, compiled labels mix with others, or torch compiles for every size of image anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import autolabel, labels_of, refused
from formula import network_by_formula, picture
from torch import Tensor

from autolabel.manifests.run.folder import Run
from autolabel.teacher import compiled
from autolabel.teacher.compiled import CompilationFailed, compile_network
from autolabel.teacher.fold import fold_batch_norm
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.networks.build import ARCHITECTURES, build
from autolabel.teacher.networks.combine import ScaleOutput
from autolabel.teacher.networks.decoders import SegmentationNet

ALONE = [str(network) for network in ARCHITECTURES.values() if not network.combination]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for each test, and nothing that another has compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    torch._dynamo.reset()  # type: ignore[no-untyped-call]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Torch follows a network and leaves it as it is, which takes no C++ compiler; the list has what it followed."""
    graphs: list[Any] = []

    def follow(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "backend", lambda: follow)
    monkeypatch.setattr(compiled, "_require_compiler", lambda device: None)
    monkeypatch.setattr(compiled, "_FIRST", (64, 96))
    return graphs


def without_content(arch: str) -> SegmentationNet:
    with torch.device("meta"):
        return build(arch, 5).eval()


def require_one_program_for_all_sizes(network: SegmentationNet, *, multiple: int = 1) -> None:
    programs: list[Any] = []

    def follow(graph: Any, inputs: Any) -> Any:
        programs.append(graph)
        return graph.forward

    run = torch.compile(network.predict, dynamic=True, fullgraph=True, backend=follow)
    with torch.inference_mode():
        for height, width in ((64, 96), (67, 133), (128, 90)):
            images = torch.empty(
                1, 3, -(-height // multiple) * multiple, -(-width // multiple) * multiple, device="meta"
            )
            found, expected = run(images), network.predict(images)
            assert found.logits.shape == expected.logits.shape
            assert found.features.shape == expected.features.shape
    assert len(programs) == 1


@pytest.mark.thorough
def test_the_small_trunk_is_compiled_once_for_all_sizes() -> None:
    require_one_program_for_all_sizes(without_content("efficientnet_lite0_plain"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ALONE)
def test_every_network_is_compiled_once_for_all_sizes(arch: str) -> None:
    """Combinations of scales lie outside what is compiled, so that each trunk with each decoder is all there is."""
    require_one_program_for_all_sizes(without_content(arch))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["timm:mobilenetv3_small_050/plain", "smp:Unet/resnet18"])
def test_networks_of_other_libraries_are_compiled_once_for_all_sizes(arch: str) -> None:
    network = without_content(arch)
    require_one_program_for_all_sizes(network, multiple=network.multiple)


@pytest.mark.slow
def test_compiled_kernels_give_nearly_the_logits_of_others() -> None:
    network = network_by_formula("efficientnet_lite0_plain", 5)
    fold_batch_norm(network)
    image = picture(90, 140)
    with torch.inference_mode():
        expected = network.logits(image, (0.5, 1.0))
        compile_network(network, "float32", device="cpu", subject="net")
        found = network.logits(image, (0.5, 1.0))
    assert 0 < float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def generated(out: Path, drive: Path, teacher: Path, *more: str) -> tuple[str, ...]:
    run = ("generate", str(drive), "--teacher", str(teacher), "--out", str(out), "--engine", "local")
    return *run, "--scales", "0.5,1", "--store", "png", "--limit", "2", *more


def test_a_run_is_compiled_or_not_from_its_beginning(
    city: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def compile_nothing(network: SegmentationNet, precision: str, *, device: str, subject: str) -> None:
        asked.append((precision, device))

    monkeypatch.setattr(compiled, "compile_network", compile_nothing)
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        assert not asked
        result = autolabel(*generated(tmp_path / name, city / "coarse.parquet", teacher, *more))
        assert result.exit_code == 0, result.output
        assert Run.open(tmp_path / name).recipe.compile == bool(more)
    assert set(asked) == {("float32", "cpu")}
    assert labels_of(tmp_path / "plain") == labels_of(tmp_path / "compiled")
    line = refused(*generated(tmp_path / "plain", city / "coarse.parquet", teacher, "--compile"))
    assert "(compile was false, now true)" in line


def test_nothing_is_written_where_nothing_can_be_compiled(
    city: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "g++-of-nobody"))
    line = refused(*generated(tmp_path / "run", city / "coarse.parquet", teacher, "--compile"))
    assert line == (
        "--compile needs a C++ compiler on a CPU, and there is no g++-of-nobody: install one, or name it in CXX"
    )
    assert not (tmp_path / "run").exists()


def test_a_size_that_cannot_be_compiled_ends_the_call_and_costs_no_image(
    city: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_for_large(network: SegmentationNet, precision: str, *, device: str, subject: str) -> None:
        eager = network.predict

        def predict(images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
            if images.shape[-1] < 128:  # an image of the city at scale 0.5; what memory is measured with is larger
                raise CompilationFailed(f"{subject} cannot be compiled for images of 96 x 48")
            return eager(images, context=context)

        network.predict = predict  # type: ignore[method-assign]

    monkeypatch.setattr(compiled, "compile_network", compile_for_large)
    line = refused(*generated(tmp_path / "run", city / "coarse.parquet", teacher, "--compile"))
    assert line == f"{teacher} cannot be compiled for images of 96 x 48"
    assert not list((tmp_path / "run" / "units").glob("*.parquet"))


@pytest.mark.thorough
def test_kernels_that_cannot_be_built_are_told_in_one_line(traced: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(compiled, "backend", lambda: fail)
    network = network_by_formula("efficientnet_lite0_plain", 5)
    with pytest.raises(CompilationFailed) as caught:
        compile_network(network, "float32", device="cpu", subject="net")
    assert str(caught.value) == (
        "net cannot be compiled for images of 96 x 64 on cpu (RuntimeError: no such kernel): leave out --compile, for a"
        " run of its own"
    )


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(CompilationFailed, match=r"^compiled code cannot be kept in .*: name another folder in TORCH"):
        compiled.keep_compiled_code(torch.device("cpu"))


def test_code_of_another_torch_or_cpu_lies_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = torch.cpu.get_capabilities()

    def folder() -> Path:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        return compiled.keep_compiled_code(torch.device("cpu"))

    first = folder()
    assert first == folder() and first.parent == tmp_path / "cache" / "autolabel" / "compiled"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: here | {"amx_bf16": not here.get("amx_bf16")})
    other = folder()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert len({first, other, folder()}) == 3


def test_torch_that_is_told_not_to_compile_is_refused(traced: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    network = network_by_formula("efficientnet_lite0_plain", 5)
    with pytest.raises(CompilationFailed, match=r"^net was not compiled: torch is told not to, as by TORCH_COMPILE"):
        compile_network(network, "float32", device="cpu", subject="net")


def test_models_of_other_libraries_are_not_compiled(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^--compile: .*net.onnx is no checkpoint of ours, and only those are compiled"
    ):
        load_teacher(tmp_path / "net.onnx", compile=True)
