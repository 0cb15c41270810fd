"""Models that share weights (a model and its part, tied weights) exclude each other; a mixture is refused."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from delta_kit import snapshot
from test_shelf_threads import run, sums
from threads_kit import Beside
from torch import nn

from selectune.delta import Delta, Shelf, diff, switch
from selectune.errors import DeltaStateError, DeltaTimeoutError


def nested() -> tuple[nn.Sequential, nn.Module, Delta, Delta]:
    whole = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    part = whole[0]
    return whole, part, shifted(whole, 1.0), shifted(part, 2.0)


def shifted(model: nn.Module, by: float) -> Delta:
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in tuned.parameters():
            tensor.view(-1)[0] += by
    return diff(model, tuned)


@pytest.mark.parametrize("tied", [False, True], ids=["a part", "tied weights"])
def test_models_that_share_weights(tied):
    whole, part, of_whole, of_part = nested()
    if tied:
        part = nn.Linear(3, 3)
        part.weight = whole[0].weight
        of_part = shifted(part, 2.0)
    before = snapshot(whole)
    shelf = Shelf(whole, {"a": of_whole})
    with pytest.raises(DeltaStateError, match=r"shares weights with another Sequential.*a shelf of a; put all"):
        Shelf(part, {"b": of_part})
    empty = Shelf(part, {})
    with pytest.raises(DeltaStateError, match="shares weights with another"):
        empty.add("b", of_part)
    switch(whole, "a")
    with pytest.raises(DeltaStateError, match="applied to a model that shares weights with this one"):
        of_part.apply(part)
    switch(whole, None)
    of_part.apply(part)
    for name in ("a", None):
        with pytest.raises(DeltaStateError, match="applied to a model that shares weights"), shelf.using(name):
            pass
    with pytest.raises(DeltaStateError, match="applied to a model that shares weights"):
        switch(whole, "a")
    of_part.revert(part)
    with shelf.using("a"):
        [error] = Beside(lambda: empty.switch(None, 0.01)).raised()
        assert isinstance(error, DeltaTimeoutError)
        with pytest.raises(DeltaStateError, match="would wait for ever"):
            of_part.apply(part)
    switch(whole, None)
    assert snapshot(whole) == before


def test_a_part_and_the_whole_in_several_threads():
    whole, part, of_whole, of_part = nested()
    before = snapshot(whole)
    clean, torn = {}, []
    for delta, model in ((of_whole, whole), (of_part, part)):
        with delta.applied(model):
            clean[delta] = sums(whole)

    def work(rng: random.Random) -> None:
        for _ in range(60):
            delta, model = rng.choice([(of_whole, whole), (of_part, part)])
            with delta.applied(model):
                if sums(whole) != clean[delta]:
                    torn.append(delta)

    run(4, work)
    assert not torn
    assert snapshot(whole) == before


def test_what_was_undone_by_loading_weights_is_not_in_the_way():
    whole, part, of_whole, of_part = nested()
    before = snapshot(whole)
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    of_part.apply(part)
    whole.load_state_dict(state)
    of_whole.apply(whole)
    of_whole.revert(whole)
    assert snapshot(whole) == before
