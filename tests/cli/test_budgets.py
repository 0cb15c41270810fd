"""Checkpoints at budgets on the way: nested, measured, as small as their budget; and the masks between them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from cli_kit import call

import selectune as st
from selectune import tasks
from selectune.errors import ConfigError, StoppedError
from selectune.models.restore import Source, evaluate_delta, load_base, verify_delta
from selectune.runs.config import RunConfig
from selectune.runs.progress import RunCallback
from selectune.runs.stop import Stop
from selectune.runs.training import run

pytest_plugins = ("tiny_fixtures",)

BUDGETS = (30, 60, 150)


@pytest.fixture(scope="module")
def config(tiny, data):
    return {
        "model": str(tiny), "task": "glue/rte", "budget": 200, "max_steps": 6, "lr": 5e-3, "data": str(data), "seed": 1,
        "checkpoint_budgets": BUDGETS,
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("budgets") / "out"
    return out, run(RunConfig(**config, out=str(out)))


def places(delta):
    return {(name, int(i)) for name, indices in delta.support.items() for i in indices}


def test_deltas_at_each_budget_are_nested_and_give_their_numbers(made, tiny, data):
    out, found = made
    told = found.as_json()["checkpoints"]
    # 200 scalars over 6 steps: 33, 66, 100, 133, 166, 200
    assert [(row["budget"], row["selected"], row["step"]) for row in told] == [(30, 33, 1), (60, 66, 2), (150, 166, 5)]
    assert json.loads((out / "run.json").read_text())["checkpoints"] == told
    before = set()
    for row in told:
        path = out / f"budget-{row['budget']}"
        delta = st.load(path)
        assert delta.selected == row["selected"]
        assert before < places(delta)
        before = places(delta)
        assert verify_delta(Source(str(tiny)), path).ok
        assert evaluate_delta(Source(str(tiny)), path, tasks.get("glue/rte"), str(data)).value == row["value"]
        head = sum(dense.tensor.numel() for dense in delta.dense)
        assert (path / "delta.safetensors").stat().st_size < 8 * (delta.selected + head) + 20_000
        assert [file.name for file in path.iterdir()] == ["delta.safetensors"]
    assert before < places(st.load(found.delta))


def test_any_mask_on_the_way_can_be_rebuilt(made, tiny, tmp_path):
    out, _ = made
    told = call("delta", "cut", out, "--budget", 66, "--model", tiny, "-o", tmp_path / "cut", "--json")
    assert "warning: The values of" in told.stderr
    assert json.loads(told.stdout)["scalars"] == 66
    cut, final = st.load(tmp_path / "cut"), st.load(out)
    assert places(cut) == places(st.load(out / "budget-60"))
    for name, indices in cut.support.items():
        at = torch.searchsorted(final.support[name], indices)
        assert torch.equal(cut.values[name], final.values[name][at])
    assert (cut.info["budget"], cut.info["method"]["name"]) == (66, "cut")
    assert verify_delta(Source(str(tiny)), tmp_path / "cut").ok
    base = load_base(Source(str(tiny)), final, None, tokenizer=False).model
    sizes = [len(places(st.algebra.cut(final, count, base=base))) for count in (1, 2, 199, 200)]
    assert sizes == [1, 2, 199, 200]
    assert places(st.algebra.cut(final, 200, base=base)) == places(final)
    for count in (0, 201, 1.5):
        with pytest.raises(ConfigError, match="must be a count of 1 to 200"):
            st.algebra.cut(final, count, base=base)  # pyright: ignore[reportArgumentType]
    assert places(st.algebra.cut(st.load(out / "budget-60"), 33, base=base)) == places(st.load(out / "budget-30"))
    bare = st.Delta([dataclasses.replace(p, order=None) for p in final.patches], final.dense, final.info)
    with pytest.raises(ConfigError, match="does not say in which order"):
        st.algebra.cut(bare, 10, base=base)


def test_a_run_that_was_stopped_has_the_same_checkpoints(config, made, tmp_path, monkeypatch):
    """Stopped within the measurement of the second budget: the first is not written again, nor the second."""
    out, straight = made
    original, stop, saved = RunCallback._measure, Stop(), []

    def measure(self, step):
        if step == 2:
            stop.ask()
        original(self, step)

    again = RunConfig(**config, out=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "_measure", measure)
        with pytest.raises(StoppedError, match="after step 2"):
            run(again, stop=stop)
    save = st.Tuner.save
    monkeypatch.setattr(
        st.Tuner, "save", lambda self, path, **more: saved.append(str(path)) or save(self, path, **more)
    )
    rest = run(again, resume=True)
    assert [path.rpartition("out/")[2] for path in saved] == ["budget-150/delta.safetensors", "delta.safetensors"]
    assert rest.as_json()["checkpoints"] == straight.as_json()["checkpoints"]
    for name in ("", *(f"budget-{budget}" for budget in BUDGETS)):
        mine, whole = (folder / name / "delta.safetensors" for folder in (tmp_path / "out", out))
        assert mine.read_bytes() == whole.read_bytes()
    monkeypatch.undo()
    fresh = run(dataclasses.replace(again, checkpoint_budgets=(100,)), overwrite=True)
    assert [row["budget"] for row in fresh.as_json()["checkpoints"]] == [100]
    assert sorted(path.name for path in (tmp_path / "out").glob("budget-*")) == ["budget-100"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_budgets": (60, 30)}, "must be counts of scalars"),
        ({"checkpoint_budgets": (0,)}, "must be counts of scalars"),
        ({"checkpoint_budgets": (0.5,)}, "must be counts of scalars"),
        ({"method": "pafi"}, "need a method whose support grows step by step .* pafi does not"),
        ({"method": "repeat-d3"}, "repeat-d3 does not"),
    ],
)
def test_budgets_that_cannot_be_reached(config, change, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**(config | change))


def test_a_budget_beyond_the_runs(config, tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint_budgets=300 is never reached: 200 scalars are selected in all"):
        run(RunConfig(**(config | {"checkpoint_budgets": (30, 300)}), out=str(tmp_path / "out")))


def test_on_the_command_line(tiny, data, tmp_path):
    args = ("train", "-m", tiny, "-t", "glue/rte", "--data", data, "-b", 90, "--max-steps", 3)
    told = call(*args, "--checkpoint-budgets", "30,40", "-o", tmp_path / "out").stdout
    assert "\nbudget 30: 30 selected at step 1, accuracy 0." in told
    assert "\nbudget 40: 60 selected at step 2, accuracy 0." in told
    again = call("train", "--config", tmp_path / "out" / "run.json", "-o", tmp_path / "again", "--json")
    assert [row["budget"] for row in json.loads(again.stdout)["checkpoints"]] == [30, 40]
