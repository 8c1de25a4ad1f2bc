"""What decoding a photograph and a label costs: CPU time by library, and where it goes.

python benchmarks/decode.py [FOLDER_OF_PHOTOGRAPHS] [--turns 9] [--smallest]

The photograph is 2048 x 1024: four JPEGs of FOLDER, enlarged and with a little noise, so that its PNG is as large
as those of Cityscapes; without FOLDER four drawn street scenes. Times are CPU ms of one thread; in each turn every
way runs once; the least and the median are shown. Ratios compare medians with Pillow's. Libraries that are not
installed are left out: pip install 'autolabel[fast]' pyspng-seunglab imagecodecs isal. Every way must give Pillow's
pixels. With --smallest the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import os
import platform
import statistics
import sys
import threading
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests import images
from autolabel.manifests.headers import pixels_only, png_chunks, read_header
from autolabel.manifests.images import decode_image, decode_label, decode_picture, encode_label, photograph_header
from autolabel.manifests.reading import decode_photograph
from autolabel.manifests.samples import Sample
from autolabel.manifests.scenes import draw_scene
from autolabel.manifests.storage import fingerprint_bytes

Pixels = NDArray[np.uint8]
Ways = dict[str, Callable[[], Any]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    arguments = parser.parse_args()
    if arguments.smallest:
        print("--smallest: these numbers mean nothing")
    height, turns = (64, 2) if arguments.smallest else (1024, arguments.turns)
    cv2.setNumThreads(1)
    pixels = photograph(arguments.folder, height)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores\n")
    png, jpeg = (encoded(pixels, form, **how) for form, how in (("PNG", {}), ("JPEG", {"quality": 90})))
    label = encode_label(drawn_label(height))
    print("| file | bytes | way | ms | median | of Pillow |")
    print("|---|---:|---|---:|---:|---:|")
    for name, data, ways in (
        ("PNG", png, png_ways(png)),
        ("JPEG q90 4:2:0", jpeg, jpeg_ways(jpeg)),
        ("label PNG", label, label_ways(label)),
    ):
        for way, (least, median, ratio) in timed(ways, turns).items():
            print(f"| {name} | {len(data):,} | {way} | {1e3 * least:.2f} | {1e3 * median:.2f} | {ratio:.3f} |")
    print("\n| part of a PNG's way | ms | median |")
    print("|---|---:|---:|")
    for part, (least, median, _) in timed(parts(png), turns).items():
        print(f"| {part} | {1e3 * least:.2f} | {1e3 * median:.2f} |")
    print("\n| PNG by | CPU of another thread meanwhile |")
    print("|---|---:|")
    for way in ("Pillow", "decode_image"):
        print(f"| {way} | {100 * beside(png_ways(png)[way], turns):.0f} % |")


def photograph(folder: Path | None, height: int) -> Pixels:
    """A picture of twice this height as its width, made of four photographs."""
    width, quarter = 2 * height, height // 2
    if folder is None:
        four = [Image.fromarray(draw_scene(n, height=quarter, width=height).image) for n in range(4)]
    else:
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        chosen = [found[n * len(found) // 6] for n in range(4)]
        enlarged = [Image.open(path).convert("RGB").resize((height, 3 * height // 4)) for path in chosen]
        four = [tile.crop((0, height // 8, height, height // 8 + quarter)) for tile in enlarged]
    whole = Image.new("RGB", (width, height))
    for n, tile in enumerate(four):
        whole.paste(tile, (n % 2 * height, n // 2 * quarter))
    noise = np.random.default_rng(0).normal(0, 1.0, (height, width, 1))
    return np.clip(np.asarray(whole) + noise, 0, 255).astype(np.uint8)


def drawn_label(height: int) -> Pixels:
    """The ids of a drawn scene."""
    return draw_scene(0, height=height, width=2 * height).fine


def encoded(pixels: Pixels, form: str, **how: Any) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **how)
    return buffer.getvalue()


def by_pillow(data: bytes) -> Pixels:
    """Pillow alone, with none of our checks."""
    return np.asarray(Image.open(io.BytesIO(data)))


def others(data: bytes, size: tuple[int, int]) -> Ways:
    """Ways of other libraries that are installed."""
    ways: Ways = {}
    calls: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "kornia-rs alone": ("kornia_rs", lambda m: m.io.decode_image_png_u8(data, size, "rgb")),
        "pyspng": ("pyspng", lambda m: m.load(data)),
        "imagecodecs": ("imagecodecs", lambda m: m.imread(data)),
        "simplejpeg": ("simplejpeg", lambda m: m.decode_jpeg(data)),
    }
    for name, (module, call) in calls.items():
        if (module == "simplejpeg") == (data[:2] == b"\xff\xd8") or module == "imagecodecs":
            try:
                loaded = importlib.import_module(module)
            except ImportError:
                print(f"{name} is not installed", file=sys.stderr)
            else:
                ways[name] = functools.partial(call, loaded)
    return ways


def png_ways(data: bytes) -> Ways:
    """Ways to decode the photograph."""
    header = read_header(io.BytesIO(data))
    sample = Sample("a", Path("a.png"), header.height, header.width)
    return {
        "Pillow": lambda: by_pillow(data),
        "our path, by Pillow": lambda: images._decode(data, photograph_header(io.BytesIO(data))),
        "decode_image": lambda: decode_image(data),
        "decode_photograph": lambda: decode_photograph(sample, data),
        "decode_picture, upper half": lambda: decode_picture(data, rows=header.height // 2)[0],
        "OpenCV": lambda: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
        **others(data, header.size),
    }


def jpeg_ways(data: bytes) -> Ways:
    """Ways to decode the photograph as a JPEG."""
    return {
        "Pillow": lambda: by_pillow(data),
        "decode_image": lambda: decode_image(data),
        "OpenCV": lambda: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
        **others(data, (0, 0)),
    }


def label_ways(data: bytes) -> Ways:
    """Ways to decode the label."""
    return {"Pillow": lambda: by_pillow(data), "decode_label": lambda: decode_label(data, None)}


def parts(data: bytes) -> Ways:
    """What is done beside the decoder's work, and inflating alone."""
    header = read_header(io.BytesIO(data))
    idat = b"".join(data[start + 8 : end - 4] for name, start, end in png_chunks(data) if name == b"IDAT")
    ways: Ways = {
        "header": lambda: read_header(io.BytesIO(data)),
        "checksums of chunks": lambda: png_chunks(data),
        "cut down for Pillow": lambda: pixels_only(data, header),
        "fingerprint (sha256)": lambda: fingerprint_bytes(data),
        "inflate, zlib": lambda: inflated(zlib, idat),
    }
    for name, module in (("zlib-ng", "zlib_ng.zlib_ng"), ("ISA-L", "isal.isal_zlib")):
        try:
            loaded = importlib.import_module(module)
        except ImportError:
            continue
        ways[f"inflate, {name}"] = functools.partial(inflated, loaded, idat)
    return ways


