"""All exit codes are in one table. An error is a red line, or JSON under --json."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from cli_kit import call

from selectune.cli import app as apps
from selectune.cli import catalogue
from selectune.cli.commands import lists
from selectune.cli.exits import DONE, EXITS, FAILED, INTERRUPTED, TABLE, TERMINATED, WRONG, code_of
from selectune.cli.mistakes import wants_json
from selectune.cli.output import refuse
from selectune.errors import BudgetError, ConfigError, DeltaError, ModelError, SelectuneError, UnknownTaskError

NOWHERE = ("--model", "./nowhere", "--task", "demo/topic", "--out", "out", "--budget", "9")


def commands(group=None, path=()):
    """Every command, as the words that call it."""
    group = group or typer.main.get_command(apps.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())
WITH_JSON = [words for words, command in COMMANDS.items() if any("--json" in p.opts for p in command.params)]


def test_all_commands_take_json():
    assert set(WITH_JSON) == set(COMMANDS)


TABLE_OF = [
    (DONE, ("--version",)),
    (DONE, ("tasks",)),
    (DONE, ("delta", "--help")),
    (FAILED, ("train", *NOWHERE)),
    (FAILED, ("eval", "--model", "demo", "--delta", "nowhere", "--task", "glue/rte")),
    (FAILED, ("delta", "show", "nowhere")),
    (WRONG, ("train", *NOWHERE[:-1], "0")),
    (WRONG, ("train", *NOWHERE, "--nope")),
    (WRONG, ("train", "--model", "demo")),
    (WRONG, ("verify", "--model", "demo", "--delta", "nowhere")),
    (WRONG, ("plan", "--model", "minilm", "--optimizer", "nope")),
    (WRONG, ("nope",)),
    (WRONG, ("--nope", "tasks")),
    (WRONG, ("delta", "nope")),
    (WRONG, ("tasks", "one too many")),
    (WRONG, ("train", "--steps", "many", *NOWHERE)),
]


@pytest.mark.parametrize("code, words", TABLE_OF)
def test_the_table(code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = call(*words, code=code)
    assert found.stderr.startswith("error: ") == (code != DONE)
    if code == DONE:
        return
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    asked = json.loads(call(*words, "--json", code=code).stdout)
    assert asked.keys() == {"error"}
    assert asked["error"]["exit"] == code
    assert found.stderr == f"error: {asked['error']['message']}\n"


@pytest.mark.parametrize("words", WITH_JSON)
def test_usage_errors_are_json_for_every_command(words):
    for wrong in (("--nope",), ("one", "two", "three", "--nope=1"), ("a\0b",)):
        found = call(*words, *wrong, "--json", *("-" if words == ("bench",) else ""), code=WRONG)
        told = json.loads(found.stdout)["error"]
        assert (told["kind"], told["exit"]) == ("UsageError", WRONG)
        assert found.stderr.startswith("error: ")


def test_ctrl_c(monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lists, "result", stopped)
    assert call("tasks", code=INTERRUPTED).stderr == "stopped: by Ctrl-C\n"
    told = json.loads(call("tasks", "--json", code=INTERRUPTED).stdout)
    assert told == {"error": {"kind": "Stopped", "message": "by Ctrl-C", "exit": 130}}


def test_an_error_of_the_system(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lists, "result", full)
    told = json.loads(call("tasks", "--json", code=FAILED).stdout)["error"]
    assert (told["kind"], told["exit"]) == ("OSError", 1)
    assert "No space left" in told["message"]


def test_kinds(tmp_path):
    found = json.loads(call("train", *NOWHERE[:-1], "0", "--json", code=2).stdout)
    assert found["error"]["kind"] == "BudgetError"
    assert "--budget 0" in found["error"]["message"]
    assert json.loads(call("train", *NOWHERE, "--json", code=1).stdout)["error"]["kind"] == "ModelError"


def test_a_verification_that_failed_is_no_error(tmp_path):
    (tmp_path / "delta.safetensors").write_bytes(b"damaged")
    found = call("verify", "--model", "demo", "--delta", tmp_path, "--json", code=FAILED)
    assert json.loads(found.stdout)["ok"] is False
    assert found.stderr.startswith("error: ")


def test_codes_of_errors():
    for error in (ConfigError(), BudgetError(), UnknownTaskError()):
        assert code_of(error) == WRONG
    for error in (SelectuneError(), DeltaError(), ModelError(), OSError()):
        assert code_of(error) == FAILED
    assert list(EXITS) == [DONE, FAILED, WRONG, INTERRUPTED, TERMINATED] == [0, 1, 2, 130, 143]


def test_the_table_is_told():
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text("utf-8").split())
    assert TABLE.removesuffix(".") in readme
    assert TABLE in " ".join(call("--help").stdout.replace("│", " ").split())


@pytest.mark.parametrize("place", range(8))
def test_nul_in_any_path(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--model", "demo", "--data", "d", "--out", "o", "--task"]
    words = [*words, "glue/rte", "--budget", "9"]
    words[(2, 4, 6, 8, 10, 0, 1, 3)[place]] += "\0x"
    found = call(*words, code=WRONG)
    assert "holds a NUL character" in found.stderr
    assert "\0" not in found.stderr
    assert not list(tmp_path.iterdir())


def test_what_asks_for_json():
    assert wants_json(["train", "--json"])
    assert wants_json(["--json", "train"])
    assert not wants_json(["train", "--", "--json"])
    assert not wants_json(["bench", "--json", "rows.json"])
    assert not wants_json(["-v", "bench", "--json"])
    assert wants_json(["bench", "--json", "-"])


def test_a_hostile_name_steers_no_terminal(capsys):
    refuse("The folder \x1b[2J\u202e\udcff [bold]a[/] :warning: is none.", "ModelError", 1, as_json=False)
    assert capsys.readouterr().err == "error: The folder \\x1b[2J\\u202e\\udcff [bold]a[/] :warning: is none.\n"


def shown(columns):
    """What a long error looks like on a terminal of so many columns."""
    url = "https://huggingface.co/" + "a-long-name/" * 12
    text = f"{'a few words at first ' * 6}{url} end"
    code = f"from selectune.cli.output import refuse; refuse({text!r}, 'E', 1, False)"
    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=env, check=True, timeout=60)
    os.close(theirs)
    return os.read(ours, 10_000).decode(), url


def test_long_errors_break_between_words_on_a_terminal(capsys):
    text, url = shown(40)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.replace("\r", "").splitlines()]
    assert len(lines) > 4
    assert all(len(line) <= 40 for line in lines if url not in line)
    assert sum(url in line for line in lines) == 1
    assert " ".join(" ".join(lines).split()) == f"error: {'a few words at first ' * 6}{url} end"
    refuse("word " * 100, "E", 1, as_json=False)
    assert capsys.readouterr().err.count("\n") == 1


def test_an_installation_that_is_damaged(tmp_path, monkeypatch):
    (tmp_path / "methods.json").write_text("[")
    monkeypatch.setattr(catalogue, "FILE", tmp_path / "methods.json")
    assert "methods.json is not valid JSON" in call("methods", code=FAILED).stderr
