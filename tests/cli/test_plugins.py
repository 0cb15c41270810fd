"""Plug-ins: methods and tasks of a file or of an installed package, and the errors of broken ones."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys

import pytest
from cli_kit import call

from selectune import plugins, tasks
from selectune.bench.worker import answer
from selectune.bench.workload import Bench
from selectune.errors import ConfigError, PluginError
from selectune.models.restore import Source, evaluate_delta
from selectune.recipes import RECIPES
from selectune.runs.config import RunConfig
from selectune.runs.training import run

pytest_plugins = ("tiny_fixtures",)

FILE = '''
import selectune as st
from selectune.schedule import Increment
from selectune.tasks import Classification, Task
from selectune.tasks.metrics import accuracy


@st.score(reads="gradient", above=0.0)
def taylor(weight, gradient):
    return (weight * gradient).abs()


def taylor_steps(budget, steps: int = None, every: int = 1, share=1.0):
    """Taylor: at every step select the largest |w g|."""
    return st.Method(score=taylor(), schedule=Increment(budget, steps, every), name="taylor-steps")


def rows(split):
    return [{"text": f"the {w} runs", "label": n % 2} for n, w in enumerate(("dog", "cat") * 8)]


ANIMALS = Task(
    "acme/animals", ("text",), Classification(), ("dog", "cat"), accuracy, "accuracy", 0.5, "generated", 1, 10,
    generate=rows,
)
RECIPES, TASKS = [taylor_steps], [ANIMALS]
'''


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """The tables as they were, after each test."""
    kept = [(table, dict(table)) for table in (RECIPES, tasks.TASKS, plugins._sources, plugins._files)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "acme.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that installs a distribution with entry points into a folder of sys.path."""

    def install(code, entries, name="acme", version="1.2"):
        place = tmp_path / "site"
        info = place / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (place / f"{name}_code.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entries)
        monkeypatch.syspath_prepend(place)
        monkeypatch.delitem(sys.modules, f"{name}_code", raising=False)
        return place

    return install


ENTRIES = (
    "[selectune.methods]\ntaylor-steps = acme_code:taylor_steps\n[selectune.tasks]\nacme/animals = acme_code:ANIMALS\n"
)


def config_of(tiny, out, **more):
    return RunConfig(
        **{"model": str(tiny), "task": "acme/animals", "method": "taylor-steps:every=2", "budget": 40, "max_steps": 4,
           "batch_size": 4, "lr": 5e-3, "save_every": 2, "out": str(out), **more}
    )  # fmt: skip


def test_a_file_in_the_lists(file):
    found = json.loads(call("methods", "--plugin", file, "--json").stdout)
    assert [m["name"] for m in found][-1] == "taylor-steps"
    assert found[-1]["options"] == {"every": 1, "share": 1.0}
    assert found[-1]["summary"] == "at every step select the largest |w g|."
    assert found[-1]["plugin"]["name"] == "acme.py"
    assert len(found[-1]["plugin"]["sha256"]) == 64
    assert "plug-in acme.py" in call("methods", "--plugin", file).stdout
    assert "plug-in acme.py" in call("tasks", "--plugin", file).stdout.splitlines()[-1]
    assert call("methods", "taylor-steps", "--plugin", file).stdout.startswith("taylor-steps:every=1")


def test_a_run_of_a_file(file, tiny, tmp_path):
    out = tmp_path / "out"
    args = ("--model", tiny, "--task", "acme/animals", "--plugin", file, "--json")
    more = ("--method", "taylor-steps:every=2", "--budget", 40, "--max-steps", 4, "--out", out)
    printed = json.loads(call("train", *args, *more).stdout)
    assert printed["plugins"] == [plugins.source_of(plugins.METHODS, "taylor-steps").as_json()]
    assert json.loads((out / "run.json").read_text())["plugins"] == printed["plugins"]
    found = json.loads(call("eval", *args, "--delta", out).stdout)
    assert found["value"] == printed["value"]
    put_on = ("--model", tiny, "--plugin", file, "--delta", out)
    assert call("verify", *put_on).stdout.startswith("ok: ")
    call("delta", "apply", *put_on, "--out", tmp_path / "merged")
    again = json.loads(call("train", "--config", out / "run.json", "--out", tmp_path / "again", "--json").stdout)
    assert (again["config"]["plugin"], again["value"]) == ([str(file)], printed["value"])


def test_plan_and_bench_take_what_train_takes(file):
    args = ("--model", "tiny", "--budget", 40, "--batch", 2, "--length", 8, "--plugin", file)
    assert json.loads(call("plan", "--method", "taylor-steps:every=2", *args, "--json").stdout)["trained"] == 40
    once = ("--steps", 1, "--rounds", 1, "--processes", "fresh", "--no-live", "--json", "-")
    (row,) = json.loads(call("bench", "--methods", "taylor-steps:every=2", *args, *once).stdout)["rows"]
    assert (row["method"], row["error"]) == ("taylor-steps:every=2", None)


def test_a_worker_of_bench_loads_a_package(package):
    package(FILE, ENTRIES)
    bench = dataclasses.asdict(Bench("tiny", 2, 8))
    command = {"do": "warm", "threads": None, "method": "taylor-steps:every=2", "bench": bench, "plugin": []}
    assert answer({}, command) == {}
    assert plugins.source_of(plugins.METHODS, "taylor-steps") == plugins.Plugin("acme", "1.2")


def test_a_package(package, tiny, tmp_path):
    package(FILE, ENTRIES)
    assert "acme_code" not in sys.modules
    assert "plug-in acme 1.2" in call("methods").stdout
    assert json.loads(call("tasks", "--json").stdout)[-1]["plugin"] == {"name": "acme", "version": "1.2"}
    result = run(config_of(tiny, tmp_path / "out"))
    assert result.as_json()["plugins"] == [{"name": "acme", "version": "1.2"}]
    source = Source(str(tiny))
    assert evaluate_delta(source, result.delta, tasks.get("acme/animals")).value == result.value


def test_a_package_is_imported_only_where_it_is_asked_for(package):
    package("raise RuntimeError('half a package')", ENTRIES)
    assert RunConfig(model="m", task="glue/rte", budget=10).recipe == "id3"
    assert "acme_code" not in sys.modules
    code = "import sys; from selectune.cli.app import app; assert 'selectune.recipes' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_a_broken_package_stops_what_needs_it_alone(package, tmp_path):
    package("raise RuntimeError('half a\\npackage')", ENTRIES)
    why = "The plug-in acme 1.2 failed: RuntimeError: half a package"
    train = ("train", "-m", "x", "-o", tmp_path / "out", "-b", 9)
    for args in (
        (*train, "-t", "glue/rte", "--method", "taylor-steps"),
        (*train, "-t", "acme/animals"),
        ("eval", "-m", "x", "-t", "acme/animals"),
        ("methods", "taylor-steps"),
        ("plan", "-m", "tiny", "--method", "taylor-steps"),
        ("bench", "-m", "tiny", "--methods", "full,taylor-steps"),
    ):
        found = call(*args, code=1)
        assert found.stderr == f"error: {why}\n"
    for command in ("methods", "tasks"):
        found = call(command)
        assert found.stderr == f"warning: {why}\n"
        assert "glue/rte" in found.stdout or "id3: " in found.stdout


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "The plug-in acme.py failed: ZeroDivisionError: division by zero"),
        ("def f(:", "The plug-in acme.py failed: SyntaxError"),
        ("import sys; sys.exit(3)", "The plug-in acme.py failed: SystemExit: 3"),
        ("x = 1", "offers nothing: it has no list RECIPES and no list TASKS"),
        ("RECIPES = {}", "its methods are {}, not a list"),
        ("RECIPES = [3]", "offers 3 as a method; a recipe function is needed"),
        ("TASKS = [3]", "offers 3 as a task; a selectune.tasks.Task is needed"),
        ("def id3(budget): ...\nRECIPES = [id3]", "offers the method 'id3', a name that selectune has already"),
        ("def lora(budget): ...\nRECIPES = [lora]", "offers the method 'lora', a name that selectune has already"),
        ("def f(budget): ...\nRECIPES = [f, f]", "offers the method 'f', a name that acme.py has already"),
        ("def f(budget, power): ...\nRECIPES = [f]", "the option power of f needs a default value"),
        ("from selectune.tasks import TASKS as T\nTASKS = [T['glue/rte']]", "the task 'glue/rte', a name that sel"),
        (
            "from selectune.recipes import Recipe\nRECIPES = [Recipe('f', lambda: 0, '', '', '', '', 'lion')]",
            "f has no optimizer 'lion'. Known: adamw, adamw-entry, sm3",
        ),
    ],
)
def test_a_broken_file_is_one_line_and_may_be_mended(file, code, message):
    file.write_text(code)
    for _ in range(2):  # a second try is refused just the same
        found = call("methods", "--plugin", file, "--json", code=1)
        assert message in found.stderr
        assert found.stderr.count("\n") == 1
        assert json.loads(found.stdout)["error"]["kind"] == "PluginError"
    file.write_text(FILE)
    call("methods", "taylor-steps", "--plugin", file)


