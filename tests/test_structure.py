"""The shape of the code: imports point one way, the core stays small, and some things never occur."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import selectune

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "selectune"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import from the rows above its own and from its own name, never from below or beside.
ORDER = (
    ("errors",),
    ("files",),
    ("spec",),
    ("internals", "frames"),
    ("seeds", "bits"),
    ("quantised",),
    ("types", "quota"),
    ("scope", "schedule", "select", "structure", "scores", "phases"),
    ("method",),
    ("recipes",),
    ("ops",),
    ("beside",),
    ("delta",),
    ("train",),
    ("selectune",),  # the package's own __init__: public names of everything above
    ("adapters",),
    ("integrations",),
    ("tasks",),
    ("plugins", "documents"),
    ("models",),
    ("interop",),
    ("runs",),
    ("bench",),
    ("study",),
    ("doctor",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
CORE = tuple(name for name, rank in RANK.items() if rank <= RANK["selectune"])
CORE_NEEDS = {"torch", "numpy", "safetensors", "numba"}
LINES = 400  # of any file, tests too


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def top(path: Path) -> str:
    """The name under selectune/ that a file belongs to; "selectune" for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0]
    return "selectune" if first == "__init__.py" else first.removesuffix(".py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, absolute module, imported name or "") of every import in a file, lazy ones too."""
    package = ["selectune", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, module, alias.name


def imported_top(module: str, name: str) -> str:
    """Which name under selectune/ an import of `module` (and `name` from it) reaches."""
    parts = module.split(".")
    if len(parts) > 1:
        return parts[1]
    is_module = bool(name) and ((PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir())
    return name if is_module else "selectune"


def test_every_module_has_a_place_in_the_order():
    unknown = {top(path) for path in FILES} - set(RANK)
    assert not unknown, f"give {sorted(unknown)} a row in ORDER"


def test_imports_point_one_way():
    wrong = []
    for path in FILES:
        here = top(path)
        told = {node.lineno for node in _block(path)} if here == "selectune" else set()  # names that are fetched lazily
        for line, module, name in imports(path):
            if module.partition(".")[0] != "selectune" or line in told:
                continue
            there = imported_top(module, name)
            if there != here and RANK[there] >= RANK[here]:
                wrong.append(f"{where(path)}:{line} ({here}) imports {there}")
    assert not wrong, "\n".join(wrong)


def test_the_order_check_sees_a_wrong_import(tmp_path, monkeypatch):
    """The test above can fail: lazy, relative and plain imports upward are all seen."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    (tmp_path / "train").mkdir()
    file = tmp_path / "ops" / "bad.py"
    file.write_text("import selectune.train\ndef f():\n    from ..train import tracker\nfrom selectune import train\n")
    assert [imported_top(module, name) for _, module, name in imports(file)] == ["train"] * 3


def test_the_core_needs_four_packages_only():
    allowed = CORE_NEEDS | set(sys.stdlib_module_names) | {"selectune"}
    wrong = [
        f"{where(path)}:{line} imports {module}"
        for path in FILES
        if top(path) in CORE
        for line, module, _ in imports(path)
        if module.partition(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_knows_typer_and_rich():
    wrong = [
        f"{where(path)}:{line} imports {module}"
        for path in FILES
        if top(path) not in ("cli", "__main__")
        for line, module, _ in imports(path)
        if module.partition(".")[0] in ("typer", "rich", "click")
    ]
    assert not wrong, "\n".join(wrong)


_PROBE = """
import json, socket, sys, time
def refuse(*args, **kwargs):
    raise AssertionError("import uses the network")
socket.socket.connect = socket.getaddrinfo = refuse
import torch
before = set(sys.modules)
written = []
def watch(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        written.append(str(args[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove"):
        written.append(f"{event} {args[0]}")
sys.addaudithook(watch)
threads = torch.get_num_threads()
start = time.perf_counter()
import %s
took = time.perf_counter() - start
added = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
threads = [threads, torch.get_num_threads()]
json.dump({"added": added, "written": written, "took": took, "threads": threads}, sys.stdout)
"""


def _import_alone(module: str, folder: Path) -> dict:
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROBE % module],
        capture_output=True, text=True, env=env, cwd=folder, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert not run.stderr, run.stderr
    return json.loads(run.stdout)


def test_import_is_light(tmp_path, note):
    """What `import selectune` leads to is the core only: no network, no file written, no thread setting changed."""
    seen = _import_alone("selectune; selectune.attach", tmp_path)
    heavy = {
        "transformers",
        "peft",
        "datasets",
        "accelerate",
        "trl",
        "typer",
        "rich",
        "triton",
        "scipy",
        "sklearn",
    }
    heavy |= {"pandas", "pyarrow", "matplotlib", "huggingface_hub", "tokenizers"}
    assert "safetensors" in seen["added"]
    assert not heavy & set(seen["added"])
    assert not seen["written"]
    assert seen["threads"][0] == seen["threads"][1]
    note(f"import selectune and use it: {seen['took']:.2f} s over torch (goal: 0.3 s)")


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    """What pyproject.toml promises of the core's packages is what `make test-torch` installs; README.md says so."""
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    lowest = dict(bound.split(">=") for bound in bounds if bound.partition(">=")[0] in CORE_NEEDS)
    oldest, newest = (
        dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements" / f"torch-{which}.txt").read_text("utf-8"), re.M))
        for which in ("oldest", "newest")
    )
    assert set(lowest) == CORE_NEEDS
    assert {name: oldest[name].removesuffix(".0") for name in CORE_NEEDS} == lowest
    assert f"on torch {oldest['torch']}, the oldest" in (readme := (ROOT / "README.md").read_text("utf-8"))
    assert f"on torch {newest['torch']}, the newest" in readme


def test_no_file_is_too_long():
    counts = {path: len(path.read_text("utf-8").splitlines()) for path in [*FILES, *(ROOT / "tests").rglob("*.py")]}
    long = {where(path): n for path, n in counts.items() if n > LINES}
    assert not long, f"split by what it reads or does: {long}"


def _words(path: Path) -> Iterator[tuple[int, str]]:
    """Identifiers and string constants of a file, docstrings left out."""
    module = tree(path)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(module)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(module):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield line, node.value
        for field in ("id", "attr", "name", "arg", "asname"):
            if isinstance(value := getattr(node, field, None), str):
                yield line, value


def test_the_engine_knows_no_method_by_name():
    """Methods are values: train/ and ops/ work with any score and schedule, and name none."""
    from selectune.recipes import RECIPES

    generic = {"random", "full", "set"}  # words of their own
    names = {re.sub("[-_]", "[-_]?", re.escape(n).replace(r"\-", "-")) for n in RECIPES if n not in generic}
    pattern = re.compile(rf"(?<![a-z0-9])({'|'.join(sorted(names))})(?![a-z0-9])", re.IGNORECASE)
    wrong = [
        f"{where(path)}:{line} names a method: {word!r}"
        for path in FILES
        if top(path) in ("train", "ops")
        for line, word in _words(path)
        if pattern.search(word)
    ]
    assert not wrong, "\n".join(wrong)


def _block(path: Path) -> list[ast.stmt]:
    """What a file imports for type checkers only."""
    found = [node.body for node in tree(path).body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node)]
    return [statement for body in found for statement in body]


def test_public_names_are_what_pyright_takes_them_for():
    """`selectune.__getattr__` looks names up by itself, so it could find something else than the imports say."""
    seen = {}
    for node in _block(PACKAGE / "__init__.py"):
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            modules = importlib.import_module(node.module or "")
            seen[alias.name] = getattr(modules, alias.name)
    assert sorted(seen) == sorted(selectune.__all__), "a name needs an import and its place in __all__"
    wrong = [name for name, thing in seen.items() if getattr(selectune, name) is not thing]
    assert not wrong, f"_HOMES finds another {wrong}"


def test_names_and_modules_are_found_as_ever():
    """In a fresh process each, since whatever came before has loaded them already."""
    for code in (
        "import selectune as st; assert callable(st.attach) and st.Tuner.__name__ == 'Tuner' and st.scores.d3\n"
        "assert {'attach', 'score', 'train', '__version__'} <= set(dir(st)) and not hasattr(st, 'atach')",
        "from selectune import *; assert callable(attach) and errors.ConfigError and 'recipes' in random.__module__",
        "import selectune as st; assert st.ops.bits and st.train.attach is st.attach and st.select.GlobalTopK\n"
        "from selectune import id3, tasks; assert id3(budget=1, steps=1) and tasks.TASKS",
    ):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, f"{code}\n{run.stderr}"


HEAVY = {"torch", "numpy", "numba", "transformers", "safetensors", "peft", "datasets", "sklearn", "scipy"}


def _heavy_tops() -> set[str]:
    """Names under selectune/ that load torch as they are imported."""
    above = {"adapters", "integrations", "interop", "models", "runs"}
    return set(CORE) - {"errors", "files", "spec", "selectune"} | above


def test_commands_import_what_they_work_with_when_they_run():
    """`selectune --help` must not wait for torch, so modules of the command line import nothing heavy at their top."""
    light = {"selectune.bench", "selectune.bench.configs"}  # and what it takes from there: checks, doctor
    wrong = []
    for path in FILES:
        if top(path) not in ("cli", "__main__"):
            continue
        for node in tree(path).body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.partition(".")[0] in HEAVY or (
                    name.startswith("selectune.")
                    and name not in light
                    and name.split(".")[1] in _heavy_tops() | {"bench"}
                ):
                    wrong.append(f"{where(path)}:{node.lineno} imports {name}: do it in the function that needs it")
    assert not wrong, "\n".join(wrong)


def test_public_names_exist_and_are_documented():
    missing = []
    for name in selectune.__all__:
        thing = getattr(selectune, name)
        if not (inspect.ismodule(thing) or inspect.isclass(thing) or callable(thing)):
            continue  # a constant
        text = (inspect.getdoc(thing) or "") if not inspect.isclass(thing) else (thing.__doc__ or "")
        generated = inspect.isclass(thing) and text.startswith(f"{thing.__name__}(")
        if not text.strip() or generated:
            missing.append(name)
    assert not missing


def test_public_methods_are_documented():
    missing = [
        f"{name}.{member}"
        for name in selectune.__all__
        if inspect.isclass(thing := getattr(selectune, name)) and thing.__module__.startswith("selectune")
        for member, value in vars(thing).items()
        if not member.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, property))
        and not inspect.getdoc(getattr(thing, member))
    ]
    assert not missing


def _modules() -> list[str]:
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if path.name != "__main__.py"
    )


@pytest.mark.parametrize("name", _modules())
def test_every_module_says_what_it_is(name):
    module = importlib.import_module(name)
    empty = not Path(str(module.__file__)).read_text("utf-8").strip()
    assert empty or (module.__doc__ or "").strip(), f"{name} has no docstring"
