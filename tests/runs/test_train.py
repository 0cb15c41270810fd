"""Runs: settings refused early, a run that learns, saves and reproduces, runs that must not end in success."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import selectune as st
from selectune import tasks
from selectune.delta import weights_digest
from selectune.errors import (
    BudgetError,
    CalibrationError,
    ConfigError,
    NonFiniteError,
    NothingTrainedError,
    ScheduleError,
    ScopeError,
    TaskError,
)
from selectune.models.restore import Source, evaluate_delta, load_base, verify_delta
from selectune.recipes import RECIPES
from selectune.runs.config import RunConfig, build_method
from selectune.runs.result import Update
from selectune.runs.training import run
from selectune.tasks import Classification

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def config(tiny, data, tmp_path):
    return RunConfig(
        model=str(tiny),
        task="glue/rte",
        budget=200,
        max_steps=6,
        lr=5e-3,
        data=str(data),
        out=str(tmp_path / "out"),
        seed=1,
    )


BAD = [
    ({"method": "id4"}, ConfigError, "Unknown method 'id4'. Known: id3, "),
    ({"task": "glue/x"}, TaskError, "Unknown task"),
    ({"budget": None}, BudgetError, "needs a budget"),
    ({"budget": 0}, BudgetError, "at least 1"),
    ({"budget": 1.5}, BudgetError, "density"),
    ({"method": "bitfit"}, ConfigError, "takes no budget"),
    ({"method": "bitfit:exp=1", "budget": None}, ConfigError, "takes no option exp. It takes: none"),
    ({"method": "pafi:every=2"}, ConfigError, "takes no option every. It takes: tie"),
    ({"method": "full", "budget": None, "train_fully": ("*",)}, ConfigError, "no train_fully"),
    ({"method": "id3:exp=x"}, ConfigError, r"exp='x' is not allowed; it must be a number"),
    ({"method": "id3:every=1.5"}, ConfigError, r"every=1.5 is not allowed; it must be a whole number"),
    ({"method": "id3:budget=5"}, ConfigError, "budget is no option of a method"),
    ({"method": "id3:exp"}, ConfigError, "written name=value"),
    ({"method": "fish:labels=both"}, ConfigError, "Unknown labels"),
    ({"lr": 0.0}, ConfigError, "lr=0.0"),
    ({"lr": float("nan")}, ConfigError, "lr=nan"),
    ({"batch_size": 0}, ConfigError, "batch_size=0"),
    ({"max_steps": True}, ConfigError, "max_steps=True"),
    ({"epochs": 2.0}, ConfigError, "not both"),
    ({"seed": -1}, ConfigError, "seed=-1"),
    ({"schedule": "step"}, ConfigError, "Unknown schedule 'step'"),
    ({"dtype": "int8"}, ConfigError, "Unknown dtype"),
    ({"warmup": -1.0}, ConfigError, "warmup"),
    ({"optimizer": "adam"}, ConfigError, "Unknown optimizer 'adam'. Known: adamw, adamw-entry, sm3"),
    ({"method": "id3:eps=0"}, ConfigError, "eps"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(row[0]) for row in BAD])
def test_bad_settings_are_refused_before_anything_is_loaded(change, error, message):
    good = RunConfig(model="nowhere", task="glue/rte", budget=10, max_steps=5)
    with pytest.raises(error, match=message):
        dataclasses.replace(good, **change)


def test_steps_and_defaults():
    config = RunConfig(model="m", task="glue/rte", budget=10)
    assert config.steps(2490) == 30 * 156
    assert dataclasses.replace(config, epochs=0.5, accumulation=4).steps(2490) == 20
    assert config.learning_rate == 5e-4
    assert RunConfig(model="m", task="glue/rte", method="full").learning_rate == 5e-5
    assert RunConfig(model="m", task="glue/rte", method="child-tuning-d").learning_rate == 4e-5


def test_patterns_reach_the_scope():
    bias = RunConfig(model="m", task="glue/rte", method="bitfit", train_fully=("classifier.*",))
    scope = build_method(bias, 5).scope
    assert (scope.include, scope.train_fully) == (("*bias",), ("classifier.*",))
    id3 = RunConfig(model="m", task="glue/rte", budget=5, exclude=("*embeddings*",))
    assert build_method(id3, 5).scope.exclude == ("*embeddings*",)


class Watch:
    def __init__(self):
        self.seen = []

    def start(self, title, steps):
        self.seen.append((title, steps))

    def update(self, update):
        assert isinstance(update, Update)
        self.seen.append(update)

    def stop(self):
        self.seen.append("stop")


def test_a_run_saves_what_it_printed(config, tiny, data):
    watch = Watch()
    config = dataclasses.replace(config, eval_every=2)
    result = run(config, watch)
    assert (result.steps, result.selected, result.budget) == (6, 200, 200)
    assert 0 < result.verification.changed <= 200
    assert result.delta_bytes == result.delta.stat().st_size
    assert watch.seen[0] == ("id3 on glue/rte", 6)
    assert watch.seen[-1] == "stop"
    assert watch.seen[-2].step == 6

    written = json.loads((result.delta.parent / "run.json").read_text())
    assert written["value"] == result.value
    assert [row["step"] for row in written["history"] if "metric" in row] == [2, 4]
    assert written["best"]["value"] >= result.value
    assert written["model"]["id"] == "tiny"
    assert all(str(tiny.parent) not in text for text in (written["model"]["id"],))
    assert set(written["versions"]) >= {"selectune", "torch", "transformers"}

    source = Source(str(tiny))
    task = tasks.get("glue/rte")
    assert evaluate_delta(source, result.delta, task, str(data)) == result.evaluation
    report = verify_delta(source, result.delta)
    assert report.ok, report.problem
    assert report.weights
    assert report.changed == result.verification.changed
    info = st.load(result.delta).info
    assert info["base"]["id"] == "tiny"
    assert info["base"]["seed"] == 1
    assert info["method"]["task"] == "glue/rte"
    assert info["model"]["path"] == str(tiny)  # the one place that says where the folder lies, for load_model
    assert result.delta.read_bytes().count(str(tiny.parent).encode()) == 1


def test_the_same_seed_gives_the_same_bytes(config, tmp_path):
    first = run(config)
    again = run(dataclasses.replace(config, out=str(tmp_path / "again")))
    assert first.delta.read_bytes() == again.delta.read_bytes()
    assert first.value == again.value
    other = run(dataclasses.replace(config, out=str(tmp_path / "other"), seed=2))
    assert first.delta.read_bytes() != other.delta.read_bytes()


def test_a_run_may_have_another_optimizer(config, tmp_path):
    """Entries that are selected late start with a whole step only if each counts its own steps."""
    from selectune.runs.config import OPTIMIZERS
    from selectune.runs.trainer import OPTIMIZERS as MADE

    assert tuple(MADE) == OPTIMIZERS
    of = {
        name: st.load(run(dataclasses.replace(config, optimizer=name, out=str(tmp_path / str(name)))).delta).digest
        for name in (None, *OPTIMIZERS)
    }
    assert of[None] == of["adamw"]
    assert len(set(of.values())) == 3


def test_a_run_learns(config):
    long = dataclasses.replace(config, max_steps=60, budget=2000, lr=1e-2)
    losses = [record["loss"] for record in run(long).history if "loss" in record]
    assert min(losses[-5:]) < 0.7 * losses[0]


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("task", ["glue/cola", "glue/stsb"])
def test_every_method_runs_and_its_metric_comes_back(config, tiny, data, method, task):
    changes = {"method": method, "task": task, "max_steps": 3, "lr": 1e-3}
    if method in ("bitfit", "full", "xattn", "child-tuning-f"):
        changes["budget"] = None
    little = {"fish": "fish:examples=8", "fish-dip": "fish-dip:examples=4", "movement": "movement:batches=2"}
    little |= {name: f"{name}:batches=2" for name in ("speft", "gem", "smt", "losia")}
    changes["method"] = little.get(method, method)
    if method == "xattn":  # an encoder has no cross-attention
        with pytest.raises(ScopeError, match="no decoder that attends to an encoder"):
            run(dataclasses.replace(config, **changes))
        return
    if method == "rosa":
        with pytest.raises(ScopeError, match="Put LoRA on the model first"):
            run(dataclasses.replace(config, **changes))
        return
    result = run(dataclasses.replace(config, **changes))
    assert evaluate_delta(Source(str(tiny)), result.delta, tasks.get(task), str(data)) == result.evaluation
    if method in ("full", "child-tuning-f"):
        assert (result.selected, result.trained) == (0, sum(p.numel() for p in _base(result, tiny).parameters()))


def _base(result, tiny):
    return load_base(Source(str(tiny)), st.load(result.delta), None).model


def test_fish_with_labels_of_the_model(config):
    result = run(dataclasses.replace(config, method="fish:examples=4,labels=model", max_steps=2))
    assert result.selected == 200
    with pytest.raises(CalibrationError, match="reads 1000 single examples, the training set has 48"):
        run(dataclasses.replace(config, method="fish:examples=1000"), overwrite=True)
    with pytest.raises(CalibrationError, match=r"reads 4 mini-batches of 16, the training set has 3.*batches="):
        run(dataclasses.replace(config, method="snip:batches=4"), overwrite=True)
    with pytest.raises(CalibrationError, match=r"reads 49 single examples, the training set has 48.*pool="):
        run(dataclasses.replace(config, method="fish-dip:pool=49"), overwrite=True)


def test_options_of_dense_phases_reach_the_method(config):
    gated = dataclasses.replace(config, method="diff-pruning:penalty=0.5,start_from=found,gate_lr=0.2,dense=0.25")
    method = build_method(gated, 8)
    assert method.dense.latents == {"difference": 1e-5, "gate": 0.2, "group": 0.2}
    assert (method.dense.found, method.dense.penalty, method.schedule.share) == (True, 0.5, 0.25)
    rounds = build_method(dataclasses.replace(config, method="lt-sft:rounds=2,l1=0.1,dense_lr=1e-3"), 8)
    assert (rounds.schedule.rounds, rounds.dense.l1, rounds.dense.lr) == (2, 0.1, 1e-3)
    assert build_method(dataclasses.replace(config, method="child-tuning-f:p=0.2", budget=None), 8).dense.p == 0.2
    with pytest.raises(ConfigError, match="takes no option rounds"):
        dataclasses.replace(config, method="diff-pruning:rounds=2")
    with pytest.raises(ScheduleError, match="leaves a round 3 steps"):
        dataclasses.replace(config, method="lt-sft:rounds=2,dense=3")


def test_a_dense_phase_has_its_own_learning_rate(config):
    """The log's loss falls in the dense steps only if their rate is the one that was given."""
    still = dataclasses.replace(config, method="lt-sft:dense=0.5,dense_lr=1e-12", max_steps=8, seed=3)
    moving = dataclasses.replace(still, method="lt-sft:dense=0.5,dense_lr=1e-2")
    supports = [st.load(run(c, overwrite=True).delta).support for c in (still, moving)]
    assert supports[0].keys() != supports[1].keys() or any(
        not torch.equal(supports[0][n], supports[1][n]) for n in supports[0]
    )


