"""`selectune train` stopped and resumed: the same bytes, the whole history, and what is refused before any loading."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import shutil

import pytest
from tiny_kit import make_data

from selectune.errors import BaseMismatchError, CheckpointError, ConfigError
from selectune.files import seal
from selectune.recipes import RECIPES
from selectune.runs import training
from selectune.runs.config import RunConfig
from selectune.runs.progress import RunCallback
from selectune.runs.training import run
from selectune.spec import join

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def config(tiny, data, tmp_path):
    return RunConfig(
        model=str(tiny), task="glue/rte", budget=200, max_steps=5, batch_size=8, lr=5e-3, data=str(data),
        out=str(tmp_path / "out"), seed=1, save_every=2, eval_every=2,
    )  # fmt: skip


@pytest.fixture
def stop_at(monkeypatch):
    """Ctrl-C before a step's work is kept, as if the process died there."""

    @contextlib.contextmanager
    def at(step):
        with monkeypatch.context() as patch:
            original = RunCallback.on_step_end

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    raise KeyboardInterrupt
                original(self, args, state, control, **kwargs)

            patch.setattr(RunCallback, "on_step_end", on_step_end)
            yield

    return at


def stopped(stop_at, config, step):
    with stop_at(step), pytest.raises(KeyboardInterrupt):
        run(config)


def test_the_same_bytes_and_the_whole_history(config, tmp_path, stop_at):
    straight = run(dataclasses.replace(config, out=str(tmp_path / "straight")))
    stopped(stop_at, config, 5)
    rest = run(config, resume=True)
    assert rest.delta.read_bytes() == straight.delta.read_bytes()
    assert rest.value == straight.value
    assert (straight.resumed, rest.resumed) == (None, 4)
    assert list(rest.history) == list(straight.history)
    assert [record["step"] for record in rest.history if "loss" in record] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in rest.history if "metric" in record] == [2, 4]
    assert rest.best == straight.best
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (written["resumed"], written["history"]) == (4, list(straight.history))


def test_from_a_folder_into_another(config, tmp_path, stop_at):
    straight = run(config)
    from_two = tmp_path / "out" / "checkpoint-2"
    other = run(dataclasses.replace(config, out=str(tmp_path / "other"), save_every=None), resume=from_two)
    assert other.delta.read_bytes() == straight.delta.read_bytes()
    assert not list((tmp_path / "other").glob("checkpoint-*"))


def test_a_run_that_was_over(config, tmp_path):
    """The last checkpoint is of the last step: nothing is trained, the delta is written again."""
    config = dataclasses.replace(config, max_steps=4)
    first = run(config)
    whole = first.delta.read_bytes()
    first.delta.unlink()
    again = run(config, resume=True)
    assert (again.resumed, again.steps) == (4, 4)
    assert again.delta.read_bytes() == whole
    assert list(again.history) == list(first.history)


def test_a_loss_between_two_logs(config, tmp_path, stop_at):
    """Losses are logged every fourth step here and at every save, so a mean is never over half its steps."""
    config = dataclasses.replace(config, max_steps=80, save_every=5, budget=160, eval_every=200)
    straight = run(dataclasses.replace(config, out=str(tmp_path / "straight")))
    stopped(stop_at, config, 58)  # after a save at 55
    rest = run(config, resume=True)
    assert rest.delta.read_bytes() == straight.delta.read_bytes()
    assert list(rest.history) == list(straight.history)


ON = [
    *({"method": name} for name in RECIPES if name not in ("xattn", "rosa")),
    {"method": "rosa", "on": "lora:r=1", "budget": 3000},
    {"method": "id3", "group_by_length": True, "accumulation": 2, "max_steps": 6},
    {"method": "id3", "on": "lora:r=4,dropout=0.1"},
    {"method": "pafi", "on": "pfeiffer:reduction=8"},
    *(
        {"method": peer}
        for peer in ("lora:r=2", "dora:r=2", "loraplus:r=2", "prefix:tokens=2", "ptuning:tokens=2", "ia3")
    ),
    *({"method": peer} for peer in ("prompt:tokens=2", "shira", "super", "ln")),
]


@pytest.mark.parametrize("change", ON, ids=lambda change: "-".join(str(value) for value in change.values()))
def test_every_method(config, tmp_path, change):
    if "on" in change or change["method"] not in RECIPES:
        pytest.importorskip("peft")
    method = change["method"]
    takes = inspect.signature(RECIPES[method].function).parameters if method in RECIPES else {}
    given = {name: value for name, value in (("examples", 4), ("batches", 2)) if name in takes}
    more = {} if "budget" in takes else {"budget": None}
    change = {**change, "method": join(method, given)}
    config = dataclasses.replace(config, **{"max_steps": 4, **more, **change}, save_every=1, eval_every=50, lr=1e-3)
    straight = run(dataclasses.replace(config, out=str(tmp_path / "straight")))
    there = tmp_path / "straight" / "checkpoint-1"
    rest = run(dataclasses.replace(config, out=str(tmp_path / "rest"), save_every=None), resume=there)
    assert rest.delta.read_bytes() == straight.delta.read_bytes()
    assert rest.value == straight.value


