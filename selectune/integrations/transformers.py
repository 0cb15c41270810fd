"""`transformers.Trainer` with an attached model: no subclass, one small callback.

    tuner = st.attach(model, st.id3(budget=103_000, steps=steps), accumulation_steps=args.gradient_accumulation_steps)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[SelectuneCallback(tuner)])
    trainer.train()                                     # later, in a new process: train(resume_from_checkpoint=True)

Trainer and its subclasses (TRL's) see an ordinary model with one trainable parameter. Checkpoints hold the tuned model
as always, and beside it the delta and the tuner's state, so that a resumed run ends with the bits of one that never
stopped.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selectune.delta import Delta, digest_bits
from selectune.errors import ConfigError, DetachedError, IntegrityError, some
from selectune.files import read_manifest, seal, verify
from selectune.frames import methods_of
from selectune.integrations.checkpoints import guard
from selectune.integrations.first_rows import check_first_rows
from selectune.integrations.loading import refuse_deepspeed
from selectune.integrations.ref_model import pair_up
from selectune.train import STATE_FILE, Tuner, read_state, world, write_state
from selectune.train.graph.own_hooks import Own

log = logging.getLogger("selectune")

_ORDER = "trainer.order"  # beside the tuner's tensors in the file


class SelectuneCallback(TrainerCallback):
    """Saves delta and tuner state in every checkpoint, resumes from one, logs selected, budget, quota, cutoff, entropy.

    `checkpoint-N/delta.safetensors` is the delta after N steps; an early one may be empty. `base` and `full` are those
    of `Tuner.save`. `checkpoint-N/tuner.safetensors` is the tuner's state. `checkpoint-N/manifest.json` is written last
    and names every file with its size and sha256, after all were flushed to the disk: without it a checkpoint is not
    whole. Each checkpoint costs one checked save (a pass over the weights) and a read of its files.

    `trainer.train(resume_from_checkpoint=True or a folder)` needs a fresh tuner, attached as the first one was to the
    same base, and the same arguments of the Trainer. True takes the newest whole checkpoint. Its weights are kept out
    of the model; the tuner's state sets them, and both must agree by bits. The Trainer restores batches, random state,
    optimizer and learning rate; the callback restores the random state that draws an epoch's order.

    `check`: True runs `Tuner.check` on the first two rows as training begins. None does so only if it takes about a
    second and the Trainer's own loss is used. TRL's `sync_ref_model` mixes the tuned weights into the reference,
    without the tuner's values. The callback moves before the Trainer's other callbacks, so that every tracker gets the
    counts.

    `tuner` may be a callable that returns the present tuner, for `model_init`, which attaches again for every run of a
    search. Under `auto_find_batch_size`, tuner and optimizer go back to the start of training if memory runs out.
    `accumulation_steps` may be a multiple of `gradient_accumulation_steps` if a loss runs backward several times a
    batch (cached contrastive losses); the callback warns, and again if the passes are fewer.

    `keep(folder, step)` may add files to a checkpoint before it is completed, and returns the entries of its manifest.

    Raises CheckpointError for a checkpoint that is not whole. Raises ConfigError as training starts, if
    `gradient_accumulation_steps` does not fit `accumulation_steps`, if the Trainer's model is not the tuner's, if
    weights were loaded into it without a resume, or if the checkpoint has no state, a state of another run, or nothing
    left to train. Raises BaseMismatchError for another base, and IntegrityError, naming tensors, for other weights than
    those of base and state.
    """

    def __init__(
        self,
        tuner: Tuner | Callable[[], Tuner],
        base: Mapping[str, Any] | None = None,
        check: bool | None = None,
        keep: Callable[[Path, int], Mapping[str, Any]] | None = None,
        full: bool = True,
    ) -> None:
        self._tuner, self._check, self._keep, self._full = tuner, check, keep, full
        self.base = base
        self._guarded = False  # True if trainer.train() verifies checkpoints before it reads them
        self._began: _Beginning | None = None
        self._passes = 1  # expected backward passes in a batch
        self._hooks: list[Any] = []
        self._kept_out: dict[str, str | None] = {}  # {name: digest} of weights that a loader brought before training
        self._delta: Delta | None = None  # that peft brought in place of weights
        self._prefixes: dict[str, str] = {}
        self._order: Tensor | None = None  # torch's random state as this epoch began: it draws the order
        self._resumed_order: Tensor | None = None

    @property
    def tuner(self) -> Tuner:
        """The tuner of the present run."""
        return self._tuner if isinstance(self._tuner, Tuner) else self._tuner()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps weights out of the attached model until training starts.

        Raises ConfigError if the Trainer would shard the model, or runs DeepSpeed.
        """
        _refuse_deepspeed(args)
        if getattr(args, "fsdp", None) and not self.tuner.sharded:
            raise ConfigError(
                f"TrainingArguments(fsdp={args.fsdp!r}) shards the model after the tuner was attached, and a tuner is "
                "attached to a model that is sharded already. Make the Trainer without this callback, shard its model "
                "with accelerate.utils.fsdp2_prepare_model(trainer.accelerator, model), attach, and call "
                "SelectuneCallback(tuner).add_to(trainer) (docs/scale.md)."
            )
        self._go_first()
        self._guard_weights(next((variables["self"] for _, variables in methods_of(Trainer)), None))

    def add_to(self, trainer: Any) -> None:
        """Joins a Trainer that was made already, as under FSDP2, where the Trainer's accelerator shards first.

        trainer = Trainer(model, TrainingArguments(fsdp=True, ...), train_dataset=rows)
        accelerate.utils.fsdp2_prepare_model(trainer.accelerator, model)
        SelectuneCallback(st.attach(model, st.id3(budget=103_000, steps=steps))).add_to(trainer)
        """
        _refuse_deepspeed(trainer.args)
        trainer.add_callback(self)
        self._guard_weights(trainer)

    def _guard_weights(self, trainer: Any) -> None:
        """Keeps weights out of the attached model until training starts."""
        self._release()
        self._kept_out, self._delta = {}, None
        if trainer is not None:
            guard(trainer, self._before_weights)
            self._guarded = True
        if self.tuner.sharded:  # weights are loaded into the parts themselves, past every hook
            return
        if (adapter := getattr(self.tuner.model, "selectune_adapter", None)) is not None:  # selectune.interop.peft
            adapter.keep_out = self._keep_delta
        for name, module in self.tuner.model.named_modules():  # all, because peft loads virtual tokens into a submodule
            keep_out, none_missing = Own(partial(self._keep_out, name)), Own(partial(self._none_missing, name))
            self._hooks.append(module.register_load_state_dict_pre_hook(keep_out))
            self._hooks.append(module.register_load_state_dict_post_hook(none_missing))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._go_first()
        self._release()
        kept_out, self._kept_out = self._kept_out, {}
        delta, self._delta = self._delta, None
        tuner = self.tuner
        self._passes = _passes(args.gradient_accumulation_steps, tuner.accumulation_steps)
        if model is not None and tuner.model not in list(model.modules()):
            raise ConfigError(
                f"The Trainer trains a {type(model).__name__} that is not the model of this tuner. Give the "
                "attached model to the Trainer. With model_init, attach in it and give the callback a callable that "
                "gives the tuner of the model made last."
            )
        if getattr(model, "peft_type", None) == "SELECTUNE" and args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end=True puts a checkpoint's delta on the model by peft once training is over, "
                "which a model with a tuner does not take. Attach with selectune.attach and give the Trainer that "
                "model without peft_config=, or leave load_best_model_at_end out."
            )
        if args.auto_find_batch_size:
            self._begin(state, kwargs.get("optimizer"))
        if tuner.steps is not None and tuner.steps != state.max_steps:
            log.warning(
                "The method was created with steps=%d, the Trainer will take %d: %s.",
                tuner.steps,
                state.max_steps,
                "the budget will not be used up" if tuner.steps > state.max_steps else "selection ends before training",
            )
        if state.global_step > 0:
            self._resume(args, state, kept_out, delta)
        elif count := len(kept_out) or (0 if delta is None else len(delta.parts)):
            raise ConfigError(
                f"{count} tensors were to be loaded into the attached model before training, and were kept out "
                "of it. Load weights before attach, or resume with trainer.train(resume_from_checkpoint=...)."
            )
        else:
            trainer = next((variables["self"] for _, variables in methods_of(Trainer)), None)
            check_first_rows(tuner, trainer, kwargs.get("train_dataloader"), self._check)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the random state: a sampler without its own generator draws the epoch's order right after this."""
        if self._resumed_order is not None:
            torch.set_rng_state(self._resumed_order)  # after skipping batches, the Trainer sets that of the step
        self._order, self._resumed_order = torch.get_rng_state(), None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        world.wait()  # every process writes its random state, which the manifest names
        first, tuner = state.is_world_process_zero, self.tuner
        if not first and not tuner.sharded:
            return
        folder = _saved_to(args, state)
        now = tuner.state_dict()  # of sharded weights all processes read it together
        tuner.save(folder, base=self.base, allow_empty=True, full=self._full)
        if first:
            within = self._order is not None and not float(state.epoch or 0).is_integer()
            now["tensors"][_ORDER] = self._order if within else torch.get_rng_state()
            write_state(folder / STATE_FILE, now)
            step = int(state.global_step)
            seal(folder, {"step": step} if self._keep is None else self._keep(folder, step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        tuner = self.tuner
        counts: dict[str, Any] = {"selected": tuner.selected, "budget": tuner.budget, "quota": tuner.quota}
        if tuner.cutoff is not None:
            counts["cutoff"] = tuner.cutoff
        if not math.isnan(entropy := tuner.entropy):
            counts["entropy"] = entropy
        # The Trainer keeps a copy of the logs that it made before callbacks saw them.
        for record in (logs, state.log_history[-1] if state.log_history else None):
            if record is not None:
                record.update(counts)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._passes > 1 and self.tuner.events["short_windows"]:
            log.warning(
                "Step %d had fewer than the %d backward passes that accumulation_steps=%d announced: the loss does not "
                "run backward %d times a batch, or its last batch was small.", state.global_step,
                self.tuner.accumulation_steps, self.tuner.accumulation_steps, self._passes,
            )  # fmt: skip
            self._passes = 1  # warn once

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = None
        self._release()

    def _go_first(self) -> None:
        """Moves the callback to the front: trackers precede users' callbacks and must see the complete log."""
        for _, variables in methods_of(Trainer):
            handler = getattr(variables["self"], "callback_handler", None)
            if handler is not None and handler.callbacks[0] is not self:
                # a new list, because the Trainer iterates over the old one
                handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
            if handler is not None:
                pair_up(handler.callbacks)
            return

    def _begin(self, state: Any, optimizer: Any) -> None:
        """Keeps the state at the start of training, or restores it if the Trainer starts again with smaller batches."""
        tuner, began, size = self.tuner, self._began, int(state.train_batch_size or 0)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if began is not None and began.tuner is tuner and size < began.batch_size:
            tuner.load_state_dict(began.state)
            if optimizer is not None and state.global_step == 0:  # else the Trainer has loaded the checkpoint's
                optimizer.load_state_dict(copy.deepcopy(began.optimizer))
            log.info("Memory ran out at %d rows a batch; training begins anew with %d.", began.batch_size, size)
            self._began = replace(began, batch_size=size)
        else:
            moments = {} if optimizer is None else copy.deepcopy(optimizer.state_dict())
            self._began = _Beginning(tuner, size, tuner.state_dict(), moments)

    def _resume(self, args: Any, state: Any, kept_out: Mapping[str, str | None], delta: Delta | None) -> None:
        """Loads the tuner's state from the checkpoint. Optimizer and scheduler have theirs already.

        Raises IntegrityError for another state than that of the weights, or of the delta, which were kept out.
        """
        tuner, folder = self.tuner, _checkpoint(args, state)
        file = folder / STATE_FILE
        if STATE_FILE not in (read_manifest if self._guarded else verify)(folder).files:
            raise ConfigError(
                f"The checkpoint {folder} was made without {STATE_FILE}, so the support and its order cannot be "
                "restored. Resume from another checkpoint, or start anew."
            )
        if state.global_step >= state.max_steps and (state.epoch or 0) < state.num_train_epochs:
            raise ConfigError(
                f"The checkpoint {folder} is the end of its run, step {state.global_step} of {state.max_steps}, and "
                "the Trainer would take a step more. Nothing is left to train: its delta is in the folder."
            )
        if not any((folder / name).exists() for name in ("optimizer.pt", "optimizer.bin", "optimizer_0")):  # by FSDP
            log.warning(
                "The checkpoint %s has no optimizer.pt (save_only_model=True?): moments and learning rate start anew, "
                "so the run will not be the one that was stopped.", folder,
            )  # fmt: skip
        saved = read_state(file)
        self._resumed_order = saved["tensors"].pop(_ORDER, None)
        tuner.load_state_dict(saved)
        now = {name: tensor for name, tensor in tuner.model.state_dict().items() if kept_out.get(name) is not None}
        wrong = [name for name, tensor in now.items() if digest_bits(tensor.detach().cpu()) != kept_out[name]]
        if wrong:
            raise IntegrityError(
                f"{len(wrong)} of the {len(now)} tensors in {folder} are not the base's with the tuner's state on it: "
                f"{some(wrong)}. Its weights were changed, or {STATE_FILE} is of another checkpoint."
            )
        if delta is not None and delta.digest != tuner.delta(allow_empty=True).digest:
            raise IntegrityError(
                f"The delta in {folder} is not that of the tuner's state beside it: one of the two is of another "
                "checkpoint, or was changed."
            )
        tuner.verify()
        log.info("Goes on from %s: step %d, %d scalars selected.", folder, tuner.step, tuner.selected)

    def _before_weights(self, folder: Path) -> None:
        """The Trainer is about to read a checkpoint: before sharded weights, the tuner's state must be there."""
        if self.tuner.sharded and (folder / STATE_FILE).is_file():
            saved = read_state(folder / STATE_FILE)
            saved["tensors"].pop(_ORDER, None)
            self.tuner.load_state_dict(saved)

    def _keep_out(self, name: str, module: nn.Module, weights: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes the weights out of a dict before it is loaded, and keeps the digests of a whole model's."""
        keys = [key for key in weights if key.startswith(prefix)]
        if not keys or self._tuner_is_off():
            return
        _refuse_outside(len(keys))
        self._prefixes[name] = prefix
        for key in keys:
            tensor, own = weights.pop(key), key.removeprefix(prefix)
            if isinstance(tensor, Tensor):
                # weights of a part may mean other tensors: p-tuning's encoder saves its output
                whole = not name
                self._kept_out[own if whole else f"{name}.{own}"] = digest_bits(tensor.cpu()) if whole else None

    def _keep_delta(self, delta: Delta) -> None:
        """Takes the delta that peft would put on the model."""
        _refuse_outside(len(delta.parts))
        self._delta = delta

    def _none_missing(self, name: str, module: nn.Module, incompatible: Any) -> None:
        prefix, missing = self._prefixes.pop(name, None), incompatible.missing_keys
        if prefix is not None:
            missing[:] = [key for key in missing if not key.startswith(prefix)]

    def _tuner_is_off(self) -> bool:
        try:
            return self.tuner.model is None
        except DetachedError:
            return True

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if not self._tuner_is_off() and (adapter := getattr(self.tuner.model, "selectune_adapter", None)) is not None:
            adapter.keep_out = None


@dataclass(frozen=True)
class _Beginning:
    """The state at the start of training."""

    tuner: Tuner
    batch_size: int
    state: Mapping[str, Any]
    optimizer: Mapping[str, Any]


def _refuse_outside(tensors: int) -> None:
    """Raises ConfigError for weights that no Trainer brings."""
    if next(methods_of(Trainer), None) is None:
        raise ConfigError(
            f"{tensors} tensors are to be loaded into a model with a tuner whose training has not begun. Load weights "
            "before attach, or resume with trainer.train(resume_from_checkpoint=...)."
        )


def _refuse_deepspeed(args: Any) -> None:
    """Raises ConfigError if the Trainer runs DeepSpeed, by its arguments or by accelerate's."""
    refuse_deepspeed("The Trainer", any(getattr(args, name, None) for name in ("deepspeed", "deepspeed_plugin")))


def _passes(batches: int, wanted: int) -> int:
    """The number of backward passes in a batch. Raises ConfigError if it is not a whole number."""
    if wanted % batches:
        raise ConfigError(
            f"The Trainer makes a step of gradient_accumulation_steps={batches} batches, the tuner was attached with "
            f"accumulation_steps={wanted}. The selection is exact over one step's backward passes, so both must be the "
            f"same, or the latter a multiple where a loss runs backward several times a batch: attach(..., "
            f"accumulation_steps={batches})."
        )
    if wanted > batches:
        log.warning(
            "The Trainer makes a step of %d batches and the tuner waits for %d backward passes, so the loss must run "
            "backward %d times a batch, as cached contrastive losses do.", batches, wanted, wanted // batches,
        )  # fmt: skip
    return wanted // batches


def _saved_to(args: Any, state: Any) -> Path:
    """The folder of the checkpoint that was just written; in a search it is below that of its trial."""
    folder = Path(args.output_dir)
    for _, variables in methods_of(Trainer):
        if "trial" in variables:
            folder = Path(variables["self"]._get_output_dir(trial=variables["trial"]))
            break
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder of the resumed checkpoint. Callbacks do not get it, so it is read from the Trainer's frame."""
    for _, variables in methods_of(Trainer):
        told = variables.get("resume_from_checkpoint")
        if isinstance(told, str | os.PathLike):
            return Path(told)
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
