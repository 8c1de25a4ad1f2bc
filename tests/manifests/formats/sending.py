"""Labels sent out by a writer as `autolabel export` does, and what a reader makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autolabel.manifests.formats.exchange import BadReturn, Outgoing, Packing
from autolabel.manifests.formats.known import known_format
from autolabel.manifests.formats.style import Style
from autolabel.manifests.images import read_label
from autolabel.manifests.label_space import CITYSCAPES, LabelSpace
from autolabel.manifests.run.shards import Label
from autolabel.manifests.samples import Sample

SPACE = LabelSpace.named("few", ("road", "traffic light", "Straße"))
STREETS = Path(__file__).parents[4] / "shared/data/labels"  # 2048 x 1024, where they are


def street_scenes(count: int) -> dict[str, Label]:
    """Label maps of real size; the test is skipped where there are none."""
    files = sorted(STREETS.glob("*.png"))[:count]
    if not files:
        pytest.skip("no label maps of street scenes here")
    return {path.stem: read_label(path, CITYSCAPES) for path in files}


def random_labels(
    seed: int = 0, classes: int = len(SPACE), sizes: Iterable[tuple[int, int]] = ((13, 17), (24, 9))
) -> dict[str, Label]:
    """Labels of noise, of areas, of one class, of nothing but ignore and one class, and with a mask at every edge."""
    rng = np.random.default_rng(seed)
    values = np.array([*range(classes), 255], np.uint8)
    labels: dict[str, Label] = {}
    for height, width in sizes:
        blocks = np.kron(rng.choice(values, (height // 4 + 1, width // 4 + 1)), np.ones((4, 4), np.uint8))
        frame = np.full((height, width), 255, np.uint8)
        frame[[0, -1]] = frame[:, [0, -1]] = 1
        corner = np.full((height, width), 255, np.uint8)
        corner[-1, -1] = classes - 1
        kinds = [
            rng.choice(values, (height, width)),
            blocks[:height, :width].astype(np.uint8),
            np.zeros_like(frame),
            frame,
            corner,
        ]
        labels |= {f"drive {height}/img_{place}.v1": label for place, label in enumerate(kinds)}
    return labels


def send(
    to: str,
    labels: Mapping[str, Label],
    folder: Path,
    *,
    space: LabelSpace = SPACE,
    confidence: Mapping[str, Label] | None = None,
    style: Style | None = None,
) -> list[str]:
    """Write labels in a format; return its notes. Photographs are grey."""
    writer = known_format(to).writer(space, style or Style())
    entries = []
    for name, label in labels.items():
        photo = folder.parent / "photos" / f"{name}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", label.shape[::-1], (90, 90, 90)).save(photo)
        sample = Sample(name, photo, *label.shape)
        certain = (confidence or {}).get(name)
        score = None if certain is None else float(certain.mean() / 255)
        for _ in range(2):  # a killed export writes some images twice
            entry = writer.write(Outgoing(sample, name, label, certain, score), folder)
        entries.append(entry)
    if isinstance(writer, Packing):
        entries = [e for n in range(0, len(entries), 4) for e in writer.pack(folder, n // 4, entries[n : n + 4])]
    writer.finish(folder, entries)
    return list(writer.notes)


def returned(to: str, path: Path, space: LabelSpace = SPACE) -> dict[str, Label]:
    """What comes back, by name."""
    labels: dict[str, Label] = {}
    for one in known_format(to).read(path, space):
        assert one.label.dtype == np.uint8 and one.name not in labels
        labels[one.name] = one.label
    return labels


def same(found: Mapping[str, Label], expected: Mapping[str, Label]) -> bool:
    """True if both have the same images, and every pixel is equal."""
    return found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in expected)


def refusal(to: str, path: Path, space: LabelSpace = SPACE) -> str:
    """The line in which a file is refused."""
    with pytest.raises(BadReturn) as refused:
        returned(to, path, space)
    assert "\n" not in str(refused.value)
    return str(refused.value)
