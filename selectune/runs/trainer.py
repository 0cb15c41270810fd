"""The Trainer of transformers in a run: its arguments, its rows, and checkpoints without the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import selectune as st
from selectune.adapters import two_rates
from selectune.delta import DELTA_FILE
from selectune.errors import CheckpointError, SelectuneError
from selectune.models.bases import LoadedModel, device
from selectune.recipes import RECIPES
from selectune.runs.config import RunConfig
from selectune.runs.resume import ADAPTER_FILE
from selectune.train import STATE_FILE, Tuner

Groups = list[dict[str, Any]]


def _adamw(groups: Groups, weight_decay: float) -> torch.optim.Optimizer | None:
    """None (the Trainer's own AdamW) if all tensors have one learning rate."""
    return torch.optim.AdamW(groups, weight_decay=weight_decay) if len(groups) > 1 else None


def _entry(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return st.SparseAdamW(groups, weight_decay=weight_decay, age="entry")


def _sm3(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return st.SparseSM3(groups, weight_decay=weight_decay)


# names as in selectune.recipes.Recipe.optimizer and RunConfig.optimizer
OPTIMIZERS: Mapping[str, Callable[[Groups, float], torch.optim.Optimizer | None]] = {
    "adamw": _adamw,
    "adamw-entry": _entry,
    "sm3": _sm3,
}


class RunTrainer(Trainer):
    """The Trainer, whose checkpoints hold the tuner's state and the delta, and the model only if `full` is True.

    State and delta are O(B), and the run knows its base. Raises CheckpointError if a checkpoint cannot be written; the
    earlier ones are untouched.
    """

    def __init__(self, *args: Any, full: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.full = full
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.full or output_dir is None:
            super()._save(output_dir, state_dict)
        else:
            os.makedirs(output_dir, exist_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if holds_model(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except SelectuneError:
            raise
        except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
            folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            raise CheckpointError(f"cannot write {folder}: {error}. Earlier checkpoints are as they were.") from error


def holds_model(folder: Path) -> bool:
    """True if a checkpoint has the model's weights beside the tuner's files."""
    own = {DELTA_FILE, STATE_FILE, ADAPTER_FILE}
    return any(path.name not in own for pattern in ("*.safetensors", "*model*.bin") for path in folder.glob(pattern))


class RowDataset(torch.utils.data.Dataset):
    """Rows as a torch Dataset, for the Trainer."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def optimizer_of(config: RunConfig, loaded: LoadedModel, tuner: Tuner) -> torch.optim.Optimizer | None:
    """The run's or the recipe's optimizer, with groups if the method or the adapter gives tensors their own rate."""
    spec = None if loaded.adapted is None else loaded.adapted.spec
    if spec is not None and "ratio" in spec.options:
        return two_rates(loaded.model, config.learning_rate, float(spec.options["ratio"]), config.weight_decay)
    recipe = RECIPES.get(config.recipe)
    make = OPTIMIZERS[config.optimizer or ("adamw" if recipe is None else recipe.optimizer)]
    return make(tuner.parameter_groups(config.learning_rate), config.weight_decay)


# Models whose loss is a sum over the tokens of all processes, divided by their number. The loss of other heads is a
# mean, which the Trainer would multiply by the number of processes.
_BY_TOKENS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def arguments_of(config: RunConfig, steps: int) -> TrainingArguments:
    """The settings of a run as arguments of the Trainer."""
    return TrainingArguments(
        output_dir=str(config.out),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=device().type == "cpu",
        save_strategy="no" if config.save_every is None else "steps",
        save_steps=config.save_every or 500,
        logging_steps=max(1, min(20, steps // 20)),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
        average_tokens_across_devices=config.the_task.head.architecture in _BY_TOKENS,
        **_sampling(config.group_by_length),
    )


def _sampling(group_by_length: bool) -> dict[str, Any]:
    """The Trainer's setting for batches of rows of similar length; its name depends on the version."""
    if not group_by_length:
        return {}
    fields = TrainingArguments.__dataclass_fields__
    new = "train_sampling_strategy" in fields
    return {"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True}
