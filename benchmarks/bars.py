"""What is promised of speed and memory, as data, and whether a run of the bench keeps it.

    python benchmarks/bars.py --no-live --steps 24 --json docs/performance/bars-1.json

measures the methods side by side, the toolkit's beside ours (`benchmarks/peers.py`), and judges them. Needs
`pip install 'selectune[hf,bench]'` and an idle machine. Exit codes: 0 every bar was kept, 1 one was missed or a method
failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectune.bench import table
from selectune.bench.rounds import Settings, middle
from selectune.bench.rows import ratio, run
from selectune.bench.workload import Bench
from selectune.cli.values import budget
from selectune.spec import names

Report = dict[str, Any]
Row = dict[str, Any]
TENTH = "id3:every=10"
TOP = "top-third"
METHODS = f"full,frozen,lora,toolkit-id3,pafi,static-d3,random,{TOP},id3,{TENTH}"
STATIC = ("pafi", "static-d3", "random")
MIB = 1 << 20


@dataclass(frozen=True)
class Bar:
    """`value(report, row)` of each of `methods` must be at most `limit`; `reach` is what to try for.

    `value` gives None where the run did not measure what it needs.
    """

    what: str
    methods: tuple[str, ...]
    value: Callable[[Report, Row], float | None]
    limit: float
    reach: float
    needs: Callable[[Report], bool] = lambda report: True


@dataclass(frozen=True)
class Verdict:
    """One bar on one method: the value, or None where it was not measured."""

    what: str
    method: str
    value: float | None
    limit: float
    reach: float
    problem: str = ""

    @property
    def kept(self) -> bool | None:
        """True or False; None where it was not measured for want of a row."""
        if self.problem:
            return False
        return None if self.value is None else self.value <= self.limit

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what, "method": self.method, "value": self.value, "limit": self.limit, "reach": self.reach,
            "kept": self.kept, "problem": self.problem,
        }  # fmt: skip


def row_of(report: Report, method: str) -> Row | None:
    """A method's row, if the run has one that did not fail."""
    return next((r for r in report["rows"] if r["method"] == method and r.get("error") is None), None)


def step_over(other: str) -> Callable[[Report, Row], float | None]:
    """The step's ratio to another method's, within a round."""

    def value(report: Report, row: Row) -> float | None:
        base = row_of(report, other)
        return None if base is None else ratio(row["step_rounds_s"], base["step_rounds_s"])

    return value


def memory_over(other: str) -> Callable[[Report, Row], float | None]:
    """The ratio of peak memory above the loaded model."""

    def value(report: Report, row: Row) -> float | None:
        base = row_of(report, other)
        return None if base is None or base["peak_mib"] <= 0 else row["peak_mib"] / base["peak_mib"]

    return value


def memory_above_floor(report: Report, row: Row) -> float | None:
    """(peak - frozen's peak) over 1.5 x the largest tensor + 32 bytes x B + 64 MiB."""
    base = row_of(report, "frozen")
    if base is None or not row["selected"]:
        return None
    allowed = 1.5 * report["model"]["largest_mib"] + 32 * row["selected"] / MIB + 64
    return (row["peak_mib"] - base["peak_mib"]) / allowed


def init_over_copy(report: Report, row: Row) -> float | None:
    """Initialisation over the time of one pass over the weights."""
    copies = middle([r["copy_s"] for r in report["rows"] if r.get("copy_s")])
    return row["init_s"] / copies if copies else None


def bytes_per_scalar(report: Report, row: Row) -> float | None:
    """Bytes of the delta's file for each selected scalar."""
    del report
    return row["delta_bytes"] / row["selected"] if row["selected"] and row["delta_bytes"] else None


def density(report: Report) -> float:
    """The budget as a share of the weights."""
    budget = report["settings"]["budget"]
    if isinstance(budget, float):
        return budget
    size = {"fp32": 4, "bf16": 2, "fp16": 2}[report["settings"]["dtype"]]
    return budget * size / (report["model"]["weights_mib"] * MIB)


def _on(device: str, low: float = 0.0, high: float = 0.01) -> Callable[[Report], bool]:
    return lambda report: report["settings"]["device"] == device and low <= density(report) < high


def _stored(*dtypes: str) -> Callable[[Report], bool]:
    return lambda report: report["settings"]["dtype"] in dtypes


def _real(report: Report) -> bool:
    return report["settings"].get("data", "random") != "random"


