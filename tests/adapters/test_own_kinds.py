"""Adapters of our own beside bottlenecks: on and off without a trace, the lecture's numbers, and what training does."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from adapters_kit import BOTH, classifier, hidden, inputs, make, trace
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from selectune.adapters import at_rank, for_tokenizer, parse, put_on
from selectune.adapters.own.adamix import Mixture, averaged, consistency
from selectune.adapters.own.increlora import Increlora
from selectune.adapters.own.sora import shrink
from selectune.errors import ConfigError

SPECS = {
    "hadamard": "hadamard",
    "sora": "sora:r=2",
    "dylora": "dylora:r=4",
    "increlora": "increlora:r=2",
    "adamix": "adamix:reduction=4,activation=tanh",
    "pasta": "pasta:ids=3+8",
    "unipelt": "unipelt:r=2,prefix=3,reduction=4",
}
ENCODERS = ("bert", "roberta", "electra")  # unipelt gives their attention keys and values
NAMES = ("bert", "roberta", "electra", "deberta-v2", "distilbert", "llama", "gpt2", "t5", "bart")
BATCH = {**inputs("bert"), "labels": torch.tensor([0, 1])}


def moved(model: nn.Module, names: list[str], by: float = 0.1) -> None:
    """Every tensor of an adapter is another one, as after training."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.add_(torch.randn_like(parameter) * by)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", SPECS)
def test_on_and_off(kind, name):
    model = make(name)
    before, out = trace(model), hidden(model, name)
    if kind == "pasta" and name in BOTH:
        with pytest.raises(ConfigError, match="one stack of layers"):
            put_on(model, SPECS[kind])
        assert trace(model) == before
        return
    if kind == "unipelt" and name not in ENCODERS:
        with pytest.raises(ConfigError, match=r"in encoders such as BERT.* differs\."):
            put_on(model, SPECS[kind])
        assert trace(model) == before
        return
    adapted = put_on(model, SPECS[kind], seed=3)
    if kind not in ("increlora", "adamix", "unipelt"):  # which are drawn, so that their gradients are not 0
        assert torch.equal(hidden(model, name), out)
    moved(model, adapted.names)
    changed = hidden(model, name)
    assert not torch.equal(changed, out)
    model(**inputs(name)).last_hidden_state.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if n in adapted.names}
    assert all(g is not None and bool(g.any()) for g in gradients.values()), gradients
    twin = copy.deepcopy(model)
    moved(model, adapted.names)
    assert torch.equal(hidden(twin, name), changed)  # a copy has its own adapter
    assert not torch.equal(hidden(model, name), changed)
    adapted.remove()
    for parameter in model.parameters():
        parameter.grad = None
    assert trace(model) == before
    assert torch.equal(hidden(model, name), out)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", ["sora", "dylora", "increlora"])
def test_merged_it_computes_the_same(kind, name):
    model = make(name)
    names = set(model.state_dict())
    adapted = put_on(model, SPECS[kind])
    moved(model, adapted.names)
    out = hidden(model, name)
    adapted.merge()
    assert set(model.state_dict()) == names
    assert torch.allclose(hidden(model, name), out, atol=1e-4)


def test_hadamard_has_two_vectors_a_layer():
    model = make("bert")
    assert put_on(model, "hadamard").size == 2 * 2 * 16
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 16
    normed = make("bert")
    put_on(normed, "hadamard:norms=true")
    assert sum(p.numel() for p in normed.parameters() if p.requires_grad) == 2 * 2 * 16 + 5 * 2 * 16


@given(st.lists(st.floats(-4, 4, width=32), min_size=1), st.floats(0, 2, width=32))
def test_a_proximal_step(gates, xi):
    """Each gate by itself: a gate between xi and 2 xi stays, which the authors' code closes."""
    found = shrink(torch.tensor(gates), xi).tolist()
    expected = [math.copysign(max(abs(g) - xi, 0.0), g) for g in gates]
    assert found == pytest.approx(expected, abs=1e-6)
    assert shrink(torch.tensor([2.5, 1.5, -0.5]), 1.0).tolist() == [1.5, 0.5, 0.0]


