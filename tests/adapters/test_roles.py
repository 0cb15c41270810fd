"""The role map: every architecture's modules, layer by layer, and the error for a model without one."""

from __future__ import annotations

from collections import Counter

import pytest
from adapters_kit import BOTH, CONFIGS, classifier, make
from torch import nn

from selectune.adapters import MAPS, find
from selectune.adapters.roles import LINEAR, linears, width
from selectune.errors import ConfigError

FUSED = ("deberta", "gpt2")
GATED = ("llama", "mistral", "qwen2", "t5-gated")
PRE_LN = ("llama", "mistral", "qwen2", "gpt2", "t5", "t5-gated", "mbart")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_has_each_role_once(name):
    found = find(make(name))
    expected = {"attention_output", "ffn1", "ffn2", "ffn_end" if name in PRE_LN else "ffn_norm"}
    expected |= {"qkv"} if name in FUSED else {"query", "key", "value"}
    expected |= {"gate"} if name in GATED else set()
    for stack in ("encoder", "decoder") if name in BOTH else ("",):
        for layer in (0, 1):
            here = [r for r in found if (r.stack, r.layer) == (stack, layer)]
            assert Counter(r.kind for r in here if not r.cross) == dict.fromkeys(expected, 1)
            cross = {"query", "key", "value", "attention_output"} if stack == "decoder" else set()
            assert {r.kind for r in here if r.cross} == cross
    assert {r.layer for r in found} == {0, 1}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_linear_layers_of_the_blocks_have_a_role(name):
    """Every linear layer has a role, except those that are no query, key, value, output or FFN."""
    model = make(name)
    mine = {r.name for r in find(model) if r.kind in LINEAR}
    others = {
        n for n, m in model.named_modules()
        if (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D") and n not in mine
    }  # fmt: skip
    assert all("pooler" in n or ".pos_" in n for n in others), others


def test_the_map_holds_under_a_head():
    bare, headed = find(make("bert")), find(classifier("bert"))
    assert [f"bert.{r.name}" for r in bare] == [r.name for r in headed]


def test_widths():
    gpt2 = make("gpt2")
    by_kind = {r.kind: width(gpt2.get_submodule(r.name)) for r in find(gpt2) if r.layer == 0 and r.kind in LINEAR}
    assert by_kind == {"qkv": 48, "attention_output": 16, "ffn1": 64, "ffn2": 16}


def test_an_unknown_architecture_says_how_to_give_a_map():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})])})
    with pytest.raises(
        ConfigError, match=r"No role map.*roles=\{'layers\.#\.attn\.q': 'query'.*blocks\.0\.q.*Known: bert"
    ):
        find(model)
    assert [r.name for r in find(model, {"blocks.#.q": "query"})] == ["blocks.0.q"]
    assert find(model, {"blocks.#.q": "cross.query"})[0].cross


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"blocks.#.q": "queries"}, "gives 'blocks.#.q' the role 'queries'. Roles: query,"),
        ({"blocks.0.q": "query"}, "needs one #"),
        ({"layers.#.q": "query"}, "matches no module of ModuleDict"),
    ],
)
def test_a_wrong_map_is_refused(roles, message):
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})])})
    with pytest.raises(ConfigError, match=message):
        find(model, roles)


def test_every_known_architecture_is_one_of_transformers():
    from transformers import CONFIG_MAPPING

    assert set(MAPS) <= set(CONFIG_MAPPING)


def test_linears_leave_the_head_out():
    assert "classifier" not in linears(classifier())
    assert "bert.pooler.dense" in linears(classifier())
