"""Runs the tests of every promise, counts what they tried, and writes RELIABILITY.md.

Usage: python tests/reliability/report.py [--long] [--only ID,ID] [--workers 2]
       python tests/reliability/report.py --page        (the page anew from rows.json; nothing is run)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tomllib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROMISES, ROWS, PAGE = (
    Path(__file__).with_name("promises.toml"),
    Path(__file__).with_name("rows.json"),
    "RELIABILITY.md",
)
FORMS = ("short", "long")


def promises() -> list[dict[str, Any]]:
    return tomllib.loads(PROMISES.read_text("utf-8"))["promise"]


def knobs(form: str) -> dict[str, dict[str, str]]:
    """The variables of each file in the short or the long form."""
    return tomllib.loads(PROMISES.read_text("utf-8"))[form]


def rows() -> dict[str, dict[str, Any]]:
    return json.loads(ROWS.read_text("utf-8")) if ROWS.exists() else {}


def bound(tried: int, failed: int) -> float:
    """The upper end of the one-sided 95 % interval of a failure rate (Clopper and Pearson 1934).

    >>> round(bound(300, 0), 4), round(bound(20, 1), 3)  # 1 - 0.05^(1/n) is nearly 3/n
    (0.0099, 0.216)
    """
    if failed == 0:
        return 1 - 0.05 ** (1 / tried)
    from scipy.stats import beta

    return float(beta.ppf(0.95, failed + 1, tried - failed)) if failed < tried else 1.0


@dataclass
class Count:
    """A pytest plugin: the cases that were tried and the tests that failed, by test without its parameters."""

    tried: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failed: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid.partition("[")[0]
        if report.failed:
            self.failed[test] += 1
        if report.when == "call" and not report.skipped:
            told = [value for name, value in report.user_properties if name == "tries"]
            self.tried[test] += sum(told) if told else 1


def counted(tests: list[str], form: str, workers: int) -> Count:
    """What the tests try; one run of pytest for each set of knobs."""
    import pytest

    groups: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for test in dict.fromkeys(tests):
        groups[tuple(knobs(form).get(test.partition("::")[0], {}).items())].append(test)
    count = Count()
    for settings, group in groups.items():
        told = " ".join(f"{name}={value}" for name, value in settings)
        sys.stdout.write(f"{told} {len(group)} tests and files\n".lstrip())
        os.environ.update(settings)
        words = ["-q", "-n", str(workers), "--dist", "worksteal", "--durations=5", "--timeout=3000", *group]
        code = pytest.main(words, plugins=[count])
        for name in dict(settings):
            del os.environ[name]
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.exit(f"pytest ended with {code!r}, so nothing was written: {' '.join(words)}")
    return count


def row(promise: dict[str, Any], count: Count) -> dict[str, Any]:
    """What a promise's tests tried and failed; a test that was skipped or is not there tried nothing."""
    found = {"tried": 0, "failed": 0}
    for test in promise["tests"]:
        for name, n in count.tried.items():
            found["tried"] += n if name == test or name.startswith(f"{test}::") else 0
        for name, n in count.failed.items():
            found["failed"] += n if name == test or name.startswith(f"{test}::") else 0
    return {"tests": promise["tests"], **found, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def here() -> str:
    """What ran: the commit and the versions."""
    import torch

    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return f"{git.stdout.strip() or 'no commit'}, Python {platform.python_version()}, torch {torch.__version__}"


HEAD = """# Reliability

What is promised, which tests try it, how often, and with what result. `make reliability` runs the tests and writes this
page; the second figure of a cell is from `make reliability-long`, which tries more. No figure is written by hand, and
`tests/reliability/test_reliability.py` fails if a promise has no row, a failure, or a row that is more than {days} days
older than the newest commit.

*Tried* counts cases: examples of hypothesis, mutants, flipped bits, kills, states of a disk, and else parameters of a
test. *At most* is the upper end of the one-sided 95 % confidence interval of the failure rate (Clopper and Pearson
1934): with no failure in n tries it is 1 - 0.05^(1/n), nearly 3/n. It speaks of cases that are drawn like those that
were tried; where a test goes through a list made by hand, it says how long the list is and no more. Nothing here ran on
a GPU.

{what}

| promise | from | tests | tried | failed | at most | date |
|---|---|---|---|---|---|---|
"""
DAYS = 30
"""How much older than the newest commit a row may be. Without new commits nothing grows old."""


def cells(found: dict[str, Any]) -> list[str]:
    told = f"{100 * bound(found['tried'], found['failed']):.2g} %" if found["tried"] else "-"
    return [f"{found['tried']:,}", str(found["failed"]), told, found["date"]]


def page(known: dict[str, Any]) -> str:
    """RELIABILITY.md, of what rows.json holds."""
    what = "\n".join(f"* last run of the {form} form: {known[form]['what']}" for form in FORMS if known[form]["what"])
    lines = [HEAD.format(days=DAYS, what=what)]
    for promise in promises():
        both = [known[form]["rows"][promise["id"]] for form in FORMS if promise["id"] in known[form]["rows"]]
        columns = [" · ".join(parts) for parts in zip(*map(cells, both), strict=True)]
        tests = ", ".join(f"`{test.removeprefix('tests/')}`" for test in promise["tests"])
        lines.append(
            f"| **{promise['id']}**: {promise['says']} | {promise['from']} | {tests} | {' | '.join(columns)} |\n"
        )
    return "".join(lines)


def main() -> None:
    take = argparse.ArgumentParser(description=__doc__)
    take.add_argument("--long", action="store_true")
    take.add_argument("--only", default="")
    take.add_argument("--workers", type=int, default=2)
    take.add_argument("--page", action="store_true")
    given = take.parse_args()
    if given.page:
        (ROOT / PAGE).write_text(page(rows()), "utf-8")
        return
    form, only = "long" if given.long else "short", set(filter(None, given.only.split(",")))
    chosen = [p for p in promises() if not only or p["id"] in only]
    if form == "long" and not only:  # the others have no long form
        chosen = [p for p in chosen if any(test.partition("::")[0] in knobs(form) for test in p["tests"])]
    os.chdir(ROOT)
    count = counted([test for promise in chosen for test in promise["tests"]], form, given.workers)
    known = {name: rows().get(name, {"rows": {}, "what": ""}) for name in FORMS}
    known[form]["what"] = here()
    known[form]["rows"] |= {promise["id"]: row(promise, count) for promise in chosen}
    ids = [promise["id"] for promise in promises()]
    for name in FORMS:
        known[name]["rows"] = {key: known[name]["rows"][key] for key in ids if key in known[name]["rows"]}
    ROWS.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    (ROOT / PAGE).write_text(page(known), "utf-8")
    wrong = [
        p["id"] for p in chosen if known[form]["rows"][p["id"]]["failed"] or not known[form]["rows"][p["id"]]["tried"]
    ]
    if wrong:
        sys.exit(f"failed, or nothing was tried: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
