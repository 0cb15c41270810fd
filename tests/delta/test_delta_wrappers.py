"""Deltas on models in wrappers, and on tied weights: names and memory, not objects."""

from __future__ import annotations

import copy

import pytest
import torch
from delta_kit import Bag, make_delta, snapshot
from torch import nn

from selectune.delta import Delta, base_info, canonical_name, diff
from selectune.errors import BaseMismatchError, DeltaStateError


def single(model: Bag, at: int, value: float, **more) -> Delta:
    return make_delta(model, {"w": torch.tensor([at])}, {"w": torch.tensor([value])}, **more)


class Net(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.block = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.block(self.embed(x)))


def as_is(model):
    return model


def parallel(model):
    return nn.DataParallel(model)


def compiled(model):
    return torch.compile(model, backend="eager")


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.block = checkpoint_wrapper(model.block)
    return model


def fully_sharded_names(model):
    class Shell(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._fsdp_wrapped_module = inner

    model.block = Shell(model.block)
    return Shell(model)


def all_of_them(model):
    return parallel(compiled(fully_sharded_names(checkpointed(model))))


WRAPPERS = [as_is, parallel, compiled, checkpointed, fully_sharded_names, all_of_them]


def tuned_from(base: nn.Module) -> nn.Module:
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for i, parameter in enumerate(tuned.parameters()):
            parameter.view(-1)[i + 1] += 1.0
    return tuned


@pytest.mark.parametrize("outer", WRAPPERS)
def test_wrappers_give_identical_deltas(outer):
    plain = diff(Net(), tuned_from(Net()), old_values=True)
    wrapped = diff(outer(Net()), outer(tuned_from(Net())), old_values=True)
    assert wrapped.to_bytes() == plain.to_bytes()
    assert list(plain.support) == ["embed.weight", "block.weight", "block.bias"]


@pytest.mark.parametrize("inner", WRAPPERS)
def test_a_delta_goes_on_through_a_wrapper_and_off_without(inner):
    net = Net()
    delta = diff(net, tuned_from(net))
    before = {name: p.tolist() for name, p in net.named_parameters()}
    wrapped = inner(net)
    delta.apply(wrapped)
    with pytest.raises(DeltaStateError, match="already"):
        delta.apply(net if inner is not checkpointed else wrapped)
    inside = wrapped
    while inside is not net:
        inside = next(iter(inside.children()))
    delta.revert(inside)
    assert {canonical_name(name): p.tolist() for name, p in net.named_parameters()} == before


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("a.weight", "a.weight"),
        ("module.a.weight", "a.weight"),
        ("_orig_mod.module.a._checkpoint_wrapped_module.b.weight", "a.b.weight"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.weight", "a.weight"),
        ("modules.weight", "modules.weight"),
        ("module", "module"),
    ],
)
def test_canonical_names(name, canonical):
    assert canonical_name(name) == canonical


def test_names_that_fall_together_are_refused():
    model = Bag({"a.w": torch.zeros(2), "module.a.w": torch.zeros(2)})
    with pytest.raises(BaseMismatchError, match=r'canonical name "a.w"'):
        base_info(model)


def test_tied_weights_are_recorded_once_and_stay_tied():
    base, tuned = Net(), tuned_from(Net())
    delta = diff(base, tuned)
    assert "head.weight" not in delta.support
    before = snapshot(base)
    delta.apply(base)
    assert base.head.weight is base.embed.weight
    assert snapshot(base) == snapshot(tuned)
    delta.revert(base)
    assert snapshot(base) == before


def test_ties_by_memory_count_as_ties():
    model = Net(tied=False)
    model.head.weight.data = model.embed.weight.data
    assert base_info(model)["structure"] == base_info(Net())["structure"]
    diff(Net(), tuned_from(Net())).apply(model)
    assert torch.equal(model.head.weight, model.embed.weight)


def test_one_tensor_written_under_two_names_is_refused():
    untied = Net(tied=False)
    one = torch.tensor([0])
    delta = make_delta(
        untied,
        {"embed.weight": one, "head.weight": one},
        {"embed.weight": torch.ones(1), "head.weight": torch.ones(1)},
    )
    with pytest.raises(BaseMismatchError, match="are one tensor here"):
        delta.apply(Net())
