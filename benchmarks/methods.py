"""Every method that `selectune methods` lists, trained for real: makes docs/results/methods-stsb.md.

    SELECTUNE_DATA=... python benchmarks/methods.py --epochs 2 --jobs 2 --out runs/methods

Each method is `selectune train` in a process of its own, with one thread a job. What is done already
(`OUT/NAME/row.json`, or a row of docs/results/methods-stsb.json) is not done again, so a run that was stopped goes on;
`--render` only writes the page.
A method that ends with an error gets a row that says so, and is tried again by the next run.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from selectune.adapters import KINDS
from selectune.recipes import RECIPES
from selectune.runs.config import RunConfig
from selectune.spec import budget

EXTRA = {  # what a method needs beside its name, and the papers' combinations
    "id3": ["--budget", "{budget}"],
    "fish": ["--method", "fish:examples=256"],
    "fish-dip": ["--method", "fish-dip:pool=500"],
    "sparse-adapter": ["--on", "pfeiffer:reduction=16"],
    "id3+lora:r=32": ["--method", "id3", "--on", "lora:r=32", "--budget", "{lora}"],
    "pafi+lora:r=32": ["--method", "pafi", "--on", "lora:r=32", "--budget", "{lora}"],
    "id3+pfeiffer": ["--method", "id3", "--on", "pfeiffer:reduction=16", "--budget", "{lora}"],
}
LAST = "full"
HEAD = "classifier.*"  # fresh, so that nothing is learnt where a mask leaves it as it is; peers train it whole too
PAGE_TEXT = """# Every method on STS-B

MiniLM (`--model demo`), {epochs} epochs, one seed, {budget} of the weights where a budget applies, batches of 16 rows
of like length; the fresh head (385 scalars) is trained whole beside the budget. Rate: the command's own default of
the day, which is not the best of each method and for some has changed since ([core study](core.md)). Metric: mean of
Pearson and Spearman of the saved delta on a fresh base. `moved`: scalars of the support that differ from the base;
dense tensors are not in it. Peak: the whole process. Seconds a step: the whole run, data, set-up and evaluation too,
over its steps; with two jobs on two cores, and other work beside them, they compare roughly. One seed: differences of
a few hundredths mean nothing.

Made by `{made}`.

{table}
"""
PAGE = Path(__file__).parent.parent / "docs" / "results" / "methods-stsb.md"
ROWS = PAGE.with_suffix(".json")


def names() -> list[str]:
    """Recipes in the order of `selectune methods`, the papers' combinations, dense peers; full fine-tuning last."""
    recipes = [name for name in RECIPES if name != LAST]
    return [*recipes, *(name for name in EXTRA if name not in RECIPES), *KINDS, LAST]


def command(name: str, options: argparse.Namespace) -> list[str]:
    fixed = [sys.executable, "-m", "selectune", "train", "--model", options.model, "--task", options.task, "--json"]
    fixed += ["--epochs", str(options.epochs), "--max-length", str(options.max_length), "--seed", str(options.seed)]
    fixed += ["--group-by-length"]
    fixed += ["--out", str(options.out / folder(name)), "--overwrite", "--eval-every", str(10**9)]
    extra = [part.format(budget=options.budget, lora=options.lora) for part in EXTRA.get(name, [])]
    if "--method" not in extra:
        extra += ["--method", name]
    recipe = RECIPES.get(name)
    if recipe is not None and "--budget" not in extra and recipe.function.__annotations__.get("budget"):
        extra += [] if name in ("sparse-adapter", "child-tuning-d") else ["--budget", options.budget]
    if name in EXTRA or (recipe is not None and "train_fully" in inspect.signature(recipe.function).parameters):
        extra += ["--train-fully", HEAD]
    return fixed + extra


def folder(name: str) -> str:
    return name.replace(":", "-").replace("+", "-on-").replace("=", "")


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a method: from its file, or made now."""
    file = options.out / folder(name) / "row.json"
    kept = saved().get(name, {"error": ""})
    if options.render and name in saved() and not file.exists():
        return kept
    same = (kept.get("settings"), kept.get("lr")) == (settings(options), rate(name, options))
    if "error" not in kept and same and not file.exists():
        return kept
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        if "error" not in known or options.render:
            return known
    file.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # the peak of one child alone: a shell of Python starts it, waits, and says what its only child used
    watch = (
        "import json,resource,subprocess,sys;"
        "done=subprocess.run(sys.argv[1:],stdout=subprocess.PIPE,stderr=subprocess.PIPE,text=True);"
        "peak=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss;"
        "print(json.dumps([done.returncode,done.stdout,done.stderr[-2000:],peak]))"
    )
    line = [sys.executable, "-c", watch, *command(name, options)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    code, out, err, peak = json.loads(done.stdout)
    row: dict[str, Any] = {
        "name": name,
        "command": command(name, options)[2:],
        "lr": rate(name, options),
        "peak_kib": peak,
    }
    if code == 0:
        found = json.loads(out)
        keep = ("value", "metric", "steps", "trained", "changed", "selected", "delta_bytes", "seconds", "events")
        row |= {key: found.get(key) for key in keep}
    else:
        row["error"] = next((text for text in reversed(err.splitlines()) if text.strip()), f"exit code {code}")
    file.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    say(f"{name}: {row.get('value', row.get('error'))} ({time.monotonic() - began:.0f} s)")
    return row


def rate(name: str, options: argparse.Namespace) -> float:
    """The default learning rate of a row's command."""
    words = command(name, options)
    given = {of: words[words.index(f"--{of}") + 1] for of in ("method", "on", "budget") if f"--{of}" in words}
    if "budget" in given:
        given["budget"] = budget(given["budget"])
    return RunConfig(model=options.model, task=options.task, **given).learning_rate


def saved() -> dict[str, dict[str, Any]]:
    """The rows that the page was last made of, by name."""
    return json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else {}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What makes two rows comparable."""
    names = ("model", "task", "budget", "lora", "epochs", "max_length", "seed")
    return {name: getattr(options, name) for name in names}


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | rate | metric | trained | moved | peak MiB | s / step | delta bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['lr']:g} | {row['error'][:120]} | | | | | |")
            continue
        lines.append(
            f"| {row['name']} | {row['lr']:g} | {row['value']:.4f} | {row['trained']:,} | {row['changed']:,} | "
            f"{row['peak_kib'] / 1024:,.0f} | {row['seconds'] / row['steps']:.2f} | {row['delta_bytes']:,} |"
        )
    return "\n".join(lines)


def page(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    made = f"python benchmarks/methods.py --epochs {options.epochs:g} --jobs {options.jobs}"
    return PAGE_TEXT.format(
        epochs=f"{options.epochs:g}", budget=options.budget, made=made, table=table(rows)
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--task", default="glue/stsb")
    parser.add_argument("--methods", default="", help="by comma; default: all")
    parser.add_argument("--budget", default="0.17%")
    parser.add_argument("--lora", default="5%", help="the budget of what is selected from an adapter")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--render", action="store_true", help="write the page from the rows that are there")
    options = parser.parse_args()
    wanted = [name for name in options.methods.split(",") if name] or names()
    if options.render:
        wanted = [n for n in wanted if n in saved() or (options.out / folder(n) / "row.json").exists()]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda name: one(name, options), wanted))
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(rows, options), encoding="utf-8")
    found = {
        row["name"]: {k: v for k, v in row.items() if k != "command"} | {"settings": settings(options)} for row in rows
    }
    ROWS.write_text(json.dumps(saved() | found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