_CPU, _GPU, _DENSE = _on("cpu"), _on("cuda"), _on("cpu", 0.04, 0.06)
BARS: tuple[Bar, ...] = (
    Bar("static masks, step / frozen", STATIC, step_over("frozen"), 1.08, 1.05, _CPU),
    Bar("a static mask in the upper third, step / frozen", (TOP,), step_over("frozen"), 0.75, 0.65, _CPU),
    Bar("static masks, step / lora", STATIC, step_over("lora"), 0.95, 0.85, _CPU),
    Bar("id3 every step, step / full", ("id3",), step_over("full"), 0.75, 0.65, _CPU),
    Bar("id3 every step on real gradients, step / frozen", ("id3",), step_over("frozen"), 1.25, 1.15, _real),
    Bar(f"{TENTH}, step / frozen", (TENTH,), step_over("frozen"), 1.10, 1.05, _CPU),
    Bar(f"{TENTH}, step / lora", (TENTH,), step_over("lora"), 1.00, 0.85, _CPU),
    Bar("id3, step / toolkit-id3", ("id3",), step_over("toolkit-id3"), 0.33, 0.30, _CPU),
    Bar("id3, peak memory / full", ("id3",), memory_over("full"), 0.55, 0.50, _CPU),
    Bar("id3, peak memory / lora", ("id3",), memory_over("lora"), 0.72, 0.62, _CPU),
    Bar("pafi, initialisation / one copy of the weights", ("pafi",), init_over_copy, 10.0, 4.0, _CPU),
    Bar("id3, (peak - frozen) / (1.5 x largest tensor + 32 B + 64 MiB)", ("id3",), memory_above_floor, 1.0, 0.6, _CPU),
    Bar("static masks at 5 %, step / full", STATIC, step_over("full"), 0.85, 0.75, _DENSE),
    Bar("delta file, bytes a scalar, fp32", (*STATIC, "id3", TENTH), bytes_per_scalar, 6.5, 6.0, _stored("fp32")),
    Bar(
        "delta file, bytes a scalar, 16 bits", (*STATIC, "id3", TENTH), bytes_per_scalar, 4.5, 4.0,
        _stored("bf16", "fp16"),
    ),
    Bar(f"GPU: {TENTH} and static masks, step / full", (*STATIC, TENTH), step_over("full"), 0.80, 0.70, _GPU),
    Bar("GPU: id3, step / full", ("id3",), step_over("full"), 1.00, 0.90, _GPU),
    Bar("GPU: peak memory / full", (*STATIC, "id3", TENTH), memory_over("full"), 0.60, 0.50, _GPU),
    Bar("GPU: peak memory / lora", (*STATIC, "id3", TENTH), memory_over("lora"), 1.00, 0.80, _GPU),
)  # fmt: skip


def judge(report: Report, bars: tuple[Bar, ...] = BARS) -> list[Verdict]:
    """Every bar that this run's device, budget and dtype are about, on every method it asked for.

    A method that was asked for and failed breaks its bars; one that was not asked for is no verdict at all.
    """
    verdicts = []
    for bar in bars:
        if not bar.needs(report):
            continue
        for method in bar.methods:
            if method not in report["settings"]["methods"]:
                continue
            row = row_of(report, method)
            if row is None:
                verdicts.append(Verdict(bar.what, method, None, bar.limit, bar.reach, "the method failed"))
            else:
                verdicts.append(Verdict(bar.what, method, bar.value(report, row), bar.limit, bar.reach))
    return verdicts


def all_kept(verdicts: list[Verdict]) -> bool:
    """Whether something was measured and nothing missed its bar."""
    return any(v.kept is True for v in verdicts) and not any(v.kept is False for v in verdicts)


PEERS = str(Path(__file__).with_name("peers.py"))
COLUMNS = ("bar", "method", "value", "limit", "reach for", "")


def cells(verdict: Verdict) -> list[str]:
    """One verdict as cells of a table."""
    kept = {True: "kept", False: "MISSED", None: "not measured"}[verdict.kept]
    value = verdict.problem or ("-" if verdict.value is None else f"{verdict.value:.2f}")
    return [verdict.what, verdict.method, value, f"<= {verdict.limit:g}", f"{verdict.reach:g}", kept]


def judged(settings: Settings) -> tuple[Report, bool]:
    """Runs the bench and prints its table and the verdicts: the report, and whether all bars were kept."""
    report = run(settings, lambda text: print(text, file=sys.stderr))
    verdicts = judge(report)
    report["bars"] = [verdict.as_json() for verdict in verdicts]
    print(f"\n{table.title(report)}\n{table.plain(table.COLUMNS, [table.cells(row) for row in report['rows']])}\n")
    print(table.plain(COLUMNS, [cells(verdict) for verdict in verdicts], 2))
    print("\n".join(table.notes(report)))
    return report, all_kept(verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-6l")
    parser.add_argument("--data", default="random", help="a task's rows for a trained model (--model demo)")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--budget", type=budget, default=0.0017, help="scalars trained, or a share of all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-live", action="store_true", help="leave out the runs that measure live memory")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    given = parser.parse_args()
    bench = Bench(given.model, given.batch, given.length, given.dtype, device=given.device, data=given.data)
    settings = Settings(
        bench, names(given.methods), given.budget, given.steps, given.rounds, threads=given.threads,
        live=not given.no_live, peers=PEERS,
    )  # fmt: skip
    report, kept = judged(settings)
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
