"""`import autolabel as al` gives these names and loads nothing heavy. If this fails, a notebook of a user breaks."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, photograph
from test_arrows import HEAVY

import autolabel as al
from autolabel.manifests.samples import load_manifest, save_manifest

# A later issue extends this list on purpose; a name that goes, or changes its meaning, goes into CHANGELOG.md.
FUNCTIONS = [
    "adopt", "audit", "coarsen", "compare", "count_polygons", "evaluate", "export", "export_model", "find_errors",
    "focus", "fuse", "generate", "import_corrections", "load_manifest", "load_teacher", "look", "open_run",
    "ray_dataset", "relabel", "report", "review", "scan", "summarise", "train",
]  # fmt: skip
CLASSES = ["LabelJob", "LabelSpace", "Manifest", "ManifestDataset", "Model", "Policy", "Run", "Teacher", "TrainJob"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_public_names_are_these() -> None:
    assert sorted(al.__all__) == sorted([*FUNCTIONS, *CLASSES, "__version__"]) == sorted(dir(al))


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_a_public_name_is_on_a_page(name: str) -> None:
    pages = [path.name for path in PAGES if re.search(rf"\bal\.{name}\b", path.read_text(encoding="utf-8"))]
    assert pages


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_the_one_of_its_room(name: str) -> None:
    found = getattr(al, name)
    assert inspect.isclass(found) and found.__name__ == name and found.__doc__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_documented_and_takes_at_most_two_arguments_by_position(name: str) -> None:
    function = getattr(al, name)
    assert re.match(r"[A-Z][a-z]+ ", function.__doc__)
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 2


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'autolabel' has no attribute 'generat'"):
        _ = al.generat


def test_the_import_loads_nothing_heavy() -> None:
    code = f"import sys, autolabel as al; dir(al); al.LabelJob; print([m for m in {HEAVY} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert printed.stdout.strip() == "[]"


def test_the_version_is_that_of_the_installed_package() -> None:
    from importlib.metadata import version

    assert al.__version__ == version("autolabel")


def test_the_package_is_typed_for_its_users() -> None:
    assert (Path(al.__file__).parent / "py.typed").is_file()


def test_python_m_autolabel_is_the_command() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "autolabel", "--version"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert printed.stdout == f"autolabel, version {al.__version__}\n"


def test_the_lines_of_python_in_the_readme_run(
    city: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block and block[1].count("steps=2000") == 1
    monkeypatch.chdir(tmp_path)
    for name in ("fine.parquet", "val.parquet"):
        save_manifest(Path(name), load_manifest(city / name))
    photograph(city, Path("drive"), ["drive_000019", "drive_000020"])
    shutil.copyfile(teacher, "teacher.pt")
    exec(block[1].replace("steps=2000", "steps=1"), {})
    assert capsys.readouterr().out == f"{al.summarise(tmp_path / 'runs' / 'auto')}\n"
    assert sorted(al.open_run("runs/auto").labels) == ["drive_000019", "drive_000020"]
    assert Path("runs/auto/report/index.html").is_file()
    assert len(al.load_manifest("fused.parquet").samples) == 8
    assert Path("student/best.pt").is_file()
    assert "2 samples, 2 labelled, 0 quarantined" in al.open_run("runs/auto")._repr_html_()


def test_a_manifest_shows_itself_in_a_notebook(city: Path) -> None:
    assert "<table>" in al.load_manifest(city / "fine.parquet")._repr_html_()


def test_a_mistake_in_a_setting_is_named() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        al.train("fine.parquet", val="val.parquet", out="student", step=3)
    with pytest.raises(ValueError, match="neither a preset"):
        al.generate("fine.parquet", teacher="teacher.pt", out="run", policy="human-fist")


def test_a_scan_warns_of_what_is_suspicious_and_strict_refuses_it(city: Path, tmp_path: Path) -> None:
    photograph(city, tmp_path / "drive", ["a_1", "a_2"])
    shutil.copy(tmp_path / "drive" / "a_1.png", tmp_path / "drive" / "b_1.png")
    with pytest.warns(UserWarning, match="^2 photographs are copies of one another"):
        assert len(al.scan(tmp_path / "drive", label_space="camvid").samples) == 3
    with pytest.raises(ValueError, match=r"^suspicious: 2 photographs are copies of one another"):
        al.scan(tmp_path / "drive", tmp_path / "m.parquet", label_space="camvid", strict=True)
    assert not (tmp_path / "m.parquet").exists()
