"""A Trainer over the tiny model and its data, for the tests of the callback."""

from __future__ import annotations

import torch
from tiny_kit import WORDS, make_tokenizer

from selectune import tasks

RTE = tasks.get("glue/rte")
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
        data_collator=lambda batch: RTE.kind.collate(loaded.tokenizer, batch),
        callbacks=[] if callback is None else [callback],
        optimizers=optimizers,
    )


def causal(tmp_path):
    """A Llama with tied weights, and its tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    make_tokenizer(tmp_path / "tokenizer", causal=True)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config), AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def sft_of(model, tokenizer, folder, tuner, optimizer=None, **options):
    """TRL's trainer over a causal language model: 4 steps of 2 backward passes, a checkpoint at every second.

    Without a tuner, of all weights as torch trains them.
    """
    import datasets
    import trl

    from selectune.integrations.transformers import SelectuneCallback

    texts = datasets.Dataset.from_dict({"text": ["the dog sees the cat .", "a big bird eats a small fish ."] * 16})
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_length": 32,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataset_num_proc": None,
        **options,
    }
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings),
        train_dataset=texts,
        processing_class=tokenizer,
        callbacks=[] if tuner is None else [SelectuneCallback(tuner)],
        optimizers=(optimizer, None),
    )
