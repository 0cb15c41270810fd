"""Ways in which a Trainer begins again or steps otherwise: out of memory, a search, cached losses, schedule-free."""

from __future__ import annotations

import logging

import pytest
import torch
from trainer_kit import STEPS, trainer_of

import selectune as st
from selectune import tasks
from selectune.errors import ConfigError
from selectune.integrations.transformers import SelectuneCallback
from selectune.models.bases import load_model, quiet
from selectune.train import STATE_FILE

pytest_plugins = ("tiny_fixtures",)
RTE = tasks.get("glue/rte")


@pytest.fixture
def fresh(tiny, data):
    """A model as a new process has it, and its rows."""

    def load():
        loaded = load_model(str(tiny), RTE.head, 0)
        for module in loaded.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # runs of other beginnings draw other numbers
        return loaded, RTE.encode(loaded.tokenizer, tasks.load(RTE, "train", data).examples, 32)

    return load


def run(fresh, folder, make=lambda: st.id3(60, STEPS), passes=1, trainer_class=None, **options):
    loaded, rows = fresh()
    tuner = st.attach(loaded.model, make(), accumulation_steps=passes)
    options = {"train_sampling_strategy": "sequential", "save_strategy": "no", **options}
    trainer = trainer_of(loaded, rows, folder, SelectuneCallback(tuner), **options)
    if trainer_class is not None:
        trainer.__class__ = trainer_class(type(trainer))
    return trainer, tuner


# -- out of memory


def breaks(at, passes=1):
    """A Trainer whose memory runs out at its `at`-th backward pass, with more than 3 rows a batch."""

    def make(base):
        class Breaks(base):
            count = 0

            def training_step(self, model, inputs, *rest):
                self.count += 1
                if inputs["labels"].shape[0] > 3 and self.count >= at:
                    loss = self.compute_loss(model, inputs)
                    loss.register_hook(lambda grad: self.fall())
                    loss.backward()
                return super().training_step(model, inputs, *rest)

            def fall(self):
                raise torch.OutOfMemoryError("CUDA out of memory. (a test)")

        return Breaks

    return make


RESTARTS = {  # the backward pass that breaks, backward passes a step, the method
    "at once": (1, 1, lambda: st.id3(60, STEPS)),
    "after two steps": (3, 1, lambda: st.id3(60, STEPS)),
    "within a window": (4, 2, lambda: st.id3(60, STEPS)),
    "after a dense phase": (4, 1, lambda: st.lt_sft(60, STEPS, dense=1, rounds=2)),
}


@pytest.mark.parametrize("case", RESTARTS)
def test_smaller_batches_begin_anew(fresh, tmp_path, case):
    """The result is that of a run with the smaller batches from its first step."""
    at, passes, make = RESTARTS[case]
    more = {"make": make, "passes": passes, "gradient_accumulation_steps": passes}
    trainer, tuner = run(
        fresh, tmp_path, trainer_class=breaks(at), auto_find_batch_size=True, per_device_train_batch_size=4, **more
    )
    with quiet():
        trainer.train()
    assert trainer.state.train_batch_size == 3
    straight, other = run(fresh, tmp_path, per_device_train_batch_size=3, **more)
    with quiet():
        straight.train()
    assert (tuner.step, tuner.selected) == (STEPS, 60)
    assert tuner.delta().to_bytes() == other.delta().to_bytes()
    assert tuner.events == other.events


# -- a search


def searched(fresh, folder, give, monkeypatch, trials=2, **options):
    """Trainer.hyperparameter_search over `trials` learning rates, with a search engine of the test's own."""
    from transformers import hyperparameter_search, trainer_utils

    made = []

    def model_init():
        loaded, rows = fresh()
        made.append((loaded, rows, st.attach(loaded.model, st.id3(60, STEPS))))
        return loaded.model

    loaded, rows = fresh()
    settings = trainer_of(loaded, rows, folder, None, save_strategy="steps", **options).args
    from transformers import Trainer

    trainer = Trainer(
        args=settings, model_init=model_init, train_dataset=rows, eval_dataset=rows[:8],
        data_collator=lambda batch: RTE.kind.collate(loaded.tokenizer, batch),
        callbacks=[SelectuneCallback(give(made))],
    )  # fmt: skip

    class Trial:
        def __init__(self, number):
            self.number, self.params = number, {}

        def report(self, *told):
            return None

        def should_prune(self):
            return False

    class Engine(hyperparameter_search.OptunaBackend):
        @staticmethod
        def is_available():
            return True

        def run(self, trainer, n_trials, direction, **kwargs):
            for number in range(n_trials):
                trainer.objective = None
                trainer.train(resume_from_checkpoint=None, trial=Trial(number))
            return trainer_utils.BestRun("0", 0.0, {})

        @staticmethod
        def default_hp_space(trial):
            return {"learning_rate": 1e-2 * (trial.number + 1)}

    backend = trainer_utils.HPSearchBackend.OPTUNA
    monkeypatch.setitem(hyperparameter_search.ALL_HYPERPARAMETER_SEARCH_BACKENDS, backend, Engine)
    for place in ("transformers.integrations.integration_utils.hp_params", "transformers.integrations.hp_params"):
        monkeypatch.setattr(place, lambda trial: trial.params)
    import transformers.trainer as module

    if hasattr(module, "ALL_HYPERPARAMETER_SEARCH_BACKENDS"):
        monkeypatch.setitem(module.ALL_HYPERPARAMETER_SEARCH_BACKENDS, backend, Engine)
    with quiet():
        trainer.hyperparameter_search(n_trials=trials, backend="optuna", hp_name=lambda trial: f"trial-{trial.number}")
    return made