def test_accumulation_and_a_short_last_window(config):
    # 48 rows in batches of 5 are 10 batches: windows of 4, 4 and 2
    result = run(dataclasses.replace(config, batch_size=5, accumulation=4, max_steps=None, epochs=2.0))
    assert (result.steps, result.selected) == (6, 200)


def test_bfloat16_is_remembered_by_the_delta(config, tiny, data):
    result = run(dataclasses.replace(config, dtype="bfloat16"))
    found = evaluate_delta(Source(str(tiny)), result.delta, tasks.get("glue/rte"), str(data))
    assert found == result.evaluation
    assert {p.dtype for p in st.load(result.delta).patches} == {torch.bfloat16}


def test_checkpoints_hold_the_delta(config, tmp_path):
    run(dataclasses.replace(config, save_every=3))
    halfway = st.load(tmp_path / "out" / "checkpoint-3")
    assert halfway.selected == 100


def test_a_broken_loss_is_no_success(config, tmp_path):
    with pytest.raises(NonFiniteError, match=r"training loss is (nan|inf).*no delta was saved"):
        run(dataclasses.replace(config, task="glue/stsb", lr=1e30, max_grad_norm=1e30, max_steps=20))
    assert not (tmp_path / "out" / "delta.safetensors").exists()


def test_a_run_that_changes_nothing_is_no_success(config, tmp_path):
    with pytest.raises(NothingTrainedError):
        run(dataclasses.replace(config, lr=1e-30, include=("*dense.weight",)))
    assert not (tmp_path / "out" / "delta.safetensors").exists()


