"""Programs of torch.export as teachers: the numbers of the module itself; nothing in a file is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import ANY, NAMES, Tiny, export, loaded, photographs, sidecar
from torch import Tensor, nn

from autolabel.manifests.samples import fingerprints, load_manifest
from autolabel.manifests.teachers import BadTeacher
from autolabel.teacher.checkpoints import fingerprint_tensor
from autolabel.teacher.networks.fields import Field

EXAMPLE = torch.rand(2, 3, 32, 48)


def scores(path: Path, images: Tensor) -> Tensor:
    """Scores of a file's model."""
    with torch.inference_mode():
        result = loaded(path).predict(images)
    return result.whole() if isinstance(result, Field) else result


class Around(nn.Module):
    """`Tiny` with something before and something behind it."""

    def __init__(self, before: Callable[[Tensor], Tensor], behind: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.net, self.before, self.behind = Tiny(), before, behind

    def forward(self, images: Tensor) -> Any:
        return self.behind(self.net(self.before(images)))


def same(x: Tensor) -> Tensor:
    return x


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`Tiny` for images of any size."""
    return sidecar(export(tmp_path_factory.mktemp("program") / "net.pt2", Tiny(), EXAMPLE, ANY))


def test_a_program_for_any_size_gives_the_modules_own_logits(program: Path) -> None:
    images = photographs(38, 66, images=3)
    with torch.inference_mode():
        expected = Tiny()(images / 255)
    model = loaded(program)
    assert (model.classes, model.gives, model.fixed_size, model.trained_on) == (NAMES, "logits", None, None)
    assert torch.allclose(scores(program, images), expected, rtol=0, atol=1e-6)
    assert torch.equal(scores(program, images)[1:2], scores(program, images[1:2]))


def test_mean_deviation_range_and_order_of_channels_are_those_of_the_sidecar(tmp_path: Path) -> None:
    images, mean, std = photographs(8, 8), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    path = export(tmp_path / "net.pt2", Tiny(), EXAMPLE, ANY)
    sidecar(path, range=(-1.0, 1.0), mean=mean, std=std, channels="bgr")
    numbers = (images / 255 * 2 - 1 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.inference_mode():
        assert torch.allclose(scores(path, images), Tiny()(numbers.flip(1)), rtol=0, atol=1e-6)
        sidecar(path, range=(0.0, 255.0))
        assert torch.allclose(scores(path, images), Tiny()(images.float()), rtol=0, atol=1e-4)


def test_a_program_of_one_size_and_batch_sees_images_resized_one_by_one(tmp_path: Path) -> None:
    path = sidecar(export(tmp_path / "net.pt2", Tiny(), EXAMPLE[:1]))
    images = photographs(50, 40)
    small = F.interpolate(images.float(), (32, 48), mode="bilinear", antialias=True)
    assert loaded(path).fixed_size == (32, 48)
    with torch.inference_mode():
        assert torch.allclose(scores(path, images), Tiny()(small / 255), rtol=0, atol=1e-6)


def test_a_fixed_batch_is_filled_up_with_its_last_image(tmp_path: Path) -> None:
    path = sidecar(export(tmp_path / "net.pt2", Tiny(), EXAMPLE))
    images = photographs(32, 48, images=3)
    with torch.inference_mode():
        assert torch.allclose(scores(path, images), Tiny()(images / 255), rtol=0, atol=1e-6)


def test_images_are_filled_up_to_a_multiple_that_program_or_sidecar_asks_for(tmp_path: Path) -> None:
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    path = sidecar(export(tmp_path / "net.pt2", Tiny(), EXAMPLE, {2: 4 * height, 3: 4 * width}), multiple=3)
    images = photographs(22, 37)
    with torch.inference_mode():
        full = F.interpolate(Tiny()(F.pad(images / 255, (0, 48 - 37, 0, 24 - 22))), (24, 48), mode="bilinear")
    assert torch.allclose(scores(path, images), full[..., :22, :37], rtol=0, atol=1e-5)


def test_channels_last_pixels_as_they_are_and_probabilities(tmp_path: Path) -> None:
    module = Around(lambda x: x.permute(0, 3, 1, 2) / 255, lambda x: x.softmax(dim=1).permute(0, 2, 3, 1)).eval()
    example = photographs(32, 48).permute(0, 2, 3, 1).contiguous()
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    path = export(tmp_path / "net.pt2", module, example, any_size)
    sidecar(path, range=None, dtype="uint8", layout="NHWC", gives="probabilities")
    images = photographs(20, 30)
    with torch.inference_mode():
        assert torch.allclose(scores(path, images), Tiny()(images / 255).softmax(dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", [False, True])
def test_class_ids_come_with_or_without_a_channel_at_any_stride(tmp_path: Path, keep: bool) -> None:
    path = export(tmp_path / "net.pt2", Around(same, lambda x: x.argmax(dim=1, keepdim=keep)).eval(), EXAMPLE, ANY)
    sidecar(path, gives="ids", multiple=4)
    images = photographs(12, 14)
    with torch.inference_mode():
        ids = Tiny()(F.pad(images / 255, (0, 2))).argmax(dim=1)
    assert torch.equal(scores(path, images), ids.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[..., :14])


def test_half_precision_in_and_out(tmp_path: Path) -> None:
    path = export(tmp_path / "net.pt2", Around(lambda x: x.float(), lambda x: x.half()).eval(), EXAMPLE.half(), ANY)
    images = photographs(16, 16)
    with torch.inference_mode():
        result = scores(sidecar(path, dtype="float16"), images)
        assert result.dtype == torch.float32 and torch.equal(result, Tiny()((images / 255).half().float()).half())


def test_one_of_several_outputs_is_named_by_key_or_place(tmp_path: Path) -> None:
    module = Around(same, lambda x: {"small": x[:, :2], "out": [x * 2, x]}).eval()
    path = sidecar(export(tmp_path / "net.pt2", module, EXAMPLE, ANY), output="out.1")
    images = photographs(16, 16)
    with torch.inference_mode():
        assert torch.allclose(scores(path, images), Tiny()(images / 255), rtol=0, atol=1e-6)
    with pytest.raises(BadTeacher, match=r"gives 3 tensors, small, out\.0, out\.1: name one in net\.toml, such as"):
        loaded(sidecar(path))
    with pytest.raises(BadTeacher, match=r'net\.toml, output = "aux": .*net\.pt2 gives 3 tensors'):
        loaded(sidecar(path, output="aux"))


def test_an_image_by_keyword_and_operators_under_no_grad_load(tmp_path: Path) -> None:
    class Named(Tiny):
        def forward(self, *, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
            with torch.no_grad():
                return super().forward(pixel_values)

    exported = torch.export.export(Named(), (), {"pixel_values": EXAMPLE}, dynamic_shapes={"pixel_values": ANY})
    torch.export.save(exported, tmp_path / "net.pt2")
    images = photographs(16, 16)
    with torch.inference_mode():
        assert torch.allclose(scores(sidecar(tmp_path / "net.pt2"), images), Tiny()(images / 255), rtol=0, atol=1e-6)


def test_what_it_was_trained_on_becomes_marks_for_the_leak_guard_when_asked(
    program: Path, city: Path, tmp_path: Path
) -> None:
    marks = fingerprint_tensor(fingerprints(load_manifest(city / "fine.parquet").samples))
    path = sidecar(shutil.copy(program, tmp_path / "net.pt2"), trained_on=str(city / "fine.parquet"))
    seen = loaded(path).trained_on
    assert seen is not None and torch.equal(seen, marks)
    model = loaded(sidecar(path, trained_on="gone.parquet"))
    with torch.inference_mode():
        assert torch.equal(model.predict(photographs(16, 16)), scores(program, photographs(16, 16)))  # type: ignore[arg-type]
    with pytest.raises(BadTeacher, match=r'net\.toml, trained_on = "gone\.parquet": '):
        _ = model.trained_on


@pytest.mark.parametrize(
    ("module", "values", "line"),
    [
        (Tiny(4), {}, r"net.pt2 takes images of 4 channels as NCHW \(2, 4, 32, 48\): expected 3, red, green and blue"),
        (Tiny(), {"classes": ("a",)}, r"gives mul \(2, 4, 16, 24\) of type float32, 4 classes: net.toml names 1"),
        (Tiny(), {"gives": "ids"}, 'of type float32: net.toml says gives = "ids", which are integers'),
        (Tiny(), {"size": (16, 16)}, r"net.pt2 takes images of 32 x 48: net.toml says \[16, 16\]"),
        (Tiny(), {"dtype": "float16"}, 'net.pt2 takes numbers of type float32: net.toml says dtype = "float16"'),
        (Around(same, lambda x: x.argmax(1)), {}, 'int64: net.toml says gives = "logits"; integers are gives = "ids"'),
        (
            Around(same, lambda x: x.mean(dim=1)),
            {},
            r"\(2, 16, 24\) .*: expected floating point numbers \(B, C, h, w\)",
        ),
        (
            Around(same, lambda x: F.dropout(x, 0.5)),
            {},
            r"draws random numbers \(aten.dropout.default\), as in training",
        ),
    ],
)
def test_a_program_that_its_sidecar_does_not_fit_gives_one_line(
    tmp_path: Path, module: nn.Module, values: dict[str, Any], line: str
) -> None:
    channels = 4 if "4 channels" in line else 3
    path = export(tmp_path / "net.pt2", module, torch.rand(2, channels, 32, 48))
    with pytest.raises(BadTeacher, match=line):
        loaded(sidecar(path, **values))


def test_a_program_that_trains_or_takes_more_than_an_image_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadTeacher, match=r"changes its own weights or statistics .* export it after module.eval\(\)"):
        loaded(sidecar(export(tmp_path / "net.pt2", Tiny().train(), EXAMPLE)))

    class Two(Tiny):
        def forward(self, images: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(images) * mask

    torch.export.save(torch.export.export(Two(), (EXAMPLE, torch.ones(1))), tmp_path / "two.pt2")
    with pytest.raises(BadTeacher, match=r"takes 2 tensors, images, mask: expected one input, the image"):
        loaded(sidecar(tmp_path / "two.pt2"))


def test_an_image_that_the_program_cannot_take_gives_one_line(tmp_path: Path) -> None:
    height = torch.export.Dim("height", min=16, max=64)
    path = sidecar(export(tmp_path / "net.pt2", Tiny(), EXAMPLE[..., :16], {2: height}), size=None)
    with pytest.raises(BadTeacher, match=r"net.pt2 takes images of any x 16: give net.toml a size = \[HEIGHT, WIDTH\]"):
        loaded(path)
    with pytest.raises(BadTeacher, match=r"cannot take images of 2 x 3 x 8 x 16: Expected input .* to be >= 16"):
        scores(sidecar(path, size=(8, 16)), photographs(8, 16))


# --- files that are none, and files that would execute something -----------------------------------------------------


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    path = sidecar(tmp_path / "net.pt2")
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(Tiny()), path)  # type: ignore[no-untyped-call]
    with pytest.raises(BadTeacher, match=r"is a program of TorchScript, not of torch.export.save: .* writes"):
        loaded(path)
    torch.save(Tiny().state_dict(), path)
    with pytest.raises(BadTeacher, match=r"is a checkpoint of torch.save, not of torch.export.save: call it .pt"):
        loaded(path)
    for data in (b"", b"\x08\x08", pickle.dumps(1)):
        path.write_bytes(data)
        with pytest.raises(BadTeacher, match=r"is no file of torch.export.save, or damaged"):
            loaded(path)


def test_a_file_that_was_cut_off_or_flipped_gives_one_line(program: Path, tmp_path: Path) -> None:
    data = program.read_bytes()
    path = sidecar(tmp_path / "net.pt2")
    for place in range(0, len(data), max(1, len(data) // 7)):
        path.write_bytes(data[:place])
        with pytest.raises(BadTeacher):
            loaded(path)
    for place in (data.index(b"weight_0") + 64, data.index(b"torch.ops.aten.relu") + 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(BadTeacher, match=r"is no file of torch.export.save, or damaged: Bad CRC-32"):
            loaded(path)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def rewritten(program: Path, path: Path, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> Path:
    """Write a program with another graph and other records."""
    with zipfile.ZipFile(program) as old:
        records = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    graph = json.loads(records.pop("models/model.json"))
    change(graph, records)
    with zipfile.ZipFile(path, "w") as new:
        for name, data in (records | {"models/model.json": json.dumps(graph).encode()}).items():
            new.writestr(f"net/{name}", data)
    return sidecar(path)


def nodes(graph: dict[str, Any]) -> Any:
    return graph["graph_module"]["graph"]["nodes"]


def test_pickles_guards_and_notes_of_a_file_are_never_read(program: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"

    def change(graph: dict[str, Any], records: dict[str, bytes]) -> None:
        records["data/sample_inputs/model.pt"] = pickle.dumps(Evil(mark))
        graph["guards_code"] = [f"__import__('os').mkdir({str(mark)!r})"]
        nodes(graph)[0]["metadata"]["source_fn_stack"] = "x,torch.os.system"

    images = photographs(16, 16)
    assert torch.equal(scores(rewritten(program, tmp_path / "net.pt2", change), images), scores(program, images))
    assert not mark.exists()


def pickled_weight(graph: dict[str, Any], records: dict[str, bytes]) -> None:
    name = "data/weights/model_weights_config.json"
    config = json.loads(records[name])
    config["config"]["stem.weight"]["use_pickle"] = True
    records[name] = json.dumps(config).encode()


def tree(graph: dict[str, Any], kind: str, context: str) -> None:
    leaf = {"type": None, "context": None, "children_spec": []}
    top = graph["graph_module"]["module_call_graph"][0]["signature"]
    top["out_spec"] = json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])


def rename(graph: dict[str, Any]) -> None:
    nodes(graph)[0]["name"] = "x = __import__('os').getpid(); y"


ENUM = json.dumps({"__enum__": True, "fqn": "os:x", "name": "y"})
FACTORY = json.dumps({"default_factory_module": "os", "default_factory_name": "x", "dict_context": ["out"]})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda g, r: nodes(g)[0].update(target="torch.os.system"), "uses torch.os.system: only operators of torch's"),
        (lambda g, r: nodes(g)[0].update(target="torch.hub.load"), "uses torch.hub.load: only operators of torch's"),
        (lambda g, r: nodes(g)[0].update(target="torch.ops.mine.go.default"), "uses torch.ops.mine.go.default: only"),
        (lambda g, r: nodes(g)[0].update(target="torch.ops.aten.from_file.default"), "none that reads or writes files"),
        (lambda g, r: nodes(g)[0].update(target="#mine:go"), "uses #mine:go: only operators of torch's aten"),
        (lambda g, r: rename(g), "holds a name that could be code"),
        (lambda g, r: tree(g, "collections.defaultdict", FACTORY), "gives or takes a collections.defaultdict"),
        (lambda g, r: tree(g, "builtins.list", ENUM), "holds a tree that could be code"),
        (lambda g, r: tree(g, "transformers.modeling_outputs.X", "[]"), "gives or takes a transformers.modeling_out"),
        (lambda g, r: g["range_constraints"].update({"__import__('os')": {}}), "holds a key that could be code"),
        (lambda g, r: pickled_weight(g, r), "holds a pickled object, weight_"),
        (lambda g, r: r.update({"data/weights/model.pt": b""}), "was written by torch 2.8 or older, with pickled weig"),
        (lambda g, r: r.update({"data/aotinductor/model/x.so": b""}), "is a compiled package of AOTInductor"),
        (lambda g, r: g["graph_module"]["graph"].update(custom_obj_values={"a": 1}), "holds an object of a class of"),
        (lambda g, r: g["graph_module"].pop("signature"), "is damaged: its graph lacks 'signature'"),
        (lambda g, r: nodes(g)[1].update(inputs=[]), "cannot load it: "),
    ],
)
def test_what_could_be_code_in_a_file_is_refused(
    program: Path, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, bytes]], None], line: str
) -> None:
    with pytest.raises(BadTeacher) as error:
        loaded(rewritten(program, tmp_path / "net.pt2", change))
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "size",
    ["__import__('os').getpid()", "s0.__class__", "Symbol('x y')", "9**9**9", "[s0 for s0 in (1,)]", "Integer('1')",
     "Max(s0, key=1)", "lambda: 1", "Pow(Integer(9), Integer(99))", "chr(111)", "f'{1}'", "s0 if s1 else s2"],
)  # fmt: skip
def test_a_symbolic_size_that_is_no_formula_is_refused(program: Path, tmp_path: Path, size: str) -> None:
    def change(graph: dict[str, Any], records: dict[str, bytes]) -> None:
        meta = graph["graph_module"]["graph"]["tensor_values"]["images"]
        meta["sizes"][2] = {"as_expr": {"expr_str": size, "hint": {"as_int": 32}}}

    with pytest.raises(BadTeacher, match="holds a size that could be code"):
        loaded(rewritten(program, tmp_path / "net.pt2", change))
