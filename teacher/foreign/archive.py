"""Files of torch.export as data: every part is checked and written anew before torch sees it.

`torch.export.load` trusts its file. It unpickles sample inputs, and weights that say so; it looks names of functions up
in `torch`, `math` and `operator`, so that "torch.hub.load" is one; it evaluates the text of symbolic sizes; it runs
guards, which are Python; it imports modules that a tree of outputs names; it loads compiled libraries; and names of
nodes become source code, which is run (torch/export/pt2_archive/_package.py, torch/_export/serde/serialize.py,
torch/export/_unlift.py, torch/utils/_pytree.py of torch 2.13). So `clean` takes from a file what it knows: weights
as bytes, a graph whose every text matches what may stand there, operators of aten by name. It leaves sample inputs,
guards and notes out, refuses everything else, and gives torch an archive of its own making. Nothing here loads torch.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import zipfile
from dataclasses import dataclass, field, replace
from keyword import iskeyword
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, json_of
from autolabel.manifests.onnx_file import Port
from autolabel.manifests.teachers import BadTeacher

_MOST_BYTES = 1 << 27  # of the graph's JSON: 3 kB a node
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
           12: "bool", 13: "bfloat16", 28: "uint16"}  # fmt: skip
_AGAIN = "load it where it was made, and write it again: torch.export.save(torch.export.load('old.pt2'), 'new.pt2')"

_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims)\.[A-Za-z_]\w*\.[A-Za-z_]\w*|torch\.sym_[a-z]+|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond)"
)
_OF_FILES = re.compile(r"torch\.ops\.aten\.(from_file|save|load)\b")
_WORD = re.compile(r"[A-Za-z_]\w*")
_DOTTED = re.compile(r"[\w.+\-]*")
_PLAIN = re.compile(r"[\w .,:;>()+*/=\-]{0,500}")  # such as "nearest" or "bchw,cd->bdhw"
_SYMBOL = re.compile(r"(s|u|ps|zf|zuf)\d+")
_FUNCTIONS = frozenset(
    "FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural"
    " FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity Max Min Eq Ne"
    " Abs floor ceiling Integer Add Mul Pow Equality Unequality StrictLessThan LessThan StrictGreaterThan"
    " GreaterThan And Or Not".split()
)
_GROWING = (ast.Pow, ast.LShift)
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")
_FACTOR = re.compile(r"Mul\(Integer\((\d+)\), Symbol\('s\d+'[^()]*\)\)|(\d+)\*s\d+")
_TREES = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


@dataclass
class Program:
    """A program that was checked. archive: the bytes of a file that `torch.export.load` may see.

    keyword: the name under which the program takes its image, "" if by position. outputs: its tensors, and `places`
    where each stands in the flat tree of what it returns.
    """

    archive: io.BytesIO
    keyword: str = ""
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


def clean(path: Path) -> Program:
    """Read and check a file, and write what torch needs of it anew. Raises BadTeacher with one line."""
    try:
        with storage.reading(path) as file, zipfile.ZipFile(file) as old:
            return _cleaned(path, old)
    except FileNotFoundError as error:
        raise BadTeacher(f"{path} does not exist: expected a file of torch.export.save") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise BadTeacher(f"{path} is no file of torch.export.save, or damaged: {error}") from error
    except BadDocument as error:
        raise BadTeacher(str(error)) from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadTeacher(f"{path} is damaged: its graph lacks {error}") from error


def _cleaned(path: Path, old: zipfile.ZipFile) -> Program:
    records = _records(path, old)
    graph = _json(path, old, records, "models/model.json")
    checker = _Checker(path)
    graph["guards_code"] = []
    graph["graph_module"]["treespec_namedtuple_fields"] = {}
    checker.check(graph, "")
    archive = io.BytesIO()
    program = Program(archive)
    _describe(path, graph, program)
    with zipfile.ZipFile(archive, "w") as new:
        for name, data in (
            ("archive_format", b"pt2"), ("archive_version", old.read(records["archive_version"])),
            ("byteorder", b"little"), (".data/version", b"6\n"), ("models/model.json", json.dumps(graph).encode()),
            ("data/sample_inputs/model.pt", b""),
        ):  # fmt: skip
            new.writestr(f"net/{name}", data)
        for kind in ("weights", "constants"):
            config = _json(path, old, records, f"data/{kind}/model_{kind}_config.json")
            checker.check(config, "")
            new.writestr(f"net/data/{kind}/model_{kind}_config.json", json.dumps(config))
            copied = set()
            for entry in config["config"].values():
                name = entry["path_name"]
                if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", name):
                    raise BadTeacher(f"{path} holds a pickled object, {name}: only plain tensors are read as data")
                if name not in copied:
                    copied.add(name)
                    new.writestr(f"net/data/{kind}/{name}", old.read(records[f"data/{kind}/{name}"]))
    archive.seek(0)
    return program


def _records(path: Path, old: zipfile.ZipFile) -> dict[str, str]:
    """Return the full names of the archive's parts by their names without the first folder. Raises BadTeacher."""
    names = old.namelist()
    records = {name.partition("/")[2]: name for name in names}
    if "constants.pkl" in records or "data.pkl" in records:
        kind = "a program of TorchScript" if "constants.pkl" in records else "a checkpoint of torch.save"
        advice = (
            "torch.export.save(torch.export.export(module, (images,)), 'net.pt2') writes the module itself"
            if "constants.pkl" in records
            else "call it .pt"
        )
        raise BadTeacher(f"{path} is {kind}, not of torch.export.save: {advice}")
    if "serialized_exported_program.json" in names:
        raise BadTeacher(f"{path} was written by torch 2.7 or older, with pickled weights: {_AGAIN}")
    if any(name.startswith("data/aotinductor/") for name in records):
        raise BadTeacher(
            f"{path} is a compiled package of AOTInductor, which holds libraries to run: expected what "
            "torch.export.save writes, the program before it is compiled"
        )
    if len(set(records)) != len(names):
        raise BadTeacher(f"{path} holds a part twice: expected a file of torch.export.save")
    if "archive_format" not in records or "models/model.json" not in records:
        raise BadTeacher(f"{path} is no file of torch.export.save: it has no models/model.json")
    if "data/weights/model.pt" in records or "data/constants/model.pt" in records:
        raise BadTeacher(f"{path} was written by torch 2.8 or older, with pickled weights: {_AGAIN}")
    if len([name for name in records if name.startswith("models/")]) != 1:
        raise BadTeacher(f"{path} holds several programs: expected one")
    if any(part.compress_type != zipfile.ZIP_STORED for part in old.infolist()):
        raise BadTeacher(f"{path} is compressed: expected a file as torch.export.save writes it")
    return records


