"""Numbers as text. If this fails, terminal and page tell the same run with different numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from autolabel.manifests.wording import (
    Table,
    counted,
    dimensions,
    duration,
    kind_and_reason,
    listed,
    number,
    percent,
    points,
    probability,
    reason,
    size,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [
        (0.123, 1, "12.3"), (0.123, 0, "12"), (1.0, 2, "100.00"), (0.0, 1, "0.0"), (None, 1, "–"), (NAN, 1, "–"),
        (0.0004, 1, "< 0.1"), (0.0004, 2, "0.04"), (0.00004, 2, "< 0.01"), (0.004, 0, "< 1"), (0.0006, 1, "0.1"),
    ],
)  # fmt: skip
def test_percent_writes_0_only_for_a_share_of_0(share: float | None, digits: int, text: str) -> None:
    assert percent(share, digits) == text


def test_points_writes_a_change_with_its_sign() -> None:
    assert [points(x) for x in (0.021, -0.021, 0.0, None, NAN)] == ["+2.1", "−2.1", "0.0", "–", "–"]
    assert (points(-0.00004), points(0.00004), points(0.01234, 2)) == ("0.0", "0.0", "+1.23")


def test_durations_bytes_and_counts_have_one_form() -> None:
    assert [duration(s) for s in (0.4, 59.6, 83, 3599.4, 3725, 360_000)] == [
        "0 s", "1 min 00 s", "1 min 23 s", "59 min 59 s", "1 h 02 min", "100 h 00 min",
    ]  # fmt: skip
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 5 * 10**9, 2.5e12, None, NAN)] == [
        "0 B", "999 B", "1.0 kB", "1.2 MB", "5.0 GB", "2.5 TB", "–", "–",
    ]  # fmt: skip
    assert [counted(n, "image") for n in (0, 1, 1234)] == ["0 images", "1 image", "1,234 images"]
    assert counted(2, "class", "classes") == "2 classes"
    assert (number(1_234_567), dimensions(2048, 1024), probability(0.8731)) == ("1,234,567", "2048 × 1024", "0.873")
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


def test_a_table_is_drawn_for_a_terminal() -> None:
    table = Table(
        "of two", ["class", "auto %"], [["road", "40.0"], ["all", "100.0"]], last_is_total=True, notes=["why"]
    )
    assert str(table).splitlines() == [
        "of two",
        " class  auto %",
        " ─────────────",
        " road     40.0",
        " ─────────────",
        " all     100.0",
        "why",
    ]
    assert str(Table("none", ["class", "auto %"], [])).splitlines()[1:] == [" class  auto %", " ─────────────"]


def test_names_from_strangers_reach_neither_the_terminal_nor_the_notebook_as_commands() -> None:
    table = Table("<b>", ["class"], [["\x1b[31m<script>"]], notes=["a & b"])
    assert " \\x1b[31m<script>" in table.lines()
    page = table._repr_html_()
    assert "<caption>&lt;b&gt;</caption>" in page and "&lt;script&gt;" in page and "<p>a &amp; b</p>" in page


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"table 'x': row \['a'\] has 1 cells but the header 2"):
        Table("x", ["one", "two"], [["a"]])


def test_wording_imports_nothing_heavy() -> None:
    code = (
        "import sys, autolabel.manifests.wording;"
        " print([m for m in ('numpy', 'pandas', 'rich', 'jinja2', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "words", "with_kind"),
    [
        (ValueError("a\nb"), "a b", "ValueError: a b"),
        (ValueError(), "an error without words (ValueError)", "an error without words (ValueError)"),
        (KeyError("plan"), "there is no 'plan'", "KeyError: there is no 'plan'"),
        (FileNotFoundError(2, "No such file", "a"), "No such file", "FileNotFoundError: No such file"),
        (OSError("short"), "short", "OSError: short"),
        (RuntimeError("x" * 999), "x" * 300, f"RuntimeError: {'x' * 300}"),
    ],
)
def test_a_reason_has_words(error: Exception, words: str, with_kind: str) -> None:
    assert (reason(error), kind_and_reason(error)) == (words, with_kind)
