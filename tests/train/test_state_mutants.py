"""States with one change: each is refused and changes nothing, or the run ends as it would have without it.

What a state holds that neither the model nor the schedule can tell is named in UNTOLD: offsets, what trains wholly,
sums over a window, what an optimizer gave. Any finite value of these is a possible run, so a bit flipped there is found
by the file's digest only (tests/train/test_state.py); here such a state may be taken, and the run must not break on it.
MUTANTS=2000 runs the long form.
"""

from __future__ import annotations

import copy
import os
import random
import re

import pytest
import torch
from test_rollback import CASES as OTHERS
from test_rollback import HEAD, Run, adamw, entries, same_state, sm3
from test_state_refused import changed_at, leaves
from train_kit import bits, same

import selectune as st
from selectune.errors import SelectuneError
from selectune.train import read_state, write_state

MUTANTS = int(os.environ.get("MUTANTS", "240"))
STEPS = 6


class Tied(torch.nn.Module):
    """With buffers that training moves, a tensor under two names, and no two base values alike."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 12)
        self.norm = torch.nn.BatchNorm1d(12)
        self.back = torch.nn.Linear(6, 12)
        self.back.weight = self.first.weight
        self.last = torch.nn.Linear(12, 3)
        for tensor in (self.norm.weight, self.norm.bias):
            torch.nn.init.normal_(tensor)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh() + self.back(x))


class Mutable(Run):
    """A run of `Tied`."""

    def __init__(self, make, optimizer, accumulation):
        from unittest import mock

        with mock.patch("test_rollback.Net", Tied):
            super().__init__(make, optimizer, accumulation)


# method, optimizer, accumulation; the step of the state
CASES = {
    "id3": ((lambda: st.id3(30, STEPS), adamw, 2), 3),
    "id3, every 2": ((lambda: st.id3(30, STEPS, every=2), adamw, 1), 3),
    "id3 and a head": ((lambda: st.id3(30, STEPS, scope=HEAD), adamw, 1), 0),
    "increment-pafi": ((lambda: st.increment_pafi(30, STEPS), adamw, 1), 2),
    "repeat-d3": ((lambda: st.repeat_d3(30, STEPS), adamw, 1), 3),
    "spiel-ag, a window open": ((lambda: st.spiel_ag(30, STEPS, every=3, window=2), entries, 1), 4),
    "spiel-ma": ((lambda: st.spiel_ma(30, STEPS, every=3, window=2), sm3, 1), 2),
    "rigl": ((lambda: st.rigl(30, STEPS, every=2), adamw, 1), 3),
    "lt-sft, dense": ((lambda: st.lt_sft(30, STEPS, dense=3, scope=HEAD), adamw, 1), 2),
    "lt-sft, sparse": ((lambda: st.lt_sft(30, STEPS, dense=3, scope=HEAD), adamw, 1), 4),
    "diff-pruning, dense": ((lambda: st.diff_pruning(30, STEPS, dense=3), adamw, 1), 2),
    "pafi": ((lambda: st.pafi(30), adamw, 1), 3),
}

if MUTANTS >= 1000:  # the others too, at several steps: what they take need not be told, but nothing may break
    CASES |= {f"{name}, after {step}": (how, step) for name, how in OTHERS.items() for step in (0, 1, 4)}

UNTOLD = {
    "": r"offsets|whole\..*|buffer\..*|phase\.(latents|before)\..*|chooser\.(window|factors)\..*|events.*|reached.*"
    "|two things",
    "repeat-d3": r"start|.*\.slot|.*\.retired_now|step|chooser\.ahead",
    "spiel-ag, a window open": "step",
    "spiel-ma": "step|chooser.ahead",
    "rigl": "step",
    "diff-pruning, dense": "step",
    "lt-sft, dense": "step",
    "lt-sft, sparse": "step",
    "pafi": "step",
}


def other_value(value, draw):
    """Another type, another value, nested, huge."""
    near = []
    if isinstance(value, int) and not isinstance(value, bool):
        near = [value + 1, value - 1, -value, value + 1000, float(value), str(value)]
    if isinstance(value, bool):
        near = [not value, int(value)]
    if isinstance(value, str):
        near = [value + "x", value[:-1], value.upper()]
    if isinstance(value, list):
        near = [value[::-1], value[:-1], value + value, [*value, 0], [value], dict(enumerate(value))]
    if isinstance(value, dict):
        near = [{k: v for k, v in value.items() if k != draw.choice([*value, ""])}, {**value, "more": 1}, list(value)]
    far = [None, -1, 0, 1, 2**63, 10**30, 0.5, float("nan"), "", "x", [], {}, [1], [[[]]], {"tensor": "offsets"}, True]
    return draw.choice(near) if near and draw.random() < 0.6 else draw.choice(far)


def other_tensor(tensor, others, draw):
    """Another dtype, shape, order; one bit, one element; empty; another of the state's."""
    kind = draw.randrange(10)
    changed = tensor.clone()
    flat = changed.view(-1) if changed.numel() else changed
    at = draw.randrange(flat.numel()) if flat.numel() else 0
    if kind == 0:
        return tensor.to(draw.choice([torch.float64, torch.float16, torch.int32, torch.int64, torch.bool]))
    if kind == 1:
        return draw.choice([tensor[None], tensor.reshape(-1)[:-1], torch.cat([tensor.reshape(-1)] * 2)])
    if kind == 2 and flat.numel():
        return tensor.reshape(-1)[torch.tensor(draw.sample(range(flat.numel()), flat.numel()))].view(tensor.shape)
    if kind in (3, 4) and flat.numel():
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        whole = flat.view(width)
        bit = draw.randrange(8 * tensor.element_size())
        whole[at] ^= 1 << bit if bit < 8 * tensor.element_size() - 1 else torch.iinfo(width).min
        return changed
    if kind in (5, 6) and flat.numel():
        flat[at] = draw.choice([0, 1, flat[draw.randrange(flat.numel())].item(), flat[at].item() + 1])
        return changed
    if kind == 7 and flat.is_floating_point() and flat.numel():
        flat[at] = draw.choice([float("nan"), float("inf"), -float("inf")])
        return changed
    if kind == 8:
        return tensor.reshape(-1)[:0]
    return draw.choice(others)


