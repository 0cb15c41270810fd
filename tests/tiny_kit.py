"""A model of 20,000 weights with its tokenizer, and task data, as folders: for tests of all that loads by name."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import torch

WORDS = (
    "the a this that dog cat bird fish tree house man woman child doctor teacher runs sleeps eats sees likes knows "
    "helps finds big small old new red green happy sad not and with near very . ?"
).split()


def make_tokenizer(folder: Path, *, causal: bool = False) -> None:
    """A word-level tokenizer with BERT's special tokens, or with <s> and </s> only."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>"] if causal else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    names = {"pad_token": special[0], "unk_token": special[1]}
    if causal:
        names |= {"bos_token": special[2], "eos_token": special[3]}
    else:
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"cls_token": special[2], "sep_token": special[3]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)


def make_model(folder: Path, seed: int = 0, hidden: int = 32) -> Path:
    """A BERT trunk without a head, in a folder."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def write_rows(path: Path, rows: list[dict], *, packed: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS[:-2]) for _ in range(rng.randint(3, 9))) + " ."


def make_data(folder: Path) -> Path:
    """RTE, STS-B and CoLA of some dozen rows that can be learnt: the label hangs on one word."""
    rng = random.Random(0)
    for split, count in (("train", 48), ("validation", 24)):
        pairs = [(sentence(rng), sentence(rng)) for _ in range(count)]
        two = [{"sentence1": a, "sentence2": b, "label": int("the" in a.split()), "idx": 0} for a, b in pairs]
        write_rows(folder / f"glue/rte/{split}.jsonl", two, packed=True)
        scored = [{"sentence1": a, "sentence2": b, "label": round(len(a) / 12, 2)} for a, b in pairs]
        write_rows(folder / f"glue/stsb/{split}.jsonl", scored)
        write_rows(
            folder / f"glue/cola/{split}.jsonl", [{"sentence": r["sentence1"], "label": r["label"]} for r in two]
        )
    return folder
