"""Documents from strangers: whatever they hold, the reader gives what was asked for, or one clear error.

If this fails, a run, a policy or a label space that somebody has sent ends in a traceback, or is misread.
"""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from autolabel.manifests.documents import BadDocument, json_of, read_csv, read_json, read_toml, shaped, toml_of


@dataclass(frozen=True)
class Inner:
    share: float | None
    pair: tuple[int, int]


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    rows: Sequence[Inner] = ()
    by_name: Mapping[str, float] = field(default_factory=dict)
    place: Path | None = None
    flag: bool = False

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("name 'bad': expected another")


INNER = {"share": 1, "pair": [1, 2]}


def test_a_document_becomes_the_type_that_was_asked_for() -> None:
    text = json.dumps({"name": "a", "inner": INNER, "rows": [INNER], "by_name": {"x": 2}, "place": "b/c", "flag": True})
    found = json_of(text, Outer, name="f")
    assert found == Outer("a", Inner(1.0, (1, 2)), [Inner(1.0, (1, 2))], {"x": 2.0}, Path("b/c"), True)
    assert isinstance(found.inner.share, float) and isinstance(found.inner.pair, tuple)
    assert json_of(json.dumps({"name": "a", "inner": {"share": None, "pair": [0, 0]}}), Outer, name="f").rows == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, "f, 'name' is 5: expected a text"),
        ({"name": None}, "f, 'name' is null: expected a text"),
        ({"name": "bad"}, "f: name 'bad': expected another"),
        ({"inner": []}, "f, 'inner' is []: expected an object"),
        ({"inner": {"share": 1}}, "f, 'inner' has no 'pair'"),
        ({"inner": {"share": "1", "pair": [1, 2]}}, """f, 'inner', 'share' is "1": expected a number"""),
        ({"inner": {"share": True, "pair": [1, 2]}}, "f, 'inner', 'share' is true: expected a number"),
        ({"inner": {"share": 1, "pair": [1]}}, "f, 'inner', 'pair' is [1]: expected a list of 2"),
        ({"inner": {"share": 1, "pair": [1, 2.0]}}, "f, 'inner', 'pair'[1] is 2.0: expected a whole number"),
        ({"rows": {}}, "f, 'rows' is {}: expected a list"),
        ({"rows": [INNER, 5]}, "f, 'rows'[1] is 5: expected an object"),
        ({"by_name": {"x": "y"}}, """f, 'by_name', 'x' is "y": expected a number"""),
        ({"by_name": [["x", 1]]}, """f, 'by_name' is [["x", 1]]: expected an object"""),
        ({"name": "a\ud800"}, """f, 'name' is "a\\ud800": expected a text"""),
        ({"by_name": {"\udcff": 1}}, """f, 'by_name', key is "\\udcff": expected a text"""),
        ({"place": 7}, "f, 'place' is 7: expected a path"),
        ({"place": "a\0b"}, """f, 'place' is "a\\u0000b": expected a path"""),
        ({"place": ""}, """f, 'place' is "": expected a path"""),
        ({"flag": 1}, "f, 'flag' is 1: expected true or false"),
        ({"nmae": 1}, "f has an unknown key 'nmae': did you mean 'name'?"),
        ({"name": "x" * 99}, None),
        ({"rows": "x" * 99}, f"""f, 'rows' is "{"x" * 56}...: expected a list"""),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_place(change: dict[str, Any], message: str | None) -> None:
    text = json.dumps({"name": "a", "inner": INNER} | change)
    if message is None:
        assert json_of(text, Outer, name="f").name == change["name"]
        return
    with pytest.raises(BadDocument) as refusal:
        json_of(text, Outer, name="f")
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "f is empty"),
        (b" \n", "f is empty"),
        (b"{", "f is no JSON, or cut off: "),
        (b"5 6", "f is no JSON, or cut off: "),
        (b"\xff\xfe5\0", "f is no UTF-8 text: byte 0xff at 0"),
        (b"[\"a\xc3\"]", "f is no UTF-8 text: byte 0xc3 at 3"),
        (b"[" * 33 + b"]" * 33, "f is nested more than 32 levels deep"),
        (b"[" * 1_000_000, "f is nested more than 32 levels deep"),
        (b"1" + b"0" * 400, "f is a number of 1329 bits: expected at most 64"),
        (b"[-1" + b"0" * 9000 + b"]", "f is no JSON that can be used: a number of thousands of digits"),
        (b"[1, NaN]", "f[1] is nan: expected a finite number"),
        (b"1e999", "f is inf: expected a finite number"),
        (b'{"a": {"b": -Infinity}}', "f, 'a', 'b' is -inf: expected a finite number"),
        (b'{"a": 1, "b": 2, "a": 1}', "f is no JSON that can be used: key 'a' stands twice"),
        (b" " * (1 << 24) + b" 5", "f has 16777218 bytes: expected at most 16777216"),
    ],
)  # fmt: skip
def test_json_that_cannot_be_trusted_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadDocument) as refusal:
        json_of(data, name="f")
    assert str(refusal.value).startswith(message)


