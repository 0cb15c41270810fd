"""Makes rows of samples: the median step of a run, ratios within a round, and the spread of steps."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from selectune.bench import methods
from selectune.bench.rounds import Samples, Settings, measure, middle
from selectune.delta import versions

KEYS = (
    "method", "init_s", "update_s", "step_s", "step_over_full", "step_over_frozen", "peak_mib", "delta_bytes",
    "selected",
)  # fmt: skip


def run(settings: Settings, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measures all methods: {"rows": [...], "settings": ..., "machine": ..., "copy_s": ...}, plain JSON values."""
    samples, how = measure(settings, say)
    return report(settings, samples, how)


def report(settings: Settings, samples: dict[str, Samples], how: str) -> dict[str, Any]:
    """The report of one run, made of what its workers measured."""
    updates = {name: update(name, seen) for name, seen in samples.items()}
    steps = {name: [whole(name, s, updates[name][0]) for s in _rounds(seen)] for name, seen in samples.items()}
    facts = [seen.facts for seen in samples.values() if seen.facts]
    return {
        "rows": [_row(name, seen, steps, updates[name]) for name, seen in samples.items()],
        "settings": {
            **asdict(settings.bench),
            "methods": list(settings.methods),
            "budget": settings.budget,
            "steps": settings.steps,
            "rounds": settings.rounds,
            "processes": how,
            "compare": settings.compare,
        },
        "model": {key: facts[0][key] for key in ("weights_mib", "largest_mib")} if facts else {},
        "copy_s": middle([f["copy_s"] for f in facts]),
        "machine": machine(settings.bench.device),
        "versions": {**versions(), "python": platform.python_version()},
    }


def update(name: str, seen: Samples) -> tuple[float | None, str]:
    """The seconds that selecting adds to a step, and how they are known: selecting steps are compared with others."""
    if not methods.is_ours(name):
        if seen.select_s:
            return middle(seen.select_s), "timed around the peer's own selection"
        return (None, seen.error) if seen.error else (0.0, "no step selects")
    steps = [pair for r in _rounds(seen) for pair in r]
    others = seen.other
    selecting = [s for s, chose in steps if chose] or [s for s, chose in others if chose]
    plain = [s for s, chose in steps if not chose] or [s for s, chose in others if not chose]
    if not selecting:
        return (None, seen.error) if seen.error else (0.0, "no step selects")
    a, b = middle(selecting), middle(plain)
    if a is None or b is None:
        return None, "every step selects, so there is none to compare with"
    return a - b, f"the median of {len(selecting)} selecting steps minus that of {len(plain)} others"


def whole(name: str, steps: Sequence[tuple[float, bool]], added: float | None) -> float:
    """The seconds of a round's step: the median, to which selecting steps add their share in a long run.

    With `id3:every=10` every tenth step selects; the median alone would hide what that costs.
    """
    plain = [s for s, chose in steps if not chose]
    selecting = [s for s, chose in steps if chose]
    every = methods.every_of(name)
    if every > 1 and added is not None and plain:
        return (middle(plain) or 0.0) + max(added, 0.0) / every
    return middle(plain if plain and len(plain) >= len(selecting) else selecting) or 0.0


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The median over rounds of the ratio within a round."""
    return middle([a / b for a, b in zip(ours, theirs, strict=False) if b > 0])


def _rounds(seen: Samples) -> list[list[tuple[float, bool]]]:
    return [list(zip(s, c, strict=True)) for s, c in zip(seen.step_s, seen.selecting, strict=True)]


def _row(name: str, seen: Samples, steps: dict[str, list[float]], added: tuple[float | None, str]) -> dict[str, Any]:
    if seen.error is not None:
        empty = dict.fromkeys(KEYS[1:])
        return {"method": name, **empty, "error": seen.error, "package": seen.facts.get("package")}
    mine = steps[name]
    every = sorted(s for r in seen.step_s for s in r)
    return {
        "method": name,
        "init_s": seen.facts["init_s"],
        "update_s": added[0],
        "step_s": middle(mine),
        "step_over_full": ratio(mine, steps.get(methods.DENSE, [])),
        "step_over_frozen": ratio(mine, steps.get(methods.FLOOR, [])),
        "peak_mib": seen.peak_mib,
        "delta_bytes": seen.delta_bytes,
        "selected": seen.selected,
        "error": None,
        "step_over_lora": ratio(mine, steps.get("lora", [])),
        "step_rounds_s": mine,
        "spread": [every[len(every) // 10], every[-1 - len(every) // 10]],
        "update_is": added[1],
        "init_over_copy": seen.facts["init_s"] / seen.facts["copy_s"] if seen.facts["copy_s"] else None,
        "init_peak_mib": seen.facts["init_peak_mib"],
        "live_mib": seen.live_mib,
        "reserved_mib": seen.reserved_mib,
        "copy_s": seen.facts["copy_s"],
        "exact_memory": seen.facts["exact_memory"],
        "package": seen.facts["package"],
        "selections": selections(seen.selections),
        "note": seen.facts["note"],
    }


def selections(steps: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What bounds left of linear weights' gradients: shares of entries, of all steps; None without such gradients.

    A tensor whose dense gradient was formed counts with all of its entries.
    """
    if not steps:
        return None
    left = sorted((one["candidates"] + one["dense_entries"]) / one["entries"] for one in steps)
    compared = [one["equal"] for one in steps if one["equal"] is not None]
    return {
        "steps": len(steps),
        "tensors": sum(one["tensors"] for one in steps),
        "bounded": sum(one["bounded"] for one in steps),
        "left_median": middle(left),
        "left_95": left[min(len(left) - 1, int(0.95 * len(left)))],
        "left_most": left[-1],
        "few": sum(share <= 0.02 for share in left),
        "compared": len(compared),
        "equal": sum(compared),
    }


def machine(device: str) -> dict[str, Any]:
    """The kind of machine; its name is left out."""
    gpu = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else None
    return {
        "cpu": _cpu() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
    }


def _cpu() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), None)
    except OSError:
        return None
