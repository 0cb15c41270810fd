"""Canonical scores: what is selected depends on the factors and the weights alone, whatever way finds it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import selectune as st
from selectune import internals
from selectune.errors import ConfigError
from selectune.ops import bounds
from selectune.schedule import Increment
from selectune.select import GlobalCollector, PerTensor
from selectune.train.choose import products


@st.score(reads="gradient", above=0.0, weighting=lambda size: size)
def taylor(weight, gradient):
    return (weight * gradient).abs()


METHODS = {
    "id3": st.id3(budget=300, steps=6),
    "id3, exp 1": st.id3(budget=90, steps=6, exp=1.0, eps=0.01),
    "id3, exp 0.7": st.id3(budget=60, steps=6, exp=0.7, eps=1e-4),
    "large weights": st.id3(budget=60, steps=6, exp=-1.5),
    "gallop": st.gallop(budget=50),
    "static-d3": st.static_d3(budget=40),
    "|g w|": st.Method(score=taylor(), schedule=Increment(budget=60, steps=6)),
    "repeat-d3": st.repeat_d3(budget=30, steps=6),
    "rigl": st.rigl(budget=200, steps=12, every=2),
    "spiel-ag": st.spiel_ag(budget=150, steps=12, every=3, window=2),
    "everything": st.id3(budget=970, steps=6, scope=st.Scope(include="4.*")),
    "id3 per tensor": replace(st.id3(budget=120, steps=6), select=PerTensor()),
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 10))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(70, 24, generator=generator) for _ in range(count)]


def train(method, rows=70, accumulation=1):
    net = model()
    tuner = st.attach(net, method, accumulation_steps=accumulation)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for x in batches(6):
        for part in range(accumulation):
            net(x[part * rows : (part + 1) * rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuner


def force(patch, way):
    """One way for all tensors."""
    if not internals.fast_int8():
        patch.setattr(internals, "int8_product", lambda q, p, out: out.copy_((q.double() @ p.double()).int()))
    patch.setattr(bounds, "pays", lambda *given: way != "dense")
    patch.setattr(bounds, "SHARE", 1.0)
    patch.setattr(bounds, "FEWEST", 16)
    patch.setattr(products, "FEW", 100)
    if way == "norms":
        patch.setattr(bounds, "EXACT", 1e-9)
    elif way == "int8":
        patch.setattr(bounds, "_by_norms", lambda *given: None)


@pytest.mark.parametrize("name", list(METHODS))
def test_the_same_support_by_every_way_and_on_every_number_of_threads(name):
    found = {}
    for way in ("dense", "norms", "int8"):
        for threads in (1, 3) if name == "id3" else (1,):
            with pytest.MonkeyPatch.context() as patch:
                force(patch, way)
                torch.set_num_threads(threads)
                tuner = train(METHODS[name])
                torch.set_num_threads(1)
            assert tuner.selected == tuner.budget
            found[way, threads] = {name: flat.tolist() for name, flat in tuner.support.items()}
    assert all(support == found["dense", 1] for support in found.values())


@pytest.mark.parametrize("backend", ["reference", "dense", "numba"])
@pytest.mark.parametrize("name", ["id3", "|g w|", "rigl"])
def test_the_same_support_on_every_backend(name, backend, monkeypatch):
    wanted = {n: flat.tolist() for n, flat in train(METHODS[name]).support.items()}
    monkeypatch.setenv("SELECTUNE_BACKEND", backend)
    assert {n: flat.tolist() for n, flat in train(METHODS[name]).support.items()} == wanted


def reported(name, way, look, **run):
    """Trains with every offer of factors shown to `look`, and what was taken of its tensor since."""
    with pytest.MonkeyPatch.context() as patch:
        force(patch, way)
        real = products.Products.__init__

        def init(self, score):
            real(self, score)
            self.report = look

        patch.setattr(products.Products, "__init__", init)
        return train(METHODS[name], **run)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "everything"])
def test_the_ways_are_taken(name):
    """`force` does what the tests above take for granted: no dense product is formed, but for ties with nothing."""
    offered = []
    reported(name, "int8", lambda one, factors: offered.append(one))
    assert sum(one.candidates is not None for one in offered) > 0.9 * len(offered) > 0
    offered.clear()
    reported(name, "dense", lambda one, factors: offered.append(one))
    assert all(one.candidates is None for one in offered)


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("way", ["dense", "norms", "int8"])
def test_every_offer_is_what_float64_says(name, way):
    """The best entries of a tensor, by an oracle that scores all of them; only ties by rounding may change places."""
    kept = []
    reported(name, way, compared(name, kept))
    assert sum(kept) > 0


def compared(name, kept):
    def check(one, factors):
        score, weight = METHODS[name].score, one.tensor.parameter.detach().double()
        gradient = factors.dy.double().mT @ factors.x.double()
        scores = torch.where(gradient == 0, 0.0, score(weight.view(-1), gradient.view(-1)).view_as(weight)).view(-1)
        if one.taken is not None:
            scores[one.taken] = -math.inf
        index = one.tensor.index
        mine = one.collector.of(index)
        mine.tighten()
        tensors = torch.searchsorted(mine.starts, mine.kept[0][1], right=True) - 1
        flat = (mine.kept[0][1] - mine.starts[tensors])[tensors == index]
        torch.testing.assert_close(mine.kept[0][0][tensors == index], scores[flat], rtol=1e-9, atol=0.0)
        left = scores.clone()
        left[flat] = -math.inf
        least = mine.kept[0][0].min() if mine.kept[0][0].numel() == mine.quota else 0.0
        assert float(left.max()) <= float(least) * (1 + 1e-9), one.tensor.name
        kept.append(flat.numel())

    return check


@pytest.mark.parametrize("name", ["id3", "|g w|", "rigl", "repeat-d3"])
@pytest.mark.parametrize("way", ["dense", "int8"])
def test_short_passes_of_a_window_are_one_product(name, way):
    """Their factors are kept, token behind token, where that takes no more memory than the sum of their gradients."""
    kept, seen = [], []
    check = compared(name, kept)

    def look(one, factors):
        seen.append((one.tensor.name, factors.dy.shape[0]))
        check(one, factors)

    reported(name, way, look, rows=6, accumulation=3)
    assert {tokens for _, tokens in seen} == {18}
    assert {tensor for tensor, _ in seen} == {"0.weight", "2.weight"}  # 4.weight, 10 x 96, is smaller than factors


@pytest.mark.parametrize("sizes", [(6, 6, 30), (30, 6, 6), (6, 70, 6), (6, 6)])
def test_windows_of_uneven_passes(sizes):
    """What is kept joins the sum as soon as a pass is too long to be kept; a short window selects what it has."""
    generator, found = torch.Generator().manual_seed(1), []
    passes = [torch.randn(size, 24, generator=generator) for size in sizes]
    for together in (True, False):
        net = model()
        tuner = st.attach(net, st.static_d3(budget=40), accumulation_steps=1 if together else 3)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=1e-2)
        for x in [torch.cat(passes)] if together else passes:
            net(x).square().sum().backward()
        optimizer.step()
        found.append({name: flat.tolist() for name, flat in tuner.support.items()})
        assert tuner.selected == 40
    assert found[0] == found[1]


@pytest.mark.parametrize(("budget", "wanted"), [(101, 0), (100, 3)])
def test_large_quotas_go_as_before(budget, wanted, monkeypatch):
    """By what is asked for and the dtypes alone, so that no number decides which scores are compared."""
    monkeypatch.setattr(products, "largest", lambda entries: 100)
    monkeypatch.setitem(METHODS, "static", st.static_d3(budget=budget))
    offered = []
    reported("static", "int8", lambda one, factors: offered.append(one))
    assert len(offered) == wanted


class EvenCollector(GlobalCollector):
    """A user's own rule on top of ours: entries at odd places are not taken."""

    def offer(self, tensor, flat, scores, carry=None):
        every = torch.arange(scores.numel()) + flat if isinstance(flat, int) else flat
        super().offer(tensor, flat, scores.masked_fill(every % 2 == 1, -math.inf), carry)


