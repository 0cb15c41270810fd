"""Tiny models that write text, whose tokenizer knows the words of the rows they are tested on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

SUMS = [
    {"question": f"{name} has {a} {thing} and finds {b} more. How many {thing} are there?",
     "answer": f"There are {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {thing}.\n#### {a + b}"}
    for name, a, b, thing in [
        ("Ann", 3, 4, "pens"), ("Ben", 10, 2, "cups"), ("Cleo", 7, 8, "hats"), ("Dan", 21, 9, "eggs"),
        ("Eve", 5, 6, "nuts"), ("Finn", 40, 2, "keys"), ("Gus", 1, 1, "figs"), ("Hope", 13, 4, "bows"),
    ]
]  # fmt: skip
DIALOGUES = [
    {"dialogue": f"#Person1#: Where is the {thing}?\n#Person2#: I left the {thing} in the {room}, sorry.",
     "summary": f"#Person2# forgot the {thing} in the {room}."}
    for thing, room in [
        ("key", "hall"), ("bag", "car"), ("cat", "garden"), ("coat", "train"), ("map", "office"), ("milk", "shop"),
        ("ring", "bath"), ("book", "bus"),
    ]
]  # fmt: skip


def make_tokenizer(folder: Path, texts: Iterable[str], template: str | None = None, *, begins: bool = False) -> None:
    """A word-level tokenizer; with `begins` a text begins with <s>, without it a text ends with </s>."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocab = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *words])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = split
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A" if begins else "$A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        chat_template=template,
    ).save_pretrained(folder)  # fmt: skip


def make_llama(folder: Path, texts: Iterable[str], template: str | None = None, positions: int = 320) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder, texts, template, begins=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=positions, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_t5(folder: Path, texts: Iterable[str]) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    make_tokenizer(folder, texts)
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0)
    config.update({"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3})
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