def test_sora_closes_gates_after_each_step_of_a_run_only():
    model = classifier()
    adapted = put_on(model, "sora:r=4,xi=0.25", steps=2)
    assert adapted.after_step is not None
    adapted.after_step(0)
    gates = [p for n, p in model.named_parameters() if n.endswith("gate")]
    assert all(bool((gate == 0.75).all()) for gate in gates)
    assert put_on(classifier(), "sora").after_step is None


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_dylora_trains_the_rank_that_was_drawn(frozen):
    model = classifier()
    put_on(model, f"dylora:r=4,init=normal,frozen={frozen}")
    first = {n: p for n, p in model.named_parameters() if n.endswith("query.low_rank.A")}
    drawn = set()
    for seed in range(8):
        torch.manual_seed(seed)
        model.train()(**BATCH).loss.backward()
        b = {m.drawn for m in model.modules() if hasattr(m, "drawn")}
        assert len(b) == 1  # one for all sites
        (b,) = b
        drawn.add(b)
        for parameter in first.values():
            rows = parameter.grad.any(dim=1).tolist()
            assert rows == [row == b - 1 if frozen == "true" else row < b for row in range(4)]
        model.zero_grad()
    assert len(drawn) > 1


def test_dylora_gives_every_rank():
    """A rank b is a LoRA of the first b rows and columns, with alpha / b; training does not change which is used."""
    model = classifier()
    adapted = put_on(model, "dylora:r=3,alpha=6")
    moved(model, adapted.names)
    for b in (1, 2, 3):
        at_rank(model, b)
        model.train()(**BATCH)
        said = model.eval()(**BATCH).logits
        plain = classifier()
        with torch.no_grad():
            for name, module in model.named_modules():
                if hasattr(module, "low_rank"):
                    a, up = module.low_rank.A[:b], module.low_rank.B[:, :b]
                    plain.get_submodule(name).weight.add_(6 / b * up @ a)
        assert torch.allclose(plain(**BATCH).logits, said, atol=1e-4), b
    for wrong, message in ((0, "from 1 to 3"), (4, "from 1 to 3"), (True, "from 1 to 3")):
        with pytest.raises(ConfigError, match=message):
            at_rank(model, wrong)
    with pytest.raises(ConfigError, match="carries no dylora"):
        at_rank(classifier(), 1)


@pytest.mark.parametrize("steps", [3, 10, 37])
def test_increlora_reaches_its_rank_exactly(steps):
    model = classifier()
    adapted: Any = put_on(model, "increlora:r=3", steps=steps)
    sites: list[Any] = [m for m in model.modules() if isinstance(m, Increlora)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    totals = []
    for step in range(steps):
        model.train()(**BATCH).loss.backward()
        for site in sites:
            assert not site.E.grad[site.rank :].any()  # nothing but the ranks that count is trained
        optimizer.step()
        adapted.after_step(step)
        optimizer.zero_grad()
        totals.append(sum(site.rank for site in sites))
    assert totals == sorted(totals)
    assert totals[-1] == 3 * len(sites)
    assert sum(int((site.E != 0).sum()) for site in sites) == 3 * len(sites)
    assert max(site.rank for site in sites) <= 6


def test_increlora_gives_ranks_to_the_highest_scores():
    model = classifier()
    adapted: Any = put_on(model, "increlora:r=2,begin=0,end=0.5", steps=2)
    sites: list[Any] = [m for m in model.modules() if isinstance(m, Increlora)]
    model.train()(**BATCH).loss.backward()
    site = sites[3]
    change = ((site.B * site.E) @ site.A).detach()
    assert site.seen > 0
    assert site.seen < float(change.abs().sum())
    for index, other in enumerate(sites):
        other.seen = 1.0 + index % 2
    adapted.kept.total = lambda step: len(sites) + len(sites) // 2  # half of them get one
    adapted.after_step(0)
    assert [other.rank for other in sites] == [1 + index % 2 for index in range(len(sites))]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("increlora:begin=0.5,end=0.5", "leave none of 10 steps in which ranks could be added"),
        ("increlora:r=4,most=3", "most=3 is below 4"),
    ],
)
def test_increlora_without_room_is_refused(spec, message):
    model = classifier()
    before = trace(model)
    with pytest.raises(ConfigError, match=message):
        put_on(model, spec, steps=10)
    assert trace(model) == before


