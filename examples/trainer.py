"""transformers.Trainer with a tuner: a run that is stopped after half of its steps goes on from its checkpoint.

    python examples/trainer.py

It needs `pip install "selectune[hf]"` and runs offline on the CPU: the model is a small random BERT. Files are written
to temporary folders.
"""

import tempfile

import datasets
import torch
import transformers

import selectune as st
from selectune.integrations.transformers import SelectuneCallback

CONFIG = transformers.BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)
IDS = torch.randint(5, 100, (64, 12), generator=torch.Generator().manual_seed(1))
ROWS = datasets.Dataset.from_dict({"input_ids": IDS.tolist(), "labels": (IDS[:, 0] > 50).long().tolist()})


def trainer_of(folder: str, max_steps: int) -> tuple[transformers.Trainer, st.Tuner]:
    """A trainer over the base with a fresh tuner on it, as every process makes them."""
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(CONFIG)
    args = transformers.TrainingArguments(
        folder, max_steps=max_steps, per_device_train_batch_size=8, learning_rate=5e-3, lr_scheduler_type="constant",
        save_steps=5, logging_steps=5, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    tuner = st.attach(model, st.id3(budget=0.01, steps=10, train_fully="classifier.*"))
    return transformers.Trainer(model, args, train_dataset=ROWS, callbacks=[SelectuneCallback(tuner)]), tuner


with tempfile.TemporaryDirectory() as straight, tempfile.TemporaryDirectory() as stopped:
    trainer, tuner = trainer_of(straight, max_steps=10)
    trainer.train()
    whole = tuner.delta()

    trainer, tuner = trainer_of(stopped, max_steps=5)
    trainer.train()
    print(f"stopped after step {tuner.step}, selected {tuner.selected} of {tuner.budget}")

    trainer, tuner = trainer_of(stopped, max_steps=10)  # in a new process it would look the same
    trainer.train(resume_from_checkpoint=True)
    print(f"resumed to step {tuner.step}, selected {tuner.selected} of {tuner.budget}")
    print(f"the delta of the run that was not stopped: {tuner.delta() == whole}")
