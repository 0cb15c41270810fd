"""Bottleneck adapters against the formulas, written out; sizes; on and off without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters_kit import BOTH, CONFIGS, classifier, hidden, inputs, make, trace
from torch import nn
from torch.nn import functional as F

from selectune.adapters import find, put_on
from selectune.adapters.own.bottleneck import NAME, Bottleneck
from selectune.errors import ConfigError

KINDS = ("houlsby", "pfeiffer", "parallel", "series")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_on_and_off(name, kind):
    """With up-projections of 0 nothing changes; with others it does. All get gradients and come off without a trace."""
    model = make(name)
    before, out = trace(model), hidden(model, name)
    adapted = put_on(model, f"{kind}:init=zero,reduction=4", seed=3)
    assert torch.equal(hidden(model, name), out)
    adapted.remove()
    assert trace(model) == before

    adapted = put_on(model, f"{kind}:init=normal,reduction=4", seed=3)
    changed = hidden(model, name)
    assert not torch.equal(changed, out)
    if any(role.kind == "ffn_norm" for role in find(model)):  # an untrained pre-LN model's own stream is tiny
        assert torch.allclose(changed, out, atol=0.3)  # near the identity
    model(**inputs(name)).last_hidden_state.square().sum().backward()
    for tensor in adapted.names:
        gradient = dict(model.named_parameters())[tensor].grad
        assert gradient is not None, tensor
        assert bool(gradient.any()), tensor
    adapted.remove()
    for parameter in model.parameters():
        parameter.grad = None
    assert trace(model) == before
    assert torch.equal(hidden(model, name), out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_sizes(name, kind):
    """2dr + r + d scalars a site; d = 16, r = 4."""
    model = make(name)
    adapted = put_on(model, f"{kind}:reduction=4")
    layers = 4 if name in BOTH else 2
    sites = {"houlsby": 2 * layers + (2 if name in BOTH else 0), **dict.fromkeys(KINDS[1:], layers)}[kind]
    assert adapted.size == sites * (2 * 16 * 4 + 4 + 16)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    norms = {n for n in trainable if NAME not in n}
    assert trainable - norms == set(adapted.names)
    assert bool(norms) is (kind == "houlsby")  # which trains the norms too
    assert all("norm" in n.lower() or ".ln_" in n or n.startswith("ln_f") for n in norms), norms


def test_the_identity():
    """U = 0 and b2 = 0: nothing is added."""
    site = Bottleneck(8, 2, init="zero")
    assert not site(torch.randn(5, 8)).any()
    assert bool(Bottleneck(8, 2)(torch.randn(5, 8)).any())


def test_a_site_by_hand():
    site = Bottleneck(3, 2, "gelu", scale=4.0).double()
    h = torch.randn(5, 3, dtype=torch.float64)
    d, b1, u, b2 = site.down.weight, site.down.bias, site.up.weight, site.up.bias
    assert torch.allclose(site(h), 4.0 * (F.gelu(h @ d.T + b1) @ u.T + b2), rtol=1e-12)


def test_where_adapters_sit_in_bert():
    """One layer of a BERT computed by hand with each kind of adapter."""
    for kind in KINDS:
        model = make("bert", num_hidden_layers=1)
        put_on(model, f"{kind}:reduction=4,init=normal,scale=2.0")
        layer, x = model.encoder.layer[0], model.embeddings(inputs("bert")["input_ids"])
        taken: list[torch.Tensor] = []
        handle = layer.attention.self.register_forward_hook(lambda m, a, o, taken=taken: taken.append(o[0]))
        expected_in = hidden(model, "bert")
        handle.remove()
        plain = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm)}

        def run(name, h, plain=plain):
            m = plain[name]
            if isinstance(m, nn.LayerNorm):
                return F.layer_norm(h, m.normalized_shape, m.weight, m.bias, m.eps)
            return F.linear(h, m.weight, m.bias)

        a = run("attention.output.dense", taken[0])
        if kind == "houlsby":
            a = a + layer.attention.output.dense.bottleneck(a)
        a = run("attention.output.LayerNorm", a + x)
        h = run("output.dense", F.gelu(run("intermediate.dense", a)))
        if kind in ("houlsby", "series"):
            h = h + layer.output.dense.bottleneck(h)
        if kind == "parallel":
            h = h + layer.output.dense.bottleneck(a)
        if kind == "pfeiffer":
            h = h + layer.output.LayerNorm.bottleneck(run("output.LayerNorm", h + a))
        assert torch.allclose(run("output.LayerNorm", h + a), expected_in, atol=1e-5), kind


def test_pfeiffer_reads_the_residual_stream_where_no_norm_follows():
    model = make("llama", num_hidden_layers=1)
    out: list[torch.Tensor] = []
    model.layers[0].register_forward_hook(lambda m, a, o: out.append(o))
    hidden(model, "llama")
    adapted = put_on(model, "pfeiffer:reduction=4")
    hidden(model, "llama")
    site = model.layers[0].bottleneck
    assert torch.allclose(out[1] + site(out[1]), model_end(model, out[1] + site(out[1])))
    adapted.remove()
    assert torch.equal(out[0], out[1])  # the block itself computes what it did; the hook comes after


def model_end(model, h):
    """The input that the final norm got."""
    seen: list[torch.Tensor] = []
    handle = model.norm.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    hidden(model, "llama")
    handle.remove()
    return seen[0]


def test_a_copied_model_uses_its_own_adapters():
    model = make("bert")
    put_on(model, "parallel:init=normal,reduction=4")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if NAME in name:
                parameter.zero_()
    assert not torch.equal(hidden(twin, "bert"), hidden(model, "bert"))
    assert all(m.held is None for m in [*model.modules(), *twin.modules()] if isinstance(m, Bottleneck))


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = make("bert").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        put_on(model, "parallel:init=normal,reduction=4", seed=1)
        if checkpointing:
            switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            switch()
            model.enable_input_require_grads()
        model(**inputs("bert")).last_hidden_state.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if NAME in n})
    assert all(torch.allclose(found[0][n], found[1][n], rtol=1e-4, atol=1e-6) for n in found[0])


def test_twice_is_refused_and_changes_nothing():
    model = classifier()
    adapted = put_on(model, "pfeiffer")
    before = trace(model)
    with pytest.raises(ConfigError, match="carries pfeiffer already"):
        put_on(model, "houlsby")
    assert trace(model) == before
    adapted.remove()
    with pytest.raises(ConfigError, match="was taken off"):
        adapted.remove()


def test_a_map_without_the_place_is_refused():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})])})
    with pytest.raises(ConfigError, match="names no place for pfeiffer adapters: it needs ffn2"):
        put_on(model, "pfeiffer", roles={"layers.#.q": "query"})
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["layers.0.q.weight", "layers.0.q.bias"]


def test_only_named_parameters_stay_trainable():
    model = classifier()
    adapted = put_on(model, "pfeiffer", keep=("classifier.weight",))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {*adapted.names, "classifier.weight"}
    assert {r.kind for r in find(model)} >= {"query", "ffn2"}
    adapted.remove()
    with pytest.raises(ConfigError, match=r"keep= names 'head\.weight'"):
        put_on(model, "pfeiffer", keep=("head.weight",))
