"""Pretrains a small T5 from nothing, since none small enough comes without a network: a base for text-to-text rows.

    python benchmarks/tiny_t5.py --text $SELECTUNE_DATA/text/english_novels/train.jsonl.gz --out tiny-t5

It learns to fill gaps, as T5 did (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4): 15 % of the tokens of a window
are left out, in spans of three, and the target has them after the sentinels that stand in their place. Spans are one in
each 20 tokens, at a place drawn for it. The same arguments give the same weights on one machine and thread count. Such
a model knows some words and no more: its numbers show that a task works, not how well a method does.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from selectune.errors import TaskError
from selectune.files import read_lines

SPAN, EVERY = 3, 20  # tokens that are left out, of so many
SENTINELS = 16


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="files of JSON lines")
    parser.add_argument("--field", nargs="+", default=["text", "dialogue"], help="fields that are read")
    parser.add_argument("--out", required=True)
    parser.add_argument("--letters", type=int, default=8_000_000, help="letters of the text that are read")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--window", type=int, default=120)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(given)
    text = read(options.text, options.field, options.letters)
    tokenizer = tokenizer_of(text, options.vocabulary)
    tokens = [t for start in range(0, len(text), 100_000) for t in plain(tokenizer, text[start : start + 100_000])]
    sentinels = [tokenizer.get_vocab()[f"<extra_id_{i}>"] for i in range(SENTINELS)]
    model = model_of(options, len(tokenizer))
    model.train()
    draw = random.Random(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps, pct_start=0.1)
    losses: list[float] = []
    for step in range(1, options.steps + 1):
        starts = [draw.randrange(len(tokens) - options.window) for _ in range(options.batch)]
        pairs = [gaps(tokens[start : start + options.window], sentinels, draw) for start in starts]
        sources, targets = ([[*side, tokenizer.eos_token_id] for side in sides] for sides in zip(*pairs, strict=True))
        loss = model(input_ids=torch.tensor(sources), labels=torch.tensor(targets)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == options.steps:
            print(f"step {step} of {options.steps}: loss {sum(losses[-100:]) / len(losses[-100:]):.3f}", flush=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(json.dumps({"weights": model.num_parameters(), "letters": len(text), "loss": losses[-1], "out": options.out}))
    return 0


def read(paths: Sequence[str], fields: Sequence[str], letters: int) -> str:
    """The first letters of all files, each giving its share."""
    share, pieces = letters // len(paths), []
    for path in paths:
        found = ""
        for _, row in read_lines(Path(path), error=TaskError, line_limit=1 << 24):
            found += "\n".join(row[field] for field in fields if field in row) + "\n"
            if len(found) >= share:
                break
        pieces.append(found[:share])
    return "".join(pieces)


def tokenizer_of(text: str, vocabulary: int):
    """Pieces of words learned from the text (byte-pair encoding over bytes), with T5's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(SENTINELS))]
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        text.splitlines(),
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    built.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=special[3:], model_max_length=512,
    )  # fmt: skip


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def model_of(options: argparse.Namespace, vocabulary: int):
    """A T5 of this width and number of layers, drawn from the seed."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(options.seed)
    heads = max(1, options.width // 32)
    config = T5Config(
        vocab_size=vocabulary, d_model=options.width, d_kv=32, d_ff=3 * options.width, num_layers=options.layers,
        num_heads=heads, dropout_rate=0.0,
    )  # fmt: skip
    config.update({"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1})
    return T5ForConditionalGeneration(config)


def gaps(tokens: Sequence[int], sentinels: Sequence[int], draw: random.Random) -> tuple[list[int], list[int]]:
    """A window with a sentinel in the place of each span, and the spans, each after its sentinel.

    >>> gaps([10, 11, 12, 13], [1], random.Random(0))
    ([1, 13], [1, 10, 11, 12])
    """
    source: list[int] = []
    target: list[int] = []
    for number, start in enumerate(range(0, len(tokens), EVERY)):
        piece = tokens[start : start + EVERY]
        at = draw.randrange(max(1, len(piece) - SPAN + 1)) if len(piece) > SPAN + 1 else 0
        source += [*piece[:at], sentinels[number], *piece[at + SPAN :]]
        target += [sentinels[number], *piece[at : at + SPAN]]
    return source, target


if __name__ == "__main__":
    sys.exit(main())
