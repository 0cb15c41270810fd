"""Runs on an adapter, and peers: the same loop, a delta that records its adapter, and the same number from the file."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import selectune as st
from selectune import tasks
from selectune.adapters import KINDS, belongs
from selectune.delta import Delta
from selectune.errors import BaseMismatchError, ConfigError
from selectune.models.bases import load_model
from selectune.models.restore import Source, evaluate_delta, load_base, merge_delta, verify_delta
from selectune.runs.config import RunConfig
from selectune.runs.training import run

pytest.importorskip("peft")
pytest_plugins = ("tiny_fixtures",)

SMALL = {
    "super": ":sparsity=0.9",
    "shira": ":r=2",
    "prefix": ":tokens=4",
    "prompt": ":tokens=4",
    "ptuning": ":tokens=4",
}
PEERS = [f"{kind}{SMALL.get(kind, '')}" for kind in KINDS]
# The papers' rows: LoRA, PaFi + LoRA, ID3 + LoRA (r = 32 at the size of r = 2), Pfeiffer, SparseAdapter + Pfeiffer and
# ID3 + Pfeiffer.
ROWS = {
    "lora": {"method": "lora:r=2"},
    "pafi+lora": {"method": "pafi", "on": "lora:r=32", "budget": 1792},
    "id3+lora": {"method": "id3", "on": "lora:r=32", "budget": 1792},
    "pfeiffer": {"method": "pfeiffer"},
    "sparse-adapter+pfeiffer": {
        "method": "sparse-adapter", "on": "pfeiffer:reduction=4", "budget": 230, "train_fully": ("classifier.*",),
    },
    "id3+pfeiffer": {"method": "id3", "on": "pfeiffer:reduction=4", "budget": 200},
}  # fmt: skip


@pytest.fixture
def config(tiny, data, tmp_path):
    return RunConfig(
        model=str(tiny),
        task="glue/rte",
        method="lora",
        max_steps=6,
        lr=5e-3,
        data=str(data),
        out=str(tmp_path / "out"),
        seed=1,
    )


def check(result, tiny, data):
    """For every row: the file evaluates to the printed number, it verifies, and its base is the plain base."""
    source, task = Source(str(tiny)), tasks.get(result.config.task)
    assert evaluate_delta(source, result.delta, task, str(data)) == result.evaluation
    report = verify_delta(source, result.delta)
    assert report.ok, report.problem
    assert report.weights
    return st.load(result.delta)


@pytest.mark.parametrize("method", PEERS)
def test_every_peer_trains_saves_and_evaluates(config, tiny, data, method):
    result = run(dataclasses.replace(config, method=method))
    delta = check(result, tiny, data)
    kind = method.partition(":")[0]
    assert (delta.selected, result.selected, result.budget) == (0, 0, 0)
    assert ("peft" in delta.info["versions"]) is (KINDS[method.partition(":")[0]].peft is not None)
    assert delta.info["method"]["name"] == delta.info["module"]["kind"] == kind
    others = {d.name.removeprefix("base_model.") for d in delta.dense if not belongs(kind, d.name)}
    norms = {name for name in others if "LayerNorm" in name}
    assert others - norms == {"classifier.weight", "classifier.bias"}
    assert bool(norms) is (kind == "houlsby")
    written = json.loads((result.delta.parent / "run.json").read_text())
    assert (written["method"], written["trained"]) == (method, sum(d.tensor.numel() for d in delta.dense))


@pytest.mark.parametrize("row", ROWS)
def test_the_papers_rows(config, tiny, data, row):
    result = run(dataclasses.replace(config, **ROWS[row]))
    delta = check(result, tiny, data)
    if result.config.on is not None:
        kind = result.config.on.partition(":")[0]
        assert result.selected == ROWS[row]["budget"]
        assert all(belongs(kind, name) or name.startswith("classifier.") for name in delta.support)
    else:
        head = 2 * 32 + 2
        # r (m + n) over four matrices of 32 x 32 and two of 32 x 64; 2dr + r + d with r = 2; two layers
        sizes = {"lora:r=2": 2 * (2 * (4 * 64) + 2 * (2 * 96)), "pfeiffer": 2 * (2 * 32 * 2 + 2 + 32)}
        assert result.trained - head == sizes[result.config.method]


@pytest.mark.parametrize("on", ["dora", "adalora", "prefix:tokens=4", "prompt:tokens=4", "ia3", "houlsby", "parallel"])
def test_a_recipe_on_every_kind(config, tiny, data, on):
    result = run(dataclasses.replace(config, method="id3", on=on, budget=20, task="glue/stsb"))
    assert (result.selected, check(result, tiny, data).selected) == (20, 20)


def test_sparse_adapters_keep_zeros_where_id3_keeps_the_drawn_values(config, tiny):
    """The same adapter, seed and budget: unselected entries are 0 in one run, and as drawn in the other."""
    for row, zero in (("sparse-adapter+pfeiffer", True), ("id3+pfeiffer", False)):
        delta = st.load(run(dataclasses.replace(config, **ROWS[row]), overwrite=True).delta)
        loaded = load_base(Source(str(tiny)), delta, None)
        drawn = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
        delta.apply(loaded.model)
        for name, tensor in loaded.model.state_dict().items():
            if "bottleneck" in name and name.endswith("weight"):
                rest = torch.ones(tensor.numel(), dtype=torch.bool)
                rest[delta.support.get(name, torch.empty(0, dtype=torch.int64))] = False
                expected = torch.zeros_like(drawn[name]) if zero else drawn[name]
                assert torch.equal(tensor.flatten()[rest], expected.flatten()[rest]), (row, name)


def test_adalora_ends_at_its_rank(config, tiny):
    result = run(dataclasses.replace(config, method="adalora:r=2,start=4", max_steps=20))
    kept = sum(int((d.tensor != 0).sum()) for d in st.load(result.delta).dense if "lora_E" in d.name)
    assert kept == 2 * 12


def test_loraplus_trains_b_faster(config):
    moved = {}
    for method in ("lora", "loraplus:ratio=16"):
        result = run(dataclasses.replace(config, method=method, lr=1e-4), overwrite=True)
        b = [d.tensor.abs().mean() for d in st.load(result.delta).dense if "lora_B" in d.name]
        moved[method] = sum(b) / len(b)
    assert moved["loraplus:ratio=16"] > 8 * moved["lora"]


@pytest.mark.parametrize("change", [{"method": "lora"}, {"method": "pfeiffer"}, {"on": "lora"}, {"on": "pfeiffer"}])
def test_a_module_on_a_half_model_is_float32(config, tiny, data, change):
    """The delta says how the base was loaded; its own tensors are in the module's dtype."""
    recipe = {"method": "id3", "budget": 50} if "on" in change else {}
    result = run(dataclasses.replace(config, **recipe, **change, dtype="bfloat16"))
    delta = check(result, tiny, data)
    module = delta.info["module"]["kind"]
    dtypes = {belongs(module, d.name): d.tensor.dtype for d in delta.dense}
    dtypes |= {belongs(module, p.name): p.dtype for p in delta.patches}
    assert dtypes.get(True, torch.float32) == torch.float32
    assert dtypes.get(False, torch.bfloat16) == torch.bfloat16