def test_a_budget_beyond_the_model(config):
    with pytest.raises(BudgetError, match="larger than"):
        run(dataclasses.replace(config, budget=10_000_000))


def test_measuring_leaves_model_and_random_state_alone(tiny, data):
    from selectune.models.bases import load_model
    from selectune.models.evaluate import evaluate

    task = tasks.get("glue/rte")
    loaded = load_model(str(tiny), task.head, 0)
    rows = task.encode(loaded.tokenizer, tasks.load(task, "validation", data).examples, 32)
    loaded.model.train()
    before, state = weights_digest(loaded.model), torch.get_rng_state()
    first = evaluate(loaded.model, loaded.tokenizer, task, rows)
    assert first == evaluate(loaded.model, loaded.tokenizer, task, rows)
    assert loaded.model.training
    assert weights_digest(loaded.model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_demo(tiny, data):
    from selectune.runs.demos.comparison import demo

    said: list[str] = []
    found = demo(data=str(data), model=str(tiny), steps=4, budget=100, say=said.append)
    assert found.task == "glue/stsb"
    base, random, id3, full = found.rows
    assert [row.name for row in found.rows] == ["base", "random mask", "ID3", "full fine-tuning"]
    assert id3.trained == random.trained == 100
    assert (base.trained, full.trained, full.share) == (0, found.weights, 1.0)
    assert id3.delta_bytes < full.delta_bytes
    assert all(0 < row.step_seconds < row.seconds for row in found.rows[1:])
    assert found.revert.same_bits
    assert found.revert.value_applied == id3.value
    assert said[0].startswith("LoRA is left out: so few steps of glue/stsb")
    assert [sentence.partition(": the score is ")[0] for sentence in said[1:]] == [
        "Base", "Random mask", "ID3", "Full fine-tuning"
    ]  # fmt: skip
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.parametrize("peft", [True, False])
def test_the_demo_without_data_makes_its_own(tiny, peft, monkeypatch, tmp_path):
    from selectune.runs.demos import comparison as demos

    monkeypatch.setenv("SELECTUNE_DATA", str(tmp_path))  # a folder without STS-B; the hub is not asked
    monkeypatch.setattr("selectune.tasks.splits._from_hub", None)
    if not peft:
        monkeypatch.setattr(demos, "find_spec", lambda name: None)
    said: list[str] = []
    found = demos.demo(model=str(tiny), steps=2, budget=100, say=said.append)
    assert (found.task, found.origin) == ("demo/topic", "generated (480 rows)")
    lora = [row for row in found.rows if row.name == "LoRA, r=8"]
    assert len(lora) == peft
    assert all(100 < row.trained < found.weights for row in lora)
    assert peft or "peft is not installed" in said[0]


def test_real_data(tiny, real_data, tmp_path):
    for name in ("glue/rte", "glue/stsb"):
        out = str(tmp_path / name)
        config = RunConfig(model=str(tiny), task=name, budget=0.01, max_steps=3, data=str(real_data), out=out)
        result = run(config)
        assert evaluate_delta(Source(str(tiny)), out, tasks.get(name), str(real_data)) == result.evaluation


@pytest.mark.parametrize("method", ["full", "child-tuning-f"])
def test_what_dense_methods_leave_out(config, method):
    left_out = dataclasses.replace(config, method=method, budget=None, exclude=("*embeddings*",), max_steps=2)
    result = run(left_out)
    delta = st.load(result.delta)
    changed = {*delta.support, *(part.name for part in delta.dense)}
    assert changed
    assert not [name for name in changed if "embeddings" in name]


def test_batches_of_like_length_pad_less_and_show_every_row(config, monkeypatch):
    shapes: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    real = Classification.collate
    for grouped, seen in shapes.items():

        def collate(kind, tokenizer, rows, seen=seen):
            batch = real(kind, tokenizer, rows)
            seen.append((int(batch["attention_mask"].sum()), batch["input_ids"].numel()))
            return batch

        monkeypatch.setattr(Classification, "collate", collate)
        run(
            dataclasses.replace(
                config, method="bitfit", budget=None, batch_size=2, max_steps=24, group_by_length=grouped
            ),
            overwrite=True,
        )
    real_tokens, all_tokens = ({g: sum(s[k] for s in seen) for g, seen in shapes.items()} for k in (0, 1))
    assert real_tokens[True] == real_tokens[False]  # 24 steps of two: each of the 48 rows once
    assert all_tokens[True] < all_tokens[False]


def test_the_one_way_to_write_a_method(config):
    def canonical(method):
        return dataclasses.replace(config, method=method).canonical

    assert canonical("id3:eps=1, every=10,exp=2.0") == canonical("id3:every=10") == "id3:every=10"
    assert canonical("id3:exp=1") == "id3:exp=1.0"
    assert dataclasses.replace(config, method="id3:every=10").recipe == "id3"
    assert dataclasses.replace(config, method="child-tuning-f:p=0.2", budget=None, lr=None).learning_rate == 4e-5