def inflated(library: Any, data: bytes) -> object:
    """What zlib, or a library that is called as it is, makes of a stream."""
    return library.decompressobj().decompress(data)


def timed(ways: Ways, turns: int) -> dict[str, tuple[float, float, float]]:
    """Least and median seconds of CPU, and the median as a share of the first way's. All pixels must be alike."""
    first = next(iter(ways.values()))()
    for name, run in ways.items():  # once for what is loaded and prepared
        result = run()
        if isinstance(first, np.ndarray):
            assert np.array_equal(np.asarray(result), first[: np.asarray(result).shape[0]]), name
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, run in ways.items():
            started = time.process_time()
            run()
            taken[name].append(time.process_time() - started)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    base = next(iter(medians.values()))
    return {name: (min(taken[name]), median, median / base if base else 0.0) for name, median in medians.items()}


def beside(run: Callable[[], object], turns: int) -> float:
    """How much CPU a thread of Python gets while another decodes, as a share of the decoding thread's.

    Near 1 if Python's lock is free all the time, near 0 if decoding holds it; a machine that is full gives less.
    """
    taken: list[float] = []

    def decoding() -> None:
        started = time.thread_time()
        for _ in range(turns):
            run()
        taken.append(time.thread_time() - started)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    thread, started = threading.Thread(target=decoding), time.thread_time()
    thread.start()
    while not taken:
        pass
    spent = time.thread_time() - started
    thread.join()
    sys.setswitchinterval(interval)
    return spent / taken[0]


if __name__ == "__main__":
    main()
