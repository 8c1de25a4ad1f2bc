"""What the label store takes: bytes, CPU to write, CPU to read a label and a crop, beside PNG and other Zarr software.

python benchmarks/store.py [FOLDER_OF_LABEL_PNGS] [--smallest]

Without a folder it draws 12 street scenes of 1024 x 2048; the maps of a folder must have one size. Times are CPU time
of this process for a label, or for a crop of 512 x 1024: the best of 5 turns, in each of which every candidate runs
once. PNGs are encoded to memory and decoded from memory. A Zarr shard of 64 labels is written to a file, and ours is
forced to disk; zarr-python writes the same frames and does not force them. Bytes include a label's share of the index.
With --smallest the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import platform
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
import zstandard
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from zarr.codecs import ZstdCodec

from autolabel.manifests.images import encode_label
from autolabel.manifests.label_space import CITYSCAPES, IGNORE
from autolabel.manifests.run import shards as stores
from autolabel.manifests.run.frames import read_zarr
from autolabel.manifests.run.labels import LABELS, zarr_folder
from autolabel.manifests.run.shards import bucket_of, create_zarr, encode_zarr, write_zarr_shard
from autolabel.manifests.scenes import draw_scene

Label = NDArray[np.uint8]
Window = tuple[int, int, int]  # label, top, left


@dataclass(frozen=True)
class Extent:
    """How much is measured: labels of a shard, drawn scenes and their size, crops and theirs, turns, ways to start."""

    shard: int = 64
    scenes: int = 12
    height: int = 1024
    width: int = 2048
    crops: int = 240
    crop: tuple[int, int] = (512, 1024)
    turns: int = 5
    methods: tuple[str, ...] = ("fork", "spawn", "forkserver")


SMALLEST = Extent(2, 2, 64, 128, 4, (32, 64), 1, ("fork",))


def turns(work: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """CPU seconds of the fastest of `count` runs of each, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(count):
        for name, run in work.items():
            started = time.process_time()
            run()
            taken[name].append(time.process_time() - started)
    return {name: min(times) for name, times in taken.items()}


def label_maps(folder: Path | None, extent: Extent) -> list[Label]:
    """The label maps of a folder, or drawn ones, as train ids."""
    if folder is not None:
        return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    ids = np.frombuffer(CITYSCAPES.train_ids, np.uint8)
    return [ids[draw_scene(n, height=extent.height, width=extent.width).fine] for n in range(extent.scenes)]


def pillow_png(label: Label) -> bytes:
    """With Pillow's defaults."""
    buffer = io.BytesIO()
    Image.fromarray(label).save(buffer, "PNG")
    return buffer.getvalue()


def optimised_png(label: Label) -> bytes:
    """As small as Pillow gets: a palette of 20 colours."""
    image = Image.fromarray(np.where(label == IGNORE, 19, label).astype(np.uint8))
    image.putpalette(bytes(60))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def decoded(png: bytes) -> Label:
    return np.asarray(Image.open(io.BytesIO(png)))


def for_all(work: Callable[..., object], items: Iterable[Any]) -> None:
    """Results are dropped at once, as a loader does when its batch is gone."""
    for item in items:
        work(*item) if isinstance(item, tuple) else work(item)


class TunedCodec(ZstdCodec):
    """What zarr-python would need to write the frames that the store writes."""

    _of_thread = threading.local()

    def __init__(self) -> None:
        super().__init__(level=9, checksum=True)

    def _compress(self, chunk: Any, spec: Any) -> Any:
        if not hasattr(self._of_thread, "compress"):
            compressor = zstandard.ZstdCompressor(compression_params=stores._TUNED)
            self._of_thread.compress = compressor.compress
        return spec.prototype.buffer.from_bytes(self._of_thread.compress(chunk.as_numpy_array().data))

    async def _encode_single(self, chunk: Any, spec: Any) -> Any:
        return await asyncio.to_thread(self._compress, chunk, spec)


class Crops(Dataset[torch.Tensor]):
    """Crops of labels, of one size, from a store or from PNGs in memory."""

    def __init__(self, windows: list[Window], size: tuple[int, int], array: Path | None, pngs: list[bytes]) -> None:
        self.windows, self.size, self.array, self.pngs = windows, size, array, pngs

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, place: int) -> torch.Tensor:
        row, top, left = self.windows[place]
        height, width = self.size
        if self.array is not None:
            return torch.from_numpy(read_zarr(self.array, row, window=(top, left, height, width)))
        return torch.from_numpy(decoded(self.pngs[row])[top : top + height, left : left + width].copy())


def crops_per_second(crops: Crops, method: str) -> float:
    """Through a data loader with 2 workers that are at work already; this process has read the same crops."""
    for_all(crops.__getitem__, range(min(32, len(crops))))
    loader = DataLoader(crops, 16, num_workers=2, multiprocessing_context=method, persistent_workers=True)
    list(loader)
    started = time.perf_counter()
    for _ in range(2):
        for _ in loader:
            pass
    return 2 * len(crops) / (time.perf_counter() - started)


