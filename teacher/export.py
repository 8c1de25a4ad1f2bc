"""A checkpoint as one file that other programs run: `.onnx` for onnxruntime, TensorRT and others, `.pt2` for torch.

The file takes RGB images as they are, (B, 3, H, W) uint8, and gives scores at the size of the image: normalising,
resizing for every scale and the attention between scales are inside, batch norms are folded. It is written only after
it has given what the checkpoint gives, see `agreement`. Beside it come the files that make it a teacher, see `sidecar`:
NAME.toml, and for a checkpoint that knows its training images NAME.seen.txt.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from autolabel.manifests import storage
from autolabel.manifests.label_space import BUILT_IN, LabelSpace, load_label_space
from autolabel.manifests.policy import check_scales
from autolabel.manifests.run.place import require_outside_runs
from autolabel.manifests.teachers import CHECKPOINT, TeacherPlace
from autolabel.manifests.wording import Progress, Shown, kind_and_reason
from autolabel.manifests.wording import size as in_bytes
from autolabel.teacher.agreement import (
    CLASSES,
    GROUPS,
    LOGITS,
    ONNX,
    OUTPUTS,
    PT2,
    Agreement,
    BadExport,
    compare,
    runner,
)
from autolabel.teacher.checkpoints import Checkpoint, load_network, read_checkpoint
from autolabel.teacher.feed import Normaliser
from autolabel.teacher.fold import fold_batch_norm
from autolabel.teacher.foreign.sidecar import GIVES, Sidecar, sidecar_of, write_sidecar
from autolabel.teacher.loading import load_teacher
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.networks.fields import Size

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_SMALLEST = 33  # pixels of an open side at the smallest scale: a map of one row would count as a constant
_LARGEST = 1 << 13
_FINEST = 64  # largest denominator of a scale, where height and width are open: others round as floats do
_MARK = "Written by `autolabel export-model`"


@dataclass(frozen=True)
class Exported(Shown):
    """A file that was written, and how far it agrees with its checkpoint.

    files: the file, then those beside it. bytes: of the file. size: None for any from `least` pixels a side on.
    gives: one of OUTPUTS. classes: how many. scales: those inside it.
    """

    files: tuple[Path, ...]
    bytes: int
    size: Size | None
    least: int
    gives: str
    classes: int
    scales: tuple[float, ...]
    agreement: Agreement

    def lines(self) -> list[str]:
        """The file's inputs and outputs, the check, and the names of all files."""
        size = f"{self.size[0]} x {self.size[1]}" if self.size else f"any height and width from {self.least} on"
        given = "its class (uint8)" if self.gives == CLASSES else f"{self.classes} {self.gives} (float32)"
        return [
            f"takes RGB images (uint8) of {size}, looks at scales {','.join(f'{s:g}' for s in self.scales)},"
            f" gives each pixel {given}",
            self.agreement.line(self.gives),
            f"wrote {self.files[0]} ({in_bytes(self.bytes)}), {', '.join(map(str, self.files[1:]))}",
        ]


class ForwardPass(nn.Module):
    """The exported program: RGB images (B, 3, H, W) uint8 -> scores (B, C, H, W) float32, or ids (B, H, W) uint8."""

    full: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, network: SegmentationNet, scales: Sequence[float], gives: str) -> None:
        super().__init__()
        self.network, self.scales, self.gives = network, tuple(scales), gives
        normalise = Normaliser(torch.device("cpu"))
        for name in ("full", "mean", "std"):
            self.register_buffer(name, getattr(normalise, name))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network.logits((images.float() / self.full - self.mean) / self.std, self.scales)
        if self.gives == LOGITS:
            return logits
        return logits.argmax(dim=1).to(torch.uint8) if self.gives == CLASSES else logits.softmax(dim=1)


