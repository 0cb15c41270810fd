"""A dense phase that works in pieces gives the bits that the same formulas give on whole tensors.

The reference below is those formulas, one torch operation after the other.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from selectune import ops, phases
from selectune.phases import Gates, Here, Weights
from selectune.seeds import Stream, uniform

PIECE = 64  # in place of what fits in a cache; torch computes the last few entries of a call in another way
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(phases, "PIECE", PIECE)
    yield
    torch.set_num_threads(threads)


def gate(kind, alpha, u):
    width = kind.right - kind.left
    s = torch.sigmoid(alpha) if u is None else torch.sigmoid(torch.logit(u, eps=1e-4) + alpha)
    z = s * width + kind.left
    slope = (torch.addcmul(s, s, s, value=-1) * width).masked_fill((z <= 0) | (z >= 1), 0.0)
    return z.clamp(0.0, 1.0), slope


def drawn(kind, latents, seed):
    """z and slope of the tensor's own gate, then of the entries."""
    random = Stream(seed)
    shared = [gate(kind, a, uniform(a, random)) for a in latents[2:]]
    alpha = latents[1]
    return shared, gate(kind, alpha, uniform(alpha, random))


def whole_weight(kind, base, latents, seed):
    shared, (z, _) = drawn(kind, latents, seed)
    return torch.addcmul(base, z * shared[0][0] if shared else z, latents[0])


def whole_pull(kind, gradient, latents, seed):
    shared, (z, slope) = drawn(kind, latents, seed)
    if not shared:
        return gradient * z, gradient * latents[0] * slope
    ((whole, whole_slope),) = shared
    per_gate = gradient * latents[0]
    return gradient * (z * whole), per_gate * (whole * slope), (per_gate * z).sum() * whole_slope


def whole_step(kind, gradients, latents):
    if not kind.penalty:
        return gradients
    shift = math.log(-kind.left / kind.right)
    p = torch.sigmoid(latents[1] - shift)
    slope = kind.penalty * p * (1 - p)
    if not kind.structured:
        return gradients[0], gradients[1] + slope
    whole = torch.sigmoid(latents[2] - shift)
    whole_slope = kind.penalty * whole * (1 - whole)
    if kind.group_penalty == "product":
        slope, whole_slope = slope * whole, whole_slope * p.sum()
    return gradients[0], gradients[1] + slope, gradients[2] + whole_slope


def whole_change(kind, latents):
    z = gate(kind, latents[1], None)[0]
    return (z * gate(kind, latents[2], None)[0] if kind.structured else z) * latents[0]


def equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)
        assert torch.equal(ops.bits(a), ops.bits(b))


def engine(base, latents, seed, offers):
    """The functions' input, with the engine's memory (filled with arbitrary numbers) or without it."""
    random = Stream(seed)
    if not offers:
        return Here(base, latents, random, base.numel())
    target = torch.full_like(base, math.nan)
    return Here(base, latents, random, base.numel(), target, True, lambda t: torch.full_like(t, math.nan), ops.uniform)


shapes = some.one_of(
    some.tuples(some.sampled_from([0, 1, PIECE - 1, PIECE, PIECE + 1, 7 * PIECE, 1000])),
    some.tuples(some.integers(1, 30), some.integers(1, 30)),
)
kinds = some.builds(
    Gates,
    structured=some.booleans(),
    group_penalty=some.sampled_from(["product", "sum"]),
    left=some.sampled_from([-1.5, -0.3]),
    right=some.sampled_from([1.5, 1.1]),
    penalty=some.sampled_from([0.0, 0.03]),
)
cases = (kinds, shapes, some.sampled_from(DTYPES), some.integers(0, 999), some.booleans(), some.booleans())


def made(kind, shape, dtype, seed, turned):
    random = torch.Generator().manual_seed(seed)
    shape = shape[::-1] if turned else shape
    base, w, alpha, g = (torch.randn(*shape, dtype=dtype, generator=random) for _ in range(4))
    base, w, alpha, g = ((t.t() if turned and t.dim() == 2 else t) for t in (base, w, 3 * alpha, g))
    latents = (w, alpha, torch.tensor(0.4, dtype=dtype))
    return base, latents if kind.structured else latents[:2], g


@settings(max_examples=80, deadline=None)
@given(*cases)
def test_gates_in_pieces_are_gates_at_once(kind, shape, dtype, seed, turned, offers):
    base, latents, g = made(kind, shape, dtype, seed, turned)

    def here():
        return engine(base, latents, seed, offers)

    equal([kind.weight(here())], [whole_weight(kind, base, latents, seed)])
    pulled = whole_pull(kind, g, latents, seed)
    before = g.clone()
    equal(kind.pull(g, here()), pulled)
    assert torch.equal(g, before)  # the weight's gradient is not the phase's to write into
    expected = whole_step(kind, pulled, latents)
    equal(kind.step(tuple(p.clone() for p in pulled), here()), expected)
    equal([kind.change(here())], [whole_change(kind, latents)])


@settings(max_examples=80, deadline=None)
@given(shapes, some.sampled_from(DTYPES), some.integers(0, 999), some.booleans(), some.booleans(), some.booleans(),
       some.sampled_from([0.3, 0.5, 1.0]))  # fmt: skip
def test_masks_in_pieces_are_masks_at_once(shape, dtype, seed, turned, offers, l1, p):
    base, (now, _), g = made(Gates(structured=False), shape, dtype, seed, turned)
    g[: len(g) // 2] = -math.inf  # what is masked is 0, whatever it was
    kind = Weights(l1=0.2 if l1 else 0.0, p=p)
    expected = g + (now - base).sign() * (0.2 / max(1, base.numel())) if l1 else g.clone()
    if p < 1:
        u = uniform(g, Stream(seed))
        expected = torch.where(u < p, expected / p, 0.0)
    before = g.clone()
    at = dataclasses.replace(engine(base, (now,), seed, offers), total=max(1, base.numel()))
    equal(kind.step((g,), at), [expected])
    assert offers or torch.equal(g, before)


def test_without_an_offer_nothing_is_written_into():
    kind, (base, latents, g) = Gates(), made(Gates(), (200,), torch.float32, 0, False)
    held = [t.clone() for t in (base, *latents, g)]
    gradients = kind.pull(g, engine(base, latents, 0, False))
    copies = [t.clone() for t in gradients]
    kind.step(gradients, engine(base, latents, 0, False))
    assert all(torch.equal(a, b) for a, b in zip((base, *latents, g, *gradients), (*held, *copies), strict=True))
