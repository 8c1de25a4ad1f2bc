"""Names of teachers on the hub of Hugging Face: found in its cache, pinned to a commit, refused in one line."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from autolabel.manifests import teachers
from autolabel.manifests.teachers import TRANSFORMERS, BadTeacher, TeacherName, TeacherPlace

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": "{}", "model.safetensors": "tensors", "preprocessor_config.json": "[]", "merges.txt": "a b"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of an earlier download of team/net, on a machine without a network."""
    folder = tmp_path / "hub" / "models--team--net"
    snapshot = folder / "snapshots" / COMMIT
    for part in (snapshot, folder / "blobs", folder / "refs"):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for number, (name, content) in enumerate({**FILES, "README.md": "not read"}.items()):
        (folder / "blobs" / str(number)).write_text(content)
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    teachers._snapshot.cache_clear()
    return snapshot


def test_a_name_on_the_hub_is_recorded_with_its_commit(cache: Path) -> None:
    for spelling in ("hf:team/net", "hf:team/net@main", f"hf:team/net@{COMMIT}"):
        name = TeacherName.of(spelling)
        assert str(name.absolute()) == f"hf:team/net@{COMMIT}"
        assert TeacherName.of(str(name.absolute())) == name.absolute()
        assert name.absolute().exists()


def test_the_digest_is_that_of_the_files_wherever_they_lie(cache: Path, tmp_path: Path) -> None:
    own = tmp_path / "elsewhere"
    own.mkdir()
    for name, content in FILES.items():
        (own / name).write_text(content)
    (own / "notes.md").write_text("not read either")
    place = TeacherPlace.of("hf:team/net")
    assert [path.name for path in place.files()] == sorted(FILES)
    assert place.digest() == TeacherPlace.of(own).digest() == TeacherPlace.of(f"hf:{own}").digest()
    (own / "merges.txt").write_text("b a")
    assert place.digest() != TeacherPlace.of(own).digest()


def test_a_folder_of_that_name_goes_first(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "team" / "net").mkdir(parents=True)
    assert TeacherPlace.of("hf:team/net") == TeacherPlace(TRANSFORMERS, Path("team/net"))


def test_only_files_that_are_read_are_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: wanted.update({"name": name} | more) or str(cache)
    )
    assert TeacherPlace.of("hf:team/net@v2").folder() == cache
    patterns = ["*.json", "*.safetensors", "merges.txt"]
    assert wanted == {"name": "team/net", "revision": "v2", "allow_patterns": patterns}


@pytest.mark.parametrize("name", ["team/other", "team/net@v9"])
def test_what_neither_folder_nor_hub_has_is_refused_in_one_line(cache: Path, name: str) -> None:
    with pytest.raises(BadTeacher, match=r"there is no folder team/.*, and the hub of Hugging Face does not give") as e:
        TeacherName.of(f"hf:{name}").digest()
    assert "\n" not in str(e.value)
