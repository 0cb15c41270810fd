"""`selectune bench` with modules: peers through one builder, recipes on what sits on a model, names with options."""

from __future__ import annotations

import pytest
from test_bench import asked, load

from selectune import spec
from selectune.adapters import KINDS, linears, put_on
from selectune.bench import methods
from selectune.bench.estimate import plan
from selectune.bench.rounds import Settings
from selectune.bench.rows import whole
from selectune.bench.workload import Bench, prepare
from selectune.errors import ConfigError

pytest.importorskip("peft")
TINY = Bench("tiny", 2, 16)


@pytest.mark.parametrize("method", [*KINDS, "lora:r=2,targets=query+value", "id3:every=2+lora:r=4", "pafi+pfeiffer"])
def test_a_worker_trains_every_module(method):
    facts, steps, saved = asked(load(method, 0.001, 8), {"do": "steps", "count": 3}, {"do": "save"})
    assert facts["ok"], facts
    assert steps["ok"], steps
    assert steps["selected"] > 0
    assert saved["delta_bytes"] > 4 * steps["selected"]
    kind = (methods.parts(method)[1] or method).partition(":")[0]
    assert (facts["package"] or "").startswith("peft") is (KINDS[kind].peft is not None)
    if method == "shira":
        assert saved["delta_bytes"] > 12 * steps["selected"]  # positions as pairs of int32
    if method == "id3:every=2+lora:r=4":
        assert steps["selecting"] == [True, False, True]


def test_sizes_of_the_peers():
    """r (m + n) over every linear layer; houlsby trains norms too."""
    layers = linears(prepare(TINY)).values()
    one = sum(sum(layer.weight.shape) for layer in layers)
    facts, steps = asked(load("lora"), {"do": "steps", "count": 1})
    assert facts["ok"]
    assert steps["selected"] == 8 * one
    _, steps = asked(load("shira", 0.01), {"do": "steps", "count": 1})
    assert steps["selected"] == max(1, round(1124 / one)) * one


def test_names():
    given = "full, lora:r=8,alpha=16,frozen, id3+lora:r=8,targets=query+value,id3:every=10"
    expected = ("full", "lora:r=8,alpha=16", "frozen", "id3+lora:r=8,targets=query+value", "id3:every=10")
    assert spec.names(given) == expected
    assert methods.is_ours("id3:every=10+lora")
    assert not methods.is_ours("lora:targets=query+value")
    assert not methods.is_ours("pfeiffer")
    assert methods.recipe("id3:every=10+lora", 100, 50).schedule.every == 10  # pyright: ignore
    assert whole("id3:every=10+lora", [(1.0, False), (2.0, True)], 1.0) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("id3+lorra", "Unknown adapter 'lorra'"),
        ("id3+loraplus", "is a way to train an adapter"),
        ("lora:rank=2", "takes no option rank"),
        ("full+lora", "unknown. Known"),
        ("pafi:every=3+lora", "'pafi' takes no option every"),
    ],
)
def test_names_that_make_no_sense(name, message):
    with pytest.raises(ConfigError, match=message):
        Settings(TINY, (name,), 0.01, 3, 1)


@pytest.mark.parametrize("adapter", [kind for kind in KINDS if kind != "shira"])
def test_every_adapter_can_be_planned(adapter):
    """Its size is that of the adapter on a model with weights."""
    adapted = put_on(prepare(TINY), methods.placed(adapter), record=False, steps=10)
    size = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    found = plan(TINY, adapter, 100, 10)
    assert found.trained == size
    assert found.above_model > found.saved > 0
    assert found.adapter > 0 or adapter == "ln"
    assert found.peak == found.weights + found.above_model


def test_an_adapter_that_looks_at_data_cannot_be_planned():
    """SHiRA's mask is drawn by peft as places where a tensor is not 0."""
    with pytest.raises(ConfigError, match="a plan has none"):
        plan(TINY, "shira", 100, 10)


def test_a_selection_from_an_adapter_can_be_planned():
    found = plan(TINY, "id3", 100, 10, on="lora:r=4")
    assert found.trained == 100
    assert found == plan(TINY, "id3+lora:r=4", 100, 10)
    assert plan(TINY, "id3", "lora:r=4", 10).trained == plan(TINY, "lora:r=4", 100, 10).trained
    for method, on in (("full", "lora"), ("lora", "lora"), ("id3+lora", "lora"), ("id3", "loraplus")):
        with pytest.raises(ConfigError):
            plan(TINY, method, 100, 10, on=on)
