"""benchmarks/ranks.py: which numbers of its processes become a row, without starting them."""

from __future__ import annotations

from argparse import Namespace

import pytest
from test_bars import script

from selectune.bench.estimate import plan
from selectune.bench.meter import MIB
from selectune.bench.workload import Bench

GIVEN = Namespace(model="tiny", batch=2, length=16, steps=2, budget=50, repeats=2, methods="id3,lora:r=8,full")


@pytest.fixture
def ranks(monkeypatch):
    """The script, whose processes hold 400 MiB in full fine-tuning and 100 otherwise; the second one 2 more."""
    found, runs = script("ranks"), []

    def spread(ranks, work, way, method, *args):
        runs.append((way, method))
        peak = (400.0 if method == "full" else 100.0) + 10 * len(runs)
        return [{"loaded": 5.0, "started": 7.0, "peak": peak + 2 * rank} for rank in range(ranks)]

    monkeypatch.setattr(found, "spread", spread)
    return found


def test_a_row_is_the_process_that_held_most_over_full_of_the_same_way(ranks):
    rows = {(row["way"], row["method"]): row for row in ranks.memory(2, GIVEN)}
    assert list(rows) == [("ddp", "full"), ("ddp", "id3"), ("ddp", "lora:r=8"), ("fsdp", "full"), ("fsdp", "id3")]
    assert [row["peak_mib"] for row in rows.values()] == [417.0, 137.0, 157.0, 477.0, 197.0]  # medians of two runs
    assert {row["spread_mib"] for row in rows.values()} == {10.0}
    assert rows["ddp", "id3"]["over_full"] == 137 / 417
    assert rows["fsdp", "id3"]["over_full"] == 197 / 477


def test_a_plan_stands_beside_it_where_weights_are_replicated(ranks):
    rows = {(row["way"], row["method"]): row for row in ranks.memory(2, GIVEN)}
    said = plan(Bench("tiny", 2, 16), "id3", 50, 2, ranks=2).peak / MIB
    assert rows["ddp", "id3"]["planned_mib"] == said
    assert f"planned {said:,.0f};" in ranks.told_of_memory(rows["ddp", "id3"])
    assert rows["fsdp", "id3"]["planned_mib"] is None
    assert {row["way"] for row in ranks.memory(4, GIVEN)} == {"ddp"}
