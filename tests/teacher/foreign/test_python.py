"""A class of the user's own: whatever is wrong with it is said in one line that names the user's file, not ours."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import autolabel, refused

from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import fingerprints, load_manifest
from autolabel.manifests.teachers import BadTeacher, TeacherPlace
from autolabel.teacher.checkpoints import fingerprint_tensor
from autolabel.teacher.foreign import python

CPU = torch.device("cpu")
GOOD = """
import torch

class Teacher:
    classes = ["road", "car"]

    def predict(self, images):
        return torch.cat([images[:, :1], images[:, 1:2]], dim=1).float()
"""


def written(folder: Path, text: str, name: str = "my_teacher.py") -> TeacherPlace:
    (folder / name).write_text(text)
    return TeacherPlace.of(f"{folder / name}:Teacher")


def test_defaults_fill_what_a_class_does_not_say(tmp_path: Path) -> None:
    place = written(tmp_path, GOOD)
    model = python.load(place, device=CPU)
    assert python.classes(place) == ("road", "car") == model.classes
    assert (model.gives, model.fixed_size, model.trained_on) == ("logits", None, None)
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    assert torch.equal(model.predict(images), images[:, :2].float())


@pytest.mark.parametrize(
    ("constructor", "device"),
    [
        ("def __init__(self): self.device = None", None),
        ("def __init__(self, device): self.device = device", CPU),
        ("def __init__(self, where): self.device = where", CPU),
        ("def __init__(self, weights='w.pt', device='cuda'): self.device = device", CPU),
        ("def __init__(self, weights='w.pt'): self.device = None", None),
        ("def __init__(self, *, device): self.device = device", CPU),
    ],
)
def test_a_class_is_made_with_the_device_where_it_asks_for_one(
    constructor: str, device: torch.device | None, tmp_path: Path
) -> None:
    place = written(tmp_path, GOOD + f"\n    {constructor}\n")
    model = python.load(place, device=CPU)
    assert isinstance(model, python.PythonModel)
    assert model.own.device == device


def test_a_module_of_torch_is_put_on_the_device_and_into_evaluation(tmp_path: Path) -> None:
    text = GOOD.replace("class Teacher:", "class Teacher(torch.nn.Module):")
    model = python.load(written(tmp_path, text), device=CPU)
    assert isinstance(model, python.PythonModel)
    assert model.own.training is False


def test_modules_beside_a_file_are_its_own(tmp_path: Path) -> None:
    """Two teachers each have a `helper.py`."""
    for name, colour in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helper_of_teachers.py").write_text(f"NUMBER = {colour}")
        text = "import helper_of_teachers\n" + GOOD.replace(
            "[images[:, :1]", "[images[:, :1] * helper_of_teachers.NUMBER"
        )
        written(tmp_path / name, text)
    models = [python.load(TeacherPlace.of(f"{tmp_path / n}/my_teacher.py:Teacher"), device=CPU) for n in ("a", "b")]
    ones = torch.ones(1, 3, 2, 2, dtype=torch.uint8)
    assert [int(model.predict(ones)[0, 0, 0, 0]) for model in models] == [1, 2]  # type: ignore[index]
    assert not [path for path in sys.path if path.startswith(str(tmp_path))]


def test_a_file_runs_once_in_a_process(tmp_path: Path) -> None:
    text = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n" + GOOD
    place = written(tmp_path, text)
    python.classes(place)
    python.load(place, device=CPU)
    assert (tmp_path / "runs").read_text() == "x"


def test_the_images_that_it_has_seen_are_those_of_the_manifest_that_it_names(city: Path, tmp_path: Path) -> None:
    text = GOOD + f"\n    trained_on = {str(city / 'fine.parquet')!r}\n"
    marks = fingerprint_tensor(fingerprints(load_manifest(city / "fine.parquet").samples))
    assert torch.equal(python.load(written(tmp_path, text), device=CPU).trained_on, marks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", " has no class 'Teacher': expected a class with classes and predict"),
        ("class Taecher: pass", " has no class 'Teacher': did you mean "),
        ("Teacher = 3", " has no class 'Teacher': expected a class with classes and predict"),
        ("def f(:", " is no Python of this version: invalid syntax ("),
        (
            "import no_such_package_here\n" + GOOD,
            ":Teacher cannot be loaded: ModuleNotFoundError: No module named 'no_",
        ),
        ("import sys; sys.exit(3)", ":Teacher cannot be loaded: SystemExit: 3 ("),
        (GOOD + "\n    def __init__(self): raise KeyError('weights')", ":Teacher cannot be made: KeyError: "),
        (
            GOOD + "\n    def __init__(self, a, b): pass",
            ":Teacher needs a, b to be made: expected Teacher(device) or Te",
        ),
        (GOOD.replace("classes =", "names ="), ":Teacher has no classes: expected their names by channel, such as cl"),
        (GOOD.replace('"car"', '"road"'), ":Teacher names the class 'road' twice: expected each name once"),
        (GOOD.replace('"car"', "3"), ":Teacher is ['road', 3]: expected names by channel, such as ['road', 'car']"),
        (GOOD.replace('["road", "car"]', '"road"'), ":Teacher is 'road': expected names by channel, such as ['road'"),
        (GOOD.replace('["road", "car"]', "[]"), ":Teacher names no classes: expected their names by channel"),
        (GOOD.replace("def predict", "def forward"), ":Teacher has no method predict: expected predict(images), see d"),
        (GOOD + "\n    gives = 'scores'", ":Teacher gives 'scores': expected 'logits', 'probabilities', 'ids'"),
        (GOOD + "\n    fixed_size = 512", ":Teacher is 512: expected height and width in pixels, or None"),
        (GOOD + "\n    trained_on = 'no.parquet'", ":Teacher was trained on "),
        (
            GOOD + "\n    trained_on = 7",
            ":Teacher is 7: expected the path of a manifest, int64 marks of shape (N,), or",
        ),
    ],
)
def test_what_is_wrong_with_a_class_is_said_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    place = written(tmp_path, text)
    with pytest.raises(BadTeacher, match=re.escape(f"{tmp_path / 'my_teacher.py'}{message}")) as refusal:
        python.load(place, device=CPU)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_and_a_file_without_a_class_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(BadTeacher, match=r"no\.py does not exist: expected a file of Python with the class Teacher$"):
        python.classes(TeacherPlace.of(tmp_path / "no.py:Teacher"))
    written(tmp_path, "raise SystemExit\nclass Net: pass")
    with pytest.raises(BadTeacher, match=r"is code, which runs only if a class is named: type .*my_teacher\.py:Net$"):
        python.classes(TeacherPlace.of(tmp_path / "my_teacher.py"))


# --- a run ------------------------------------------------------------------------------------------------------------

# Confident in the brightest channel; the classes of the drawn city are Cityscapes'.
OWN = """
import torch
from helper_of_mine import SCALE

