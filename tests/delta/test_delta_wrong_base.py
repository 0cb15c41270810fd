"""Every way to be the wrong base: refused, and not one bit of the model changes."""

from __future__ import annotations

import copy

import pytest
import torch
from delta_kit import snapshot
from torch import nn

from selectune.delta import Delta, base_info, diff
from selectune.errors import BaseMismatchError

VOCABULARY, WIDTH = 12, 6


class Tiny(nn.Module):
    """An embedding, a trunk and a new head; the output is tied to the embedding."""

    def __init__(self, seed=0, head_seed=0, vocabulary=VOCABULARY, layers=2, tied=True, labels=3):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.wide = nn.Linear(WIDTH, 4)
        self.out = nn.Linear(WIDTH, vocabulary, bias=False)
        if tied:
            self.out.weight = self.embed.weight
        torch.manual_seed(100 + head_seed)
        self.head = nn.Linear(WIDTH, labels)


def trained(base: nn.Module, seed: int, tensors: tuple[str, ...] | None = None) -> nn.Module:
    tuned = copy.deepcopy(base)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if tensors is None or name in tensors:
                flat = parameter.view(-1)
                flat[torch.randperm(len(flat), generator=source)[:3]] += 0.5
    return tuned


def delta_of(seed: int, full: bool = False, tensors: tuple[str, ...] | None = None) -> Delta:
    base = Tiny()
    found = diff(base, trained(base, seed, tensors))
    fresh = ("head.weight", "head.bias")
    info = {**found.info, "base": base_info(base, id="tiny", revision="1", seed=0, initialised=fresh, full=full)}
    return Delta(found.patches, found.dense, info)


def one_ulp(model: nn.Module, name: str, at: int) -> nn.Module:
    model.get_parameter(name).detach().view(-1).view(torch.int32)[at] += 1
    return model


def replaced(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    model.set_submodule(path, module)
    return model


def reshaped(model, shape):
    model.wide.weight = nn.Parameter(model.wide.weight.detach().reshape(shape))
    return model


def renamed(model):
    model.broad = model.wide
    del model.wide
    return model


def quantised(model):
    model.wide.weight = nn.Parameter((model.wide.weight.detach() * 50).to(torch.int8), requires_grad=False)
    return model


def merged(delta, i):
    model = Tiny()
    delta.merge(model)
    return model


def other_applied(i):
    """Another delta that shares at least one scalar lies merged on the model."""
    model = Tiny()
    with torch.no_grad():
        for name, indices in delta_of(i).support.items():
            model.get_parameter(name).view(-1)[indices[:1]] = 9.0
    return model


CLASSES = {
    "other seed": (lambda d, i: Tiny(seed=i + 1), "differs at"),
    "other seed of the head": (lambda d, i: Tiny(head_seed=i + 1), r"seed 0 \(info\['base'\]\['seed'\] matters"),
    "1 ulp in a selected weight": (
        lambda d, i: one_ulp(Tiny(), "layers.0.weight", int(d.support["layers.0.weight"][i % 3])),
        r'"layers\.0\.weight" differs at the 3 trained places. Nothing was changed. .* made on tiny, revision 1',
    ),
    "cast to bf16": (lambda d, i: Tiny().to(torch.bfloat16), "dtype BF16, expected F32"),
    "cast to f64": (lambda d, i: Tiny().to(torch.float64), "dtype F64, expected F32"),
    "vocabulary resized": (
        lambda d, i: Tiny(vocabulary=VOCABULARY + (i + 1 if i % 2 else -1 - i % (VOCABULARY - 1))),
        "resized vocabulary",
    ),
    "head untied": (lambda d, i: Tiny(tied=False), "other shapes, dtypes or ties"),
    "layer missing": (lambda d, i: Tiny(layers=1), r'"layers\.1\.weight" is missing'),
    "layer more": (lambda d, i: Tiny(layers=3), "has others"),
    "buffer more": (lambda d, i: replaced(Tiny(), "norm", nn.BatchNorm1d(i + 1, affine=False)), "has others"),
    "same entries in another shape": (lambda d, i: reshaped(Tiny(), [(2, 12), (3, 8), (24, 1)][i % 3]), "has shape"),
    "transposed": (lambda d, i: reshaped(Tiny(), (WIDTH, 4)), r"has shape \(6, 4\), expected \(4, 6\)"),
    "renamed": (lambda d, i: renamed(Tiny()), r'"wide\.weight" is missing'),
    "quantised": (lambda d, i: quantised(Tiny()), "dtype I8"),
    "merged already": (merged, "holds this delta's values already"),
    "another delta applied": (lambda d, i: other_applied(i), "differs at"),
    "other number of labels": (lambda d, i: Tiny(labels=4 + i), "number of labels"),
}


@pytest.mark.parametrize(("make", "message"), CLASSES.values(), ids=CLASSES.keys())
def test_wrong_base_is_refused(make, message, tries):
    tries(20)
    for i in range(20):
        delta = delta_of(i)
        model = make(delta, i)
        before = snapshot(model)
        for act in (delta.apply, delta.merge):
            with pytest.raises(BaseMismatchError, match=message):
                act(model)
        assert not delta.verify(model).ok
        assert snapshot(model) == before


def test_the_right_base_is_taken(tries):
    tries(20)
    for i in range(20):
        model = Tiny()
        before = snapshot(model)
        with delta_of(i, full=True).applied(model):
            assert snapshot(model) == snapshot(trained(Tiny(), i))
        assert snapshot(model) == before


def test_one_ulp_anywhere_is_seen_by_the_full_check(tries):
    tries(20)
    for i in range(20):
        delta = delta_of(i, full=True, tensors=("layers.0.weight",))
        model = one_ulp(Tiny(), "layers.1.weight", i)
        before = snapshot(model)
        with pytest.raises(BaseMismatchError, match="some weight differs"):
            delta.apply(model, full=True)
        assert snapshot(model) == before


def test_a_head_that_was_drawn_otherwise_is_seen_where_the_delta_does_not_write():
    delta = delta_of(0, tensors=("layers.0.weight",))
    model = Tiny(head_seed=5)
    with pytest.raises(BaseMismatchError, match=r'"head\.weight" was initialised otherwise.*seed 0'):
        delta.apply(model)


def test_initialised_tensors_under_another_delta_are_looked_through():
    """A stacked delta finds the head as it was drawn, although the first delta trained it."""
    model = Tiny()
    first = delta_of(1, tensors=("head.weight", "wide.weight"))
    second = delta_of(2, tensors=("layers.0.weight",))
    before = snapshot(model)
    first.apply(model)
    second.apply(model, stack=True)
    second.revert(model)
    first.revert(model)
    assert snapshot(model) == before


def test_the_message_names_the_first_few_and_counts_the_rest():
    delta = delta_of(0)
    with pytest.raises(BaseMismatchError, match=r'"embed\.weight".* and \d+ more\.'):
        delta.apply(Tiny(seed=3, head_seed=3))


def test_diff_refuses_other_structures():
    for other in (Tiny(layers=3), Tiny(tied=False), Tiny().double(), Tiny(vocabulary=13)):
        with pytest.raises(BaseMismatchError, match="more than values"):
            diff(Tiny(), other)
        with pytest.raises(BaseMismatchError, match="more than values"):
            diff(other, Tiny())


def test_initialised_must_name_a_tensor():
    with pytest.raises(BaseMismatchError, match=r'"haed.weight"'):
        base_info(Tiny(), initialised=["haed.weight"])
