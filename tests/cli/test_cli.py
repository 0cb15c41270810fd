"""The command line: every command, pure JSON on stdout, one line of error, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from cli_kit import call, runner
from tiny_kit import make_model

import selectune as st
from selectune.adapters import KINDS
from selectune.cli.app import app
from selectune.cli.commands.demo import page
from selectune.recipes import RECIPES
from selectune.runs.demos.comparison import DemoResult, Revert, Row
from selectune.tasks import TASKS

pytest_plugins = ("tiny_fixtures",)


def data_of(found):
    """The JSON on stdout. Nothing else may be there."""
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def trained(tiny, data, tmp_path_factory):
    """A run of the train command, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "rte"
    found = call(
        "train", "--model", tiny, "--task", "glue/rte", "--method", "id3", "--budget", "0.2k", "--lr", "5e-3",
        "--epochs", 1, "--batch-size", 8, "--max-length", 24, "--seed", 3, "--data", data, "--out", out, "--json",
    )  # fmt: skip
    return out, data_of(found)


def test_train(trained):
    out, printed = trained
    assert (printed["task"], printed["metric"], printed["examples"]) == ("glue/rte", "accuracy", 24)
    assert (printed["steps"], printed["selected"], printed["budget"]) == (6, 200, 200)
    assert printed["delta_bytes"] == (out / "delta.safetensors").stat().st_size
    written = json.loads((out / "run.json").read_text())
    assert all(written[key] == value for key, value in printed.items())


def test_train_tells_people(tiny, data, tmp_path):
    found = call(
        "train", "-m", tiny, "-t", "glue/cola", "--method", "bitfit", "--max-steps", 2, "--data", data, "-o", tmp_path
    )
    assert re.search(r"glue/cola: Matthews correlation -?[\d.]+ on 24 examples, 2 steps", found.stdout)
    assert "delta.safetensors" in found.stdout


def test_eval_prints_what_train_printed(trained, tiny, data):
    out, printed = trained
    found = data_of(call("eval", "--model", tiny, "--delta", out, "--task", "glue/rte", "--data", data, "--json"))
    assert found == {"task": "glue/rte", "metric": "accuracy", "value": printed["value"], "examples": 24}
    file = out / "delta.safetensors"
    text = call(
        "eval", "--model", tiny, "--delta", file, "--task", "glue/rte", env={"SELECTUNE_DATA": str(data)}
    ).stdout
    assert text == f"glue/rte: accuracy {printed['value']:.4f} on 24 examples\n"


def test_eval_of_a_base(tiny, data):
    found = data_of(call("eval", "--model", tiny, "--task", "glue/stsb", "--data", data, "--json"))
    assert (found["task"], found["examples"]) == ("glue/stsb", 24)


def test_verify(trained, tiny):
    out, _ = trained
    assert call("verify", "--model", tiny, "--delta", out).stdout.startswith("ok: the base is right, ")
    found = data_of(call("verify", "--model", tiny, "--delta", out, "--json"))
    assert found["ok"]
    assert found["weights"]
    assert found["reverted"]
    assert 0 < found["changed"] <= found["budget"] == 200


def test_verify_wrong_base(trained, other):
    out, _ = trained
    assert call("verify", "--model", other, "--delta", out, code=1).stdout.startswith("not ok: ")
    assert data_of(call("verify", "--model", other, "--delta", out, "--json", code=1))["ok"] is False


def test_verify_another_shape(trained, tmp_path):
    out, _ = trained
    wide = make_model(tmp_path / "wide", hidden=64)
    assert data_of(call("verify", "--model", wide, "--delta", out, "--json", code=1))["ok"] is False


