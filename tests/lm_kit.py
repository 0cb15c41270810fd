"""A LLaMA of 12,000 weights with a tokenizer of whole words, rows of text and of multiple choice."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tiny_kit import WORDS, make_tokenizer, sentence, write_rows


def make_llama(folder: Path, seed: int = 0, **more: object) -> Path:
    """A causal language model of one layer, in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=2, eos_token_id=3, pad_token_id=0, **more,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder, causal=True)
    return folder


def make_texts(folder: Path) -> Path:
    """Texts, and questions whose answer is the word that the question ends with."""
    rng = random.Random(0)
    for split, count in (("train", 24), ("validation", 12)):
        write_rows(folder / f"text/wikitext2/{split}.jsonl", [{"text": sentence(rng)} for _ in range(count)])
    for split, count in (("train", 32), ("test", 17)):
        rows = []
        for _ in range(count):
            words = rng.sample(WORDS[:-2], 3)
            right = rng.randrange(2)
            rows.append(
                {
                    "instruction": f"Please choose the correct solution to the question: find {words[right]}\n\n"
                    f"Solution1: {words[0]}\n\nSolution2: {words[1]} {words[2]}\n\n"
                    "Answer format: solution1/solution2",
                    "answer": f"solution{right + 1}",
                }
            )
        write_rows(folder / f"commonsense/piqa/{split}.jsonl", rows)
    return folder
