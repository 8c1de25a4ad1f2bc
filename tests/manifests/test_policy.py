"""A policy is what the user wrote, or a clear refusal. If this fails, labels are decided by rules nobody asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.policy import PAPER, PRESETS, REFERENCE, Area, Policy, differences, load_policy, policy_of

EVERYTHING = """
name = "all of it"
threshold = 0.6
temperature = 1.5
boundary = 2
smallest_piece = 50
coarse = "teacher-wins"

[thresholds]
pole = 0.3
"traffic light" = 0.35

[area]
rows = [15, 840]
columns = [14, 2030]

[coarse_rules]
truck = "union"
car = "ignore"
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_says_what_counts(tmp_path: Path) -> None:
    assert load_policy(written(tmp_path, EVERYTHING)) == Policy(
        "all of it", 0.6, {"pole": 0.3, "traffic light": 0.35}, 1.5, Area((15, 840), (14, 2030)), 2, 50,
        "teacher-wins", {"truck": "union", "car": "ignore"},
    )  # fmt: skip


def test_an_empty_file_is_the_papers_policy_under_its_own_name(tmp_path: Path) -> None:
    found = load_policy(written(tmp_path, ""))
    assert found.name == "mine"
    assert list(differences(found.to_dict(), PAPER.to_dict())) == []


@pytest.mark.parametrize("policy", PRESETS.values(), ids=PRESETS)
def test_a_policy_comes_back_from_toml_and_json(policy: Policy, tmp_path: Path) -> None:
    assert load_policy(written(tmp_path, policy.to_toml())) == policy
    assert policy_of(policy.to_dict()) == policy


def test_every_rule_of_a_policy_is_the_same_after_writing_and_reading_it(tmp_path: Path) -> None:
    policy = load_policy(written(tmp_path, EVERYTHING))
    text = policy.to_toml({"pole": "precise to 0.95"})
    assert '# precise to 0.95\n"pole" = 0.3' in text and text.count("# precise") == 1
    assert load_policy(written(tmp_path, text)) == policy == policy_of(policy.to_dict())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold = 0.5", "unknown key 'treshold': did you mean 'threshold'?"),
        ("colour = 1", "unknown key 'colour': expected name, threshold"),
        ("threshold = 1.0", "threshold 1: expected a probability in [0, 1)"),
        ("threshold = '0.5'", "threshold = '0.5': expected a number"),
        ("threshold = true", "threshold = True: expected a number"),
        ("threshold = nan", "'threshold' is nan: expected a finite number"),
        (f"threshold = 1{'0' * 400}", "'threshold' is a number of 1329 bits: expected at most 64"),
        (f"[thresholds]\npole = -1{'0' * 400}", "'thresholds', 'pole' is a number of 1329 bits: expected at most 64"),
        ("[outlined]\nroad = 0.9", "unknown key 'outlined'"),
        (f"boundary = {'7' * 5000}", "is no TOML: a number of thousands of digits"),
        ("temperature = 1e400", "'temperature' is inf: expected a finite number"),
        ("a = " + "[" * 60_000, "is nested more than 32 levels deep"),
        ("a = " + "{b = " * 9_000, "is nested more than 32 levels deep"),
        ("a." * 20_000 + "a = 1", "is nested more than 32 levels deep"),
        (f"[{'a . ' * 10_000}a]", "is nested more than 32 levels deep"),
        ("#" * 70_000, "has 70000 bytes: expected at most 65536"),
        (f"[area]\nrows = [0, {10**15}]\ncolumns = [0, 9]", "area rows [0, 1000000000000000]: expected two whole"),
        ("[area]\nrows = [0, 1e300]\ncolumns = [0, 9]", "area rows [0, 1e+300]: expected two whole"),
        ("thresholds = [[1]]", "thresholds = [[1]]: expected a table"),
        ("[coarse_rules]\ncar = {a = 1}", "coarse_rules.car: expected one of ignore"),
        ("threshold = 1979-05-27", "threshold = datetime.date(1979, 5, 27): expected a number"),
        ("[area]\nrows = 'ab'\ncolumns = [0, 1]", "area.rows = 'ab': expected a list"),
        ("thresholds = 0.5", "thresholds = 0.5: expected a table"),
        ("[thresholds]\npole = -0.1", "class 'pole': threshold -0.1: expected a probability in [0, 1)"),
        ("[thresholds]\npole = 'high'", "thresholds.pole = 'high': expected a number"),
        ("temperature = 0", "temperature 0: expected a number from 0.05 to 20"),
        ("boundary = 1.5", "boundary = 1.5: expected a whole number"),
        ("boundary = 65", "boundary 65: expected 0 to 64 pixels"),
        ("smallest_piece = -1", "smallest_piece -1: expected 0 to 1048576 pixels"),
        ("coarse = 'human'", "coarse rule 'human': expected one of ignore, agree, union, human-wins, teacher-wins"),
        ("[coarse_rules]\ncar = 1", "coarse_rules.car: expected one of ignore"),
        ("[area]\nrows = [0, 10]", "area has no columns: expected rows and columns"),
        ("[area]\nrows = [10, 0]\ncolumns = [0, 9]", "area rows [10, 0]: expected two whole numbers"),
        ("[area]\nrows = [0, 1.5]\ncolumns = [0, 9]", "area rows [0, 1.5]: expected two whole numbers"),
        ("[area]\nunit='fractions'\nrows=[0, 1.5]\ncolumns=[0, 1]", "area rows [0, 1.5]: expected two fractions"),
        ("[area]\nunit='inches'\nrows=[0, 1]\ncolumns=[0, 1]", "area unit 'inches': expected pixels or fractions"),
        ("[area]\nrows = [0]\ncolumns = [0, 1]", "area.rows [0]: expected two numbers"),
        ("[area]\nrow = [0, 1]", "unknown key 'area.row': did you mean 'rows'?"),
        ("threshold = ", "Invalid value"),
    ],
)  # fmt: skip
def test_a_wrong_policy_file_is_refused_with_its_name_and_the_reason(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        load_policy(written(tmp_path, text))
    assert str(refused.value).startswith(str(tmp_path / "mine.toml")) and message in str(refused.value)


def test_a_policy_that_is_not_there_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"^policy 'papre' is neither a preset \(paper, .*\) nor a file that exists$"):
        load_policy("papre")


