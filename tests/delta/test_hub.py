"""Deltas on the hub, against a stand-in of its API: pushed and loaded bit for bit, and every refusal is a sentence."""

# ruff: noqa: E402  (what follows needs packages that the core is tested without)
from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

hf: Any = pytest.importorskip("huggingface_hub", reason="pip install 'selectune[hub]' is needed")
pytest.importorskip("typer", reason="the command line's package, which the core is tested without, is needed")

from cli_kit import call
from hub_kit import TOKEN, Hub, Repo, stand_in
from typer.main import get_command

import selectune as st
from selectune.cli.app import app
from selectune.delta import Delta
from selectune.errors import ConfigError, DeltaError, DeltaFormatError, HubError
from selectune.models.evaluate import Evaluation
from selectune.models.recorded import run_of
from selectune.runs.config import RunConfig

constants: Any = import_module("huggingface_hub.constants")
RESOLVE = "/{repo_id}/resolve/{revision}/{filename}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with stand_in() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + RESOLVE)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield found


def models(seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    base = torch.nn.Linear(8, 8)
    torch.manual_seed(seed + 1)
    return base, torch.nn.Linear(8, 8)


def delta(seed: int = 0, **base: object) -> Delta:
    made = st.diff(*models(seed))
    info = made.info
    return Delta(made.patches, made.dense, {**info, "base": {**info["base"], **base}})


def test_what_is_pushed_is_loaded_bit_for_bit(hub: Hub):
    first, second = delta(1), delta(2)
    made = first.push_to_hub("org/name")
    assert made.commit is not None
    assert made.commit == hub.repos["org/name"].branches["main"]
    assert hub.repos["org/name"].commits[made.commit]["README.md"].decode() == made.card
    found = st.load("org/name")
    assert found.to_bytes() == first.to_bytes()
    assert found.origin == f"org/name@{made.commit}"
    model, tuned = models(1)
    found.apply(model)
    assert torch.equal(model.weight, tuned.weight)  # pyright: ignore[reportArgumentType]

    later = second.push_to_hub("org/name", revision="v2", private=True)
    assert st.load("org/name").to_bytes() == first.to_bytes()
    for name, revision in (("org/name@v2", None), ("org/name", "v2"), ("org/name", later.commit)):
        again = st.load(name, revision)
        assert again.to_bytes() == second.to_bytes()
        assert again.origin == f"org/name@{later.commit}"
    assert {auth for method, _, auth in hub.requests if method == "POST"} == {f"Bearer {TOKEN}"}


def test_a_new_repository_is_private_if_asked(hub: Hub):
    delta().push_to_hub("org/open")
    delta().push_to_hub("org/closed", private=True)
    assert [hub.repos[name].private for name in ("org/open", "org/closed")] == [False, True]


@pytest.mark.parametrize("at", [3, 60, -1, -300])
def test_a_corrupted_download_is_refused(hub: Hub, at: int):
    damaged = bytearray(delta().to_bytes())
    damaged[at] ^= 1
    hub.repos["org/name"] = repo = Repo()
    repo.commit("main", {"delta.safetensors": bytes(damaged)})
    with pytest.raises(DeltaFormatError, match=r"came from the hub: remove this file") as told:
        st.load("org/name")
    Path(str(told.value).partition(": ")[0]).resolve().unlink()  # as it says
    repo.commit("main", {"delta.safetensors": delta().to_bytes()})
    assert st.load("org/name").digest == delta().digest


def test_a_dry_run_sends_nothing_and_says_what_is_sent(hub: Hub, tmp_path: Path):
    delta().save("run")
    planned = delta().push_to_hub("org/name", license="apache-2.0", dry_run=True)
    shown = json.loads(call("push", "run", "org/name", "--license", "apache-2.0", "--json").stdout)
    text = call("push", "run", "org/name", "--license", "apache-2.0").stdout
    assert not hub.requests
    assert planned.commit is shown["commit"] is None
    assert not shown["sent"]
    assert planned.card == shown["card"]
    assert "Nothing was sent" in text
    assert planned.card.rstrip() in text
    sent = json.loads(call("push", "run", "org/name", "--license", "apache-2.0", "--yes", "--json").stdout)
    assert {**sent, "commit": None, "sent": False} == shown
    files = hub.repos["org/name"].commits[sent["commit"]]
    assert {name: len(data) for name, data in files.items()} == {n: f["bytes"] for n, f in shown["files"].items()}
    assert files["delta.safetensors"] == (tmp_path / "run" / "delta.safetensors").read_bytes()


def test_what_lies_here_is_taken_and_the_hub_is_not_asked(hub: Hub):
    delta().save("org/name")
    assert st.load("org/name").origin is None
    for missing in ("./org/other", "nowhere", "org/other.safetensors", Path("org/other")):
        with pytest.raises(DeltaError):
            st.load(missing)
    with pytest.raises(ConfigError, match="revision=v1 is for deltas on the hub"):
        st.load("org/name", revision="v1")
    with pytest.raises(DeltaError, match=r"org/typo does not exist, though its folder org does.*org/typo@main"):
        st.load("org/typo")
    assert not hub.requests


def test_a_commit_that_is_in_the_cache_needs_no_network(hub: Hub, monkeypatch):
    commit = delta().push_to_hub("org/name").commit
    st.load("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert st.load("org/name").origin == st.load("org/name", commit).origin == f"org/name@{commit}"
    assert not hub.requests


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def _private(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.repos["org/name"] = Repo(private=True)
    patch.setenv("HF_TOKEN", TOKEN[:-1] + "x")


def _no_network(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "ENDPOINT", closed := closed_port())
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", closed + RESOLVE)
    patch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries a few times


def _slow(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.status = 503
    patch.setattr("time.sleep", lambda seconds: None)


LOADING = {
    "404": (lambda hub, patch: None, "the hub shows no repository org/name"),
    "private": (_private, "or it is private and the token may not read it"),
    "gated": (lambda hub, patch: hub.repos.update({"org/name": Repo(gated=True)}), "must be asked for on its page"),
    "no revision": (lambda hub, patch: hub.repos.update({"org/name": Repo()}), "has no revision v9"),
    "no delta": (
        lambda hub, patch: hub.repos.setdefault("org/name", Repo()).commit("v9", {"a": b""}),
        "holds no delta.safetensors",
    ),
    "401": (lambda hub, patch: setattr(hub, "status", 401), r"the hub refuses this for org/name \(401\)"),
    "403": (lambda hub, patch: setattr(hub, "status", 403), r"the hub refuses this for org/name \(403\)"),
    "503": (_slow, "the hub answers 503"),
    "no network": (_no_network, "the hub cannot be reached"),
    "offline": (lambda hub, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE=1"),
}
PUSHING = {
    "401": (lambda hub, patch: setattr(hub, "status", 401), r"the hub refuses this for org/name \(401\)"),
    "wrong token": (lambda hub, patch: patch.setenv("HF_TOKEN", TOKEN[:-1] + "x"), "hf auth login"),
    "503": (_slow, "the hub answers 503"),
    "no network": (_no_network, "the hub cannot be reached"),
    "offline": (lambda hub, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE=1"),
}


def check(told: pytest.ExceptionInfo[HubError], why: str) -> None:
    text = str(told.value)
    assert re.search(why, text), text
    assert "\n" not in text
    assert text.endswith(".")
    assert TOKEN[:-1] not in "".join(traceback.format_exception(told.value))


@pytest.mark.parametrize("case", LOADING)
def test_each_way_of_not_loading_is_a_sentence(hub: Hub, monkeypatch, case):
    plant, why = LOADING[case]
    plant(hub, monkeypatch)
    with pytest.raises(HubError, match=r"^org/name is no file or folder here") as told:
        st.load("org/name", revision="v9")
    check(told, why)


@pytest.mark.parametrize("case", PUSHING)
def test_each_way_of_not_pushing_is_a_sentence(hub: Hub, monkeypatch, case):
    plant, why = PUSHING[case]
    plant(hub, monkeypatch)
    with pytest.raises(HubError, match=r"^The delta was not pushed: ") as told:
        delta().push_to_hub("org/name")
    check(told, why)


@pytest.mark.parametrize("name", ["name", "org/name/more", "org/name@v1", "./run", "", "org/na--me"])
def test_a_name_that_is_no_repository_is_refused(hub: Hub, name):
    with pytest.raises((ConfigError, HubError), match=r"org/name|na--me"):
        delta().push_to_hub(name)
    assert not hub.repos


def test_the_card_says_what_the_delta_records(hub: Hub):
    named = delta(id="org/base", revision=COMMIT)
    card = named.push_to_hub(
        "org/name", license="mit", metrics={"accuracy on glue/rte": 0.75}, commands=["selectune train"], dry_run=True
    ).card
    data = hf.ModelCard(card).data.to_dict()
    assert data == {
        "library_name": "selectune", "tags": ["selectune", "diff"], "license": "mit", "base_model": "org/base",
        "base_model_relation": "adapter",
    }  # fmt: skip
    for part in (f"org/base, revision {COMMIT}", "72 scalars", named.digest, "| accuracy on glue/rte | 0.75 |",
                 "selectune train\nselectune verify --model org/base --delta org/name"):  # fmt: skip
        assert part in card
    assert len(hf.ModelCard(card).data.to_yaml().splitlines()) > 5
    assert "base_model" not in delta(id="folder").push_to_hub("org/name", dry_run=True).card


def test_the_lines_in_the_card_load_the_delta(hub: Hub):
    made = delta().push_to_hub("org/name")
    model, tuned = models()
    found = re.search(r"```python\n(.*?)```", made.card, re.S)
    assert found is not None
    assert len([line for line in found[1].splitlines() if line]) == 3
    exec(found[1], {"model": model})
    assert torch.equal(model.weight, tuned.weight)  # pyright: ignore[reportArgumentType]


def test_the_command_in_the_card_is_that_of_the_run(tmp_path: Path):
    config = {"model": "/home/me/base", "task": "glue/rte", "method": "id3:exp=1", "budget": 500, "max_steps": 5,
              "include": ["*.attention.*"], "data": None, "train": None, "plugin": [], "seed": 6}  # fmt: skip
    told = {"task": "glue/rte", "metric": "accuracy", "value": 0.5, "others": {"f1": 0.25}, "model": {"id": "demo"}}
    (tmp_path / "run.json").write_text(json.dumps({**told, "config": config}))
    metrics, (command,) = run_of(tmp_path)
    assert metrics == {"accuracy on glue/rte": 0.5, "f1 on glue/rte": 0.25}
    words = shlex.split(command)
    assert words[:2] == ["selectune", "train"]
    context = get_command(app).commands["train"].make_context("train", words[2:])  # pyright: ignore
    given = {name: value for name, value in context.params.items() if name in config and value is not None}
    assert given.items() >= {**{k: config[k] for k in ("task", "method", "max_steps", "include", "seed")},
                             "budget": "500", "model": "demo"}.items()  # fmt: skip
    whole = RunConfig(
        model="demo", task="glue/rte", budget=500, seed=0, max_grad_norm=0.0, pattern="{} {} is", words=("yes", "no"),
        shots=2, optimizer="sm3", quantise="nf4", train_size=50, hold_out=0.1, group_by_length=True, revision="v1",
        eval_size=9,
    )  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps({**told, "config": whole.as_json()}))
    words = shlex.split(run_of(tmp_path)[1][0])
    again = get_command(app).commands["train"].make_context("train", words[2:]).params  # pyright: ignore
    wanted = {name: value for name, value in whole.as_json().items() if value is not None and name not in ("budget",)}
    wanted["pattern"] = [whole.pattern]  # an option that may be given several times
    assert {name: again[name] for name in wanted if again[name]} == {n: v for n, v in wanted.items() if v}
    assert (again["seed"], again["max_grad_norm"]) == (0, 0.0)
    (tmp_path / "run.json").write_text(json.dumps({**told, "config": {**config, "train": "/home/me/rows.csv"}}))
    assert run_of(tmp_path)[1] == []
    assert run_of(tmp_path / "elsewhere") == ({}, [])


def test_an_evaluation_names_the_commit_of_its_delta():
    found = Evaluation("glue/rte", "accuracy", 0.5, 2)
    assert "delta" not in found.as_json()
    assert replace(found, delta=f"org/name@{COMMIT}").as_json()["delta"] == f"org/name@{COMMIT}"


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"pip install 'selectune\[hub\]'"):
        st.load("org/name")


def test_the_command_line_in_a_process_of_its_own(hub: Hub, tmp_path: Path):
    """The environment alone says where the hub is and who asks; the token is shown nowhere, whatever goes wrong."""
    delta().save(tmp_path / "run")
    code = """
import sys
from selectune.cli import main
for args in (["push", "run", "org/name"], ["push", "run", "org/name", "--yes"], ["delta", "show", "org/name"],
             ["--verbose", "delta", "show", "org/none"], ["verify", "--model", "demo", "--delta", "org/none"]):
    try:
        main(args)
    except SystemExit as end:
        sys.stderr.write(f"exit {end.code}\\n")
"""
    keep = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(st.__file__).parent.parent), "HOME": str(tmp_path)}
    env = {
        **keep,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert re.findall(r"^exit (.*)$", run.stderr, re.M) == ["0", "0", "0", "1", "2"], run.stderr
    assert run.stderr.count("the hub shows no repository org/none") == 2
    assert delta().digest in run.stdout
    assert TOKEN not in run.stdout + run.stderr
    assert any(auth == f"Bearer {TOKEN}" for _, _, auth in hub.requests)
