"""Small models with a tokenizer in folders, and trained deltas on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_kit import WORDS, make_tokenizer
from torch import nn
from typer.testing import CliRunner

import selectune as st
from selectune.cli.app import app
from selectune.delta import Delta


def make_llama(
    folder: Path, seed: int = 0, tied: bool = False, dtype: torch.dtype = torch.float32, **save: Any
) -> Path:
    """A Llama of 20,000 weights in a folder, with a tokenizer; `save`: of `save_pretrained`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied, max_position_embeddings=32, attention_bias=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(folder, **save)
    make_tokenizer(folder, causal=True)
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def tokens(rows: int = 3, columns: int = 7) -> torch.Tensor:
    return torch.randint(0, len(WORDS), (rows, columns), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens()).logits


def train(model: nn.Module, method: st.Method, steps: int = 4, lr: float = 5e-2, **save: Any) -> Delta:
    """The delta of a short run; the model is the base again."""
    tuner = st.attach(model, method)
    optimizer = torch.optim.AdamW(tuner.parameter_groups(lr), lr=lr)
    for _ in range(steps):
        model(tokens()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = tuner.delta(**save)
    tuner.detach()
    return delta


def trained(folder: Path, out: Path, method: st.Method | None = None) -> Path:
    """A folder with the delta of a short run on the model in another folder."""
    method = method or st.id3(budget=120, steps=4, scope=st.Scope(include=["model.layers*proj.weight"]))
    return train(load(folder), method).save(out)


def call(*args: object) -> str:
    """What a command printed; fails unless it succeeded."""
    found = CliRunner().invoke(app, [str(arg) for arg in args])
    assert found.exit_code == 0, f"{found.output}\n{found.exception!r}"
    return found.output
