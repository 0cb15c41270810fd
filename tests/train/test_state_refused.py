"""States that were changed: each is refused with a sentence of ours, and model and tuner are as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from test_rollback import CASES, Run, same_state
from train_kit import bits, same

from selectune.errors import BaseMismatchError, ConfigError, SelectuneError


def key_of(tensors, part, least=1):
    return next(key for key, t in tensors.items() if key.endswith(part) and t.numel() >= least)


def twice(tensor):
    return torch.cat((tensor[:1], tensor[:1], tensor[2:]))


def with_nan(tensor):
    changed = tensor.clone()
    changed[0] = float("nan")
    return changed


# what is changed, how, and what is said: of "repeat-d3" after 3 steps, which has dropped entries too
TENSORS = {
    "another base": (".base", lambda t: t + 1, BaseMismatchError, "base values of 1 tensors"),
    "another base under a dropped entry": (".retired_base", lambda t: t + 1, BaseMismatchError, "base values of 1 ten"),
    "one bit of a base": (".base", lambda t: (t.view(torch.int32) ^ 1).view(t.dtype), BaseMismatchError, "base values"),
    "a slot twice": (".slot", twice, ConfigError, "slots are not those of a budget of 30"),
    "a slot too far": (".slot", lambda t: t + 100, ConfigError, "slots are not those"),
    "a slot below 0": (".slot", lambda t: t - 100, ConfigError, "slots are not those"),
    "indices out of order": (".flat", lambda t: t.flip(0), ConfigError, "do not ascend"),
    "an index twice": (".flat", twice, ConfigError, "do not ascend, or one stands there twice"),
    "an index too far": (".flat", lambda t: t + 10**9, ConfigError, "leave the tensor"),
    "an index below 0": (".flat", lambda t: t - 10**9, ConfigError, "leave the tensor"),
    "dropped ones out of order": (".retired", lambda t: t.flip(0), ConfigError, "do not ascend"),
    "a free slot that is used": ("free", lambda t: torch.tensor([0]), ConfigError, "slots are not those"),
    "NaN": ("offsets", with_nan, ConfigError, 'NaN or infinity among its trained values \\("offsets"'),
    "infinity": ("offsets", lambda t: t / 0, ConfigError, "NaN or infinity"),
    "NaN in a dropped weight": (".retired_now", with_nan, ConfigError, "NaN or infinity"),
    "values in another dtype": ("offsets", lambda t: t.double(), ConfigError, "dtype torch.float64"),
    "indices as numbers": (".flat", lambda t: t.float(), ConfigError, "dtype torch.float32"),
    "a base of another dtype": (".base", lambda t: t.half(), ConfigError, "dtype torch.float16"),
    "a part too short": (".slot", lambda t: t[:-1], ConfigError, "parts of different lengths"),
    "another buffer": ("running_mean", lambda t: t[:-1], ConfigError, "missing or has another shape"),
    "no tensor": ("offsets", lambda t: t.tolist(), ConfigError, "missing or has another shape"),
}

INFO = {
    "a step below 0": ({"step": -1}, "step is -1"),
    "a step that is none": ({"step": 2.5}, r"step is 2\.5"),
    "a step as text": ({"step": "3"}, "step is '3'"),
    "a tensor out of scope": ({"reached": [99]}, '"reached" must be'),
    "events that are none": ({"events": {"skipped_steps": -1}}, '"events" must be'),
    "no chooser": ({"chooser": None}, '"chooser"'),
    "another chooser": ({"chooser": {"ahead": 1, "news": None, "window": {}}}, '"chooser" has'),
    "a phase": ({"phase": {"on": False}}, "method with a dense phase"),
    "no run": ({"run": {}}, "which run it is of"),
}


@pytest.fixture
def pair():
    """The state of a run after 3 steps, and a run that has taken 1."""
    first, second = Run(*CASES["repeat-d3"]), Run(*CASES["repeat-d3"])
    first.go(0, 3)
    second.go(0, 1)
    return first.tuner.state_dict(), second


def refused(run, state, error, said):
    """The state is refused, and neither the model nor the tuner nor the rest of the run has changed."""
    before, own = bits(run.model), run.tuner.state_dict()
    with pytest.raises(error, match=said):
        run.tuner.load_state_dict(state)
    assert same(bits(run.model), before)
    same_state(run.tuner.state_dict(), own)
    run.tuner.verify()


@pytest.mark.parametrize("name", TENSORS)
def test_a_changed_tensor(pair, name):
    state, run = pair
    part, change, error, said = TENSORS[name]
    key = key_of(state["tensors"], part, 3 if part.startswith(".") else 1 if part != "free" else 0)
    state["tensors"][key] = change(state["tensors"][key])
    refused(run, state, error, said)
    run.go(1, 6)
    straight = Run(*CASES["repeat-d3"])
    straight.go(0, 6)
    assert same(bits(run.model), bits(straight.model))


@pytest.mark.parametrize("name", INFO)
def test_a_changed_value(pair, name):
    state, run = pair
    changed, said = INFO[name]
    refused(run, {**state, "info": {**state["info"], **changed}}, ConfigError, said)


def test_an_entry_that_is_selected_and_dropped(pair):
    state, run = pair
    tensors = state["tensors"]
    key = key_of(tensors, ".retired", 3)
    page = key.removesuffix("retired")
    tensors[f"{page}flat"][0] = tensors[key][0]
    tensors[f"{page}flat"] = torch.unique(tensors[f"{page}flat"])
    for part in ("slot", "base"):
        tensors[page + part] = tensors[page + part][: len(tensors[f"{page}flat"])]
    refused(run, state, ConfigError, "selected and dropped")


def leaves(value, path=()):
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from leaves(item, (*path, number))
    yield path


def changed_at(value, path, new):
    changed = copy.deepcopy(value)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return changed


def tried(tuner, state):
    """The message that refused a state; None if it was accepted."""
    try:
        tuner.load_state_dict(state)
    except SelectuneError as error:
        return str(error)
    return None


@pytest.mark.parametrize("case", ["repeat-d3", "increment-pafi", "spiel-ag", "spiel-ma", "lt-sft", "id3 and a head"])
def test_every_value_and_every_tensor_changed(case, tries):
    """A changed state is accepted, because a run may have it, or an error of ours refuses it and nothing changes."""
    first, run = Run(*CASES[case]), Run(*CASES[case])
    first.go(0, 2)
    run.go(0, 1)
    state, before, own = first.tuner.state_dict(), bits(run.model), run.tuner.state_dict()
    changes = [
        (changed_at(state["info"], path, new), state["tensors"])
        for path in leaves(state["info"])
        if path
        for new in (None, -1, "x", [], {}, [1], {"tensor": "offsets"}, {"tensor": "nowhere"})
    ]
    for key, tensor in state["tensors"].items():
        for new in (None, tensor[:-1] if tensor.ndim else None, tensor[None], tensor.to(torch.int16), tensor - 1):
            changes.append((state["info"], state["tensors"] | {key: new}))
    count = 0
    for info, tensors in changes:
        said = tried(run.tuner, {"info": info, "tensors": tensors})
        if said is None:
            run.tuner.load_state_dict(own)
            continue
        count += 1
        assert said[0].isupper(), said
        assert said.endswith("."), said
        assert same(bits(run.model), before)
        same_state(run.tuner.state_dict(), own)
    tries(len(changes))
    assert count > 0.7 * len(changes)


def test_what_an_integration_keeps_beside_it(pair):
    """The Trainer's order of the data lies in the same file, under a key that the tuner leaves alone."""
    state, run = pair
    guest = {"trainer.order": torch.zeros(3)}
    run.tuner.load_state_dict({**state, "tensors": {**state["tensors"], **guest}})
    same_state(run.tuner.state_dict(), state)
    guest = {"order": torch.zeros(3)}
    refused(run, {**state, "tensors": {**state["tensors"], **guest}}, ConfigError, "no place for: 'order'")