class Even(st.select.GlobalTopK):
    def collector(self, quota, sizes, seed):
        return EvenCollector(quota, sizes, None)


def test_a_subclass_of_our_collectors_is_offered_every_score(monkeypatch):
    method = st.Method(score=st.scores.d3(), select=Even(), schedule=st.schedule.OneShot(100))
    monkeypatch.setitem(METHODS, "even", method)
    offered = []
    tuner = reported("even", "int8", lambda one, factors: offered.append(one))
    assert not offered
    assert tuner.selected == 100
    assert all((flat % 2 == 0).all() for flat in tuner.support.values())


def test_products_that_may_be_coarser_than_float32_are_not_bounded():
    offered, before = [], torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        reported("id3", "int8", lambda one, factors: offered.append(one))
    finally:
        torch.set_float32_matmul_precision(before)
    assert not offered


@pytest.mark.parametrize(
    ("weighting", "why"), [(lambda size: 2 * size, "other numbers"), (lambda size: (size - 1).abs(), "neither rises")]
)
def test_a_weighting_that_is_none_is_refused(weighting, why):
    @st.score(reads="gradient", weighting=weighting)
    def wrong(weight, gradient):
        return (weight * gradient).abs()

    with pytest.raises(ConfigError, match=why):
        st.attach(model(), st.Method(score=wrong(), schedule=Increment(budget=60, steps=6)))
    with pytest.raises(ConfigError, match="the step's gradient"):
        st.score(reads="weight", weighting=weighting)


def test_broken_gradients_are_named(caplog):
    net = model()
    tuner = st.attach(net, st.id3(budget=30, steps=3))
    (net(batches(1)[0]).square().mean() * float("inf")).backward()
    assert tuner.events["nonfinite_selections"] == 1
    assert "not finite" in caplog.text
