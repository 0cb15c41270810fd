"""Counts what became of the zoo's rows, and shows those that are not equal."""

from __future__ import annotations

from collections import Counter
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = sorted(
        {
            str(text)
            for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed"))
            if report.when == "call"
            for kind, text in report.user_properties
            if kind == "zoo"
        }
    )
    if found:
        terminalreporter.write_sep("-", "zoo")
        counts = Counter(text.partition("|")[0] for text in found)
        for text in found:
            if not text.startswith(("equal|", "without|")):
                terminalreporter.write_line(text[:300])
        terminalreporter.write_line(", ".join(f"{kind} {count}" for kind, count in counts.items()))
