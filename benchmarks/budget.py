"""Metric against trained scalars: ID3, PaFi, a random mask and LoRA over budgets, on the demo's generated task.

    python benchmarks/budget.py --seeds 6,7,8 --out runs/budget

writes docs/results/budget.json and its figure, which README.md shows. Each cell is one run of the loop that
`selectune train` runs, measured from its saved delta. Cells that are in the file are not run again, and `--draw` only
draws.
Methods train at their default learning rates, LoRA at 2e-3 and full fine-tuning at 1e-4, as in `selectune demo`.
Needs `pip install 'selectune[hf,peft,plot]'` and the demo's model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from selectune.runs.config import RunConfig
from selectune.runs.training import run

FILE = Path(__file__).parent.parent / "docs" / "results" / "budget.json"
BUDGETS = (0.0001, 0.0004, 0.0017, 0.01)
RANKS = (1, 2, 4, 8)
LABELS = {"id3": "ID3", "pafi": "PaFi", "random": "random mask", "lora": "LoRA (r = 1, 2, 4, 8)"}
RATES = {"lora": 2e-3, "full": 1e-4}
TASK, STEPS = "demo/topic", 120


def cells(seeds: list[int]) -> list[dict[str, Any]]:
    """Seed by seed, so that a run that is stopped leaves whole curves."""
    found: list[dict[str, Any]] = []
    for seed in seeds:
        found.append({"method": "full", "budget": None, "seed": seed})
        for budget, rank in zip(BUDGETS, RANKS, strict=True):
            found += [{"method": name, "budget": budget, "seed": seed} for name in ("id3", "random", "pafi")]
            found.append({"method": f"lora:r={rank}", "budget": None, "seed": seed})
    return found


def one(cell: dict[str, Any], out: Path) -> dict[str, Any]:
    """Runs a cell: what was trained, and the metric of the saved delta."""
    method = cell["method"]
    folder = out / f"{method.replace(':', '-')}-{cell['budget']}-{cell['seed']}"
    config = RunConfig(
        model="demo",
        task=TASK,
        method=method,
        budget=cell["budget"],
        lr=RATES.get(method.partition(":")[0]),
        max_steps=STEPS,
        eval_every=STEPS,
        seed=cell["seed"],
        out=str(folder),
    )
    result = run(config, overwrite=True)
    return {**cell, "trained": result.trained, "value": result.value, "bytes": result.delta_bytes}


def draw(rows: list[dict[str, Any]]) -> None:
    """One line for each method through the means over seeds, with a bar from the lowest to the highest."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "selectune"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    for name, label in LABELS.items():
        points: dict[int, list[float]] = {}
        for row in rows:
            if row["method"].partition(":")[0] == name:
                points.setdefault(row["trained"], []).append(row["value"])
        x = sorted(points)
        y = [statistics.mean(points[k]) for k in x]
        spread = [[m - min(points[k]) for k, m in zip(x, y, strict=True)],
                  [max(points[k]) - m for k, m in zip(x, y, strict=True)]]  # fmt: skip
        axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=label, linestyle="--" if name == "lora" else "-")
    full = [row for row in rows if row["method"] == "full"]
    axes.axhline(statistics.mean(row["value"] for row in full), color="grey", linewidth=1, linestyle=":")
    axes.text(BUDGETS[0] * full[0]["trained"], statistics.mean(row["value"] for row in full) + 0.01,
              f"full fine-tuning, {full[0]['trained']:,} scalars", fontsize=8, color="grey")  # fmt: skip
    axes.set(xscale="log", xlabel="trained scalars", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(FILE.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="6,7,8")
    parser.add_argument("--out", default="runs/budget", type=Path)
    parser.add_argument("--draw", action="store_true", help="Only draw what is in the file.")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(FILE.read_text("utf-8")) if FILE.exists() else []
    done = [{key: row[key] for key in ("method", "budget", "seed")} for row in rows]
    for cell in [] if options.draw else cells([int(seed) for seed in options.seeds.split(",")]):
        if cell in done:
            continue
        rows.append(one(cell, options.out))
        FILE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        sys.stderr.write(f"{rows[-1]}\n")
    draw(rows)


if __name__ == "__main__":
    main()
