"""The zoo's models of transformers; ZOO=all runs every row in every setting (`make test-zoo`), else the short form."""

from __future__ import annotations

import pytest
import zoo_decoders
import zoo_encoders
import zoo_senses
import zoo_seq2seq
from zoo_kit import cases, check

pytest.importorskip("transformers")

ROWS = [*zoo_encoders.ROWS, *zoo_decoders.ROWS, *zoo_seq2seq.ROWS, *zoo_senses.ROWS]


@pytest.mark.parametrize("row, setting", cases(ROWS, ("whole", "nonreentrant", "bf16")))
def test_model(row, setting, record_property):
    check(row, setting, record_property)


def test_the_zoo_holds_sixty_models():
    assert len({row.name for row in ROWS}) == len(ROWS) >= 60
