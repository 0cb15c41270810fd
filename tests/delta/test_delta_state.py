"""A machine that applies, reverts, merges, reloads and drifts, against an oracle that only knows bytes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from delta_kit import Bag, bits_of, finite, laid_out, make_delta, random_bits, snapshot, subset
from hypothesis import settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from selectune.delta import Delta
from selectune.errors import BaseMismatchError, DeltaError, DeltaStateError

SIZES = {"a": (3, 4), "b": (2, 2, 2, 2), "c": ()}
DTYPES = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float64}
COUNT = 4


def build() -> Bag:
    layouts = {"a": "transposed", "b": "channels_last", "c": "contiguous"}
    return Bag({n: laid_out(random_bits(SIZES[n], DTYPES[n], 7 + i), layouts[n]) for i, n in enumerate(SIZES)})


def deltas() -> list[Delta]:
    """Overlapping and disjoint ones, with and without old values, one with a dense tensor."""
    made = []
    for i in range(COUNT):
        model = build()
        support = {"a": subset(12, 4, i), "b": subset(16, 3 + i, 20 + i)}
        if i % 2:
            support["c"] = torch.tensor([0])
        values = {n: finite(len(s), DTYPES[n], 50 + i) for n, s in support.items()}
        dense = {}
        if i == 2:
            support.pop("a")
            dense["a"] = finite(12, torch.float32, 99).reshape(3, 4)
        made.append(make_delta(model, support, values, dense=dense, old_values=i in (1, 2)))
    return made


DELTAS = deltas()


def plan(i: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Delta i as {name: (positions, new bits)}."""
    found = {p.name: (p.indices.numpy(), np.array(bits_of(p.values))) for p in DELTAS[i].patches}
    for entry in DELTAS[i].dense:
        found[entry.name] = (np.arange(entry.tensor.numel()), np.array(bits_of(entry.tensor)))
    return found


PLANS = [plan(i) for i in range(COUNT)]


class Machine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.model = build()
        self.base = {name: np.array(bits_of(p)) for name, p in self.model.named_parameters()}
        self.now = {name: bits.copy() for name, bits in self.base.items()}
        self.stack: list[tuple[int, dict[str, np.ndarray]]] = []
        self.use = list(DELTAS)

    # the oracle

    def is_base(self, i, bits):
        return all((bits[n][at] == self.base[n][at]).all() for n, (at, _) in PLANS[i].items())

    def holds(self, i):
        return all((self.now[n][at] == new).all() for n, (at, new) in PLANS[i].items())

    def under(self):
        bits = {name: value.copy() for name, value in self.now.items()}
        for i, olds in reversed(self.stack):
            for n, (at, _) in PLANS[i].items():
                bits[n][at] = olds[n]
        return bits

    def expect_apply(self, i, stack):
        while self.stack:
            j, olds = self.stack[-1]
            if not all((self.now[n][at] == olds[n]).all() for n, (at, _) in PLANS[j].items()):
                break
            self.stack.pop()
        if any(j == i for j, _ in self.stack) or (self.stack and not stack):
            return DeltaStateError
        if not self.is_base(i, self.now) and not (self.stack and self.is_base(i, self.under())):
            return BaseMismatchError
        return None

    def put(self, i):
        for n, (at, new) in PLANS[i].items():
            self.now[n][at] = new

    def do(self, error, call):
        if error is None:
            call()
        else:
            with pytest.raises(error):
                call()

    # the rules

    @rule(i=some.integers(0, COUNT - 1), stack=some.booleans())
    def apply(self, i, stack):
        error = self.expect_apply(i, stack)
        self.do(error, lambda: self.use[i].apply(self.model, stack=stack))
        if error is None:
            self.stack.append((i, {n: self.now[n][at].copy() for n, (at, _) in PLANS[i].items()}))
            self.put(i)

    @rule(i=some.integers(0, COUNT - 1))
    def revert(self, i):
        if self.stack:
            top, olds = self.stack[-1]
            fine = top == i and self.holds(i)
        else:
            fine = DELTAS[i].reversible and self.holds(i)
            olds = {n: self.base[n][at] for n, (at, _) in PLANS[i].items()}
        self.do(None if fine else DeltaStateError, lambda: self.use[i].revert(self.model))
        if fine:
            for n, (at, _) in PLANS[i].items():
                self.now[n][at] = olds[n]
            if self.stack:
                self.stack.pop()

    @rule(i=some.integers(0, COUNT - 1))
    def merge(self, i):
        if [j for j, _ in self.stack] == [i]:
            error = None if self.holds(i) else DeltaStateError
            self.do(error, lambda: self.use[i].merge(self.model))
        else:
            error = DeltaStateError if self.stack else self.expect_apply(i, False)
            self.do(error, lambda: self.use[i].merge(self.model))
            if error is None:
                self.put(i)
        if error is None:
            self.stack.clear()

    @rule(i=some.integers(0, COUNT - 1))
    def reload(self, i):
        data = self.use[i].to_bytes()
        self.use[i] = Delta.from_bytes(data)
        assert self.use[i].to_bytes() == data

    @rule(i=some.integers(0, COUNT - 1))
    def context(self, i):
        error = self.expect_apply(i, True)

        def inside():
            with self.use[i].applied(self.model, stack=True):
                assert snapshot(self.model)["b"][3] != self.now["b"].tolist()
                raise KeyError

        self.do(KeyError if error is None else error, inside)

    @rule(i=some.integers(0, COUNT - 1))
    def cast_is_refused(self, i):
        other = copy.deepcopy(self.model).to(torch.float16)
        before = snapshot(other)
        with pytest.raises(BaseMismatchError, match="dtype"):
            self.use[i].apply(other)
        with pytest.raises(DeltaError):
            self.use[i].revert(other)
        assert snapshot(other) == before

    @rule(name=some.sampled_from(sorted(SIZES)), at=some.integers(0, 15), source=some.integers(0, COUNT))
    def drift(self, name, at, source):
        """Somebody else writes one scalar: the base's value, a delta's, or a foreign one."""
        at %= len(self.now[name])
        bits = int(self.base[name][at]) if source == COUNT else 12345 + source
        if source < COUNT and name in PLANS[source] and at in PLANS[source][name][0]:
            positions, new = PLANS[source][name]
            bits = int(new[positions.tolist().index(at)])
        tensor = dict(self.model.named_parameters())[name].detach()
        view = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
        view[tuple(np.unravel_index(at, SIZES[name]))] = bits
        self.now[name][at] = bits

    @rule()
    def back_to_base(self):
        self.model.load_state_dict(build().state_dict())
        self.now = {name: bits.copy() for name, bits in self.base.items()}

    @invariant()
    def every_bit_is_the_oracles(self):
        if hasattr(self, "model"):
            assert {n: bits_of(p) for n, p in self.model.named_parameters()} == {
                n: bits.tolist() for n, bits in self.now.items()
            }


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)
