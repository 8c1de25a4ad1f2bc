"""A checkpoint from a stranger, or one that was damaged: refused in one line and in bounded memory, or it is right.

If this fails, labels come from weights that nobody trained, or a small file takes all memory.
"""

from __future__ import annotations

import io
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import autolabel
from safetensors.torch import save_file
from torch import Tensor

from autolabel.manifests.label_space import CAMVID
from autolabel.manifests.notes import heard
from autolabel.teacher.checkpoints import (
    FORMAT,
    Checkpoint,
    fingerprint_tensor,
    load_network,
    overlap,
    read_checkpoint,
    save_checkpoint,
    save_tensors,
)
from autolabel.teacher.container import BadCheckpoint, read_container, require_few_values
from autolabel.teacher.networks.build import build
from autolabel.teacher.start import read_start

pytestmark = pytest.mark.thorough

ARCH = "hrnet18s_plain"
Content = dict[str, Any]


@pytest.fixture(scope="module")
def content() -> Content:
    """What `autolabel train` saves of an untrained network."""
    torch.manual_seed(0)
    return {
        "format": FORMAT, "arch": ARCH, "label_space": CAMVID.to_dict(), "state_dict": build(ARCH, 11).state_dict(),
        "trained_on": fingerprint_tensor(["0f", "f" * 16]), "metrics": {"miou": 0.5},
    }  # fmt: skip


def refusal(path: Path) -> str:
    with pytest.raises(BadCheckpoint) as refused:
        load_network(path, read_checkpoint(path))
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)
    return str(refused.value).removeprefix(str(path))


def told(path: Path) -> list[str]:
    """The notes while a file is read twice."""
    notes: list[str] = []
    with heard(notes.append):
        read_container(path)
        read_container(path)
    return notes


# --- checksums --------------------------------------------------------------------------------------------------------


def small() -> Checkpoint:
    """A checkpoint of ours with few tensors; it is never put into a network."""
    state = {f"layer.{k}.weight": torch.randn(4, 6, generator=torch.Generator().manual_seed(k)) for k in range(3)}
    return Checkpoint(ARCH, 11, 3, CAMVID, state, fingerprint_tensor(["0f", "f" * 16]), {"miou": 0.5})


def save_small(path: Path) -> None:
    checkpoint = small()
    if path.suffix == ".safetensors":
        save_tensors(path, checkpoint)
        return
    module = torch.nn.Module()
    for key, tensor in checkpoint.state_dict.items():
        module.register_buffer(key.replace(".", "_"), tensor)
    save_checkpoint(path, module, arch=ARCH, space=CAMVID, trained_on=checkpoint.trained_on, metrics={"miou": 0.5})


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("name", ["c.pt", "c.safetensors"])
def test_a_flipped_bit_in_any_byte_is_refused_or_changes_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save_small(path)
    data, rng = path.read_bytes(), random.Random(3)
    whole, refused = vars(read_checkpoint(path)), 0
    for place in range(0, len(data), 1 if len(data) < 4000 else 17):
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = vars(read_checkpoint(path))
        except BadCheckpoint as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            continue
        assert all(same(found[key], whole[key]) for key in whole), place
    assert refused > len(data) / 50  # torch's zip has 64 bytes of padding for each tensor