def test_ranks_that_move(config, tmp_path):
    """AdaLoRA's averages are neither weights nor optimizer state: before they move ranks, while, and after."""
    pytest.importorskip("peft")
    config = dataclasses.replace(config, method="adalora:r=2", budget=None, max_steps=20, save_every=3, eval_every=50)
    straight = run(config)
    for step in (3, 9, 18):
        out = str(tmp_path / f"from-{step}")
        rest = run(dataclasses.replace(config, out=out, save_every=None), resume=tmp_path / f"out/checkpoint-{step}")
        assert rest.delta.read_bytes() == straight.delta.read_bytes(), step
    (tmp_path / "out/checkpoint-9/module.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-9 is damaged: module\.safetensors is missing"):
        run(config, resume=tmp_path / "out/checkpoint-9")
    seal(tmp_path / "out/checkpoint-9", {"run": straight.run, "step": 9})
    with pytest.raises(ConfigError, match=r"has no module\.safetensors, which adalora needs"):
        run(config, resume=tmp_path / "out/checkpoint-9")


@pytest.mark.parametrize("method", ["sora:xi=0.001", "dylora:r=4", "increlora:r=2", "adamix:experts=2,init=zero"])
def test_adapters_that_do_more_than_a_step(config, tmp_path, method):
    """Gates that shrink, ranks that are drawn or grow, and sites that are drawn go on as if there had been no stop."""
    config = dataclasses.replace(config, method=method, budget=None, max_steps=8, save_every=3, eval_every=50)
    straight = run(config)
    rest = run(dataclasses.replace(config, out=str(tmp_path / "rest")), resume=tmp_path / "out/checkpoint-3")
    assert rest.delta.read_bytes() == straight.delta.read_bytes()
    if method.startswith("increlora"):
        late = run(dataclasses.replace(config, out=str(tmp_path / "late")), resume=tmp_path / "out/checkpoint-6")
        assert late.delta.read_bytes() == straight.delta.read_bytes()


@pytest.fixture
def made(config, monkeypatch):
    """A finished run's settings, where neither model nor data can be loaded any more."""
    run(config)

    def refuse(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(training, "load_model", refuse)
    monkeypatch.setattr(training.tasks, "load", refuse)
    return config


DIFFERENT = [
    ({"lr": 1e-3}, r"lr \(0.005 there, 0.001 now\)"),
    ({"task": "glue/cola"}, r"task \('glue/rte' there, 'glue/cola' now\)"),
    ({"max_steps": 6, "seed": 2}, r"max_steps \(5 there, 6 now\), seed \(1 there, 2 now\)"),
    ({"budget": 201}, r"budget \(200 there, 201 now\)"),
    ({"method": "pafi"}, r"method \('id3' there, 'pafi' now\)"),
    ({"exclude": ("*bias",)}, r"exclude \(\[\] there, \['\*bias'\] now\)"),
]


@pytest.mark.parametrize(("change", "message"), DIFFERENT)
def test_other_settings_are_named_before_anything_is_loaded(made, change, message):
    for resume in (True, f"{made.out}/checkpoint-2"):
        with pytest.raises(ConfigError, match=message):
            run(dataclasses.replace(made, **change), resume=resume)


def test_checkpoints_that_are_none(made, tmp_path):
    with pytest.raises(ConfigError, match=r"no checkpoint to resume in .*nowhere.*--save-every"):
        run(dataclasses.replace(made, out=str(tmp_path / "nowhere")), resume=True)
    with pytest.raises(ConfigError, match=r"The checkpoint .*checkpoint-3 does not exist"):
        run(made, resume=tmp_path / "out" / "checkpoint-3")
    for name in ("tuner.safetensors", "optimizer.pt", "run.json", "manifest.json"):
        copied = tmp_path / name / "checkpoint-4"
        shutil.copytree(tmp_path / "out" / "checkpoint-4", copied)
        (copied / name).unlink()
        with pytest.raises(CheckpointError, match=rf"checkpoint-4 is (damaged|incomplete).*{name}"):
            run(made, resume=copied)
    (tmp_path / "out" / "checkpoint-4" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"Beside it these are whole: checkpoint-5, checkpoint-2\."):
        run(made, resume=tmp_path / "out" / "checkpoint-4")
    for text in ("{}", "[]", "{", '{"step": 4}'):
        (copied / "run.json").write_text(text)
        seal(copied, {"run": "1", "step": 4})
        with pytest.raises(CheckpointError, match=r"run\.json is not (that of a checkpoint|valid JSON)"):
            run(made, resume=copied)


def test_an_incomplete_checkpoint_is_passed_over(config, tmp_path):
    straight = run(config)
    whole = straight.delta.read_bytes()
    newest = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    (newest / "tuner.safetensors").unlink()
    before = int(newest.name.partition("-")[2])
    rest = run(config, resume=True)
    assert rest.resumed is not None
    assert rest.resumed < before
    assert rest.delta.read_bytes() == whole


def test_other_data_and_another_model(config, tmp_path, tiny, other):
    run(config)
    folder = make_data(tmp_path / "data")
    file = folder / "glue/rte/train.jsonl.gz"
    file.unlink()
    shutil.copy(folder / "glue/rte/validation.jsonl.gz", file)
    with pytest.raises(ConfigError, match="other training data: the 24 rows"):
        run(dataclasses.replace(config, data=str(folder)), resume=True)
    again = shutil.copytree(other, tmp_path / "moved" / tiny.name)  # its name is right, its weights are not
    with pytest.raises(BaseMismatchError, match="another base"):
        run(dataclasses.replace(config, model=str(again)), resume=True)
    moved = shutil.copytree(tiny, tmp_path / "elsewhere" / tiny.name)
    assert run(dataclasses.replace(config, model=str(moved)), resume=True).selected == 200
