"""Tiny models in folders, trained by a plain loop, and looked at again in a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny_kit import WORDS, make_model

import selectune as st
from selectune.delta import digest_bits

ROOT = Path(__file__).parent.parent.parent
_LOGITS = """
import json, sys, torch, selectune as st
torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[3]))
torch.randn(7)
model = st.load_model(sys.argv[1], **json.loads(sys.argv[4]))
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
json.dump([type(model).__name__, str(logits.dtype), logits.float().flatten().tolist(), model.training], sys.stdout)
"""
HEAD = ["classifier.bias", "classifier.weight"]
ROWS = [[2, 5, 9, 3], [2, 8, 7, 3]]


def logits_of(model) -> list:
    """A model's answer to ROWS in eval mode: its class, its dtype and every logit, exactly."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor(ROWS)).logits
    return [type(model).__name__, str(logits.dtype), logits.float().flatten().tolist(), False]


def logits_elsewhere(path: Path, cwd: Path, seed: int = 99, **arguments) -> list:
    """The same of `st.load_model(path)` in a new process, in another folder, with another random state."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _LOGITS, str(path), json.dumps(ROWS), str(seed), json.dumps(arguments)],
        capture_output=True, text=True, env=env, cwd=cwd, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def trunk(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A BERT without a head."""
    from transformers import AutoModel

    make_model(folder)
    if dtype != torch.float32:
        AutoModel.from_pretrained(folder).to(dtype).save_pretrained(folder)
    return folder


def tied(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A causal model with tied embeddings, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=2, eos_token_id=3, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def classifier(folder: Path, seed: int = 11, **options):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, **{"num_labels": 3, **options})


def heads_whole(budget: int = 60, steps: int = 3):
    return st.id3(budget=budget, steps=steps, scope=st.Scope(train_fully=("classifier.*",)))


def batch_of(model) -> dict:
    rows = torch.tensor(ROWS)
    return {"input_ids": rows, "labels": rows if "CausalLM" in type(model).__name__ else torch.tensor([0, 2])}


def trained(model, method, steps: int = 3):
    """The tuner of a plain loop."""
    tuner = st.attach(model, method, seed=0)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for _ in range(steps):
        model(**batch_of(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuner


def bits(model) -> dict[str, str]:
    return {name: digest_bits(tensor) for name, tensor in model.state_dict().items()}


def saved(folder, dtype=torch.float32, kind="classifier"):
    """The trained model's answer and its delta's path, of a plain loop."""
    from transformers import AutoModelForCausalLM

    if kind == "tied":
        model = AutoModelForCausalLM.from_pretrained(tied(folder / "base", dtype))
        tuner = trained(model, st.id3(budget=60, steps=3))
    else:
        tuner = trained(model := classifier(trunk(folder / "base", dtype)), heads_whole())
    assert next(model.parameters()).dtype == dtype
    path = tuner.save(folder / "run")
    return logits_of(model), path
