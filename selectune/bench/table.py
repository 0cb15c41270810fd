"""Shows rows as text, with the columns of the papers' efficiency table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS = (
    "method", "init s", "update s", "step s", "spread", "/full", "/frozen", "/lora", "peak MiB", "live MiB",
    "delta bytes", "selected",
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row; a method that failed has its error in place of numbers."""
    if row.get("error"):
        return [row["method"], f"failed: {row['error']}", *[""] * (len(COLUMNS) - 2)]
    low, high = row["spread"]
    return [
        row["method"],
        _seconds(row["init_s"]),
        _seconds(row["update_s"]),
        _seconds(row["step_s"]),
        f"{_seconds(low)}-{_seconds(high)}",
        *(_ratio(row[f"step_over_{name}"]) for name in ("full", "frozen", "lora")),
        f"{row['peak_mib']:,.0f}",
        "-" if row.get("live_mib") is None else f"{row['live_mib']:,.0f}",
        "-" if row["delta_bytes"] is None else f"{row['delta_bytes']:,}",
        "-" if row["selected"] is None else f"{row['selected']:,}",
    ]


def title(report: dict[str, Any]) -> str:
    """One line that says what was run."""
    s, m = report["settings"], report["machine"]
    budget = f"{s['budget']:.3g} of the weights" if isinstance(s["budget"], float) else f"{s['budget']:,} scalars"
    extra = (f", autocast {s['autocast']}" if s["autocast"] else "") + (", checkpointing" if s["checkpointing"] else "")
    data = "" if s.get("data", "random") == "random" else f", rows of {s['data']}"
    return (
        f"{s['model']}{data}, batch {s['batch']} x {s['length']}, {s['dtype']}{extra}, {budget}, {s['steps']} steps in "
        f"{s['rounds']} rounds, processes {s['processes']}; {m['gpu'] or m['cpu']}, {m['threads']} threads, "
        f"torch {report['versions']['torch']}"
    )


def notes(report: dict[str, Any]) -> list[str]:
    """Lines that a reader of the table needs to know what its numbers mean."""
    packages = sorted({row["package"] for row in report["rows"] if row.get("package")})
    found = [
        "step: the median over rounds of whole steps (forward, backward, selection, optimizer); with every=k, "
        "selecting steps count 1/k; spread: 10th to 90th percentile of all steps; ratios are taken within a round",
        "peak: above the loaded model, as the system counts it; live: the same without memory that the C library "
        "keeps for reuse, from a run of its own; init: set-up of the method, after libraries and kernels are loaded",
    ]
    found += [selected(row["method"], row["selections"]) for row in report["rows"] if row.get("selections")]
    if report.get("copy_s"):
        found.append(f"one pass over the weights (a copy): {report['copy_s']:.4f} s")
    if packages:
        found.append(f"peers: {', '.join(packages)}")
    found += [f"{row['method']}: {row['note']}" for row in report["rows"] if row.get("note")]
    if any(row.get("exact_memory") is False for row in report["rows"]):
        found.append("peak memory is that of the whole process, because this system cannot reset it")
    return found


def selected(method: str, seen: dict[str, Any]) -> str:
    """What bounds left of gradients, and whether selections are those of float64, as a sentence."""
    text = (
        f"{method}: in {seen['steps']:,} selecting steps, bounds served {seen['bounded']:,} of {seen['tensors']:,} "
        f"linear weights; of their entries they left {seen['left_median']:.3%} in the median step, at most "
        f"{seen['left_95']:.3%} in 95 % of steps"
    )
    if seen["compared"]:
        text += f"; {seen['equal']:,} of {seen['compared']:,} compared selections are those of float64"
    return text


def plain(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in plain text; the first `left` columns are flush left, the others flush right.

    >>> print(plain(("a", "bb"), [["xy", "1"]]))
    a   bb
    xy   1
    """
    short = [r for r in rows if len(r) < 2 or not r[1].startswith("failed: ")]
    widths = [max(len(r[i]) for r in [list(columns), *short]) for i in range(len(columns))]
    widths[0] = max([widths[0], *(len(r[0]) for r in rows)])
    lines = []
    for row in [columns, *rows]:
        if len(row) > 1 and row[1].startswith("failed: "):
            lines.append(f"{row[0]:<{widths[0]}}  {row[1]}")
            continue
        parts = [f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def planned(found: dict[str, Any]) -> str:
    """A prediction as text: the items of the peak first, then the delta and the updates."""
    mib = 1 << 20
    items = (
        ("weights", "weights"), ("adapter", "adapter's weights"), ("saved", "saved for backward"),
        ("backward", "backward in addition"),
        ("gradient", "dense gradients"), ("values", "offsets"), ("latents", "latents of a dense phase"),
        ("optimizer", "optimizer state"),
        ("ledger", "positions, slots, base values"), ("workspace", "scoring"),
        ("calibration", "calibration, before training"), ("exchange", "collectives of the processes"),
        ("peak", "peak"), ("above_model", "peak above the model"),
    )  # fmt: skip
    lines = [f"{label:<30} {found[key] / mib:>12,.1f} MiB" for key, label in items]
    lines.append(f"{'delta file':<30} {found['delta_bytes']:>12,} bytes")
    lines.append(f"{'trained scalars':<30} {found['trained']:>12,} of {found['parameters']:,} ({found['density']:.4%})")
    if found["ranks"] > 1:
        for key, label in (("sent", "sent by each process a step"), ("sent_selecting", "the same, selecting, at most")):
            lines.append(f"{label:<30} {found[key] / mib:>12,.1f} MiB")
    if found["updates"] is not None:
        lines.append(f"{'updates of scalars':<30} {found['updates']:>12,} in {found['steps']:,} steps")
        lines.append(
            f"{'updates / those of a static mask':<30} {found['updates'] / found['trained'] / found['steps']:>10.6f}"
        )
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