class Teacher:
    gives = "logits"
    trained_on = {fine!r}

    def __init__(self, device):
        from autolabel.manifests.label_space import CITYSCAPES
        self.classes = CITYSCAPES
        self.weights = torch.linspace(-1, 1, 3 * 19, device=device).sin().view(19, 3) * SCALE

    def predict(self, images):
        {line}
        return torch.einsum("kc,bchw->bkhw", self.weights, images.float() / 255)
"""


def own_teacher(folder: Path, city: Path, line: str = "pass") -> str:
    (folder / "helper_of_mine.py").write_text("SCALE = 9")
    (folder / "my_teacher.py").write_text(OWN.format(fine=str(city / "fine.parquet"), line=line))
    return f"{folder / 'my_teacher.py'}:Teacher"


def test_a_class_of_ones_own_labels(city: Path, tmp_path: Path) -> None:
    teacher = own_teacher(tmp_path, city)
    result = autolabel(
        "generate", city / "coarse.parquet", "--teacher", teacher, "--out", tmp_path / "run", "--limit", 2,
        "--device", "cpu", "--engine", "local",
    )  # fmt: skip
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("line", ["raise KeyError('mine')", "return images.float()", "return None"])
def test_an_exception_of_the_users_code_ends_the_command_with_its_file_and_line(
    line: str, city: Path, tmp_path: Path
) -> None:
    teacher = own_teacher(tmp_path, city, line)
    message = refused("generate", city / "coarse.parquet", "--teacher", teacher, "--out", tmp_path / "run")
    assert message.startswith(f"{teacher} ")
    if "raise" in line:
        assert message.endswith(
            f"cannot predict an image: KeyError: there is no 'mine' ({tmp_path / 'my_teacher.py'}, line 15)"
        )


def test_a_run_from_a_stranger_runs_no_code(city: Path, tmp_path: Path) -> None:
    """Its run.json names a class, and the file lies there with the sha256 that it records."""
    marker = tmp_path / "ran"
    teacher = own_teacher(tmp_path, city, f"open({str(marker)!r}, 'w')")
    made = autolabel(
        "generate", city / "fine.parquet", "--teacher", teacher, "--out", tmp_path / "run", "--limit", 1,
        "--device", "cpu", "--engine", "local",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    marker.unlink()
    line = f"{teacher} is code, which runs only if you name it"
    assert Run.open(tmp_path / "run").find_teacher() == (None, line)
    assert line in refused("audit", tmp_path / "run", "--truth", city / "fine.parquet")
    assert not marker.exists()
