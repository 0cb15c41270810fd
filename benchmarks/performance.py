"""Fills the tables of docs/performance.md and docs/scale.md: `python benchmarks/performance.py`.

The reports are in docs/performance/, where `benchmarks/bars.py`, `benchmarks/figures.py` and `benchmarks/ranks.py`
wrote them (`--json`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bars import judge

HERE = Path(__file__).parent.parent / "docs"
Report = dict[str, Any]


def read(name: str) -> Report:
    return json.loads((HERE / "performance" / f"{name}.json").read_text(encoding="utf-8"))


def number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def rows(name: str) -> str:
    """One run, a line a method."""
    report = read(name)
    lines = [
        "| method | init s | update s | step s | / full | / frozen | / lora | peak MiB | delta bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [
            row["method"], number(row["init_s"], ".3f"), number(row["update_s"], ".3f"), number(row["step_s"], ".3f"),
            number(row["step_over_full"], ".2f"), number(row["step_over_frozen"], ".2f"),
            number(row["step_over_lora"], ".2f"), number(row["peak_mib"], ",.0f"), number(row["delta_bytes"], ",d"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bars(*names: str) -> str:
    """The bars, a column a run."""
    verdicts = [judge(read(name)) for name in names]
    lines = [
        "| bar | method | limit | " + " | ".join(f"run {n + 1}" for n in range(len(names))) + " | kept |",
        "|---" * (4 + len(names)) + "|",
    ]
    for same in zip(*verdicts, strict=True):
        if all(v.kept is None for v in same):
            continue  # not measured
        first, kept = same[0], sum(v.kept is True for v in same)
        values = " | ".join(number(v.value, ".2f") for v in same)
        lines.append(f"| {first.what} | {first.method} | {first.limit:g} | {values} | {kept} of {len(same)} |")
    return "\n".join(lines)


def series(name: str, what: str) -> str:
    """Reports of growing density or size: step over full fine-tuning's, and over the frozen floor's."""
    reports = read(name)
    names = [row["method"] for row in reports[0]["rows"]]
    lines = [f"| {what} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for report in reports:
        at = report["settings"]["budget"] if what == "density" else report["settings"]["model"]
        cells = [number(row["step_over_full"], ".2f") for row in report["rows"]]
        lines.append(f"| {f'{100 * at:g} %' if what == 'density' else at} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ranks() -> str:
    """What a selecting step sends between processes, a line a number of them."""
    lines = ["| processes | median MiB | most MiB | all-reduce of all, MiB | median / that |", "|---|---|---|---|---|"]
    for row in read("ranks"):
        sizes = (row["median_mib"], row["largest_mib"], row["whole_mib"])
        cells = [str(row["ranks"]), *(f"{size:.1f}" for size in sizes), f"{row['median_share']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory() -> str:
    """What each process held at most, a line a method; `/ full` is within the same way and number of processes."""
    ways = {"ddp": "DDP", "fsdp": "FSDP2"}
    lines = [
        "| processes | method | peak MiB | / full | planned MiB | of it the weights |",
        "|---|---|---|---|---|---|",
    ]
    for row in [*read("ranks-memory-2"), *read("ranks-memory-4")]:
        cells = [
            f"{row['ranks']}, {ways[row['way']]}", row["method"], number(row["peak_mib"], ",.0f"),
            number(row["over_full"], ".2f"), number(row["planned_mib"], ",.0f"), number(row["loaded_mib"], ",.0f"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


RUNS = ("bars-1", "bars-2", "bars-3")
REAL = ("bars-real-1", "bars-real-2", "bars-real-3")
# by the mark in a page: the reports it needs, and what makes it; a report that is not there leaves its table alone
TABLES: dict[str, tuple[tuple[str, ...], Callable[[], str]]] = {
    "rows": (RUNS[:1], lambda: rows("bars-1")),
    "bars": (RUNS, lambda: bars(*RUNS)),
    "bars at 5 %": (("bars-dense",), lambda: bars("bars-dense")),
    "density": (("density",), lambda: series("density", "density")),
    "size": (("size",), lambda: series("size", "model")),
    "bars on real gradients": (REAL, lambda: bars(*REAL)),
    "ranks": (("ranks",), ranks),
    "memory of ranks": (("ranks-memory-2", "ranks-memory-4"), memory),
}


def main() -> None:
    for page in (HERE / "performance.md", HERE / "scale.md"):
        fill(page)


def fill(page: Path) -> None:
    """Writes the tables of a page anew."""
    text = page.read_text(encoding="utf-8")
    for name, (needed, make) in TABLES.items():
        if not all((HERE / "performance" / f"{report}.json").exists() for report in needed):
            continue
        marks = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
        text = re.sub(marks, lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