def test_a_recipe_that_raises_or_returns_no_method(file):
    for body, message in (("1 / 0", "ZeroDivisionError: division by zero"), ("3", "f returned 3, not a selectune")):
        file.write_text(f"def f(budget): return {body}\nRECIPES = [f]")
        with pytest.raises(PluginError, match=f"The plug-in acme.py failed: .*{message}"):
            RunConfig(model="m", task="glue/rte", method="f", budget=9, plugin=(str(file),))
    code = "from selectune.errors import BudgetError\ndef f(budget): raise BudgetError('an odd number, please')\n"
    file.write_text(code + "RECIPES = [f]")
    with pytest.raises(ConfigError, match=r"^an odd number, please$"):
        RunConfig(model="m", task="glue/rte", method="f", budget=9, plugin=(str(file),))


def test_the_code_of_a_task_that_raises(file, tiny, tmp_path):
    file.write_text(FILE.replace("    return [{", "    1 / 0\n    return [{"))
    with pytest.raises(PluginError, match=r"The plug-in acme.py failed: ZeroDivisionError"):
        run(config_of(tiny, tmp_path / "out", plugin=(str(file),)))


def test_files_that_do_not_exist_and_options_that_do_not_fit(file):
    call("train", "-m", "x", "-t", "glue/rte", "-o", "z", "--plugin", file.with_name("nowhere.py"), code=2)
    with pytest.raises(ConfigError, match=r"every=1.5 is not allowed; it must be a whole number"):
        config_of("m", "z", method="taylor-steps:every=1.5", plugin=(str(file),))
    with pytest.raises(ConfigError, match="share='a' is not allowed; it must be a number"):
        config_of("m", "z", method="taylor-steps:share=a", plugin=(str(file),))
    with pytest.raises(ConfigError, match="takes no include, exclude or train_fully"):
        config_of("m", "z", include=("*",), plugin=(str(file),))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[selectune.methods]\nid3 = acme_code:taylor_steps\n", "offers the method 'id3', a name that selectune has"),
        ("[selectune.methods]\na b = acme_code:taylor_steps\n", "'a b' cannot be a name"),
        ("[selectune.methods]\nother = acme_code:none\n", "failed: AttributeError"),
        ("[selectune.tasks]\nother = acme_code:ANIMALS\n", "the entry point 'other' leads to 'acme/animals'"),
    ],
)
def test_entry_points_that_are_refused(package, caplog, entries, message):
    package(FILE, entries)
    with caplog.at_level(logging.WARNING, "selectune"):
        plugins.load_all(plugins.METHODS)
        plugins.load_all(plugins.TASKS)
    assert message in caplog.text
    assert RECIPES["id3"].source.startswith("Agarwal")


def test_two_packages_with_one_name(package):
    package(FILE, ENTRIES)
    package(FILE, ENTRIES.replace("acme_code", "other_code"), "other")
    with pytest.raises(PluginError, match=r"Several packages offer the method 'taylor-steps': .*acme 1.2"):
        plugins.want_method("taylor-steps")


def test_resume_refuses_another_plug_in(file, tiny, tmp_path):
    config = config_of(tiny, tmp_path / "out", plugin=(str(file),))
    straight = run(config)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    moved = moved / "acme.py"
    moved.write_text(FILE)
    there = tmp_path / "out" / "checkpoint-2"
    same = dataclasses.replace(config, plugin=(str(moved),), out=str(tmp_path / "same"))
    again = ("--config", there, "--model", tiny, "--plugin", moved, "--out", tmp_path / "again", "--json")
    assert json.loads(call("train", *again).stdout)["steps"] == straight.steps
    assert run(same, resume=there).delta.read_bytes() == straight.delta.read_bytes()
    file.write_text(FILE + "# changed\n")
    with pytest.raises(ConfigError, match=r"plugins \(\[\{'name': 'acme.py', 'sha256': .* there, .* now\)"):
        run(dataclasses.replace(config, out=str(tmp_path / "other")), resume=there)
