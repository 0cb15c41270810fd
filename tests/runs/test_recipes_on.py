"""Every recipe on an adapter of peft and on one of ours: it is accepted, it learns, its file gives the same number."""

from __future__ import annotations

import inspect

import pytest

import selectune as st
from selectune import tasks
from selectune.errors import CalibrationError, ConfigError
from selectune.models.restore import Source, evaluate_delta, verify_delta
from selectune.recipes import RECIPES
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.spec import join

pytest_plugins = ("tiny_fixtures",)
LITTLE = {"examples": 4, "batches": 2}  # of what a recipe reads before training, where it can be told


NONE = ("xattn", "s2ft", "rosa")  # an encoder has no cross-attention, adapters have no heads, and 60 is less than LoRA
PRODUCTS = ("snip", "synflow", "movement", "losia")  # of weight and gradient: of LoRA's A and its B = 0 they are all 0


@pytest.mark.parametrize("on", ["lora:r=4", "lora:r=4,init=normal", "pfeiffer:reduction=8"])
@pytest.mark.parametrize("method", RECIPES)
def test_a_recipe_on_a_module(tiny, data, tmp_path, method, on):
    if on.startswith("lora"):
        pytest.importorskip("peft")
    takes = inspect.signature(RECIPES[method].function).parameters
    written = join(method, {name: value for name, value in LITTLE.items() if name in takes})
    needs = "budget" in takes and (takes["budget"].default is inspect.Parameter.empty or method == "sparse-adapter")
    budget = 60 if needs else None
    config = RunConfig(
        model=str(tiny), task="glue/rte", method=written, on=on, max_steps=4, lr=5e-3, data=str(data),
        out=str(tmp_path / "out"), seed=1, train_fully=("classifier.*",) if "train_fully" in takes else (),
        budget=budget,
    )  # fmt: skip
    if method in NONE or (method == "bitfit" and on.startswith("lora")):
        with pytest.raises(ConfigError):  # LoRA has no biases
            run(config)
        return
    if method in PRODUCTS and on == "lora:r=4":
        with pytest.raises(CalibrationError, match="every score is 0"):
            run(config)
        return
    result = run(config)
    assert evaluate_delta(Source(str(tiny)), result.delta, tasks.get("glue/rte"), str(data)) == result.evaluation
    report = verify_delta(Source(str(tiny)), result.delta)
    assert report.ok, report.problem
    if budget:
        assert 0 < result.selected <= 60


def test_rosa_trains_lora_and_entries_of_the_base_in_one_budget(tiny, data, tmp_path):
    pytest.importorskip("peft")
    config = RunConfig(
        model=str(tiny), task="glue/rte", method="rosa:batches=2", on="lora:r=1", max_steps=4, lr=5e-3, data=str(data),
        out=str(tmp_path / "out"), seed=1, train_fully=("classifier.*",), budget=3000,
    )  # fmt: skip
    result = run(config)
    delta = st.load(result.delta)
    assert delta.info["method"]["counted"] == ["*lora_*"]
    lora = sum(d.tensor.numel() for d in delta.dense if "lora_" in d.name)
    head = sum(d.tensor.numel() for d in delta.dense if "lora_" not in d.name)
    assert result.selected == result.budget == 3000 - lora > 0 < lora
    assert result.trained == 3000 + head
    assert all("lora_" not in patch.name for patch in delta.patches)
    assert sum(patch.indices.numel() for patch in delta.patches) == result.selected
    assert evaluate_delta(Source(str(tiny)), result.delta, tasks.get("glue/rte"), str(data)) == result.evaluation
    assert verify_delta(Source(str(tiny)), result.delta).ok
