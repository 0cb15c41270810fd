"""`selectune analyze`: what runs selected, when, and how far it moved."""

from __future__ import annotations

from typing import Annotated

import typer

from selectune.cli.options import Dtype, Json, Plugins, Revision, Trust, option
from selectune.cli.output import result, working

EXAMPLES = (
    "Examples:\n\nselectune analyze runs/id3 --out figures/id3\n\n"
    "selectune analyze runs/seed-6 runs/seed-7 --full runs/full --out figures/seeds"
)


def analyze(
    runs: Annotated[
        list[str], typer.Argument(help="Folders of runs, or .safetensors files. Several are compared too.")
    ],
    out: Annotated[
        str | None, option("Folder for figures, each as PNG and SVG with its numbers as JSON.", "--out", "-o")
    ] = None,
    full: Annotated[
        str | None, option("A run of full fine-tuning from the same base and head, to compare with.", "--full")
    ] = None,
    model: Annotated[str | None, option("The base. Default: the one that each delta records.", "--model", "-m")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the control sets that --full needs.")] = 0,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Say what runs selected, when, and how far it moved: sparsity, entropies, layers and roles, overlaps, figures."""
    from selectune import plugins
    from selectune.models.restore import Source
    from selectune.study.analysis import figures
    from selectune.study.analysis.findings import analysed, finite, told, told_overlaps
    from selectune.study.analysis.subjects import read_subject, read_subjects

    with working():
        plugins.add_files(plugin or ())
        subjects = read_subjects(runs)
        source = None if model is None else Source(model, revision, dtype, trust_remote_code)
        found = analysed(subjects, None if full is None else read_subject(full), source, seed)
        files = [] if out is None else [str(path) for path in figures.save(found, out)]
    lines = [line for name, run in found["runs"].items() for line in told(name, run)]
    lines += told_overlaps(found["overlaps"]) if "overlaps" in found else []
    if files:
        lines.append(f"{sum(path.endswith('.json') for path in files)} figures with their numbers: {out}")
    result(as_json, finite({**found, "files": files}), "\n".join(lines))
