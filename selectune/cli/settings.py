"""`--config FILE`: the options of a command as a file has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selectune.errors import ConfigError, did_you_mean
from selectune.files import read_owned

LIMIT = 1 << 26  # bytes: a run.json with its history


def settings(path: str, known: set[str]) -> dict[str, Any]:
    """The options in a YAML or JSON file, or in the "config" of a run.json, by their names with - or _.

    Raises ConfigError that names the file: for one that cannot be read, and for options that the command does not have.
    """
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(f"--config {path} needs the package pyyaml: pip install 'selectune[hf]'.") from error
    if not Path(path).is_file():
        raise ConfigError(f"--config {path}: there is no such file.")
    try:
        found = yaml.safe_load(bytes(read_owned(path, limit=LIMIT)).decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"--config {path} is neither YAML nor JSON: {' '.join(str(error).split())[:200]}") from error
    if isinstance(found, Mapping) and isinstance(found.get("config"), Mapping):
        found = found["config"]
    if not isinstance(found, Mapping):
        raise ConfigError(f"--config {path}: expected options and their values, such as `budget: 103k`.")
    given = {str(name).replace("-", "_"): value for name, value in found.items() if value not in (None, [], ())}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(
            f"--config {path}: unknown option {unknown[0]}. Known: {', '.join(sorted(known))}."
            f"{did_you_mean(unknown[0], known)}"
        )
    return {name: str(value) if name == "budget" else value for name, value in given.items()}