def test_a_flipped_bit_of_a_weight_is_found_by_every_command_that_reads_it(
    city: Path, teacher: Path, tmp_path: Path
) -> None:
    data = bytearray(teacher.read_bytes())
    with zipfile.ZipFile(teacher) as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
    lengths = (
        int.from_bytes(data[member.header_offset + k : member.header_offset + k + 2], "little") for k in (26, 28)
    )
    start = member.header_offset + 30 + sum(lengths)
    data[start + member.file_size // 8 * 4 + 3] ^= 0x02  # the exponent of a weight in the middle
    path = tmp_path / "c.pt"
    path.write_bytes(data)
    line = f"autolabel: {path} is damaged: the checksum of {member.filename} in it is another; copy the file again\n"
    asked: list[tuple[object, ...]] = [
        ("evaluate", path, city / "val.parquet"),
        ("generate", city / "coarse.parquet", "--teacher", path, "--out", tmp_path / "run", "--engine", "local"),
        ("train", city / "fine.parquet", "--val", city / "val.parquet", "--out", tmp_path / "t", "--init", path,
         "--steps", 1, "--device", "cpu"),
    ]  # fmt: skip
    for words in asked:
        result = autolabel(*words)
        assert (result.exit_code, result.stderr.splitlines(keepends=True)[-1]) == (2, line)


def test_a_file_without_a_checksum_is_called_unverified_once(content: Content, tmp_path: Path) -> None:
    state = content["state_dict"]
    torch.save(content, tmp_path / "ours.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "published.safetensors")
    save_small(tmp_path / "ours.safetensors")
    assert told(tmp_path / "ours.pt") == told(tmp_path / "ours.safetensors") == []
    (old,), (published,) = told(tmp_path / "old.pth"), told(tmp_path / "published.safetensors")
    assert old == (f"{tmp_path}/old.pth is unverified: a checkpoint in the format before torch 1.6 carries no checksum")
    assert published == f"{tmp_path}/published.safetensors is unverified: a safetensors file carries no checksum"


def compressed(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return out.getvalue()


def test_a_compressed_zip_is_refused_before_it_is_unpacked(content: Content, tmp_path: Path) -> None:
    torch.save({**content, "state_dict": {"a": torch.zeros(10_000_000)}}, tmp_path / "c.pt")
    bomb = compressed((tmp_path / "c.pt").read_bytes())
    (tmp_path / "c.pt").write_bytes(bomb)
    assert len(bomb) < 100_000
    assert refusal(tmp_path / "c.pt").endswith("is compressed, which torch never does: save it again")


def test_a_zip_that_lists_a_part_twice_is_refused(content: Content, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "c.pt", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.infolist()[0].filename, b"another pickle")
    assert refusal(tmp_path / "c.pt") == " is damaged: parts of it are listed twice"


def test_parts_that_lie_in_each_other_are_refused(content: Content, tmp_path: Path) -> None:
    """A zip of 8 MB that lists one member a thousand times, under other names, has 8 GB to read."""
    torch.save({**content, "state_dict": {"a": torch.zeros(1_000_000)}}, tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "c.pt", "a") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        for k in range(9):
            twin = zipfile.ZipInfo(f"archive/data/{k}x")
            for name in ("header_offset", "file_size", "compress_size", "CRC", "compress_type", "create_system"):
                setattr(twin, name, getattr(largest, name))
            archive.filelist.append(twin)
        archive._didModify = True  # type: ignore[attr-defined]
    assert refusal(tmp_path / "c.pt") == " is damaged: parts of it are listed twice"


# --- tensors that are no plain numbers --------------------------------------------------------------------------------

SPECIAL: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (lambda w: w.to_sparse(), "sparse (sparse_coo)"),
    "sparse by rows": (lambda w: w[0, 0].to_sparse_csr(), "sparse (sparse_csr)"),
    "meta": (lambda w: w.to("meta"), "without content (meta)"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "complex": (lambda w: w.to(torch.complex64), "complex64"),
    "quantized": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "quantized"),
    "uint16": (lambda w: w.to(torch.uint16), "uint16"),
    "nested": (lambda w: torch.nested.nested_tensor([w[0], w[1, :1]]), "nested"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("form", ["ours", "published"])
def test_a_weight_that_is_no_plain_number_is_refused_by_name(
    kind: str, form: str, content: Content, tmp_path: Path
) -> None:
    change, words = SPECIAL[kind]
    state = content["state_dict"]
    key = next(key for key, value in state.items() if value.ndim == 4)
    changed = {**state, key: change(state[key])}
    torch.save({**content, "state_dict": changed} if form == "ours" else {"state_dict": changed}, tmp_path / "c.pt")
    text = refusal(tmp_path / "c.pt")
    assert text.endswith(f"tensor {key} is {words}: expected plain numbers, such as float32") or (
        kind == "nested" and text.startswith(" is not a loadable checkpoint: it wants more than tensors")
    )
    with pytest.raises(BadCheckpoint):
        read_start(tmp_path / "c.pt", ARCH, space=CAMVID)


SEEN: list[tuple[object, str]] = [
    (None, "a NoneType"), ({}, "a dict"), (5, "a int"), ([[1]], "a list"), ("0f", "a str"),
    (torch.tensor([[1, 2]]), "int64 of shape (1, 2)"), (torch.tensor(5), "int64 of shape ()"),
    (torch.tensor([1.0, 2.0], dtype=torch.float64), "float64 of shape (2,)"),
    (torch.tensor([1, 2], dtype=torch.int32), "int32 of shape (2,)"),
    (torch.arange(10)[::2], "int64 of shape (5,)"),
    (torch.tensor([True]), "bool of shape (1,)"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "kind"), SEEN, ids=[f"{n} {kind}" for n, (_, kind) in enumerate(SEEN)])
def test_marks_of_another_kind_are_refused(value: object, kind: str, content: Content, tmp_path: Path) -> None:
    """As float64 they would equal nothing, and the images would pass for unseen."""
    torch.save({**content, "trained_on": value}, tmp_path / "c.pt")
    assert refusal(tmp_path / "c.pt") == (
        f": trained_on is {kind}: expected int64 of shape (N,), the marks of its images"
    )


@pytest.mark.parametrize("key", ["arch", "label_space", "metrics", "training", "state_dict", "format"])
@pytest.mark.parametrize("value", [5, [1], {"a": 1}, "word", None, torch.zeros(2), {"miou": "high"}, {5: 1}])
def test_an_entry_of_any_kind_is_refused_or_right(key: str, value: object, content: Content, tmp_path: Path) -> None:
    torch.save({**content, key: value}, tmp_path / "c.pt")
    try:
        checkpoint = read_checkpoint(tmp_path / "c.pt")
    except BadCheckpoint as error:
        assert str(error).startswith(str(tmp_path / "c.pt")) and len(str(error)) < 300 + len(str(tmp_path))
    else:
        assert key in ("metrics", "training", "format")
        assert key != "format" or checkpoint.trained_on is None


# --- memory -----------------------------------------------------------------------------------------------------------


def in_little_memory(path: Path) -> str:
    """What a process that may take 4 GiB of addresses says of a file."""
    code = (
        "import resource, sys\nfrom pathlib import Path\nimport torch\nfrom autolabel.teacher.checkpoints import *\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try:\n    load_network(Path(sys.argv[1]), read_checkpoint(Path(sys.argv[1])))\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().removeprefix(str(path))


@pytest.mark.thorough
def test_no_small_file_takes_much_memory(content: Content, tmp_path: Path) -> None:
    many = torch.zeros(1, dtype=torch.int64).expand(10**10)
    state = content["state_dict"]
    head = next(key for key in reversed(state) if state[key].ndim == 4)
    wide = {**state, head: torch.zeros(()).expand(10**9, *state[head].shape[1:])}
    wide[head.replace("weight", "bias")] = torch.zeros(()).expand(10**9)
    fewer = {key: value[:60_000] if len(value.shape) and len(value) == 10**9 else value for key, value in wide.items()}
    lists: list[Any] = [0] * 10
    for _ in range(12):
        lists = [lists] * 10  # 10^13 numbers in a few bytes
    for name, changed, expected in (
        (
            "marks",
            {**content, "trained_on": many},
            "tensor trained_on has 10,000,000,000 numbers, but the file holds 1",
        ),
        ("classes", {"state_dict": wide}, "tensor cls_head.6.weight has 256,000,000,000 numbers, but the file"),
        ("lists", {**content, "metrics": lists}, "holds more than 3,000,000 values beside its tensors"),
        ("fewer classes", {"state_dict": fewer}, "predicts 60,000 classes at 3 scales: expected at most 255 and 16"),
        (
            "extra",
            {**content, "state_dict": {**state, "extra": many}},
            "tensor extra has 10,000,000,000 numbers",
        ),
    ):
        torch.save(changed, tmp_path / f"{name}.pt")
        assert (tmp_path / f"{name}.pt").stat().st_size < 20_000_000
        assert expected in in_little_memory(tmp_path / f"{name}.pt"), name


def test_a_list_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(BadCheckpoint, match="values beside its tensors"):
        require_few_values(tmp_path, {"a": endless})


def test_marks_are_compared_without_a_set_of_numbers() -> None:
    rng = np.random.default_rng(0)
    prints = [f"{value:016x}" for value in rng.integers(0, 1 << 63, 1000, np.uint64).tolist()]
    seen = fingerprint_tensor(prints[::3])
    assert overlap(seen, prints) == list(range(0, 1000, 3))
    assert overlap(seen, []) == []


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_orig_mod._orig_mod."])
def test_a_network_that_torch_has_compiled_loads(prefix: str, content: Content, tmp_path: Path) -> None:
    state = content["state_dict"]
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}}, tmp_path / "c.pt")
    loaded = load_network(tmp_path / "c.pt", read_checkpoint(tmp_path / "c.pt")).state_dict()
    assert same(dict(loaded), dict(state))


def test_a_network_of_which_a_part_was_compiled_loads(content: Content, tmp_path: Path) -> None:
    state = content["state_dict"]
    renamed = {key.replace("backbone.", "backbone._orig_mod.", 1): value for key, value in state.items()}
    torch.save({**content, "state_dict": renamed}, tmp_path / "c.pt")
    loaded = load_network(tmp_path / "c.pt", read_checkpoint(tmp_path / "c.pt")).state_dict()
    assert same(dict(loaded), dict(state))


def test_weights_under_two_prefixes_are_refused(content: Content, tmp_path: Path) -> None:
    state = content["state_dict"]
    key = next(iter(state))
    torch.save({"state_dict": {**state, f"module.{key}": state[key]}}, tmp_path / "c.pt")
    assert refusal(tmp_path / "c.pt") == (
        f" holds {key} twice, under another prefix: expected the weights of one network"
    )


# --- leaks ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_does_not_say_what_it_has_seen_is_no_checkpoint_that_has_seen_nothing(
    city: Path, teacher: Path, tmp_path: Path
) -> None:
    """A published file, one of a foreign format, and one of ours without marks."""
    full = torch.load(teacher, weights_only=True)
    contents: dict[str, Content] = {
        "published": {"state_dict": full["state_dict"]},
        "foreign": {**full, "format": "another/1"},
        "empty": {**full, "trained_on": torch.zeros(0, dtype=torch.int64)},
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        assert read_checkpoint(path).trained_on is None
        scored = autolabel("evaluate", path, city / "fine.parquet", "--scales", "1")
        assert scored.exit_code == 0, scored.output
        note = f"note: {path} does not say which images it has seen: nobody can tell whether it knows these"
        assert scored.stderr.splitlines().count(note) == 1
        start = read_start(path, full["arch"], space=read_checkpoint(teacher).label_space)  # type: ignore[arg-type]
        assert start.trained_on is None and "does not say which images it has seen" in start.description
    silent = autolabel("evaluate", teacher, city / "val.parquet", "--scales", "1")
    assert silent.exit_code == 0 and "note: " not in silent.stderr


def test_a_pickle_that_is_no_checkpoint_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return (Path.touch, (tmp_path / "run",))

    (tmp_path / "c.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
    assert "nothing in it was run" in refusal(tmp_path / "c.pt") and not (tmp_path / "run").exists()