def test_a_class_of_another_label_space_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'poel' is no class of label space 'camvid': did you mean 'pole'\?"):
        Policy(thresholds={"poel": 0.3}).require(CAMVID)
    with pytest.raises(ValueError, match="'truck' is no class of label space 'camvid'"):
        REFERENCE.require(CAMVID)
    REFERENCE.require(CITYSCAPES)


def test_the_reference_preset_has_an_area_of_rows_15_to_839_and_columns_14_to_2029() -> None:
    assert REFERENCE.area is not None
    assert REFERENCE.area.box(1024, 2048) == (slice(15, 840), slice(14, 2030))
    assert REFERENCE.area.box(512, 1024) == (slice(8, 420), slice(7, 1015))  # scaled with the image


def test_an_area_outside_the_image_is_refused() -> None:
    assert Area((0, 10), (0, 20)).box(10, 20) == (slice(0, 10), slice(0, 20))
    with pytest.raises(ValueError, match="leaves an image of 10 rows and 19 columns: give it in fractions"):
        Area((0, 10), (0, 20)).box(10, 19)


@pytest.mark.parametrize("levels", [3, 8, 20, 32])
def test_kept_levels_hold_every_threshold_in_force_exactly(levels: int) -> None:
    policy = Policy(threshold=0.517, thresholds={"pole": 0.3})
    edges = policy.edges(CAMVID, levels)
    assert len(edges) == levels - 1 and list(edges) == sorted(set(edges))
    assert {0.517, 0.3} <= set(edges)
    assert policy.edges(CAMVID) == (0.3, 0.517)


def test_more_thresholds_than_levels_are_refused() -> None:
    policy = Policy(thresholds={"pole": 0.3, "sign": 0.4})
    with pytest.raises(
        ValueError, match=r"keep-confidence 3: policy 'threshold 0\.5' has 3 different thresholds, which"
    ):
        policy.edges(CAMVID, 3)
