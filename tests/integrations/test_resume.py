"""A run that is stopped and resumed through transformers.Trainer has the bits of one that was not; and refusals."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_kit import STEPS, causal, sft_of, trainer_of

import selectune as st
from selectune import tasks
from selectune.adapters import put_on
from selectune.delta import weights_digest
from selectune.errors import BaseMismatchError, ConfigError, DeltaFormatError, IntegrityError
from selectune.files import seal
from selectune.integrations.transformers import SelectuneCallback
from selectune.models.bases import load_model, quiet
from selectune.train import STATE_FILE

pytest_plugins = ("tiny_fixtures",)
RTE = tasks.get("glue/rte")
HEAD = st.Scope(train_fully=("classifier.*",))


class Stop(Exception):
    """The process dies here."""


def killed_at(step):
    from transformers import TrainerCallback

    class Killer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise Stop

    return Killer()


class Runs:
    """Runs of one method, each on a fresh model as a new process has it."""

    def __init__(self, tiny, data, tmp_path):
        self.tiny, self.folder = tiny, tmp_path / "run"
        tokenizer = load_model(str(tiny), RTE.head, 0).tokenizer
        self.rows = RTE.encode(tokenizer, tasks.load(RTE, "train", data).examples, 32)

    def trainer(self, make, accumulation=1, on=None, optimizer=None, folder=None, seed=0, **options):
        loaded = load_model(str(self.tiny), RTE.head, 0)
        self.base = weights_digest(loaded.model)
        if on is not None:
            adapted = put_on(loaded.model, on, 3, keep=loaded.initialised)
            loaded = type(loaded)(**{**vars(loaded), "model": adapted.model})
        tuner = st.attach(loaded.model, make(), seed=seed, accumulation_steps=accumulation)
        if optimizer is not None:
            options["optimizers"] = (optimizer(tuner.parameters(), lr=1e-2), None)
        options["gradient_accumulation_steps"] = accumulation
        return trainer_of(loaded, self.rows, folder or self.folder, SelectuneCallback(tuner), **options), tuner

    def stopped_after(self, step, make, **how):
        """A run that dies in its step `step + 1`, so that what came after the checkpoint is lost."""
        trainer, _ = self.trainer(make, **how)
        trainer.add_callback(killed_at(step + 1))
        with quiet(), pytest.raises(Stop):
            trainer.train()


@pytest.fixture
def runs(tiny, data, tmp_path):
    return Runs(tiny, data, tmp_path)


def losses(trainer):
    return [(r["step"], r["loss"], r["grad_norm"], r["selected"]) for r in trainer.state.log_history if "loss" in r]


def age(parameters, lr):
    return st.SparseAdamW(parameters, lr=lr, age="entry")


CASES = {
    "id3": ({}, lambda: st.id3(60, STEPS, scope=HEAD)),
    "id3, accumulation": ({"accumulation": 2}, lambda: st.id3(60, STEPS)),
    "repeat-d3": ({}, lambda: st.repeat_d3(60, STEPS)),
    "pafi": ({}, lambda: st.pafi(60)),
    "increment-pafi": ({}, lambda: st.increment_pafi(60, STEPS)),
    "rigl": ({"accumulation": 2}, lambda: st.rigl(60, STEPS, every=2)),
    "spiel-ag": ({"optimizer": age}, lambda: st.spiel_ag(60, STEPS, every=3, window=2)),
    "spiel-ma": ({"optimizer": st.SparseSM3}, lambda: st.spiel_ma(60, STEPS, every=3, window=2)),
    "lt-sft, dense": ({}, lambda: st.lt_sft(60, STEPS, dense=5)),
    "lt-sft, over": ({"accumulation": 2}, lambda: st.lt_sft(60, STEPS, dense=3, scope=HEAD)),
    "lt-sft, rounds": ({}, lambda: st.lt_sft(60, STEPS, dense=1, rounds=2)),
    "diff-pruning, dense": ({}, lambda: st.diff_pruning(60, STEPS, dense=5)),
    "diff-pruning, over": ({"accumulation": 2}, lambda: st.diff_pruning(60, STEPS, dense=3)),
    "child-tuning-f": ({}, lambda: st.child_tuning_f(p=0.3)),
    "lora": ({"on": "lora:r=4,dropout=0.1"}, lambda: st.id3(60, STEPS)),
    "pfeiffer": ({"on": "pfeiffer:reduction=4"}, lambda: st.id3(60, STEPS)),
    "rigl on lora": ({"on": "lora:r=4,init=normal"}, lambda: st.rigl(60, STEPS, every=2)),
    "lt-sft on pfeiffer": ({"on": "pfeiffer:reduction=4"}, lambda: st.lt_sft(60, STEPS, dense=3)),
    "sparse-adapter": ({"on": "pfeiffer:reduction=4"}, lambda: st.sparse_adapter(60, score="magnitude")),
    "a dense peer": ({"on": "lora:r=4"}, lambda: st.Method(st.Scope(include=(), train_fully=("*",)), name="lora")),
    "prefix": ({"on": "prefix:tokens=3"}, lambda: st.id3(60, STEPS)),
    "prompt": ({"on": "prompt:tokens=3"}, lambda: st.id3(60, STEPS)),
    "prefix, projected": ({"on": "prefix:tokens=3,projection=true"}, lambda: st.id3(60, STEPS)),
    "ptuning": ({"on": "ptuning:tokens=3"}, lambda: st.id3(60, STEPS)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_run_that_was_not_stopped(runs, tmp_path, case):
    how, make = CASES[case]
    if "on" in how and not how["on"].startswith("pfeiffer"):
        pytest.importorskip("peft")
    straight, tuner = runs.trainer(make, folder=tmp_path / "straight", **how)
    with quiet():
        straight.train()
    runs.stopped_after(4, make, **how)
    again, second = runs.trainer(make, **how)
    with quiet():
        again.train(resume_from_checkpoint=True)
    assert second.delta().to_bytes() == tuner.delta().to_bytes()
    assert losses(again) == losses(straight)
    assert len(losses(again)) == STEPS
    assert second.events == tuner.events
    assert second.verify() == tuner.verify()
    whole = (tmp_path / "straight" / f"checkpoint-{STEPS}" / STATE_FILE).read_bytes()
    assert (runs.folder / f"checkpoint-{STEPS}" / STATE_FILE).read_bytes() == whole
    second.detach()
    if "on" not in how:
        assert weights_digest(again.model) == runs.base


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_from_the_first_checkpoint_and_across_epochs(runs, tmp_path, order):
    """12 steps are an epoch: a checkpoint at its end, one within the next epoch, and one in another folder."""
    how = {"max_steps": 20, "save_steps": 6, "train_sampling_strategy": order}
    make = lambda: st.id3(60, 20)  # noqa: E731
    straight, tuner = runs.trainer(make, folder=tmp_path / "straight", **how)
    with quiet():
        straight.train()
    for step in (6, 12, 18):
        moved = tmp_path / "elsewhere" / f"it-{step}"
        shutil.copytree(tmp_path / "straight" / f"checkpoint-{step}", moved)
        again, second = runs.trainer(make, folder=tmp_path / f"from-{step}", **how)
        with quiet():
            again.train(resume_from_checkpoint=str(moved))
        assert second.delta().to_bytes() == tuner.delta().to_bytes(), step
        assert losses(again) == losses(straight), step


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_pefts_own(runs, tmp_path):
    """A PeftModel saves and loads its adapter only, by another way than other models."""
    peft = pytest.importorskip("peft")

    def trainer(folder):
        loaded = load_model(str(runs.tiny), RTE.head, 0)
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=0.1, task_type="SEQ_CLS")
        model = peft.get_peft_model(loaded.model, config)
        tuner = st.attach(model, st.id3(60, STEPS))
        changed = type(loaded)(**{**vars(loaded), "model": model})
        return trainer_of(changed, runs.rows, folder, SelectuneCallback(tuner)), tuner

    straight, tuner = trainer(tmp_path / "straight")
    with quiet():
        straight.train()
    assert not (tmp_path / "straight" / "checkpoint-2" / "model.safetensors").exists()
    again, second = trainer(tmp_path / "again")
    with quiet():
        again.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert second.delta().to_bytes() == tuner.delta().to_bytes()
    assert losses(again) == losses(straight)


def test_trls_trainer_with_tied_weights(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    pytest.importorskip("datasets")
    tuners = []
    for _ in range(2):
        model, tokenizer = causal(tmp_path)
        tuners.append(st.attach(model, st.id3(budget=80, steps=4), accumulation_steps=2))
        with quiet():
            trainer = sft_of(model, tokenizer, tmp_path / "out", tuners[-1])
            trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2") if len(tuners) == 2 else None)
    assert tuners[0].delta().to_bytes() == tuners[1].delta().to_bytes()
    assert tuners[1].selected == 80


def test_sharded_weights(runs, tmp_path):
    """The Trainer loads a checkpoint in several files by several calls."""
    from transformers import AutoModelForSequenceClassification

    runs.stopped_after(4, lambda: st.id3(60, STEPS))
    folder = runs.folder / "checkpoint-4"
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder, max_shard_size="30kB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    again, second = runs.trainer(lambda: st.id3(60, STEPS))
    with quiet():
        again.train(resume_from_checkpoint=True)
    straight, tuner = runs.trainer(lambda: st.id3(60, STEPS), folder=tmp_path / "straight", save_strategy="no")
    with quiet():
        straight.train()
    assert second.delta().to_bytes() == tuner.delta().to_bytes()


def test_old_checkpoints_go(runs):
    trainer, _ = runs.trainer(lambda: st.id3(60, STEPS), save_total_limit=1)
    with quiet():
        trainer.train()
    assert [path.name for path in runs.folder.iterdir()] == ["checkpoint-6"]
    assert (runs.folder / "checkpoint-6" / STATE_FILE).is_file()


@pytest.fixture
def stopped(runs):
    """The folder of checkpoint 4 of a run of ID3."""
    runs.stopped_after(4, lambda: st.id3(60, STEPS))
    return runs.folder / "checkpoint-4"


REFUSED = [
    ({"make": lambda: st.id3(61, STEPS)}, ConfigError, "its method is"),
    ({"make": lambda: st.pafi(60)}, ConfigError, "its method is"),
    ({"seed": 1}, ConfigError, "its seed is 0, this tuner's is 1"),
    ({"accumulation": 2}, ConfigError, "its accumulation_steps is 1, this tuner's is 2"),
]


@pytest.mark.parametrize(("how", "error", "message"), REFUSED, ids=[row[2] + str(i) for i, row in enumerate(REFUSED)])
def test_another_run_is_refused(runs, stopped, how, error, message):
    trainer, tuner = runs.trainer(**{"make": lambda: st.id3(60, STEPS), **how})
    with quiet(), pytest.raises(error, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert weights_digest(trainer.model) == runs.base
    assert tuner.step == 0


def test_another_base_is_refused(runs, stopped, other):
    runs.tiny = other
    trainer, _ = runs.trainer(lambda: st.id3(60, STEPS))
    with quiet(), pytest.raises(BaseMismatchError, match="another base"):
        trainer.train(resume_from_checkpoint=True)
    assert weights_digest(trainer.model) == runs.base


def test_a_checkpoint_without_a_state(runs, stopped):
    (stopped / STATE_FILE).unlink()
    seal(stopped, {"step": 4})
    trainer, _ = runs.trainer(lambda: st.id3(60, STEPS))
    with quiet(), pytest.raises(ConfigError, match=rf"checkpoint-4 was made without {STATE_FILE}"):
        trainer.train(resume_from_checkpoint=True)
    assert weights_digest(trainer.model) == runs.base


def test_a_checkpoint_whose_weights_were_changed(runs, stopped):
    file = stopped / "model.safetensors"
    weights = load_file(file)
    weights["classifier.bias"][1] += 1
    save_file(weights, file, {"format": "pt"})
    seal(stopped, {"step": 4})
    trainer, _ = runs.trainer(lambda: st.id3(60, STEPS))
    with quiet(), pytest.raises(IntegrityError, match=r"1 of the \d+ tensors in .*checkpoint-4 .*: classifier.bias\."):
        trainer.train(resume_from_checkpoint=True)


def test_a_state_of_another_checkpoint(runs, stopped):
    shutil.copy(runs.folder / "checkpoint-2" / STATE_FILE, stopped / STATE_FILE)
    seal(stopped, {"step": 4})
    trainer, _ = runs.trainer(lambda: st.id3(60, STEPS))
    with quiet(), pytest.raises(IntegrityError, match=f"{STATE_FILE} is of another checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_a_damaged_state(runs, stopped):
    whole = (stopped / STATE_FILE).read_bytes()
    flipped, renamed = whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"selectune_state", b"another_state__")
    for damaged in (whole[:-1], flipped, b"", renamed):
        (stopped / STATE_FILE).write_bytes(damaged)
        seal(stopped, {"step": 4})
        trainer, _ = runs.trainer(lambda: st.id3(60, STEPS))
        with quiet(), pytest.raises(DeltaFormatError, match="damaged"):
            trainer.train(resume_from_checkpoint=True)
        assert weights_digest(trainer.model) == runs.base


def test_a_tuner_that_has_trained_goes_back(runs):
    trainer, tuner = runs.trainer(lambda: st.id3(60, STEPS))
    with quiet():
        trainer.train()
        delta, log = tuner.delta().to_bytes(), losses(trainer)
        trainer.train(resume_from_checkpoint=str(runs.folder / "checkpoint-2"))
    assert tuner.delta().to_bytes() == delta
    assert losses(trainer) == log


def test_the_end_of_a_run(runs):
    trainer, _ = runs.trainer(lambda: st.id3(60, STEPS))
    with quiet():
        trainer.train()
    again, _ = runs.trainer(lambda: st.id3(60, STEPS))
    with quiet(), pytest.raises(ConfigError, match="step 6 of 6"):
        again.train(resume_from_checkpoint=True)


def test_the_end_of_a_run_of_whole_epochs(runs, tmp_path):
    """At the last step the Trainer takes no further one, so a script that always resumes ends without an error."""
    how = {"max_steps": 12, "save_steps": 12}
    trainer, tuner = runs.trainer(lambda: st.id3(60, 12), **how)
    with quiet():
        trainer.train()
    again, second = runs.trainer(lambda: st.id3(60, 12), **how)
    with quiet():
        again.train(resume_from_checkpoint=True)
    assert second.delta().to_bytes() == tuner.delta().to_bytes()


def test_without_the_optimizer_it_is_said(runs, caplog):
    runs.stopped_after(4, lambda: st.id3(60, STEPS), save_only_model=True)
    trainer, tuner = runs.trainer(lambda: st.id3(60, STEPS))
    with quiet(), caplog.at_level(logging.WARNING, logger="selectune"):
        trainer.train(resume_from_checkpoint=True)
    assert "has no optimizer.pt" in caplog.text
    assert tuner.verify().selected == 60


def test_weights_without_a_resume(runs):
    """Weights are never left out silently: loading by hand or by another Trainer is refused, and works after detach."""
    trainer, tuner = runs.trainer(lambda: st.id3(60, STEPS))
    bias = {"classifier.bias": torch.ones(2)}
    with pytest.raises(ConfigError, match="1 tensors are to be loaded into a model with a tuner"):
        trainer.model.load_state_dict(bias, strict=False)
    with pytest.raises(ConfigError, match="1 tensors are to be loaded"):
        trainer.model.classifier.load_state_dict({"bias": torch.ones(2)}, strict=False)
    assert weights_digest(trainer.model) == runs.base

    class Loads(type(trainer)):
        def create_optimizer(self, *args):
            self.model.load_state_dict(bias, strict=False)
            return super().create_optimizer(*args)

    trainer.__class__ = Loads
    with quiet(), pytest.raises(ConfigError, match="1 tensors were to be loaded into the attached model"):
        trainer.train()
    assert weights_digest(trainer.model) == runs.base

    trainer, tuner = runs.trainer(lambda: st.id3(60, STEPS))
    tuner.detach()
    missing = trainer.model.load_state_dict(bias, strict=False).missing_keys
    assert "classifier.weight" in missing
    assert trainer.model.classifier.bias.tolist() == [1.0, 1.0]


def test_the_file_is_small_and_no_pickle(runs, stopped):
    content = (stopped / STATE_FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    json.loads(content[8 : 8 + size])
    assert len(content) - 8 - size < 60 * 64 + 8 * 100 + 5056  # 60 scalars, some buffers, a random state
