"""Step time against density and against model size: measures both, draws them.

    python benchmarks/figures.py --out docs/performance

writes `density.json`, `size.json` (reports of `selectune bench`) and one figure of each. `--draw` draws
what is there without measuring. Needs `pip install 'selectune[hf,bench,plot]'` and an idle machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from selectune.bench.rounds import Settings
from selectune.bench.rows import run
from selectune.bench.workload import Bench

DENSITIES = (0.0005, 0.0017, 0.005, 0.05, 0.1)
SIZES = ("minilm", "bert-6l", "deberta-v3-base")
STEPS, ROUNDS = 6, 2


def measure_density(model: str) -> list[dict[str, Any]]:
    """A static mask of growing density beside full fine-tuning, LoRA and the frozen floor."""
    return [measured(model, ("full", "frozen", "random", "id3"), density) for density in DENSITIES]


def measure_size() -> list[dict[str, Any]]:
    """One share of the weights of growing models."""
    return [measured(model, ("full", "frozen", "random"), 0.0017) for model in SIZES]


def measured(model: str, methods: tuple[str, ...], budget: float) -> dict[str, Any]:
    return run(Settings(Bench(model, 8, 128), methods, budget, STEPS, ROUNDS, live=False))


def draw(reports: list[dict[str, Any]], x: list[float], label: str, file: Path) -> None:
    """Step time over full fine-tuning's, a line for each method."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "selectune"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    names = [row["method"] for row in reports[0]["rows"] if row["method"] != "full"]
    for name in names:
        rows = [next(r for r in report["rows"] if r["method"] == name) for report in reports]
        axes.plot(x, [row["step_over_full"] for row in rows], marker="o", label=name)
    axes.axhline(1.0, color="grey", linewidth=1, linestyle=":")
    axes.set(xscale="log", xlabel=label, ylabel="step / full fine-tuning's step", ylim=(0, None))
    axes.set_xticks(x, [f"{100 * v:g} %" if v < 1 else f"{v:.0f} M" for v in x], minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False, ncols=3, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/performance"))
    parser.add_argument("--model", default="bert-6l", help="the model whose density grows")
    parser.add_argument("--only", choices=("density", "size"), help="measure one of the two")
    parser.add_argument("--draw", action="store_true", help="draw the reports that are there")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, measure in (("density", lambda: measure_density(given.model)), ("size", measure_size)):
        if not given.draw and given.only in (None, name):
            report = json.dumps(measure(), indent=1) + "\n"
            (given.out / f"{name}.json").write_text(report, encoding="utf-8")
    for name, label in (("density", "trained share of the weights"), ("size", "weights")):
        file = given.out / f"{name}.json"
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            draw(found, [place(report, name) for report in found], label, given.out / f"{name}.svg")


def place(report: dict[str, Any], name: str) -> float:
    """Where a report stands on the axis: its density, or its millions of weights."""
    return report["settings"]["budget"] if name == "density" else report["model"]["weights_mib"] * (1 << 20) / 4e6


if __name__ == "__main__":
    main()