def export_model(
    checkpoint: Path,
    output: Path,
    *,
    size: Size | None = None,
    batch: int | None = None,
    scales: Sequence[float] | None = None,
    gives: str = LOGITS,
    label_space: LabelSpace | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a checkpoint as `.onnx` or `.pt2`, with its sidecar, after comparing the two on images.

    size, batch: the only height and width, and number of images, that the file will take; None leaves them open.
    scales: None takes those of the network's training. gives: one of OUTPUTS. label_space: the classes of a checkpoint
    that does not name them. Raises BadExport, BadCheckpoint, FileNotFoundError, and ValueError for scales that the
    network cannot combine and an output inside a run.
    """
    steps = _Steps(progress)
    _require_good(checkpoint, output, size=size, batch=batch, gives=gives)
    read = read_checkpoint(checkpoint)
    space = _space(checkpoint, read, label_space)
    network = load_network(checkpoint, read)
    fold_batch_norm(network)
    scales = _scales(network, scales, size)
    classes = Sidecar(space.names, dtype="uint8", size=size, gives=GIVES[OUTPUTS.index(gives)])
    comment = f"{_MARK} from {checkpoint.name}, sha256 {storage.sha256(checkpoint)}"
    sidecar, beside = _sidecar(output, space, classes, comment)
    least = -int(-_SMALLEST // min(scales))
    made = ForwardPass(network, scales, gives).eval().requires_grad_(False)
    teacher = load_teacher(checkpoint, device="cpu")
    steps.next()
    subject, agreement = f"{checkpoint} ({read.arch})", Agreement()
    with _quiet():
        program = _traced(made, subject, size=size, batch=batch, least=least)
    steps.next()
    with _quiet():
        data = _onnx(program, subject, gives=gives, space=space) if output.suffix == ONNX else _pt2(program)
        run = runner(data, output.suffix)
    steps.next()
    for one in compare(run, teacher, scales, gives=gives, size=size, batch=batch, least=least):
        agreement += one
        steps.next()
    storage.remove(output)  # an older network never stands beside the sidecar of this one
    for path, content in beside.items():
        storage.write(path, content)
    marks = [] if read.trained_on is None else [f"{mark & (1 << 64) - 1:016x}" for mark in read.trained_on.tolist()]
    write_sidecar(output, sidecar, marks=marks, comment=comment)
    storage.write(output, data)
    seen = [output.with_suffix(".seen.txt")] if marks else []
    files = (output, sidecar_of(output), *beside, *seen)
    return Exported(files, len(data), size, least, gives, len(space), scales, agreement)


@dataclass
class _Steps:
    """Counts the steps of an export: reading, tracing, converting, and one for each group of images in the check."""

    progress: Progress | None
    done: int = 0

    def next(self) -> None:
        self.done += 1
        if self.progress:
            self.progress(self.done, 3 + GROUPS)


def _scales(network: SegmentationNet, given: Sequence[float] | None, size: Size | None) -> tuple[float, ...]:
    scales = check_scales(given or network.scale_attn.training_scales)
    network.scale_attn.require(scales)
    for scale in scales:
        if size is None and scale.as_integer_ratio()[1] > _FINEST:
            raise BadExport(f"--scales with {scale:g} need --size HxW; without it, take scales such as 0.5 or 1.25")
        if size and min(size) * scale < 1:
            raise BadExport(f"--size {size[0]}x{size[1]} is nothing at scale {scale:g}: give a larger one")
    return scales


def _require_good(checkpoint: Path, output: Path, *, size: Size | None, batch: int | None, gives: str) -> None:
    if output.suffix not in (ONNX, PT2):
        raise BadExport(f"{output}: expected a name that ends with {ONNX} or {PT2}")
    if TeacherPlace.of(checkpoint).kind != CHECKPOINT:
        raise BadExport(f"{checkpoint} is no checkpoint: expected one of `autolabel train`, such as student/best.pt")
    if gives not in OUTPUTS:
        raise BadExport(f"output {gives!r}: expected one of {', '.join(OUTPUTS)}")
    if size and not all(1 <= side <= _LARGEST for side in size):
        raise BadExport(f"--size {size[0]}x{size[1]}: expected height and width from 1 to {_LARGEST}")
    if batch is not None and batch < 1:
        raise BadExport(f"--batch {batch}: expected 1 or more images")
    require_outside_runs(output.parent)
    missing = [name for name in _NEEDED if output.suffix == ONNX and importlib.util.find_spec(name) is None]
    if missing:
        raise BadExport(
            f"{output}: ONNX needs the package {missing[0]}: pip install 'autolabel[onnx]';"
            f" {output.with_suffix(PT2).name} needs nothing"
        )


def _space(checkpoint: Path, read: Checkpoint, given: LabelSpace | None) -> LabelSpace:
    space = read.label_space or given
    if space is None:
        raise BadExport(
            f"{checkpoint} does not name its {read.classes} classes: say which, such as --label-space cityscapes"
        )
    if given not in (None, space):
        raise BadExport(f"{checkpoint} predicts label space {space.name!r}: leave out --label-space {given.name}")
    if len(space) != read.classes:
        raise BadExport(f"{checkpoint} predicts {read.classes} classes, label space {space.name!r} has {len(space)}")
    return space


def _sidecar(output: Path, space: LabelSpace, sidecar: Sidecar, comment: str) -> tuple[Sidecar, dict[Path, bytes]]:
    """Return the sidecar that names a label space, and the files that it needs for that; nothing is written.

    Raises BadExport where the sidecar's place belongs to somebody else.
    """
    place, beside = sidecar_of(output), {}
    if space.name in BUILT_IN and load_label_space(space.name) == space:
        classes = space.name
    else:
        own = output.with_suffix(".classes.json")
        classes, beside[own] = own.name, space.to_json().encode() + b"\n"
    sidecar = replace(sidecar, classes=classes)
    if storage.exists(place):
        text = storage.read(place, at_most=storage.SMALL).decode(errors="replace")
        if _MARK not in text:
            raise BadExport(f"{place} exists and is not of `autolabel export-model`: give {output.name} another name")
        other = output.with_suffix(PT2 if output.suffix == ONNX else ONNX)
        lines = [line for line in text.splitlines() if not line.startswith("trained_on")]
        if storage.exists(other) and lines != [f"# {comment}", *sidecar.lines()]:
            raise BadExport(f"{place} describes {other.name}, which differs: give {output.name} another name")
    return sidecar, beside


# --- the file ---------------------------------------------------------------------------------------------------------


def _traced(
    made: ForwardPass, subject: str, *, size: Size | None, batch: int | None, least: int
) -> torch.export.ExportedProgram:
    images = torch.zeros(batch or 2, 3, *(size or (least + 32, least + 96)), dtype=torch.uint8)
    axes = {} if batch else {0: torch.export.Dim("batch", min=1)}
    if not size:
        axes |= {2: torch.export.Dim("height", min=least), 3: torch.export.Dim("width", min=least)}
    shapes = {"images": axes} if axes else None
    try:
        with torch.no_grad():
            program = torch.export.export(made, (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch has classes of its own for each thing that it cannot follow
        advice = " in this size" if size else " for any height and width: give --size HxW"
        raise BadExport(f"{subject} cannot be traced{advice} ({kind_and_reason(error)})") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names this machine's folders
    return program


def _pt2(program: torch.export.ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _onnx(program: torch.export.ExportedProgram, subject: str, *, gives: str, space: LabelSpace) -> bytes:
    places = [node for node in program.graph.nodes if node.op == "placeholder" and node.name == "images"]
    names = {0: "batch", 2: "height", 3: "width"}
    axes = {i: name for i, name in names.items() if isinstance(places[0].meta["val"].shape[i], torch.SymInt)}
    try:
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=[gives],
            dynamic_shapes={"images": axes} if axes else None,
        )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise BadExport(f"{subject} cannot be written as ONNX: {PT2} may do ({kind_and_reason(error)})") from error
    assert made is not None
    model = made.model_proto
    graph = model.graph
    for thing in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        thing.ClearField("metadata_props")  # lines of Python, for whoever looks into torch
        thing.ClearField("doc_string")
    entry = model.metadata_props.add()
    entry.key, entry.value = "classes", space.to_json()
    return bytes(model.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lines about Python and torch from a person who can do nothing about them."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
