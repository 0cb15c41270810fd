"""`selectune compare`: files and folders of results in, tables and JSON out."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from cli_kit import call

from selectune.study.records import RESULTS, Record, Setting, line_of

ID3, LORA = (0.70, 0.74, 0.71, 0.75, 0.73, 0.77), (0.69, 0.71, 0.70, 0.72, 0.69, 0.70)


@pytest.fixture
def study(tmp_path):
    lines = [
        line_of(
            Record(f"{method}{seed}", "main", Setting("demo", "glue/rte", method, None, None), 5e-4, seed, "accuracy",
                   False, 10, 10, score, 5, 100, True)
        )
        for method, scores in (("id3:exp=1,every=10", ID3), ("lora:r=8", LORA))
        for seed, score in enumerate(scores)
    ]  # fmt: skip
    (tmp_path / RESULTS).write_text("".join(lines))
    return tmp_path


def test_a_table_and_its_warnings(study):
    found = call("compare", study, "--against", "lora")
    for said in ("glue/rte: accuracy; against lora:r=8", "id3:exp=1,every=10", "0.0156", "Holm", "80 % power"):
        assert said in found.stdout
    assert found.stdout.count("! ") == 0  # six pairs, all of them positive: nothing to warn of
    assert "no p below 0.125" not in found.stdout


def test_json_is_the_comparison_and_files_are_written(study):
    for suffix, holds in ((".md", "| method |"), (".tex", "\\toprule"), (".csv", "task,metric,method")):
        out = study / f"table{suffix}"
        found = call("compare", study / RESULTS, "--against", "lora", "--json", "--out", out)
        told = json.loads(found.stdout)
        assert told["standings"][0]["difference"]["p"] == 1 / 64
        assert holds in out.read_text()


def test_scores_of_rows_are_found_beside_the_results(study):
    for method, scores in (("id3:exp=1,every=10", ID3), ("lora:r=8", LORA)):
        for seed, score in enumerate(scores):
            folder = study / "cells" / f"{method}{seed}"
            folder.mkdir(parents=True)
            right = round(100 * score)
            items = {"scores": [1.0] * right + [0.0] * (100 - right), "predictions": [], "answers": []}
            (folder / "items.json").write_text(json.dumps(items))
    told = json.loads(call("compare", study, "--against", "lora", "--json").stdout)
    found = told["standings"][0]["difference"]
    assert found["over_items"]["low"] > 0
    assert found["mcnemar"]["5"] == {"first": 7, "second": 0, "rows": 100, "p": 2 / 2**7}
    (study / "cells" / "lora:r=80" / "items.json").write_text('{"right": []}')
    assert "does not hold the scores of rows" in call("compare", study, "--against", "lora", code=1).stderr


def test_methods_are_listed_with_their_own_commas(study):
    told = call("compare", study, "--against", "best", "--methods", "id3:exp=1,every=10", "--json").stdout
    assert json.loads(told)["against"] == {"glue/rte": "lora:r=8"}
    call("compare", study, "--against", "lora", "--methods", "lora:r=8,id3:exp=1,every=10")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--against", "lroa:r=8"), 2, "Did you mean lora:r=8?"),
        (("--against", "lora", "--out", "table.doc"), 2, "one of .md, .tex, .csv"),
        (("--against", "lora", "--rule", "first"), 2, "Known: last, best"),
        (("nowhere", "--against", "lora"), 1, "nowhere is no study"),
        ((), 2, "--against"),
    ],
)
def test_what_is_refused(study, arguments, code, says):
    assert says in call("compare", study, *arguments, code=code).stderr


def test_torch_is_not_loaded(study):
    code = (
        "import sys\nfrom selectune.cli.app import app\n"
        f"app(['compare', {str(study)!r}, '--against', 'lora'], standalone_mode=False)\n"
        "assert 'scipy' in sys.modules and 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