def _json(path: Path, old: zipfile.ZipFile, records: dict[str, str], name: str) -> dict[str, Any]:
    if name not in records:
        raise BadTeacher(f"{path} is no file of torch.export.save: it has no {name}")
    document = json_of(old.read(records[name]), dict, name=f"{path}, {name}", at_most=_MOST_BYTES)
    assert isinstance(document, dict)
    return document


class _Checker:
    """Walks through the graph's JSON: what may mean code is refused, what only tells of its past is emptied."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, value: Any, key: str) -> None:
        """Check a value and all below it; `key` is the one under which it stands. Raises BadTeacher."""
        if isinstance(value, list):
            for item in value:
                self.check(item, key)
        elif isinstance(value, dict):
            if value.keys() == {"type", "index"}:  # a device: the program goes where the teacher shall be
                value.update(type="cpu", index=None)
            for name, item in value.items():
                if name == "metadata":  # notes, of which torch would look names up
                    value[name] = {}
                elif name in ("in_spec", "out_spec"):
                    value[name] = json.dumps([1, self.tree(item)])
                elif name in ("as_custom_obj", "custom_obj") or (name == "custom_obj_values" and item):
                    raise self.refusal("an object of a class of its own", name)
                else:
                    self.require(_fits(name, _DOTTED) or _is_expression(name), "key", name)
                    self.check(item, name)
        elif isinstance(value, str):
            self.text(value, key)

    def text(self, value: str, key: str) -> None:
        """Check a text."""
        if key in ("target", "as_operator"):
            if _OF_FILES.match(value) or not _fits(value, _OPERATOR):
                raise BadTeacher(
                    f"{self.path} uses {value}: only operators of torch's aten are run, none of other libraries, and "
                    "none that reads or writes files"
                )
        elif key == "expr_str":
            self.require(_is_expression(value), "size", value)
        elif key in ("as_string", "as_strings"):
            self.require(_fits(value, _PLAIN), "text", value)
        elif key in ("name", "as_name", "forward_arg_names"):  # they become source code
            self.require(value == "" or (_fits(value, _WORD) and not iskeyword(value)), "name", value)
        else:
            self.require(_fits(value, _DOTTED), f"text of {key!r}", value)

    def tree(self, text: Any) -> Any:
        """Check the JSON of a tree of inputs or outputs, and return it as values."""
        protocol, tree = json_of(text, list, name=f"{self.path}, tree of outputs")
        self.require(protocol == 1, "tree", str(protocol))
        return self.branch(tree)

    def branch(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Check one node of a tree: a tensor, or a tuple, list or dictionary of nodes."""
        kind, context, children = tree["type"], tree["context"], tree["children_spec"]
        if kind is None:
            self.require(context is None and children == [], "tree", str(context))
            return {"type": None, "context": None, "children_spec": []}
        if kind not in _TREES:
            raise BadTeacher(
                f"{self.path} gives or takes a {kind}: expected tensors, or tuples, lists and dictionaries of them"
            )
        keys = json_of(context, name=f"{self.path}, tree of outputs")
        if kind in _TREES[2:]:
            fine = isinstance(keys, list) and all(isinstance(name, str) for name in keys)
            self.require(fine and len(keys) == len(children), "tree", str(context))
        else:
            self.require(keys is None, "tree", str(context))
        return {"type": kind, "context": json.dumps(keys), "children_spec": [self.branch(child) for child in children]}

    def require(self, fine: bool, thing: str, value: str) -> None:
        """Raise BadTeacher unless a value is one of those that torch.export.save writes."""
        if not fine:
            raise self.refusal(f"a {thing} that could be code", value)

    def refusal(self, thing: str, value: str) -> BadTeacher:
        """The refusal of a value."""
        return BadTeacher(f"{self.path} holds {thing}, {value[:60]!r}: only plain tensors and operators are read")