def test_adamix_agreement_and_means():
    p1, p2 = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    there, back = ((p * (p / q).log()).sum().item() for p, q in ((p1, p2), (p2, p1)))
    assert (there, back) == pytest.approx((0.5108, 0.3681), abs=5e-5)
    assert consistency(p1.log(), p2.log()).item() == pytest.approx((there + back) / 2)
    assert consistency(p1.log(), p2.log()).item() == pytest.approx(0.4395, abs=1e-4)
    ups = [nn.Linear(1, 1) for _ in range(2)]
    for up, value in zip(ups, (1.0, 3.0), strict=True):
        nn.init.constant_(up.weight, value)
        nn.init.constant_(up.bias, value)
    assert [t.item() for t in averaged(nn.ModuleList(ups))] == [2.0, 2.0]


def test_a_mixture_draws_down_and_up_apart_and_is_their_mean_outside_training():
    site, h = Mixture(4, 2, 3, "tanh", "normal"), torch.randn(5, 4)
    torch.manual_seed(0)
    outputs = {tuple(site.train()(h).flatten().tolist()) for _ in range(200)}
    pairs = {tuple(up(torch.tanh(down(h))).flatten().tolist()) for down in site.down for up in site.up}
    assert outputs == pairs
    assert len(pairs) == 9
    mean = [
        torch.stack([getattr(x, part) for x in side]).mean(0)
        for side in (site.down, site.up)
        for part in ("weight", "bias")
    ]
    expected = nn.functional.linear(torch.tanh(nn.functional.linear(h, *mean[:2])), *mean[2:])
    assert torch.allclose(site.eval()(h), expected, atol=1e-6)


@pytest.mark.parametrize("labels", [2, 1])
def test_adamix_adds_the_disagreement_of_two_passes_to_the_loss(labels):
    """Classes: the symmetric KL. One number: the squared difference. Outside training nothing is added."""
    model = classifier(num_labels=labels)
    model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    adapted = put_on(model, "adamix:experts=2,weight=3.0")
    moved(model, adapted.names, by=1.0)
    batch = {**BATCH, "labels": torch.tensor([0, 1]) if labels == 2 else torch.tensor([0.5, 1.0])}
    passes: list[torch.Tensor] = []
    handle = model.classifier.register_forward_hook(lambda m, a, o: passes.append(o))
    model.train()
    out = model(**batch)
    handle.remove()
    first, second = passes
    assert torch.equal(out.logits, first)
    assert not torch.equal(first, second)
    if labels == 2:
        expected = nn.functional.cross_entropy(first, batch["labels"]) + 3.0 * consistency(first, second)
    else:
        one = first.squeeze(-1)
        expected = (one - batch["labels"]).square().mean() + 3.0 * (first - second).square().mean()
    assert torch.allclose(out.loss, expected, atol=1e-6)
    with torch.no_grad():
        plain = model.eval()(**batch)
    assert torch.isfinite(plain.loss)
    assert plain.loss == model(**batch).loss


def test_pasta_adds_each_vector_to_its_token_in_each_layer():
    """Two layers by hand: before a layer, vector p is added to the p-th special token of a row, the others stay."""
    model = make("bert")
    ids = torch.tensor([[3, 9, 4, 7, 4, 4], [3, 4, 0, 0, 0, 0]])
    adapted = put_on(model, "pasta:ids=3+4,count=3")
    moved(model, adapted.names)
    seen: list[torch.Tensor] = []
    for layer in model.encoder.layer:
        layer.attention.self.query.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=(ids != 0).long())
    before = model.embeddings(ids)
    vectors = model.encoder.layer[0].pasta.vectors
    expected = before.clone()
    for row, places in enumerate(([0, 2, 4], [0, 1])):  # the fourth special token of row 0 gets none
        for number, place in enumerate(places):
            expected[row, place] += vectors[number]
    assert torch.equal(seen[0], expected)
    with pytest.raises(ConfigError, match="not inputs_embeds"):
        model(inputs_embeds=before)


