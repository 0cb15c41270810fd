"""TRL's SFTTrainer with a tuner: supervised fine-tuning of a causal language model by 200 of its scalars.

    python examples/trl_sft.py

It needs `pip install "selectune[hf,trl]"` and runs offline on the CPU: model, tokenizer and texts are made in code.
"""

import tempfile

import datasets
import tokenizers
import torch
import transformers

import selectune as st
from selectune.integrations.transformers import SelectuneCallback

try:
    import trl
except ImportError:
    raise SystemExit('This example needs TRL: pip install "selectune[hf,trl]"') from None

TEXTS = ["the dog sees the cat .", "a big bird eats a small fish ."] * 16
WORDS = ["<pad>", "<unk>", "<s>", "</s>", *sorted(set(" ".join(TEXTS).split()))]
vocab = {word: number for number, word in enumerate(WORDS)}
lookup = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
lookup.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=lookup, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    pad_token_id=0, bos_token_id=2, eos_token_id=3, tie_word_embeddings=True,
))  # fmt: skip

with tempfile.TemporaryDirectory() as folder:
    args = trl.SFTConfig(
        folder, max_steps=20, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=3e-2,
        max_length=32, logging_steps=10, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
    )  # fmt: skip
    tuner = st.attach(model, st.id3(budget=200, steps=20), accumulation_steps=args.gradient_accumulation_steps)
    trainer = trl.SFTTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer,
        callbacks=[SelectuneCallback(tuner)],
    )  # fmt: skip
    trainer.train()
    first, last = (float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    print(f"loss {first:.2f}, then {last:.2f}")
    print(f"scalars that differ from the base: {tuner.verify().changed} of {tuner.budget}")
