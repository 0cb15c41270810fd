"""Adapters on quantised bases: every kind trains beside the stored bits and comes off, or is refused with a reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapters_kit import classifier
from quant_kit import QUANTISE, stored

import selectune as st
from selectune.adapters import put_on
from selectune.errors import ConfigError

pytest.importorskip("transformers", reason="models of transformers are tested (the extra hf)")

SPECS = (
    "lora:r=2", "dora:r=2", "loraplus:r=2", "adalora:r=2", "sora:r=2", "dylora:r=2", "increlora:r=2",
    "adamix:reduction=4", "pasta:ids=3+4", "unipelt", "houlsby:reduction=4", "pfeiffer:reduction=4", 
    "parallel:reduction=4", "series:reduction=4", "hadamard", "prompt:tokens=2", "ia3", "ln", "super",
)  # fmt: skip
REFUSED = {("nf4", "dora"), ("gguf", "dora"), ("nf4", "adalora")}  # and super everywhere


def base(kind: str) -> Any:
    """A BERT whose layers are quantised but for the head, which every kind of adapter trains."""
    model = classifier(hidden_size=32, intermediate_size=64)
    QUANTISE[kind](model.bert)
    return model


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")  # peft cannot merge, and we refuse to
@pytest.mark.parametrize("kind", ["own", "int8", "nf4", "gguf"])
@pytest.mark.parametrize("spec", SPECS)
def test_an_adapter_trains_beside_the_stored_bits(kind, spec):
    model = base(kind)
    before, ids = stored(model), torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])
    wanted = model(ids).logits.detach()
    if spec == "super" or (kind, spec.partition(":")[0]) in REFUSED:
        with pytest.raises(ConfigError, match="does not work on weights that are quantised as"):
            put_on(model, spec, seed=1)
        assert torch.equal(model(ids).logits, wanted)
        return
    adapted = put_on(model, spec, seed=1)
    tuner = st.attach(adapted.model, st.full())
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)
    for _ in range(2):
        adapted.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    tuner.verify()
    assert not torch.equal(adapted.model(input_ids=ids).logits, wanted)
    tuner.detach()
    with pytest.raises(ConfigError, match=r"is quantised, and its stored|no change of the base's weights"):
        copy.copy(adapted).merge()
    adapted.remove()
    assert torch.equal(model(ids).logits, wanted)
    after = stored(model)
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))
