"""The layout: rooms whose docstrings name their files, names that occur once, and things that never occur."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "selectune"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted({path.parent for path in FILES} - {PACKAGE})  # the package itself has the axes and the ground floor
MOST = 10  # files of a room, beside its __init__

# Within these rooms a file or sub-room may import from the rows above its own, never from below or beside.
WITHIN = {
    "train": (
        ("support",),
        ("graph", "world"),
        ("optim", "window"),
        ("choose",),
        ("step",),
        ("tracker",),
        ("aside",),
        ("step_hooks",),
        ("engine",),
        ("saved", "check"),
        ("attach",),
    ),
    "delta": (("file",), ("live", "card"), ("hub",), ("delta",), ("diff", "combine")),
}


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _doc(room: Path) -> str:
    return ast.get_docstring(tree(room / "__init__.py")) or ""


@pytest.mark.parametrize("room", ROOMS, ids=where)
def test_a_room_names_all_its_files_and_has_few(room):
    files = {p.stem for p in room.glob("*.py")} - {"__init__"}
    rooms = {p.name for p in room.iterdir() if (p / "__init__.py").exists()}
    assert len(files) <= MOST, f"{len(files)} files in {where(room)}: give some of them a room of their own"
    missing = {name for name in files | rooms if not re.search(rf"(?<![\w.]){name}(?!\w)", _doc(room))}
    assert not missing, f"the docstring of {where(room)} does not name {sorted(missing)}"


def _standing_twice(found: dict[str, set[Path]]) -> dict[str, list[str]]:
    return {name: sorted(map(where, rooms)) for name, rooms in found.items() if len(rooms) > 1}


def test_no_file_stem_stands_in_two_rooms():
    """The ops are excepted: a kernel has the name of its op."""
    found = defaultdict(set)
    for path in FILES:
        if path.stem not in ("__init__", "__main__") and "ops" not in path.parts:
            found[path.stem].add(path.parent)
    assert not _standing_twice(found)


OPTIONAL = {"kernels", "apex", "deepspeed", "flash_attn", "sentencepiece", "wandb"}
"""Packages that transformers and others import where they are installed."""


def test_no_script_hides_a_package():
    """A script's own folder is the first that imports look in."""
    taken = sys.stdlib_module_names | set(metadata.packages_distributions()) | OPTIONAL
    scripts = [path for name in ("benchmarks", "docs", "examples") for path in (ROOT / name).glob("*.py")]
    assert len(scripts) > 10
    assert not [where(path) for path in scripts if path.stem in taken]


def test_no_class_name_stands_in_two_rooms():
    found = defaultdict(set)
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].add(path.parent)
    assert not _standing_twice(found)


def _inner(room: str) -> Iterator[tuple[Path, int, str, str]]:
    """(file, line, its name within the room, the name it imports) of every import inside a room, lazy ones too."""
    for path in sorted((PACKAGE / room).rglob("*.py")):
        mine = path.relative_to(PACKAGE / room).parts[0].removesuffix(".py")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"selectune.{room}"):
                rest = node.module.split(".")[2:]
                for name in [rest[0]] if rest else [alias.name for alias in node.names]:
                    yield path, node.lineno, mine, name


@pytest.mark.parametrize("room", WITHIN)
def test_imports_point_one_way_within_the_large_rooms(room):
    """Imports for type checkers count too, because a circle of them is a circle."""
    rank = {name: rank for rank, names in enumerate(WITHIN[room]) for name in names}
    wrong = [
        f"{where(path)}:{line} ({mine}) imports {name}"
        for path, line, mine, name in _inner(room)
        if mine not in ("__init__", name) and not rank[name] < rank[mine]
    ]
    assert not wrong, "\n".join(wrong)


def test_frames_are_read_in_one_file():
    pattern = re.compile(r"sys\._getframe|f_locals|currentframe")
    assert [where(path) for path in FILES if pattern.search(path.read_text("utf-8"))] == ["selectune/frames.py"]


def _forbidden(node: ast.AST) -> str | None:
    """What a node does that never happens in selectune/."""
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "a bare except"
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        found = {n.partition(".")[0] for n in names} & {
            "pickle",
            "cPickle",
            "dill",
            "cloudpickle",
            "joblib",
            "marshal",
        }
        return f"an import of {found.pop()}" if found else None
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in ("print", "eval", "exec", "breakpoint"):
            return f"{node.func.id}()"
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            called = f"{node.func.value.id}.{node.func.attr}"
            return called if called in ("torch.load", "torch.save", "np.load", "numpy.load") else None
    return None


def test_forbidden_things_do_not_occur():
    wrong = [
        f"{where(path)}:{node.lineno} has {what}"  # pyright: ignore[reportAttributeAccessIssue]
        for path in FILES
        for node in ast.walk(tree(path))
        if (what := _forbidden(node))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    ["print(1)", "eval('1')", "import pickle", "from pickle import loads", "torch.load(f)", "exec('1')",
     "try:\n    f()\nexcept:\n    pass"],
)  # fmt: skip
def test_the_forbidden_check_sees(code):
    assert any(_forbidden(node) for node in ast.walk(ast.parse(code)))


def test_architecture_names_the_rooms_in_their_order():
    """The picture in docs/architecture.md is the order that the imports have."""
    from test_structure import ORDER

    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    picture = re.search(r"## The rooms\n.*?```\n(.*?)```", text, re.DOTALL)
    assert picture is not None
    drawn = [tuple(re.split(r" {2,}", line)[0].split()) for line in picture[1].splitlines()]
    assert drawn == [names for names in ORDER if names != ("__main__",)]


TORCHS = {"_version"}  # torch's own, though a class of ours has an attribute of that name


def _private_names(path: Path) -> set[str]:
    """Attributes with one leading underscore that the classes of a file define."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            found |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")} - TORCHS


def test_nobody_reads_what_another_keeps_to_itself():
    """State is a value that its owner hands out."""
    own = {path: _private_names(path) for path in FILES}
    private, wrong = set().union(*own.values()), []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Attribute) or node.attr not in private - own[path]:
                continue
            if ast.unparse(node.value) not in ("self", "cls", "super()"):
                wrong.append(f"{where(path)}:{node.lineno} reads {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)