def test_a_delta_of_float32_tensors_only_still_says_that_its_base_was_half(config, tiny, data):
    only = {"method": "id3", "on": "lora", "budget": 50, "include": ("*lora_*",), "dtype": "bfloat16"}
    delta = check(run(dataclasses.replace(config, **only)), tiny, data)
    assert {p.dtype for p in delta.patches} == {torch.float32}
    assert load_base(Source(str(tiny)), delta, None).model.dtype == torch.bfloat16


def test_the_same_seed_gives_the_same_bytes(config, tmp_path):
    first = run(dataclasses.replace(config, method="id3", on="lora", budget=50))
    again = run(dataclasses.replace(first.config, out=str(tmp_path / "again")))
    other = run(dataclasses.replace(first.config, out=str(tmp_path / "other"), seed=2))
    assert first.delta.read_bytes() == again.delta.read_bytes() != other.delta.read_bytes()


def test_a_head_trained_whole_beside_a_selection(config, tiny, data):
    result = run(dataclasses.replace(config, method="id3", on="pfeiffer", budget=30, train_fully=("classifier.*",)))
    delta = check(result, tiny, data)
    assert {d.name for d in delta.dense} == {"classifier.weight", "classifier.bias"}
    assert all("bottleneck" in name for name in delta.support)