def test_pasta_sizes():
    """layers * special tokens * d; BERT-large: 49,152 for single texts, 73,728 for pairs."""
    import transformers

    assert put_on(make("bert", hidden_size=4, num_attention_heads=2), "pasta:ids=3+4,count=2").size == 16
    config = transformers.AutoConfig.for_model(
        "bert", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    for count, size in ((2, 49_152), (3, 73_728)):
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
            assert put_on(model, f"pasta:ids=101+102,count={count}").size == size


class _Tokenizer:
    """Puts special tokens around texts as BERT's or RoBERTa's tokenizer does."""

    def __init__(self, before, between, after):
        self.before, self.between, self.after = before, between, after

    def __call__(self, *texts):
        return {"input_ids": [*self.before, *([] if len(texts) == 1 else self.between), *self.after]}


@pytest.mark.parametrize(
    ("tokenizer", "texts", "ids", "count"),
    [
        (_Tokenizer([101], [102], [102]), 1, "101+102", 2),
        (_Tokenizer([101], [102], [102]), 2, "101+102", 3),
        (_Tokenizer([0], [2, 2], [2]), 2, "0+2", 4),
    ],
)
def test_pasta_takes_its_ids_from_the_tokenizer(tokenizer, texts, ids, count):
    found = for_tokenizer(parse("pasta"), tokenizer, texts).options
    assert (found["ids"], found["count"]) == (ids, count)
    given = parse("pasta:ids=7,count=1")
    assert for_tokenizer(given, tokenizer, texts) == given
    assert for_tokenizer(parse("lora"), tokenizer, texts) == parse("lora")
    assert for_tokenizer(parse("pasta:count=1"), tokenizer, texts).options["count"] == 1
    with pytest.raises(ConfigError, match="puts none into rows"):
        for_tokenizer(parse("pasta"), _Tokenizer([], [], []), texts)
    with pytest.raises(ConfigError, match=r"ids=auto are those of the tokenizer.*pasta:ids=101\+102"):
        put_on(classifier(), "pasta")


def test_unipelt_attends_to_gated_keys_and_values():
    """Self-attention by hand, with P more keys and values, times the mean gate of a row's tokens, padding apart."""
    model = make("bert", num_hidden_layers=1)
    ids = torch.tensor([[3, 9, 4, 7], [3, 4, 0, 0]])
    mask = (ids != 0).long()
    adapted = put_on(model, "unipelt:r=2,prefix=3,reduction=4")
    moved(model, adapted.names, by=0.5)
    layer: Any = model.encoder.layer[0]
    attention, seen = layer.attention.self, []
    attention.register_forward_hook(lambda m, a, o: seen.append(o[0]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        x = model.embeddings(ids)

        def projected(name: str) -> torch.Tensor:
            part = getattr(attention, name)
            plain = nn.functional.linear(x, part.weight, part.bias)
            if name == "key":
                return plain
            low = part.unipelt.inner
            change = low.scale * (x @ low.A.T @ low.B.T)
            return plain + torch.sigmoid(part.unipelt.gate(x)) * change

        q, k, v = (projected(name) for name in ("query", "key", "value"))
        gates = torch.sigmoid(attention.unipelt.gate(x)).squeeze(-1)
        for row, length in enumerate((4, 2)):
            open_ = gates[row, :length].mean()
            keys = torch.cat((open_ * attention.unipelt.keys, k[row, :length]))
            values = torch.cat((open_ * attention.unipelt.values, v[row, :length]))
            for head in (slice(0, 8), slice(8, 16)):
                weights = (q[row, :length, head] @ keys[:, head].T / 8**0.5).softmax(-1)
                assert torch.allclose(seen[0][row, :length, head], weights @ values[:, head], atol=1e-5)


def test_unipelt_sizes():
    """Of each layer: 2 P d + (d + 1); twice 2 r d + (d + 1); 2 d b + b + d + (d + 1), b = d / reduction."""
    d, r, p, b = 16, 2, 3, 4
    layer = 2 * p * d + d + 1 + 2 * (2 * r * d + d + 1) + 2 * d * b + b + d + d + 1
    assert put_on(make("bert"), SPECS["unipelt"]).size == 2 * layer


@pytest.mark.parametrize("kind", ["unipelt", "pasta"])
def test_padding_changes_nothing(kind):
    model = make("bert")
    adapted = put_on(model, SPECS[kind])
    moved(model, adapted.names)
    with torch.no_grad():
        short = model(input_ids=torch.tensor([[3, 9, 8]]), attention_mask=torch.ones(1, 3, dtype=torch.long))
        long = model(input_ids=torch.tensor([[3, 9, 8, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))
    assert torch.allclose(short.last_hidden_state, long.last_hidden_state[:, :3], atol=1e-5)
