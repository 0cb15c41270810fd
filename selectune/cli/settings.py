"""`--config FILE`: the options of a command from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selectune.documents import read_document
from selectune.errors import ConfigError, did_you_mean

LIMIT = 1 << 26  # bytes: a run.json with its history
APART = ("config_file", "as_json", "help")
RUN = "run.json"
NUMBERS = ("checkpoint_budgets",)
"""Repeatable options whose values a file may hold as numbers."""


def settings(path: str, params: Sequence[Any]) -> dict[str, Any]:
    """The options in a YAML or JSON file, or those of a run: a run.json, a checkpoint's, or a run's folder.

    `params`: click's parameters of the command. Names may have - or _. Raises ConfigError, which names the file, if it
    cannot be read, has unknown options, or has values of another kind.
    """
    where = Path(path) / RUN if Path(path).is_dir() else Path(path)
    if not where.exists():
        raise ConfigError(f"--config {where}: there is no such file.")
    found = read_document(where, error=ConfigError, limit=LIMIT)
    if isinstance(found, Mapping):
        found = next((found[key] for key in ("config", "settings") if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping):
        raise ConfigError(f"--config {where}: expected options and their values, such as `budget: 103k`.")
    known = {param.name: param for param in params if param.name and param.name not in APART}
    given: dict[str, Any] = {}
    for written, value in found.items():
        name = str(written).replace("-", "_")
        if value in (None, []) or name == "plugins":  # a checkpoint's record of them; --plugin names the files
            continue
        if name not in known:
            flags = [known_name.replace("_", "-") for known_name in known]
            raise ConfigError(
                f"--config {where}: unknown option {written}. Known: {', '.join(sorted(flags))}."
                f"{did_you_mean(str(written).replace('_', '-'), flags)}"
            )
        if name in given:
            raise ConfigError(f"--config {where}: the option {written} is given twice.")
        given[name] = _fitting(f"--config {where}: {written}", value, known[name])
    return given


def _fitting(what: str, value: Any, param: Any) -> Any:
    """A value in the form that the option takes on the command line."""
    if param.multiple:
        values = value if isinstance(value, list) else [value]
        if param.name in NUMBERS:
            values = [str(one) if type(one) is int else one for one in values]
        if not all(isinstance(one, str) for one in values):
            raise ConfigError(f"{what} is {value!r}; it takes a text or a list of texts.")
        return values
    if isinstance(value, bool) != bool(param.is_flag) or isinstance(value, list | Mapping):
        raise ConfigError(f"{what} is {value!r}; it takes {'true or false' if param.is_flag else 'one value'}.")
    return value if param.is_flag else str(value)