def test_checkpoints_record_the_module(config, tmp_path):
    run(dataclasses.replace(config, method="id3", on="pfeiffer", budget=30, save_every=3))
    assert st.load(tmp_path / "out" / "checkpoint-3").info["module"]["kind"] == "pfeiffer"


def test_a_merged_lora_is_a_plain_model(config, tiny, data, tmp_path):
    result = run(dataclasses.replace(config, method="id3", on="lora", budget=500))
    merge_delta(Source(str(tiny)), result.delta, tmp_path / "merged")
    task = tasks.get("glue/rte")
    plain = load_model(str(tmp_path / "merged"), task.head, 0)
    assert plain.initialised == ()
    assert not any("lora" in name for name in plain.model.state_dict())
    found = evaluate_delta(Source(str(tmp_path / "merged")), None, task, str(data), max_length=result.max_length)
    assert found.value == pytest.approx(result.value, abs=0.05)


def test_an_adapter_cannot_be_merged(config, tiny, tmp_path):
    result = run(dataclasses.replace(config, method="pfeiffer"))
    with pytest.raises(ConfigError, match=r"cannot be folded into weights.*These can be merged: lora"):
        merge_delta(Source(str(tiny)), result.delta, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_module_that_comes_out_otherwise_is_reported(config, tiny):
    result = run(dataclasses.replace(config, method="id3", on="lora", budget=50))
    delta = st.load(result.delta)
    info = {**delta.info, "module": {**delta.info["module"], "seed": 2}}
    with pytest.raises(BaseMismatchError, match="does not have the bits"):
        load_base(Source(str(tiny)), Delta(delta.patches, delta.dense, info), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "lora", "budget": 10}, "'lora' trains all of its adapter and takes no budget.*--on lora"),
        ({"method": "lora:r=2", "include": ("*",)}, "takes no include"),
        ({"method": "lora:rank=2"}, "lora takes no option rank"),
        ({"method": "lorra"}, "Unknown method 'lorra'. Known: id3, .*lora"),
        ({"method": "lora", "on": "pfeiffer"}, "nothing goes under it"),
        ({"method": "id3", "budget": 10, "on": "loraplus"}, "is a way to train an adapter"),
        ({"method": "id3", "budget": 10, "on": "lorra"}, "Unknown adapter 'lorra'"),
        ({"method": "id3", "on": "lora"}, "needs a budget"),
        ({"method": "pafi:budget=10"}, "budget is no option of a method; it is given by itself"),
    ],
)
def test_what_does_not_go_together_is_refused_early(change, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**{"model": "nowhere", "task": "glue/rte", "max_steps": 5, **change})


def test_learning_rates():
    of = {m: RunConfig(model="m", task="glue/rte", method=m).learning_rate for m in ("lora", "lora:r=2", "pfeiffer")}
    assert of == {"lora": KINDS["lora"].lr, "lora:r=2": KINDS["lora"].lr, "pfeiffer": KINDS["pfeiffer"].lr}
    assert RunConfig(model="m", task="glue/rte", method="id3", budget=9, on="lora").learning_rate == 2e-3
    assert RunConfig(model="m", task="glue/rte", method="id3", budget=9, on="pfeiffer").learning_rate == 5e-4
    assert RunConfig(model="m", task="glue/rte", method="rosa", budget=9, on="lora").learning_rate == 5e-4
    assert RunConfig(model="m", task="glue/rte", method="random", budget=9, on="lora").learning_rate == 8e-3
    assert RunConfig(model="m", task="glue/rte", method="full", on="lora").learning_rate == KINDS["lora"].lr


def test_a_budget_of_the_size_of_a_module(config):
    dense = run(dataclasses.replace(config, method="lora:r=2", budget=None, max_steps=1))
    head = sum(
        p.numel()
        for n, p in load_model(config.model, tasks.get("glue/rte").head, 1).model.named_parameters()
        if n.startswith("classifier")
    )
    found = run(dataclasses.replace(config, method="pafi", budget="lora:r=2", max_steps=1), overwrite=True)
    assert found.selected == found.budget == dense.trained - head
    with pytest.raises(ConfigError, match="Unknown adapter 'lorra'"):
        dataclasses.replace(config, method="pafi", budget="lorra:r=2")