def test_brackets_in_texts_are_no_depth() -> None:
    assert json_of(json.dumps(["[" * 99, '"[[\\' * 50]), name="f")[0] == "[" * 99
    assert toml_of("a = '" + "[" * 99 + "' # " + "{" * 99 + '\nb = "x' + ".y" * 99 + '"', name="f")["a"] == "[" * 99
    assert toml_of(f"a = [{'0.5, ' * 99}]", name="f")["a"] == [0.5] * 99


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_and_line_ends_of_windows_are_no_content(mark: str, end: str, tmp_path: Path) -> None:
    for name, lines in (("a.json", ["{", '"é": 1}']), ("a.toml", ["é = 1", ""]), ("a.csv", ["é,b", "1,2", ""])):
        text = (mark + end.join(lines)).replace("é =", '"é" =')
        (tmp_path / name).write_bytes(text.encode())
    assert read_json(tmp_path / "a.json") == read_toml(tmp_path / "a.toml") == {"é": 1}
    assert read_csv(tmp_path / "a.csv", ("b", "é")) == [["2", "1"]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", " has no column 'a': expected a, b"),
        (b"a,c\n1,2\n", " has no column 'b': expected a, b"),
        (b"a,b\n1\n", ", line 2: 1 cells, expected 2"),
        (b"a,b\n1,2\n1,2,3\n", ", line 3: 3 cells, expected 2"),
        (b"a,b\n\xff,2\n", " is no UTF-8 text: byte 0xff at 4"),
        (b"a,b\n" + b"x" * 200_000 + b",2\n", " is no table: field larger than field limit"),
    ],
)
def test_a_csv_that_is_none_is_refused_with_the_advice(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(BadDocument) as refusal:
        read_csv(tmp_path / "a.csv", ("a", "b"), advice="make it again")
    assert f"a.csv{message}" in str(refusal.value) and str(refusal.value).endswith("make it again")


def test_a_file_that_is_missing_or_too_large_is_named(tmp_path: Path) -> None:
    (tmp_path / "large.json").write_bytes(b"[" + b" " * 99 + b"]")
    with pytest.raises(BadDocument, match=r"large\.json has 101 bytes: expected at most 100$"):
        read_json(tmp_path / "large.json", at_most=100)
    with pytest.raises(BadDocument, match=r"none\.json does not exist: make it$"):
        read_json(tmp_path / "none.json", advice="make it")


def mutated(text: bytes, rng: random.Random) -> bytes:
    data = bytearray(text)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 9)]
        elif kind == 2:
            data[place:place] = rng.choice((b"[", b"{", b"null", b"1e999", b'"', b"\\ud800", b"\0", b"-", b"9" * 500))
        elif kind == 3:
            data[place:place] = data[max(0, place - 20) : place] * rng.randrange(1, 5)
        else:
            del data[place + 1 :]
        if not data:
            break
    return bytes(data)


def test_mutated_documents_are_read_or_refused_and_nothing_else() -> None:
    rng, refused = random.Random(17), 0
    document = json.dumps({"name": "a", "inner": INNER, "rows": [INNER], "by_name": {"x": 2.5}, "place": "b"}).encode()
    policy = b"name = 'a'\nthreshold = 0.5\n[thresholds]\n\"pole\" = 0.3\n[area]\nrows = [0, 9]\n[[x.y]]\nz = {a = 1}\n"
    for _ in range(4000):
        for read in (lambda: json_of(mutated(document, rng), Outer, name="f"),
                     lambda: toml_of(mutated(policy, rng), name="f")):  # fmt: skip
            try:
                read()
            except BadDocument as error:
                refused += 1
                assert str(error).startswith("f") and "\n" not in str(error).replace("\\n", "")
    assert refused > 2000


def test_a_type_that_no_document_has_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError):
        shaped(complex, 1, "f")


PARSERS = {
    "json": {"load", "loads", "JSONDecoder"}, "csv": {"reader", "DictReader"}, "ast": {"literal_eval"},
    "np": {"load", "loadtxt", "genfromtxt"}, "pd": {"read_csv", "read_json", "read_pickle", "read_parquet"},
}  # fmt: skip
MODULES = {"tomllib", "pickle", "marshal", "shelve", "yaml", "configparser", "xml", "plistlib"}


def test_no_other_file_parses_documents() -> None:
    found = set()
    for room in ("manifests", "teacher", "student", "pipeline", "."):
        for path in (ROOT / room).glob("**/*.py" if room != "." else "*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = path.relative_to(ROOT).as_posix()
                if isinstance(node, ast.Attribute) and node.attr in PARSERS.get(ast.unparse(node.value), ()):
                    found.add((name, ast.unparse(node)))
                elif isinstance(node, ast.Import):
                    found |= {(name, a.name) for a in node.names if a.name.split(".")[0] in MODULES}
                elif isinstance(node, ast.ImportFrom) and (node.module in PARSERS or node.module in MODULES):
                    found.add((name, str(node.module)))
    documents = "manifests/documents.py"
    assert found == {
        (documents, "json.loads"),
        (documents, "csv.reader"),
        (documents, "tomllib"),
        ("teacher/foreign/describe.py", "ast.literal_eval"),  # exporters note names in Python's spelling
    }