def after_fork(read: Callable[[], object]) -> str:
    """What becomes of a forked process that reads what its parent has read."""
    if (child := os.fork()) == 0:
        read()
        os._exit(0)
    for _ in range(100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "reads" if status == 0 else f"ends by signal {os.WTERMSIG(status)}"
        time.sleep(0.1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    extent = SMALLEST if asked.smallest else Extent()
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
    with tempfile.TemporaryDirectory() as scratch:
        measure(label_maps(asked.folder, extent), Path(scratch), extent)


def measure(maps: list[Label], scratch: Path, extent: Extent) -> None:
    """All tables, for label maps of one size."""
    torch.set_num_threads(1)
    shard, count, crop_size = extent.shard, extent.crops, extent.crop
    rows, (height, width), bucket = list(islice(cycle(maps), shard)), maps[0].shape, bucket_of(*maps[0].shape)
    array = scratch / zarr_folder(LABELS) / bucket
    create_zarr(scratch / zarr_folder(LABELS), {bucket: shard}, shard_rows=shard, attributes={})
    encoders = {"PNG, Pillow": pillow_png, "PNG, Pillow, optimised": optimised_png, "PNG, ours": encode_label}
    pngs = {name: [encode(label) for label in maps] for name, encode in encoders.items()}
    size = {name: float(np.mean([len(png) for png in found])) for name, found in pngs.items()}
    dice = random.Random(0)
    top, left = (side - crop for side, crop in zip((height, width), crop_size, strict=True))
    windows = [(dice.randrange(shard), dice.randint(0, top), dice.randint(0, left)) for _ in range(count)]

    def ours() -> None:
        written = write_zarr_shard(array, 0, shard_rows=shard, labels=[encode_zarr(label) for label in rows])
        sizes = written.label_bytes[: len(maps)]
        size["Zarr, ours"] = sum(sizes) / len(sizes) + (written.bytes - sum(written.label_bytes)) / shard

    block = np.full((shard, *zarr.open_array(array, mode="r").shape[1:]), IGNORE, np.uint8)
    for row, label in zip(block, rows, strict=True):
        row[:height, :width] = label

    def zarr_python() -> None:
        shutil.rmtree(scratch / "other.zarr", ignore_errors=True)
        target = zarr.create_array(
            scratch / "other.zarr",
            shape=block.shape,
            shards=block.shape,
            chunks=(1, stores.CHUNK, stores.CHUNK),
            dtype="uint8",
            fill_value=IGNORE,
            compressors=[TunedCodec()],
        )
        target[:] = block

    encode = {name: partial(for_all, f, rows) for name, f in encoders.items()}
    encoding = turns(encode | {"Zarr, ours": ours, "Zarr, zarr-python": zarr_python}, extent.turns)
    plain = zarr.open_array(array, mode="r")
    assert np.array_equal(plain[:], block)

    for method in extent.methods:
        png = crops_per_second(Crops(windows, crop_size, None, list(islice(cycle(pngs["PNG, Pillow"]), shard))), method)
        found = crops_per_second(Crops(windows, crop_size, array, []), method)
        print(f"2 workers by {method}: {png:.0f} crops/s from PNG, {found:.0f} from Zarr", flush=True)

    def from_png(name: str) -> Callable[[int, int, int, int, int], Label]:
        return lambda row, y, x, h, w: decoded(pngs[name][row % len(maps)])[y : y + h, x : x + w]

    readers: dict[str, Callable[[int, int, int, int, int], Any]] = {name: from_png(name) for name in encoders}
    readers["Zarr, ours"] = lambda row, *window: read_zarr(array, row, window=window)
    readers["Zarr, zarr-python"] = lambda row, y, x, h, w: plain[row, y : y + h, x : x + w]
    try:
        import tensorstore
    except ImportError:
        forked = "tensorstore is not installed"
    else:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array)}}
        opened = tensorstore.open(spec, read=True).result()
        readers["Zarr, tensorstore"] = lambda row, y, x, h, w: opened[row, y : y + h, x : x + w].read().result()
        opened[0].read().result()
        forked = f"a forked process whose parent has read: tensorstore {after_fork(lambda: opened[0].read().result())}"
    for row, y, x in windows:
        for name, read in readers.items():
            crop = rows[row][y : y + crop_size[0], x : x + crop_size[1]]
            assert "optimised" in name or np.array_equal(read(row, y, x, *crop_size), crop), name
    labels, crops = [(row, 0, 0, height, width) for row in range(shard)], [(*window, *crop_size) for window in windows]
    whole = turns({name: partial(for_all, f, labels) for name, f in readers.items()}, extent.turns)
    crop_reading = turns({name: partial(for_all, f, crops) for name, f in readers.items()}, extent.turns)

    print(f"{forked}\n")
    machine = f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}, {len(maps)} maps of {height} x {width}\n")
    print("| | bytes | / PNG | / optimised | write ms | / PNG | read ms | / PNG | crop ms | / PNG | crops/s/core |")
    print("|---|" + "---:|" * 10)
    first, best = "PNG, Pillow", "PNG, Pillow, optimised"
    for name in readers:
        cells = ["–"] * 10
        if name in size:
            cells[:3] = f"{size[name]:.0f}", f"{size[name] / size[first]:.3f}", f"{size[name] / size[best]:.3f}"
        if name in encoding:
            cells[3:5] = f"{1e3 * encoding[name] / shard:.2f}", f"{encoding[name] / encoding[first]:.2f}"
        cells[5:7] = f"{1e3 * whole[name] / shard:.2f}", f"{whole[name] / whole[first]:.3f}"
        cells[7:9] = f"{1e3 * crop_reading[name] / count:.2f}", f"{crop_reading[name] / crop_reading[first]:.3f}"
        cells[9] = f"{count / crop_reading[name]:.0f}"
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