def test_verify_flipped_and_truncated_files(trained, tiny, tmp_path):
    whole = (trained[0] / "delta.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 4
    for name, content in (("flipped", bytes(flipped)), ("short", whole[:-7]), ("empty", b"")):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        found = call("verify", "--model", tiny, "--delta", file, "--json", code=1)
        assert data_of(found)["ok"] is False
        assert found.stderr.startswith("error: ")
        call("eval", "--model", tiny, "--delta", file, "--task", "demo/topic", code=1)


def test_verify_that_cannot_be_done(trained, tiny, tmp_path):
    assert "no such file or folder" in call("verify", "--model", tiny, "--delta", tmp_path / "x", code=2).stderr
    call("verify", "--model", tmp_path / "nowhere", "--delta", trained[0], code=2)
    call("verify", "--model", tiny, "--delta", trained[0], "--task", "glue/nothing", code=2)
    call("verify", "--model", tiny, code=2)


def test_delta_show(trained):
    out, _ = trained
    text = call("delta", "show", out).stdout
    assert "id3 on glue/rte" in text
    assert "200 of 200" in text
    found = data_of(call("delta", "show", out, "--json"))
    assert sum(patch["count"] for patch in found["patches"]) == found["selected"] == 200
    assert found["base"]["seed"] == 3


def test_apply_writes_a_model_that_needs_no_selectune(trained, tiny, data, tmp_path):
    out, printed = trained
    merged = tmp_path / "merged"
    call("delta", "apply", "--model", tiny, "--delta", out, "--out", merged)
    found = data_of(call("eval", "--model", merged, "--task", "glue/rte", "--data", data, "--max-length", 24, "--json"))
    assert found["value"] == printed["value"]


def test_diff_of_base_and_merged_is_the_delta_again(trained, tiny, data, tmp_path):
    out, printed = trained
    merged, again = tmp_path / "merged", tmp_path / "again"
    call("delta", "apply", "--model", tiny, "--delta", out, "--out", merged)
    found = data_of(call("delta", "diff", "--base", tiny, "--tuned", merged, "--out", again, "--seed", 3, "--json"))
    assert found["scalars"] == printed["changed"]
    first, second = st.load(out), st.load(again)
    for name, indices in second.support.items():
        assert set(indices.tolist()) <= set(first.support[name].tolist())
    assert data_of(call("verify", "--model", tiny, "--delta", again, "--json"))["ok"]
    args = ("--task", "glue/rte", "--data", data, "--max-length", 24, "--json")
    assert data_of(call("eval", "--model", tiny, "--delta", again, *args))["value"] == printed["value"]


def test_tasks_and_methods():
    assert [task["name"] for task in data_of(call("tasks", "--json"))] == list(TASKS)
    assert [method["name"] for method in data_of(call("methods", "--json"))] == [*RECIPES, *KINDS]
    lines = call("tasks").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(TASKS)
    assert all(task.source in line for task, line in zip(TASKS.values(), lines, strict=True))
    text, *peers = call("methods").stdout.split("\n\n")
    assert [part.partition(";")[0] for part in peers] == [
        "adapters, through peft",
        "adapters, our own",
    ]
    assert [line.partition(":")[0] for part in peers for line in part.splitlines()[1::3]] == list(KINDS)
    blocks = text.splitlines()
    assert [line.partition(":")[0] for line in blocks[::4]] == list(RECIPES)
    assert all("passes over the weights: " in line and "bytes: " in line for line in blocks[1::4])
    assert all(line.startswith("    options ") for line in blocks[2::4])
    assert all("arXiv" in line or "baseline" in line for line in blocks[3::4])


def test_demo(tiny, data, tmp_path):
    args = ("--model", tiny, "--data", data, "--steps", 2, "--budget", "100", "--out", tmp_path / "demo")
    found = data_of(call("demo", *args, "--json"))
    assert [row["name"] for row in found["rows"]] == ["base", "random mask", "ID3", "full fine-tuning"]
    assert found["revert"]["same_bits"]
    assert st.load(found["delta"]).selected == 100


def test_the_page_of_the_demo_fits_and_ends_with_what_to_try_next(monkeypatch):
    rows = [
        Row("base", -0.1, 0, 0.0, 0.0, 0, 1.0),
        Row("ID3", 0.8, 38_612, 0.0017, 0.1234, 240_176, 60.0),
        Row("full fine-tuning", 0.9, 22_713_601, 1.0, 0.2, 90_882_924, 60.0),
    ]
    revert = Revert(104, 38_600, 0.8, True)
    where = "generated (480 rows)"
    mean = "accuracy"
    result = DemoResult("demo", 22_713_601, "demo/topic", where, mean, 0.083, 120, rows, revert, 90.0, "")
    monkeypatch.setattr(sys, "argv", [".venv/bin/selectune"])
    lines = page(result).splitlines()
    assert "ID3                0.800       38,612    0.17%    0.123    0.24 MB" in lines
    assert "Reverted: taken off again, all 104 tensors have the bits they had before." in lines
    assert lines[-1] == "Try next: .venv/bin/selectune train -m demo -t demo/topic -b 1% -o runs/first"
    assert max(map(len, lines)) <= 80
    assert page(result, "my-data").splitlines()[-1].endswith(" --data my-data")


def test_the_demo_says_something_before_torch_is_there():
    """The first message is shown before the imports, which take seconds."""
    code = (
        "import sys\nfrom selectune.cli.commands import demo\n"
        "def say(line):\n    sys.exit('torch' if 'torch' in sys.modules else 'a line first')\n"
        "demo.say = say\ndemo.demo()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.stderr.strip() == "a line first"


TRAIN = ("train", "--task", "glue/rte", "--max-steps", "2")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--budget", "0"), 2, "error: --budget 0: at least 1 scalar must be trained"),
        (("--budget", "many"), 2, "error: --budget many: this is no number"),
        (("--budget", "1.2345k"), 2, "a count must be a whole number"),
        (("--budget", "120%"), 2, "below 100 %"),
        (("--budget", "10m"), 2, "larger than the"),
        ((), 2, "needs a budget"),
        (("--budget", "10", "--method", "id4"), 2, "Unknown method 'id4'"),
        (("--budget", "10", "--method", "bitfit"), 2, "takes no budget"),
        (("--method", "bitfit:exp=1"), 2, "takes no option exp"),
        (("--budget", "10", "--task", "glue/none"), 2, "Unknown task 'glue/none'"),
        (("--budget", "10", "--model", "./nowhere"), 1, "'./nowhere' does not exist"),
        (("--budget", "10", "--data", "./nowhere"), 1, "The data folder nowhere does not exist"),
        (("--budget", "10", "--task", "glue/qqp"), 1, "has no train split of glue/qqp"),
        (("--budget", "10", "--include", "nothing.*"), 2, "matches no parameter"),
        (("--budget", "10", "--max-length", "900"), 2, "max_length=900 is more than the 32 tokens"),
    ],
)
def test_mistakes_are_one_line_and_a_code(tiny, data, tmp_path, args, code, message):
    found = call(*TRAIN, "--model", tiny, "--data", data, "--out", tmp_path / "out", *args, "--json", code=code)
    told = data_of(found)["error"]
    assert told["exit"] == code
    assert issubclass(getattr(st.errors, told["kind"]), st.errors.SelectuneError)
    assert message in found.stderr
    assert found.stderr == f"error: {told['message']}\n"
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out" / "delta.safetensors").exists()


