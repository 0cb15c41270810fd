"""The zoo's odd modules: every way to use a weight is seen, or refused with a sentence. ZOO=all: in every setting."""

from __future__ import annotations

import pytest
import zoo_habits
import zoo_layers
import zoo_strange
from zoo_kit import cases, check

ROWS = [*zoo_layers.ROWS, *zoo_habits.ROWS, *zoo_strange.ROWS]


@pytest.mark.parametrize("row, setting", cases(ROWS, ("plain", "nonreentrant")))
def test_odd_module(row, setting, record_property):
    check(row, setting, record_property)


def test_the_zoo_holds_forty_odd_modules():
    assert len({row.name for row in ROWS}) == len(ROWS) >= 40
