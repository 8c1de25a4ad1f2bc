"""One look for every page: style, tables and numbers that the report and the comparison share.

A page is one file that opens from disk; nothing in it comes from the network.
"""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Any

import jinja2

from autolabel.manifests import wording

# The folders of an absolute path, of any system, that ends in a name; no address of the web.
_FOLDERS = re.compile(r"(?<![\w./\\])(?:[A-Za-z]:[\\/]|\\\\|~?/)(?:[^\s\\/'\"<>|,;:]+[\\/])*(?=[^\s\\/'\"<>|,;:])")


def without_folders(text: object) -> str:
    """The text with every absolute path cut down to its last name: a page that is sent tells nothing of its machine."""
    words, home = str(text), str(Path.home())
    if len(home) > 1:  # its name may hold spaces, where a path seems to end
        words = re.sub(re.escape(home) + r"(?=[\\/])", "~", words)
    return _FOLDERS.sub("", words)


def render(template: str, **values: Any) -> str:
    """Fill in a template, named by its path in the package: "pipeline/report/page.html.j2".

    Templates extend "manifests/base.html.j2", import "manifests/macros.html.j2" and see the functions of
    `manifests/wording.py` as filters. All values are escaped. A name without a value is an error.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(resource),
    )
    for function in (
        wording.percent, wording.points, wording.probability, wording.duration, wording.size, wording.number,
        wording.counted, wording.dimensions, wording.listed, without_folders,
    ):  # fmt: skip
        environment.filters[function.__name__] = function
    environment.globals["resource"] = resource
    return environment.get_template(template).render(values)


def resource(name: str) -> str:
    """The text of a file of the package, named by its path: "manifests/style.css"."""
    folder, _, file = name.rpartition("/")
    return importlib.resources.files(f"autolabel.{folder.replace('/', '.')}").joinpath(file).read_text(encoding="utf-8")
