"""Folds of a manifest. If this fails, a teacher judges images that it has learnt from."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import autolabel, refused

from autolabel.manifests.fold import fold, part_path, rest_path
from autolabel.manifests.label_space import CAMVID
from autolabel.manifests.samples import Manifest, Sample, load_manifest, save_manifest


def listed(folder: Path, groups: dict[str, int], *, unlabelled: int = 0) -> Path:
    """A manifest of so many samples of each group; the last ones have no label."""
    names = [f"{group}_{n}" for group, count in groups.items() for n in range(count)]
    samples = tuple(
        Sample(
            name, folder / f"{name}.png", 8, 8, group=name.rpartition("_")[0], source="fine", label=folder / f"l{name}"
        )
        for name in names
    )
    bare = tuple(Sample(f"bare{n}", folder / f"bare{n}.png", 8, 8) for n in range(unlabelled))
    save_manifest(folder / "all.parquet", Manifest.of(CAMVID, samples + bare))
    return folder / "all.parquet"


def ids(path: Path) -> list[str]:
    return [s.sample_id for s in load_manifest(path).samples]


def test_parts_share_no_group_and_together_are_all_labelled_samples(tmp_path: Path) -> None:
    manifest = listed(tmp_path, {"a": 3, "b": 7, "c": 2, "d": 4}, unlabelled=2)
    result = fold(manifest, tmp_path / "folds", folds=3)
    assert result.sizes == ((7, 9), (4, 12), (5, 11))
    parts = [ids(part_path(tmp_path / "folds", n)) for n in (1, 2, 3)]
    assert [{name[0] for name in part} for part in parts] == [{"b"}, {"d"}, {"a", "c"}]
    everything = ids(manifest)[:16]
    for n, part in enumerate(parts, start=1):
        assert ids(rest_path(tmp_path / "folds", n)) == [name for name in everything if name not in part]
    assert load_manifest(part_path(tmp_path / "folds", 1)).samples[0] == load_manifest(manifest).samples[3]


def test_fewer_groups_than_folds_are_cut_into_blocks_of_16_and_the_command_says_so(tmp_path: Path) -> None:
    result = autolabel("manifest", "fold", listed(tmp_path, {"a": 70}), "--folds", 2, "-o", tmp_path / "folds")
    assert result.exit_code == 0
    assert "has 1 group, fewer than folds: 16 consecutive samples stay together" in result.output
    part = [int(name[2:]) for name in ids(part_path(tmp_path / "folds", 1))]
    assert part == [*range(16), *range(32, 48), *range(64, 70)]


@pytest.mark.parametrize(
    ("folds", "message"),
    [(1, "--folds 1: expected 2 or more"), (10, "--folds 10: {manifest} has 9 labelled samples, too few for that")],
)
def test_folds_that_cannot_be_made_are_refused_and_nothing_is_written(folds: int, message: str, tmp_path: Path) -> None:
    manifest = listed(tmp_path, {"a": 9})
    said = refused("manifest", "fold", manifest, "--folds", folds, "-o", tmp_path / "folds")
    assert said == message.format(manifest=manifest)
    assert not (tmp_path / "folds").exists()
