"""RELIABILITY.md is what the proof wrote: a fresh row without a failure for every promise, and tests that exist."""

from __future__ import annotations

import ast
import datetime
import re
import subprocess

import pytest
import report

ROOT = report.ROOT
PROMISES = report.promises()
IDS = [promise["id"] for promise in PROMISES]


def test_there_are_many_and_each_has_a_name_of_its_own():
    assert len(PROMISES) >= 30
    assert len(set(IDS)) == len(IDS)
    assert all(promise.keys() == {"id", "says", "from", "tests"} for promise in PROMISES)


def _tests(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_their_tests_exist():
    for test in (test for promise in PROMISES for test in promise["tests"]):
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert not name or name in _tests(file), test


def test_knobs_are_read_by_the_files_that_they_are_for():
    for file, settings in (pair for form in report.FORMS for pair in report.knobs(form).items()):
        text = (ROOT / file).read_text("utf-8")
        assert all(f'environ.get("{name}"' in text for name in settings), file
        assert any(test.partition("::")[0] == file for promise in PROMISES for test in promise["tests"]), file


def test_every_promise_was_kept():
    known = report.rows()
    assert [key for key in IDS if key not in known["short"]["rows"]] == [], "make reliability"
    for form in report.FORMS:
        for key, row in known[form]["rows"].items():
            assert row["tried"] > 0, (form, key)
            assert row["failed"] == 0, (form, key)


def test_rows_are_of_the_tests_that_the_promise_names():
    tests = {promise["id"]: promise["tests"] for promise in PROMISES}
    rows = report.rows()
    other = [
        (form, key) for form in report.FORMS for key, row in rows[form]["rows"].items() if row["tests"] != tests[key]
    ]
    assert other == [], "make reliability"


def test_no_row_is_of_a_promise_that_is_no_more():
    assert all(set(report.rows()[form]["rows"]) <= set(IDS) for form in report.FORMS), "make reliability"


def test_the_page_says_what_the_rows_say():
    assert (ROOT / report.PAGE).read_text("utf-8") == report.page(report.rows()), "make reliability"


def test_no_row_is_old():
    """Old is told by the newest commit and not by today's date, so a checkout that passes goes on passing."""
    told = subprocess.run(["git", "log", "-1", "--format=%cs"], cwd=ROOT, capture_output=True, text=True, check=False)
    if told.returncode or not told.stdout.strip():
        pytest.skip("no git repository, so the newest commit is not known")
    newest = datetime.date.fromisoformat(told.stdout.strip())
    rows = report.rows()["short"]["rows"]
    ages = {key: (newest - datetime.date.fromisoformat(row["date"])).days for key, row in rows.items()}
    assert max(ages.values()) <= report.DAYS, f"make reliability: {max(ages, key=lambda key: ages[key])}"


def test_every_promise_of_the_readme_has_its_row():
    """Each bold promise of README.md names tests; all files that it names are tried for some promise."""
    text = (ROOT / "README.md").read_text("utf-8").partition("## Promises")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(tests/[\w/]+(?:\.py|/))`", text))
    tried = {test.partition("::")[0] for promise in PROMISES for test in promise["tests"]}
    assert len(named) >= 8
    missing = {path for path in named if not any(test.startswith(path) for test in tried)}
    assert not missing


def test_every_statement_of_the_threat_model_is_a_promise():
    text = (ROOT / "SECURITY.md").read_text("utf-8").partition("## What is promised")[2].partition("\n## ")[0]
    named = re.findall(r"^\| .+\. \| ([\w-]+) \|$", text, re.M)
    assert len(named) == len(re.findall(r"^\| ", text, re.M)) - 1 > 15  # the first is the table's head
    assert set(named) <= set(IDS)


def test_the_bound_is_that_of_clopper_and_pearson():
    """(Brown, Cai and DasGupta 2001, "Interval estimation for a binomial proportion", section 4.2.1.)"""
    from scipy.stats import binom

    assert report.bound(300, 0) == pytest.approx(1 - 0.05 ** (1 / 300))
    for tried, failed in ((20, 1), (300, 0), (50, 7), (5, 5)):
        limit = report.bound(tried, failed)
        assert limit == 1.0 if failed == tried else binom.cdf(failed, tried, limit) == pytest.approx(0.05)


def test_a_test_that_says_nothing_counts_as_one():
    class Told:
        def __init__(self, nodeid, properties=(), when="call", failed=False, skipped=False):
            self.nodeid, self.user_properties, self.when = nodeid, properties, when
            self.failed, self.skipped = failed, skipped

    count = report.Count()
    for told in (
        Told("tests/a.py::test_x[1]"),
        Told("tests/a.py::test_x[2]", failed=True),
        Told("tests/a.py::test_y", [("tries", 300), ("note", "n")]),
        Told("tests/a.py::test_z", skipped=True),
        Told("tests/b.py::test_x", when="setup", failed=True),
    ):
        count.pytest_runtest_logreport(told)

    def of(*tests):
        found = report.row({"tests": tests}, count)
        return found["tried"], found["failed"]

    assert of("tests/a.py") == (302, 1)
    assert of("tests/a.py::test_y", "tests/a.py::test_z") == (300, 0)
    assert of("tests/b.py::test_x") == (0, 1)
    assert of("tests/a.py::test_") == (0, 0)