def test_wrong_usage_is_two(tiny):
    call("train", "--model", tiny, code=2)
    call("nothing", code=2)
    call("train", "--nothing", code=2)


def test_the_traceback_can_be_had():
    found = runner.invoke(app, ["train", "-m", "x", "-t", "y", "-o", "z"], env={"SELECTUNE_TRACEBACK": "1"})
    assert isinstance(found.exception, st.errors.TaskError)


COMMANDS = (
    *("train", "eval", "predict", "generate", "verify", "tasks", "methods", "demo"),
    *(f"delta {name}" for name in ("show", "diff", "apply", "add", "scale", "cut", "ties", "dare", "overlap")),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command):
    from typer.main import get_command

    text = call(*command.split(), "--help").stdout
    assert "Usage" in text
    found = get_command(app)
    for part in command.split():
        found = found.commands[part]  # pyright: ignore[reportAttributeAccessIssue]
    for option in found.params:
        assert getattr(option, "help", None), f"{command} {option.name} has no help"
        assert str(option.help).endswith((".", ")")), option.name  # pyright: ignore[reportAttributeAccessIssue]
    assert (found.help or "").strip().endswith(".")


def test_help_shows_examples():
    for command in ("train", "eval", "predict", "generate", "verify", "demo"):
        assert f"selectune {command}" in call(command, "--help").stdout


def test_as_a_program(trained, tmp_path):
    """`python -m selectune`, with stdout and stderr apart."""
    found = subprocess.run(
        [sys.executable, "-m", "selectune", "delta", "show", str(trained[0]), "--json"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["selected"] == 200
    assert found.stderr == ""


def test_real_data_is_reproduced(tiny, real_data, tmp_path):
    for task in ("glue/rte", "glue/stsb"):
        out = tmp_path / task.replace("/", "-")
        args = ("--model", tiny, "--task", task, "--data", real_data, "--json")
        trained = data_of(call("train", *args, "--budget", "0.17%", "--max-steps", 3, "--out", out))
        assert data_of(call("eval", *args, "--delta", out))["value"] == trained["value"]
        assert call("verify", "--model", tiny, "--delta", out).exit_code == 0


def test_progress_in_a_pipe_is_a_line_now_and_then(capsys, monkeypatch):
    from selectune.cli import output
    from selectune.runs.result import Update

    clock = iter([0.0, 1.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr(output.time, "perf_counter", lambda: next(clock))
    bar = output.ProgressBar()
    bar.start("id3 on glue/rte", 100)
    for step in (1, 10, 20, 30):
        bar.update(Update(step, 100, 0.5, step, 400, None))
    bar.stop()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "id3 on glue/rte: 10/100  loss 0.5000  10/400 selected  0.3 steps/s",
        "id3 on glue/rte: 30/100  loss 0.5000  30/400 selected  0.5 steps/s",
    ]
