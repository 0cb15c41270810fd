"""The zoo's models of transformers; ZOO=all runs every row (`make test-zoo`), else the short form."""

from __future__ import annotations

import os

import pytest
import zoo_decoders
import zoo_encoders
import zoo_senses
import zoo_seq2seq
from zoo_kit import SETTINGS, check

pytest.importorskip("transformers")

EVERY = [*zoo_encoders.ROWS, *zoo_decoders.ROWS, *zoo_seq2seq.ROWS, *zoo_senses.ROWS]
ROWS = EVERY if os.environ.get("ZOO") == "all" else [row for row in EVERY if row.short]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_model(row, setting, record_property):
    check(row, setting, record_property)


def test_the_zoo_holds_sixty_models():
    assert len({row.name for row in EVERY}) == len(EVERY) >= 60
