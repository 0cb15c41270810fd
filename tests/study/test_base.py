"""The base as a row of a study: nothing is trained, and the number is that of `selectune eval`."""

from __future__ import annotations

import json
import shlex
import shutil

from cli_kit import call
from lm_kit import make_llama
from study_kit import grid, rows
from tiny_kit import make_data

from selectune.study.engines import Local
from selectune.study.grid import of_mapping
from selectune.study.records import RESULTS, read_results
from selectune.study.report.material import gather
from selectune.study.report.shown import content
from selectune.study.runner import run_study
from selectune.study.workspace import Workspace, begin

pytest_plugins = ("tiny_fixtures",)


def measured(told, folder):
    """The last results of a grid that was run."""
    counts = run_study(begin(folder, of_mapping(told, "grid")), Local(1, 1))
    failures = [failure.why for failure in Workspace(folder).failures()]
    assert (counts.done, failures) == (counts.all, [])
    return [record for record in read_results(folder / RESULTS) if record.last]


def again(record):
    """The value that the record's own command gives."""
    return json.loads(call(*shlex.split(record.more["command"])[1:], "--json").stdout)["value"]


def test_the_base_is_measured_as_it_is(tiny, tmp_path):
    told = grid(tiny, tmp_path, methods=["base", "id3"], seeds=[1], tasks=[rows(tmp_path)])
    folder = tmp_path / "s"
    base, tuned = measured(told, folder)
    assert (base.setting.method, base.steps, base.selected, base.more["trained"]) == ("base", 0, 0, 0)
    assert base.examples == tuned.examples == 20
    items = json.loads((folder / "cells" / base.cell / "items.json").read_text())
    assert sum(items["scores"]) / 20 == base.value
    assert "command" not in base.more  # `selectune eval` draws no rows from a file of training rows
    shown = content(gather(folder), "base")
    row = next(line for line in shown.boards[0].lines if line.label == "base")
    found = row.results[base.setting.task]
    assert (found.costs, found.trained, found.runs[0].command) == ({}, 0, "none")
    assert not any("finished" in note for note in shown.notes)


def test_examples_in_context_are_a_row_too(tmp_path, monkeypatch):
    """The same model with and without examples; both read the rows as `selectune eval` does."""
    model = make_llama(tmp_path / "llama")
    cloze = {"pattern": "{} and {} is", "words": ["small", "big"]}
    methods = ["base", {"method": "base", "shots": 1, "name": "base with 1 example"}]
    settings = {**cloze, "eval_size": 12, "max_steps": 2}
    told = grid(model, tmp_path, tasks=["glue/rte"], methods=methods, seeds=[1], settings=settings)
    data = make_data(tmp_path / "data")
    shutil.copytree(data / "glue/rte", data / "glue/mrpc")  # of the same columns
    monkeypatch.setenv("SELECTUNE_DATA", str(data))
    found = measured({**told, "measure": ["glue/mrpc"]}, tmp_path / "s")
    assert [(r.setting.task, r.setting.method) for r in found] == [
        (task, name) for name in ("base", "base with 1 example") for task in ("glue/rte", "glue/mrpc")
    ]  # fmt: skip
    for record in found:
        assert record.examples == 12
        assert again(record) == record.value
    said = [json.loads((tmp_path / f"s/cells/{r.cell}/items.json").read_text())["answers"] for r in found[::2]]
    assert said[0] == said[1]
