"""The findings as figures: PNG and SVG, and beside each of them a JSON file with its numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selectune.errors import ConfigError
from selectune.files import make_folder, write_durably
from selectune.study.analysis.findings import finite

FORMATS = ("png", "svg")
BLUE, RED, GREY = "#1f5a96", "#b3401e", "#8a8a8a"
ENTROPIES = {
    "relative": "normalised, over ln M", "raw": "raw, mean over tensors", "bernoulli": "Bernoulli, mean over tensors"
}  # fmt: skip


def save(found: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Writes all figures of `findings.analysed`, each run's in a folder of its own if there are several.

    Raises ConfigError if matplotlib is not installed.
    """
    folder, written = Path(folder), []
    several = len(found["runs"]) > 1
    for name, run in found["runs"].items():
        for figure, (data, draw) in _of_run(run).items():
            written += _write(folder / name if several else folder, figure, data, draw, name)
    if several:
        data = found["overlaps"]
        written += _write(folder, "overlap", data, _overlap, " and ".join(found["runs"]))
    return written


Draw = Callable[[Any, Mapping[str, Any]], None]


def _of_run(run: Mapping[str, Any]) -> dict[str, tuple[Any, Draw]]:
    """{name of a figure: its data and how it is drawn}, for all that the run has."""
    metric = run["metric"] if run["metric"] is not None and len(run["metric"]["points"]) > 1 else None
    means = None if run["moved"] is None else {
        "run": run["moved"]["groups"], "full": None if run["full"] is None else run["full"]["groups"]
    }  # fmt: skip
    figures: dict[str, tuple[Any, Draw]] = {
        "sparsity": (run["series"], _sparsity),
        "entropy": (run["series"], _entropy),
        "allocation": (run["allocation"], _allocation),
        "timing": (run["timing"], _timing),
        "magnitudes": (means, _magnitudes),
        "against-full": (run["full"], _against_full),
        "metric": (metric, _metric),
    }
    return {name: (data, draw) for name, (data, draw) in figures.items() if data is not None}


def _write(folder: Path, name: str, data: Any, draw: Draw, title: str) -> list[Path]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "Figures are drawn by the package matplotlib, which is not installed: pip install 'selectune[plot]'. "
            "Without --out only the summary is printed."
        ) from error
    make_folder(folder)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    draw(figure, data)
    figure.suptitle(title, fontsize=10)
    paths = [folder / f"{name}.{kind}" for kind in ("json", *FORMATS)]
    write_durably(paths[0], json.dumps({"figure": name, "run": title, "data": finite(data)}, indent=1).encode())
    for path in paths[1:]:
        dates = {"Software": None} if path.suffix == ".png" else {"Date": None}
        figure.savefig(path, dpi=150, metadata=dates)
    return paths


def _axes(figure: Any, x: str, y: str) -> Any:
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _sparsity(figure: Any, data: Mapping[str, Any]) -> None:
    axes = _axes(figure, "steps taken", "tensors without a selected entry, share")
    axes.step(data["steps"], data["tensor_sparsity"], where="post", color=BLUE)
    axes.set_ylim(0, 1.02)


def _entropy(figure: Any, data: Mapping[str, Any]) -> None:
    axes = _axes(figure, "steps taken", "normalised entropy over ln M")
    axes.plot(data["steps"], data["relative"], color=BLUE, label=ENTROPIES["relative"])
    axes.set_ylim(0, 1.02)
    other = axes.twinx()
    other.set_ylabel("raw and Bernoulli entropy, nats")
    other.plot(data["steps"], data["raw"], color=RED, label=ENTROPIES["raw"])
    other.plot(data["steps"], data["bernoulli"], color=RED, linestyle="--", label=ENTROPIES["bernoulli"])
    lines = [*axes.get_lines(), *other.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], frameon=False, loc="lower right")


def _allocation(figure: Any, data: Mapping[str, Any]) -> None:
    maps = [(f"after step {data['first_step']}", data["start"]), ("at the end", data["end"])]
    maps = [(title, found) for title, found in maps if found is not None]
    figure.set_size_inches(7, 1.4 + 2.6 * len(maps))
    for number, (title, found) in enumerate(maps):
        axes = figure.add_subplot(len(maps), 1, number + 1)
        shares = [[math.nan if share is None else share for share in row] for row in found["shares"]]
        image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
        axes.set_xticks(
            range(len(found["columns"])), found["columns"], rotation=90 if len(found["columns"]) > 12 else 0
        )
        axes.set_yticks(range(len(found["rows"])), found["rows"])
        axes.set_xlabel("layer")
        other = ", ".join(f"{kind} {count:,}" for kind, count in found["other"].items())
        axes.set_title(f"{title}: {found['total']:,} scalars; outside of the map: {other}", fontsize=8)
        figure.colorbar(image, ax=axes, label="share selected")


def _timing(figure: Any, data: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    steps, counts = data["histogram"]["steps"], data["histogram"]["selected"]
    left.bar(steps, counts, width=1.0, color=BLUE)
    left.set_xlabel("step")
    left.set_ylabel("scalars selected")
    tensors = sorted(data["tensors"], key=lambda row: (row["median"], row["name"]))
    right.hlines(range(len(tensors)), [r["first"] for r in tensors], [r["last"] for r in tensors], color=GREY)
    right.plot([r["median"] for r in tensors], range(len(tensors)), ".", color=BLUE)
    right.set_xlabel("first, median and last step")
    right.set_ylabel("tensors, by their median")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


def _magnitudes(figure: Any, data: Mapping[str, Any]) -> None:
    names = list(data["run"])
    for number, (key, title) in enumerate((("mean_all", "all scalars"), ("mean_written", "scalars trained"))):
        axes = figure.add_subplot(1, 2, number + 1)
        for side, colour, shift in (("run", BLUE, 0.0), ("full", RED, 0.4)):
            if data[side] is not None:
                values = [data[side].get(name, {}).get(key, 0.0) for name in names]
                axes.barh([at + shift for at in range(len(names))], values, height=0.38, color=colour,
                          label={"run": "this run", "full": "full fine-tuning"}[side])  # fmt: skip
        axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
        axes.set_title(f"mean |change|, {title}", fontsize=9)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)


def _against_full(figure: Any, data: Mapping[str, Any]) -> None:
    axes = _axes(figure, "quantile", "|change| in full fine-tuning")
    axes.plot(data["quantiles"], data["inside"], "o-", color=BLUE, label="entries that this run moved")
    axes.plot(data["quantiles"][: len(data["outside"])], data["outside"], "o--", color=GREY,
              label="as many drawn outside its support")  # fmt: skip
    axes.set_title(f"rho {data['rho']:.3f}; control {data['control']:.3f}", fontsize=9)
    axes.legend(frameon=False)


def _metric(figure: Any, data: Mapping[str, Any]) -> None:
    axes = _axes(figure, "scalars selected", data["name"] or "metric")
    points = data["points"]
    axes.plot([p["selected"] for p in points], [p["value"] for p in points], "o-", color=BLUE, markersize=3)


def _overlap(figure: Any, data: Mapping[str, Any]) -> None:
    names = data["names"]
    for number, (key, title) in enumerate((("jaccard", "Jaccard"), ("chance_within", "by chance within tensors"))):
        axes = figure.add_subplot(1, 2, number + 1)
        axes.imshow(data[key], vmin=0, vmax=1, cmap="viridis")
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
        axes.set_title(title, fontsize=9)
        for i, row in enumerate(data[key]):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                          color="black" if value > 0.6 else "white")  # fmt: skip
