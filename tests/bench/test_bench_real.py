"""`selectune bench` on a task's rows: real batches, what bounds left of gradients, selections compared with float64."""

from __future__ import annotations

import pytest
import torch
from test_bench import asked
from typer.testing import CliRunner

from selectune.bench import rows, table
from selectune.bench.workload import Bench, load_real, real_batches
from selectune.cli.app import app
from selectune.errors import ConfigError, UnknownTaskError
from selectune.ops.bounds import Factors

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def load(tiny, data, monkeypatch):
    monkeypatch.setenv("SELECTUNE_DATA", str(data))
    bench = {"model": str(tiny), "batch": 3, "length": 24, "data": "glue/rte"}
    return {"do": "load", "bench": bench, "budget": 600, "steps": 4, "compare": 1}


@pytest.mark.parametrize("method", ["id3", "repeat-d3", "rigl:every=2", "spiel-ag:every=2,window=1", "gallop"])
def test_selections_on_real_rows_are_those_of_float64(load, method):
    facts, steps, saved = asked({**load, "method": method}, {"do": "steps", "count": 4}, {"do": "save"})
    assert facts["ok"], facts
    assert steps["ok"], steps
    assert saved["delta_bytes"] > 0
    seen = rows.selections(steps["selections"])
    assert seen is not None
    assert seen["equal"] == seen["compared"] == seen["steps"] > 0
    assert 0 < seen["left_median"] <= seen["left_95"] <= seen["left_most"] <= 1
    assert "compared selections are those of float64" in table.selected(method, seen)


def test_a_wrong_selection_is_seen(load, monkeypatch):
    real = Factors.exact
    monkeypatch.setattr(Factors, "exact", lambda self, flat: real(self, flat) * (1 + flat % 7))
    _, steps = asked({**load, "method": "id3"}, {"do": "steps", "count": 2})
    assert [one["equal"] for one in steps["selections"]] == [False, False]


def test_batches_are_whole_and_depend_on_the_seed(tiny, data, monkeypatch):
    monkeypatch.setenv("SELECTUNE_DATA", str(data))
    bench = Bench(str(tiny), 3, 24, data="glue/rte")
    loaded = load_real(bench)
    assert loaded.model.training
    assert loaded.initialised
    found = real_batches(bench, loaded.tokenizer, 4)
    assert all(batch["input_ids"].shape[0] == 3 and batch["input_ids"].shape[1] <= 24 for batch in found)
    other = real_batches(Bench(str(tiny), 3, 24, seed=7, data="glue/rte"), loaded.tokenizer, 4)
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(found, other, strict=True))
    with pytest.raises(ConfigError, match="training rows"):
        real_batches(Bench(str(tiny), 10_000, 24, data="glue/rte"), loaded.tokenizer, 4)


def test_random_models_have_no_real_rows():
    with pytest.raises(ConfigError, match="trained model"):
        Bench("tiny", data="real")
    with pytest.raises(UnknownTaskError):
        Bench("demo", data="glue/nothing")
    run = CliRunner().invoke(app, ["bench", "--model", "tiny", "--data", "real"])
    assert run.exit_code == 2