def _fits(text: str, pattern: re.Pattern[str]) -> bool:
    return pattern.fullmatch(text) is not None


def _is_expression(text: str) -> bool:
    """True for a formula of sizes, 2*s39 or Mul(Integer(2), Symbol('s39', positive=True)), and nothing else."""
    if len(text) > 1 << 16:  # 4,700 in a Swin for any size
        return False
    try:
        return _is_formula(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_formula(node: ast.expr) -> bool:
    match node:
        case ast.Name(id=name):
            return _fits(name, _SYMBOL)
        case ast.Constant(value=value):
            return type(value) in (int, float, bool)
        case ast.UnaryOp(operand=operand):
            return _is_formula(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return _is_formula(left) and (_is_small(right) if isinstance(op, _GROWING) else _is_formula(right))
        case ast.Compare(left=left, comparators=others):
            return all(map(_is_formula, (left, *others)))
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=traits):
            return _fits(name, _SYMBOL) and all(isinstance(trait.value, ast.Constant) for trait in traits)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return all(map(_is_formula, args)) and (name not in _POWERS or all(map(_is_small, args[1:])))
    return False


def _is_small(node: ast.expr) -> bool:
    """True for an exponent that makes no number of millions of digits."""
    match node:
        case ast.Call(func=ast.Name(id="Integer"), args=[argument], keywords=[]):
            return _is_small(argument)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _is_small(operand)
        case ast.Constant(value=int(value)):
            return 0 <= value <= 8
    return False


# --- inputs and outputs -----------------------------------------------------------------------------------------------


def _describe(path: Path, document: dict[str, Any], program: Program) -> None:
    """Note what the program takes and gives."""
    module = document["graph_module"]
    graph, signature = module["graph"], module["signature"]
    top = module["module_call_graph"][0]["signature"]
    for spec in signature["input_specs"]:
        if "user_input" in spec or "constant_input" in spec:
            program.inputs.append(_port(spec, graph, program))
    positional, keywords = json_of(top["in_spec"], name="its tree of inputs")[1]["children_spec"]
    if len(program.inputs) == 1:
        names = json_of(keywords["context"], name="its tree of inputs")
        direct = (positional["children_spec"] or keywords["children_spec"])[:1]
        if direct != [{"type": None, "context": None, "children_spec": []}]:
            raise BadTeacher(f"{path} takes its image within a list or dictionary: expected the image itself")
        program.keyword = names[0] if names else ""
        name = program.keyword or (top.get("forward_arg_names") or [program.inputs[0].name])[0]
        program.inputs[0] = replace(program.inputs[0], name=name)
    names = _leaves(json_of(top["out_spec"], name="its tree of outputs")[1])
    user = [spec["user_output"] for spec in signature["output_specs"] if "user_output" in spec]
    if len(user) != len(signature["output_specs"]):
        raise BadTeacher(
            f"{path} changes its own weights or statistics when it runs, as in training: export it after module.eval()"
        )
    for place, (name, spec) in enumerate(zip(names, user, strict=True)):
        if "as_tensor" in spec["arg"]:
            port = _port({"user_input": spec}, graph, program)
            program.outputs.append(Port(name or port.name, port.shape, port.dtype))
            program.places.append(place)


def _port(spec: dict[str, Any], graph: dict[str, Any], program: Program) -> Port:
    argument = spec["user_input"]["arg"] if "user_input" in spec else {}
    if "as_tensor" not in argument:
        return Port(str(spec.get("constant_input", {}).get("name", "a number")), None, "")
    name = argument["as_tensor"]["name"]
    meta = graph["tensor_values"][name]
    factors = [1]
    shape: list[int | None] = []
    for side in meta["sizes"]:
        shape.append(side.get("as_int"))
        factor = _FACTOR.fullmatch(side.get("as_expr", {}).get("expr_str", ""))
        factors += [int(factor[1] or factor[2])] if factor else []
    return Port(name, tuple(shape), _DTYPES.get(meta["dtype"], str(meta["dtype"])), math.lcm(*factors))


def _leaves(tree: dict[str, Any], name: str = "") -> list[str]:
    """Return the names of a tree's tensors in order: out, 0, aux.1; "" where the tree is one tensor."""
    if tree["type"] is None:
        return [name]
    children = tree["children_spec"]
    keys = json_of(tree["context"], name="its tree of outputs") or range(len(children))
    return [
        leaf
        for key, child in zip(keys, children, strict=True)
        for leaf in _leaves(child, f"{name}.{key}" if name else str(key))
    ]