def test_a_search_attaches_for_every_trial(fresh, tmp_path, monkeypatch):
    made = searched(fresh, tmp_path, lambda made: lambda: made[-1][2], monkeypatch)
    assert [tuner.step for _, _, tuner in made] == [0, STEPS, STEPS]
    assert made[1][2].delta().to_bytes() != made[2][2].delta().to_bytes()
    for number in range(2):
        folder = tmp_path / f"trial-{number}" / f"checkpoint-{STEPS}"
        assert (folder / STATE_FILE).is_file()
        assert st.load(folder).to_bytes() == made[number + 1][2].delta().to_bytes()
    assert not list(tmp_path.glob("checkpoint-*"))
    plain, tuner = run(fresh, tmp_path / "plain", learning_rate=1e-2, train_sampling_strategy="random")
    with quiet():
        plain.train()
    assert tuner.delta().to_bytes() == made[1][2].delta().to_bytes()


def test_a_search_with_the_first_models_tuner_is_refused(fresh, tmp_path, monkeypatch):
    loaded, _ = fresh()
    first = st.attach(loaded.model, st.id3(60, STEPS))
    with pytest.raises(ConfigError, match=r"not the model of this tuner.*With model_init, attach in it"):
        searched(fresh, tmp_path, lambda made: first, monkeypatch)
    assert first.step == 0


# -- several backward passes a batch


def cached(chunks):
    """A Trainer whose loss keeps the outputs, and runs forward and backward again in chunks: as GradCache does."""

    def make(base):
        class Cached(base):
            def compute_loss(self, model, inputs, *rest, **more):
                parts = [{k: v.chunk(chunks)[n] for k, v in inputs.items()} for n in range(chunks)]
                with torch.no_grad():
                    kept = [model(**part).logits for part in parts]
                kept = [logits.requires_grad_() for logits in kept]
                loss = torch.nn.functional.cross_entropy(torch.cat(kept).float(), inputs["labels"])

                def backward(gradient):
                    with torch.enable_grad():
                        for part, logits in zip(parts, kept, strict=True):
                            (model(**part).logits * logits.grad * gradient).sum().backward()

                loss.backward(retain_graph=False)
                surrogate = loss.detach().requires_grad_()
                surrogate.register_hook(backward)
                return surrogate * 1.0

        return Cached

    return make


def test_cached_losses_run_backward_several_times_a_batch(fresh, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="selectune"):
        trainer, tuner = run(fresh, tmp_path, trainer_class=cached(4))
        with quiet():
            trainer.train()
    assert "had fewer than" not in caplog.text
    straight, other = run(fresh, tmp_path)
    with quiet():
        straight.train()
    assert (tuner.step, tuner.selected, dict(tuner.events)) == (STEPS, 60, {})
    ours, theirs = tuner.support, other.support
    shared = sum(int(torch.isin(flat, theirs[name]).sum()) for name, flat in ours.items() if name in theirs)
    assert shared >= 57  # rounding may decide near ties
    for (name, a), b in zip(straight.model.state_dict().items(), trainer.model.state_dict().values(), strict=True):
        assert float((a - b).abs().float().quantile(0.99)) < 1e-4, name


def test_a_multiple_that_the_loss_does_not_keep_is_said(fresh, tmp_path, caplog):
    trainer, _ = run(fresh, tmp_path, passes=4)
    with caplog.at_level(logging.WARNING, logger="selectune"), quiet():
        trainer.train()
    assert "Step 1 had fewer than the 4 backward passes" in caplog.text
    trainer, tuner = run(fresh, tmp_path, passes=3, gradient_accumulation_steps=2)
    with quiet(), pytest.raises(ConfigError, match=r"gradient_accumulation_steps=2 .*accumulation_steps=3.*a multiple"):
        trainer.train()
    assert tuner.step == 0


# -- an optimizer that keeps a copy of its parameter

FREE = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 1e-2}


@pytest.mark.parametrize("make", [lambda: st.pafi(60), lambda: st.id3(60, STEPS)], ids=["pafi", "id3"])
def test_schedule_free(fresh, tmp_path, make):
    """At a rate of nearly 0 nothing moves. A run at its own rate continues from its checkpoint bit for bit."""
    pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    still, tuner = run(fresh, tmp_path / "still", make=make, **{**FREE, "learning_rate": 1e-9})
    before = {name: tensor.clone() for name, tensor in still.model.state_dict().items()}
    with quiet():
        still.train()
    assert all(float((t - before[name]).abs().max()) < 1e-7 for name, t in still.model.state_dict().items())
    tuner.verify()
    straight, tuner = run(fresh, tmp_path / "straight", make=make, save_strategy="steps", **FREE)
    with quiet():
        straight.train()
    again, second = run(fresh, tmp_path / "again", make=make, save_strategy="steps", **FREE)
    with quiet():
        again.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert second.delta().to_bytes() == tuner.delta().to_bytes()
    assert second.verify().selected == 60
