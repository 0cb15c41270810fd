"""The model card of a delta: README.md of its repository on the hub, made from what the delta records."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from selectune.delta.file.content import Content

COMMIT = re.compile(r"[0-9a-f]{40}")


def base_on_hub(delta: Content) -> str | None:
    """The hub id of the base; None if it did not come from the hub, which a recorded commit would say."""
    base = delta.info["base"]
    return base["id"] if base["id"] and COMMIT.fullmatch(base["revision"] or "") else None


def card(
    delta: Content,
    repo: str,
    metrics: Mapping[str, float] | None = None,
    commands: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """The text of README.md: front matter that the hub reads, how to load the delta, and its record as a table."""
    info, base = delta.info, base_on_hub(delta)
    relation = {} if base is None else {"base_model": base, "base_model_relation": "adapter"}
    method = str(info["method"].get("name", "delta"))
    data = import_module("huggingface_hub").ModelCardData(
        library_name="selectune", license=license, tags=["selectune", method], **relation
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {repo.partition('/')[2]}\n",
        f"A delta of selectune: {_what(delta)}. It is applied to its base, whose other weights keep their bits, and "
        "reverted bit for bit.\n",
        f"## Load\n\n```python\n{_load(delta, repo)}\n```\n",
        f"## Record\n\n| | |\n|---|---|\n{_rows(_record(delta, license))}\n",
    ]
    if metrics:
        parts.append(f"## Metrics\n\n| metric | value |\n|---|---|\n{_rows(metrics)}\n")
    parts.append("## Commands\n\n```\n" + "\n".join([*commands, *_commands(delta, repo)]) + "\n```\n")
    return "\n".join(parts)


def _what(delta: Content) -> str:
    whole = f" and {len(delta.dense)} whole tensors" if delta.dense else ""
    return f"new values of {delta.selected:,} scattered scalars{whole} of a model"


def _load(delta: Content, repo: str) -> str:
    if "model" in delta.info:
        return f'import selectune as st\n\nmodel = st.load_model("{repo}")  # the base, and the delta on it'
    return f'import selectune as st\n\ndelta = st.load("{repo}")\ndelta.apply(model)  # your base model'


def _commands(delta: Content, repo: str) -> list[str]:
    which = f"--model {shlex.quote(base_on_hub(delta) or 'BASE')} --delta {repo}"
    method = delta.info["method"]
    if "rows" in method:  # of the author's own: the delta knows their columns, and the reader needs a file of such rows
        return [f"selectune verify {which}", f"selectune eval {which} --validation FILE"]
    measured = [f"selectune eval {which} --task {shlex.quote(str(method['task']))}"] if method.get("task") else []
    return [f"selectune verify {which}", *measured]


def _record(delta: Content, license: str | None) -> dict[str, Any]:
    info, base, adapter = delta.info, delta.info["base"], delta.info.get("module")
    method = info["method"]
    budget = "" if info["budget"] is None else f" of a budget of {info['budget']:,}"
    return {
        "base": f"{base['id'] or 'unknown'}" + (f", revision {base['revision']}" if base["revision"] else ""),
        "method": method.get("name", "unknown"),
        **{name: method[name] for name in ("score", "select", "schedule", "scope", "task") if name in method},
        **({"adapter": f"{adapter['kind']} {adapter['options']}, seed {adapter['seed']}"} if adapter else {}),
        "selected": f"{delta.selected:,} scalars in {len(delta.patches)} tensors{budget}",
        **({"whole tensors": len(delta.dense)} if delta.dense else {}),
        "reverts on a merged model": "yes, it carries the base's values" if delta.reversible else "no",
        "file": f"{delta.nbytes:,} bytes, digest {delta.digest}",
        "versions": ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
        "licence": license or "not stated; the base has its own",
    }


def _rows(cells: Mapping[str, Any]) -> str:
    return "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in cells.items())


def _cell(value: Any) -> str:
    """A value in a cell of a table: `name: value` pairs of a record, a number, or text, which stays on its line.

    >>> _cell({"name": "d3", "exp": 2.0}), _cell(0.5), _cell("a | b")
    ('name d3, exp 2.0', '0.5', 'a \\\\| b')
    """
    if isinstance(value, Mapping):
        value = ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items())
    elif isinstance(value, list):
        value = " ".join(map(str, value)) or "none"
    return " ".join(str(value).split()).replace("\\|", "|").replace("|", "\\|")
