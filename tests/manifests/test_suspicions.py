"""Labels that can hardly be meant as they were read do not pass in silence, and good ones raise no alarm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import autolabel, refused
from numpy.typing import NDArray
from PIL import Image
from tiny import refusal

from autolabel.manifests.label_space import CAMVID, CITYSCAPES, LabelSpace
from autolabel.manifests.scan import scan
from autolabel.manifests.scenes import draw_scene

Labels = NDArray[np.uint8]
HEIGHT, WIDTH = 48, 64
DICE = np.random.default_rng(7)


def street(seed: int) -> Labels:
    """CamVid ids: sky above, then houses and trees, a road with a car, a pole and a sign; each picture another."""
    dice = np.random.default_rng(seed)
    label = np.full((HEIGHT, WIDTH), 1, np.uint8)
    label[: 10 + dice.integers(4)] = 0
    label[12:28, 40 + dice.integers(4) :] = 5
    label[28:] = 3
    label[28:, :8] = 4
    label[30:38, 20 + dice.integers(8) :][:, :14] = 8
    label[10:30, 30 + dice.integers(4)] = 2
    label[12:15, 10:14] = 6
    label[:2, -3:] = 255
    return label


def photograph(seed: int) -> Labels:
    return np.random.default_rng(100 + seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def write(
    root: Path,
    change: Callable[[Labels], Any] = lambda label: label,
    *,
    count: int = 6,
    picture: Callable[[int], Any] = photograph,
) -> Path:
    """A folder of images beside labels, the labels changed in some way."""
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(picture(i)).save(root / f"images/{i}.png")
        Image.fromarray(np.asarray(change(street(i)), np.uint8)).save(root / f"labels/{i}.png")
    return root


def but_ignored(change: Callable[[NDArray[np.int64]], Any]) -> Callable[[Labels], Any]:
    """Change all ids but 255."""
    return lambda label: np.where(label == 255, 255, change(label.astype(np.int64)))


def suspicions(root: Path, space: LabelSpace = CAMVID, **options: Any) -> list[str]:
    return list(scan(root, label_space=space, **{"label_ids": "train", **options})[1].suspicions)


# --- no false alarm ---------------------------------------------------------------------------------------------------


def test_good_labels_raise_no_suspicion(tmp_path: Path) -> None:
    assert suspicions(write(tmp_path)) == []
    assert suspicions(tmp_path, label_ids=None) == []


def test_drawn_streets_raise_no_suspicion(tmp_path: Path) -> None:
    for name in ("images", "labels", "source"):
        (tmp_path / name).mkdir()
    for seed in range(4):
        scene = draw_scene(seed, height=80, width=160)
        Image.fromarray(scene.image).save(tmp_path / f"images/{seed}.png")
        Image.fromarray(scene.fine).save(tmp_path / f"source/{seed}.png")
        Image.fromarray(np.frombuffer(CITYSCAPES.train_ids, np.uint8)[scene.fine]).save(tmp_path / f"labels/{seed}.png")
    assert suspicions(tmp_path, CITYSCAPES, label_ids=None) == []
    assert suspicions(tmp_path / "images", CITYSCAPES, labels=tmp_path / "source", label_ids="source") == []
    assert "they are source ids of the label space: try --label-ids source" in refusal(
        tmp_path / "images", labels=tmp_path / "source", label_space=CITYSCAPES
    )


def test_classes_that_happen_to_be_missing_raise_no_suspicion(tmp_path: Path) -> None:
    root = write(tmp_path, lambda label: np.where((label == 1) | (label == 0), 255, label))  # neither sky nor houses
    assert suspicions(root) == []


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(
            but_ignored(lambda ids: ids + 1),
            "class 'sky' (train id 0) is in none of 6 labels, and the next one is: do the ids begin at 1?"
            " They have to begin at 0",
            id="ids begin at 1",
        ),
        pytest.param(but_ignored(lambda ids: (ids - 1) % 256), "class 'pole' (train id 2) covers", id="one too low"),
        pytest.param(but_ignored(lambda ids: (ids + 1) % 11), "class 'pole' (train id 2) covers", id="ids rolled"),
        pytest.param(but_ignored(lambda ids: 10 - ids), "class 'pedestrian' (train id 9) covers", id="ids inverted"),
        pytest.param(
            lambda label: label[::-1],
            "the sky lies below the road in 6 of the 6 labels that have both: are the ids inverted or shifted, or the"
            " labels upside down?",
            id="upside down",
        ),
        pytest.param(
            but_ignored(lambda ids: np.array([3, 1, 2, 0, *range(4, 256)])[ids]),
            "the sky lies below the road in 6 of the 6 labels",
            id="sky and road swapped",
        ),
    ],
)  # fmt: skip
def test_shifted_and_inverted_ids_are_suspicious(tmp_path: Path, change: Callable[[Labels], Any], found: str) -> None:
    assert any(text.startswith(found) for text in suspicions(write(tmp_path, change)))


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        pytest.param(lambda label: np.where(label == 8, 11, label), "do the ids begin at 1? They have to begin at 0",
                     id="one past the last"),
        pytest.param(lambda label: 255 - label, "are the ids inverted (255 - id)?", id="255 - id"),
        pytest.param(lambda label: photograph(0)[..., 0],
                     "so many values are those of a photograph, and not of a label", id="a grey photograph"),
    ],
)  # fmt: skip
def test_ids_that_are_refused_come_with_what_they_look_like(
    tmp_path: Path, change: Callable[[Labels], Any], hint: str
) -> None:
    message = refusal(write(tmp_path, change), label_space=CAMVID)
    assert f"; {hint}: repair or remove it, or name the right label space and ids" in message


BACKGROUND = LabelSpace.from_json(
    json.dumps(
        {
            "name": "mine",
            "labels": [
                {"name": "background", "color": [0, 0, 0], "evaluate": False},
                *({"name": c.name, "color": c.colour} for c in CAMVID.classes),
            ],
        }
    )
)


@pytest.mark.parametrize(
    ("background", "train", "source"),
    [(2, "4 is 'pavement'", "'road'"), (20, "0 is 'sky'", "ignored"), (30, "0 is 'sky'", "ignored")],
)
def test_ids_that_fit_both_kinds_have_to_be_named(tmp_path: Path, background: int, train: str, source: str) -> None:
    """Ids count from 0 = background, which is not learnt: read as train ids, every class would be its neighbour."""

    def change(label: Labels) -> Labels:
        ids = np.where(label == 255, 255, label + 1)
        ids[:background] = 0
        return ids.astype(np.uint8)

    root = write(tmp_path, change)
    (found, *_) = suspicions(root, BACKGROUND, label_ids=None)
    assert found == (
        f"nobody said which ids the labels hold, and both kinds fit: as train ids {train}, as source ids of label space"
        f" 'mine' it is {source}; name one with --label-ids train or --label-ids source"
    )
    assert not any("nobody said" in text for text in suspicions(root, BACKGROUND, label_ids="train"))
    assert suspicions(root, BACKGROUND, label_ids="source") == []


def test_source_ids_of_cityscapes_below_19_are_suspicious_and_train_ids_are_not(tmp_path: Path) -> None:
    source = np.array([11, 11, 17, 7, 8, 0, 13, 1, 12, 4, 3], np.uint8)  # for the classes of CamVid, no id above 18
    root = write(tmp_path / "a", lambda label: np.where(label == 255, 0, source[np.minimum(label, 10)]))
    assert suspicions(root, CITYSCAPES, label_ids=None)[0].startswith("nobody said which ids the labels hold")
    train = np.array([10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 12], np.uint8)
    root = write(tmp_path / "b", lambda label: np.where(label == 255, 255, train[np.minimum(label, 10)]))
    assert suspicions(root, CITYSCAPES, label_ids=None) == []


# --- labels that say nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(lambda label: np.full_like(label, 3), "6 of 6 labels are of nothing but 'road', such as ",
                     id="one constant class"),
        pytest.param(lambda label: np.where(label == 3, 255, 0), "6 of 6 labels are of nothing but 'sky', such as ",
                     id="a mask of 0 and 255"),
        pytest.param(lambda label: np.full_like(label, 255), "6 of 6 labels are ignored altogether (255), such as ",
                     id="all 255"),
        pytest.param(lambda label: street(0), "6 labels are the same to the last pixel, such as ",
                     id="one label for all"),
    ],
)  # fmt: skip
def test_labels_that_say_nothing_are_suspicious(tmp_path: Path, change: Callable[[Labels], Any], found: str) -> None:
    assert [text for text in suspicions(write(tmp_path, change)) if text.startswith(found)]


def test_a_third_of_empty_labels_is_suspicious_and_one_of_six_is_not(tmp_path: Path) -> None:
    root = write(tmp_path)
    empty = Image.new("L", (WIDTH, HEIGHT), 255)
    empty.save(root / "labels/0.png")
    assert suspicions(root) == []
    empty.save(root / "labels/1.png")
    assert suspicions(root) == [
        f"2 of 6 labels are ignored altogether (255), such as {root}/labels/0.png: nothing can be learnt from them; is"
        " the label space the right one?"
    ]


# --- photographs that are none ----------------------------------------------------------------------------------------


def test_a_label_that_is_its_own_image_is_suspicious(tmp_path: Path) -> None:
    root = write(tmp_path, picture=lambda i: np.dstack([street(i)] * 3))
    assert suspicions(root) == [
        f"6 of 6 photographs are the very pixels of their labels, such as {root}/images/0.png: leave out what is no"
        " photograph"
    ]


def test_an_image_that_was_given_as_its_coloured_label_is_suspicious(tmp_path: Path) -> None:
    colours = np.array([*(c.colour for c in CAMVID.classes), *[(0, 0, 0)] * 245], np.uint8)
    root = write(tmp_path, lambda label: colours[label])
    shutil.rmtree(root / "images")
    shutil.copytree(root / "labels", root / "images")
    (found,) = suspicions(root, label_ids="color")
    assert found.startswith("6 of 6 photographs are the very pixels of their labels")


@pytest.mark.parametrize(
    ("picture", "found"),
    [
        pytest.param(lambda i: np.full((HEIGHT, WIDTH, 3), 40 * i, np.uint8), "of one colour", id="one colour"),
        pytest.param(
            lambda i: (photograph(i) % 5), "of one colour", id="black with a little noise"
        ),
        pytest.param(
            lambda i: np.array([*(c.colour for c in CAMVID.classes), *[(0, 0, 0)] * 245], np.uint8)[street(i)],
            "of at most 32 colours, as label maps and masks are", id="a drawn label map",
        ),
        pytest.param(
            lambda i: np.dstack([np.where(street(i) == 3, 255, 0)] * 3).astype(np.uint8),
            "of at most 32 colours, as label maps and masks are", id="a mask",
        ),
    ],
)  # fmt: skip
def test_photographs_that_are_none_are_suspicious(tmp_path: Path, picture: Callable[[int], Any], found: str) -> None:
    root = write(tmp_path, picture=lambda i: picture(i) if i < 2 else photograph(i))
    assert suspicions(root) == [
        f"2 of 6 photographs are {found}, such as {root}/images/0.png: leave out what is no photograph"
    ]


def test_copies_and_thumbnails_are_suspicious(tmp_path: Path) -> None:
    for i in range(5):
        Image.fromarray(photograph(i)).save(tmp_path / f"{i}.png")
    shutil.copy(tmp_path / "3.png", tmp_path / "z.png")
    Image.fromarray(photograph(9)[:9, :12]).save(tmp_path / "small.png")
    assert suspicions(tmp_path) == [
        f"1 of 7 images is 25 times smaller than the others, such as {tmp_path}/small.png: leave out thumbnails",
        f"2 photographs are copies of one another, such as {tmp_path}/3.png and {tmp_path}/z.png: copies in training"
        " and validation are a leak",
    ]


def test_files_of_one_length_and_equal_ends_are_no_copies(tmp_path: Path) -> None:
    """BMPs of one size, whose first and last rows are equal: only a file that is equal throughout is a copy."""
    for i in range(3):
        picture = photograph(0)
        picture[20:28] = photograph(i)[20:28]
        big = np.repeat(np.repeat(picture, 3, axis=0), 3, axis=1)
        Image.fromarray(big).save(tmp_path / f"{i}.bmp")
    assert suspicions(tmp_path) == []


# --- the account, and --strict ----------------------------------------------------------------------------------------


def test_the_account_ends_with_classes_left_aside_and_suspicions(tmp_path: Path) -> None:
    root = write(tmp_path / "data", lambda label: label[::-1], count=3)
    (root / "images/notes.txt").write_text("rain")
    _, account = scan(root, label_space=CAMVID, label_ids="train")
    classes, aside, suspicious = account.tables()
    skies = sum(int((street(i) == 0).sum()) for i in range(3))
    assert classes.rows[0] == ["sky", "3", f"{skies:,}", f"{100 * skies / (3 * HEIGHT * WIDTH):.1f} %"]
    assert [row[0] for row in classes.rows] == [*CAMVID.names, "ignored"]
    assert sum(int(row[2].replace(",", "")) for row in classes.rows) == 3 * HEIGHT * WIDTH
    assert classes.notes == ["3 classes in no label"]
    assert aside.rows == [["other files, .txt", "1", f"{root}/images/notes.txt"]]
    assert suspicious.title == "SUSPICIOUS: 1 thing to look at before you go on"
    assert suspicious.lines() == [f"  - {text}" for text in account.suspicions]


def test_strict_refuses_what_is_suspicious_and_writes_nothing(tmp_path: Path) -> None:
    bad, good = write(tmp_path / "bad", lambda label: label[::-1]), write(tmp_path / "good")
    out = tmp_path / "m.parquet"
    options = ("--label-space", "camvid", "-o", out, "--strict")
    line = refused("manifest", "scan", bad, *options)
    assert line.startswith("suspicious: the sky lies below the road in 6 of the 6 labels that have both")
    assert line.endswith("; scan without --strict to go on all the same")
    assert not out.exists()
    done = autolabel("manifest", "scan", bad, *options[:-1])
    assert done.exit_code == 0 and out.exists() and "SUSPICIOUS: 1 thing" in done.stdout
    out.unlink()
    assert autolabel("manifest", "scan", good, *options).exit_code == 0 and out.exists()


def test_only_some_photographs_of_many_are_looked_at_and_the_account_says_so(tmp_path: Path) -> None:
    for i in range(70):
        Image.fromarray(photograph(i)[:8, :8]).save(tmp_path / f"{i:02}.png")
    _, account = scan(tmp_path, label_space=CAMVID)
    assert account.looked_at == 64
    assert "  The pixels of 64 photographs were looked at, spread over all." in account.lines()
