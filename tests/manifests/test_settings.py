"""Options come from the fields of a job. If this fails, the help says one default and the program uses another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from autolabel.manifests.settings import (
    build_job,
    job_fields,
    parse_names,
    parse_numbers,
    parse_pair,
    parse_share,
    require_choices,
    setting,
)


@dataclass(frozen=True)
class Part:
    """A nested dataclass."""

    limit: int | None = setting(None, "Label the first N samples only.", group="what", metavar="N")


@dataclass(frozen=True)
class Work:
    """A job as the rooms write them."""

    source: str
    store: str = setting("zarr", "The format of the labels.", group="how", choices=("zarr", "png"))
    part: Part = Part()
    flip: bool = setting(False, "Average with the mirrored image.", group="how", flag="--mirror")

    def __post_init__(self) -> None:
        require_choices(self)


def test_the_settings_of_a_job_and_of_its_nested_parts_come_in_order() -> None:
    settings = {field.path: (field.flag, field.type, field.default) for field in job_fields(Work)}
    assert settings == {
        ("store",): ("--store", str, "zarr"),
        ("part", "limit"): ("--limit", int | None, None),
        ("flip",): ("--mirror", bool, False),
    }
    assert list(settings) == [("store",), ("part", "limit"), ("flip",)]


def test_a_setting_tells_its_kind_and_its_help_with_the_default() -> None:
    assert [(field.kind, field.help) for field in job_fields(Work)] == [
        (str, "The format of the labels. [default: zarr]"),
        (int, "Label the first N samples only."),
        (bool, "Average with the mirrored image."),
    ]


def test_flat_values_find_their_nested_part_and_the_rest_keeps_its_defaults() -> None:
    assert build_job(Work, {"source": "a", "limit": 3}) == Work("a", part=Part(3))
    assert build_job(Work, {"source": "a", "part": Part(4), "flip": True}) == Work("a", part=Part(4), flip=True)
    with pytest.raises(TypeError, match="limits"):
        build_job(Work, {"source": "a", "limits": 3})


def test_a_value_that_is_no_choice_is_named() -> None:
    with pytest.raises(ValueError, match="store 'tiff': expected zarr or png"):
        Work("a", store="tiff")


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(ValueError, match="group 'other': expected what, how, machine, rarely"):
        setting(1, "Help.", group="other")


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_numbers, "0.5,1,2", (0.5, 1.0, 2.0)),
        (parse_names, "pole, traffic sign", ("pole", "traffic sign")),
        (parse_pair("x", "HxW"), "320X480", (320, 480)),
        (parse_share, "5%", 0.05),
        (parse_share, "0.05", 0.05),
    ],
)
def test_text_options_are_parsed(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_numbers, "one", "expected numbers separated by commas, such as 0.5,1,2"),
        (parse_pair("/", "I/N, such as 2/8"), "2", "expected I/N, such as 2/8"),
        (parse_share, "120%", "expected a share between 0 and 1, such as 5% or 0.05"),
        (parse_share, "some", "expected a share between 0 and 1, such as 5% or 0.05"),
    ],
)
def test_text_that_cannot_be_parsed_is_refused_with_what_was_expected(
    parse: Callable[[str], object], text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse(text)