def mutant(state, draw):
    """(place, state): a state with a change at one place."""
    info, tensors = state["info"], state["tensors"]
    if draw.random() < 0.5:
        path = draw.choice([path for path in leaves(info) if path])
        at = info
        for key in path[:-1]:
            at = at[key]
        return ".".join(map(str, path)), {
            "info": changed_at(info, path, other_value(at[path[-1]], draw)), "tensors": tensors
        }  # fmt: skip
    key = draw.choice(sorted(tensors))
    if draw.random() < 0.1:
        without = {k: t for k, t in tensors.items() if k != key}
        return key, {"info": info, "tensors": draw.choice([without, {**tensors, "more": tensors[key]}])}
    return key, {"info": info, "tensors": {**tensors, key: other_tensor(tensors[key], list(tensors.values()), draw)}}


def is_same(a, b):
    """Whether two states are the same, bit for bit."""
    try:
        same_state(a, b)
    except (AssertionError, RuntimeError):  # of another shape
        return False
    return True


def through_a_file(state, file):
    """The state as a file gives it back; the state itself if no file can hold it."""
    try:
        return read_state(write_state(file, state))
    except (ValueError, TypeError, AttributeError, SelectuneError, RuntimeError):
        return state


@pytest.mark.parametrize("case", CASES)
def test_mutants(case, tmp_path, note, tries):
    how, step = CASES[case]
    straight = Mutable(*how)
    straight.go(0, step)
    state, moments = straight.saved()
    straight.go(step, STEPS)
    end, delta = bits(straight.model), straight.tuner.delta(allow_empty=True).to_bytes()
    draw = random.Random(case)
    rest = "step|start|chooser.ahead|.*slot|.*retired_now" if ", after " in case else "nothing"
    untold = re.compile(f"{UNTOLD['']}|{UNTOLD.get(case, rest)}")
    counts = {"refused": 0, "taken": 0, "untold": 0}
    wrong = []
    victim = Mutable(*how)
    own, before = victim.saved(), bits(victim.model)
    for number in range(MUTANTS // len(CASES)):
        where, changed = mutant(state, draw)
        while repr(changed["info"]) == repr(state["info"]) and is_same(changed, state):
            where, changed = mutant(state, draw)
        if number % 5 == 4:
            where, changed = "two things", mutant(changed, draw)[1]
        if number % 8 == 0:
            changed = through_a_file(changed, tmp_path / "state.safetensors")
        try:
            victim.tuner.load_state_dict(changed)
        except SelectuneError as error:
            counts["refused"] += 1
            if not same(bits(victim.model), before) or not is_same(victim.tuner.state_dict(), own[0]):
                wrong.append(f"{where}: refused, and something was changed ({error})")
                victim = Mutable(*how)
            elif not str(error)[0].isupper() or not str(error).endswith("."):
                wrong.append(f"{where}: no sentence: {error}")
            continue
        except Exception as error:  # noqa: BLE001 (any other class is a fault)
            wrong.append(f"{where}: {error!r:.150}")
            victim = Mutable(*how)
            continue
        told = not untold.fullmatch(where)
        counts["taken" if told else "untold"] += 1
        try:
            victim.optimizer.load_state_dict(copy.deepcopy(moments))
            victim.go(step, STEPS)
            if told and not (
                same(bits(victim.model), end) and victim.tuner.delta(allow_empty=True).to_bytes() == delta
            ):
                wrong.append(f"{where}: taken, and the run ended elsewhere: {at(changed, where)!r:.150}")
        except SelectuneError as error:
            if told:
                wrong.append(f"{where}: taken, and later: {error}")
        except Exception as error:  # noqa: BLE001 (any other class is a fault)
            wrong.append(f"{where}: taken, and later {error!r:.150}")
        victim = Mutable(*how)
    note(f"{case}: {counts}")
    tries(sum(counts.values()))
    assert not wrong, "\n".join(wrong)
    assert counts["refused"] > 0.5 * MUTANTS / len(CASES)


def at(state, where):
    if where in state["tensors"]:
        return state["tensors"][where]
    found = state["info"]
    for key in where.split("."):
        found = found[int(key) if isinstance(found, list) else key] if isinstance(found, list | dict) else None
    return found
