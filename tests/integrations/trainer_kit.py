"""A Trainer over the tiny model and its data, for the tests of the callback."""

from __future__ import annotations

from selectune.harness.evaluate import collate

STEPS = 6


def trainer_of(loaded, rows, folder, callback, **options):
    from transformers import Trainer, TrainingArguments

    optimizers = options.pop("optimizers", (None, None))
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return Trainer(
        model=loaded.model,
        args=TrainingArguments(**settings),
        train_dataset=rows,
        eval_dataset=rows[:8],
        data_collator=lambda batch: collate(loaded.tokenizer, batch),
        callbacks=[] if callback is None else [callback],
        optimizers=optimizers,
    )
