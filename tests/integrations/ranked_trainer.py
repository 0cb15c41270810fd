"""A plain script of transformers' Trainer, for tests that launch it in one process or in two.

Usage: ranked_trainer.py FOLDER ROWS_PER_PROCESS [resume] [sharded]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp2_prepare_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import selectune as st
from selectune.integrations.transformers import SelectuneCallback

STEPS, PASSES = 6, 2


class OnTheCpu(Trainer):
    """A Trainer with `fsdp=True` on the CPU, where accelerate has no FSDP: it is told that the CPU is a GPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
        self.is_fsdp_enabled = True


def main(folder: str, rows_each: str, *how: str) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).double()
    draw = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(0, 50, (12,), generator=draw), "labels": number % 2} for number in range(64)]
    shards: dict[str, Any] = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "BertLayer"}}
    args = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=int(rows_each), save_steps=3,
        gradient_accumulation_steps=PASSES, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True,
        average_tokens_across_devices=False,  # with it, the Trainer multiplies such a loss by the number of processes
        **(shards if "sharded" in how else {}),
    )  # fmt: skip

    def attached() -> st.Tuner:
        return st.attach(model, st.id3(budget=60, steps=STEPS), accumulation_steps=PASSES)

    if "sharded" in how:
        trainer = OnTheCpu(model, args, train_dataset=rows)  # pyright: ignore
        fsdp2_prepare_model(trainer.accelerator, model)
        tuner = attached()
        SelectuneCallback(tuner).add_to(trainer)
    else:
        tuner = attached()
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[SelectuneCallback(tuner)])  # pyright: ignore
    trainer.train(resume_from_checkpoint=True if "resume" in how else None)
    if tuner.sharded or trainer.is_world_process_zero():
        tuner.save(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
