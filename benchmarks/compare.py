"""One task, several methods, one budget: a Markdown table on standard output.

    SELECTUNE_DATA=... python benchmarks/compare.py --task glue/stsb \
        --methods id3,id3:every=10,pafi,random,bitfit,full --budget 0.0017 --epochs 2 --out runs/stsb

Every row is made by the same loop (`selectune.runs.training.run`), measured from its saved delta. `id3:every=10` is
`id3` with every=10, `id3+lora:r=32` selects from LoRA, `lora:r=2` is a dense peer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from selectune import tasks
from selectune.bench.methods import base_of, parts
from selectune.recipes import RECIPES
from selectune.runs.config import RunConfig
from selectune.runs.result import RunResult
from selectune.runs.training import run
from selectune.spec import names

HEAD = "| method | {metric} | trained | changed | delta bytes | bytes / scalar | lr | seconds |\n" + "|---" * 8 + "|"


def one(name: str, options: argparse.Namespace) -> RunResult:
    method, on = parts(name)
    recipe = base_of(name)
    takes_budget = recipe in RECIPES and "budget" in RECIPES[recipe].function.__annotations__
    whole = recipe == "full" or recipe not in RECIPES
    config = RunConfig(
        model=options.model,
        task=options.task,
        method=method,
        on=on or None,
        budget=options.budget if takes_budget else None,
        epochs=options.epochs,
        batch_size=options.batch_size,
        max_length=options.max_length,
        seed=options.seed,
        train_fully=() if whole else tuple(filter(None, options.train_fully.split(","))),
        eval_every=10**9,
        out=str(Path(options.out) / name.replace(":", "-")),
    )
    return run(config, overwrite=options.overwrite)


def row(name: str, result: RunResult) -> str:
    scalars, lr = max(1, result.trained), result.config.learning_rate
    changed = f"{result.verification.changed:,}" + (" + dense" if result.verification.dense else "")
    return (
        f"| {name} | {result.value:.4f} | {result.trained:,} | {changed} | "
        f"{result.delta_bytes:,} | {result.delta_bytes / scalars:.2f} | {lr:g} | {result.seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--task", default="glue/stsb")
    parser.add_argument("--methods", default="id3,id3:every=10,static-d3,pafi,random,bitfit,full")
    parser.add_argument("--budget", type=float, default=0.0017)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--train-fully", default="", help="patterns trained densely outside the budget, by comma")
    parser.add_argument("--out", default="runs/compare")
    parser.add_argument("--overwrite", action="store_true", help="runs that are in --out may go")
    options = parser.parse_args()
    print(HEAD.format(metric=tasks.get(options.task).metric_name), flush=True)
    for name in names(options.methods):
        print(row(name, one(name, options)), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
