"""Strict JSON, names and the closed schema of `info` (docs/delta-format.md, "Metadata")."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from selectune.errors import DeltaFormatError
from selectune.files.reading import MAX_DEPTH, MAX_INT, NotPlain, parse, short

MAX_NAME = 512

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Components that DDP, torch.compile, FSDP and activation checkpointing add to a name."""

MODEL_DTYPES = ("float64", "float32", "float16", "bfloat16")
MAX_LABELS = 65536

_KIND = re.compile(r"[a-z][a-z0-9_-]{0,63}")  # of an adapter
_INFO = {"method", "budget", "selected", "base", "versions"}
_BASE = {"id", "revision", "seed", "initialised", "structure", "fingerprint", "weights"}
_MODEL = {"architecture", "dtype", "labels", "num_labels", "pad_token_id", "path", "problem_type"}


def canonical_json(value: Any) -> str:
    """Serialise with sorted keys, no spaces, ASCII only; NaN, infinity and other types are refused.

    >>> canonical_json({"b": [1, 2.0], "a": None})
    '{"a":null,"b":[1,2.0]}'
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DeltaFormatError(f"a delta's metadata must be plain, finite JSON: {error}") from error


def parse_json(text: str, what: str) -> Any:
    """Parse JSON strictly: duplicate keys, NaN and huge integers, which Python's parser accepts, are refused."""
    try:
        return parse(text, MAX_DEPTH)
    except NotPlain as why:
        raise DeltaFormatError(f"{what} {why}") from why


def sha256(data: Any) -> str:
    """sha256 of bytes (or of a canonical JSON string), 64 hex digits."""
    return hashlib.sha256(data.encode("ascii") if isinstance(data, str) else data).hexdigest()


def canonical_name(name: str) -> str:
    """The parameter's name without the components that DDP, torch.compile, FSDP and checkpoint wrappers add.

    >>> canonical_name("module._orig_mod.encoder._checkpoint_wrapped_module.weight")
    'encoder.weight'
    """
    *path, last = name.split(".")
    return ".".join([part for part in path if part not in WRAPPERS] + [last])


def check_name(name: Any) -> str:
    """Return `name` if it may stand in a delta; raises DeltaFormatError with the reason otherwise."""
    if not isinstance(name, str):
        raise DeltaFormatError(f"a tensor's name must be a string; got {short(name)}")
    parts = name.split(".")
    why = None
    if not 1 <= len(name) <= MAX_NAME:
        why = f"it has {len(name)} characters; expected 1 to {MAX_NAME}"
    elif not name.isprintable():
        why = "it holds control, format or bidirectional characters"
    elif name.startswith("/") or "\\" in name:
        why = "it looks like a path"
    elif "" in parts:
        why = "it has an empty component"
    elif any(len(part) > 4 and part.startswith("__") and part.endswith("__") for part in parts):
        why = "it has a component of the form __x__"
    elif canonical_name(name) != name:
        why = f"it is not canonical; expected {short(canonical_name(name))}"
    if why:
        raise DeltaFormatError(f"tensor name {short(name)} is not allowed: {why}")
    return name


def check_int(value: Any, what: str, low: int = 0, high: int = MAX_INT) -> int:
    """Return `value` if it is an integer (a bool is none) between `low` and `high`."""
    if type(value) is not int or not low <= value <= high:
        raise DeltaFormatError(f"{what} must be an integer from {low} to {high}; got {short(value)}")
    return value


def check_hex(value: Any, length: int, what: str) -> str:
    """Return `value` if it is `length` lower-case hex digits."""
    if not isinstance(value, str) or len(value) != length or set(value) - set("0123456789abcdef"):
        raise DeltaFormatError(f"{what} must be {length} lower-case hex digits; got {short(value)}")
    return value


def check_keys(value: Any, required: set[str], what: str, optional: frozenset[str] | set[str] = frozenset()) -> dict:
    """Return `value` if it is an object with exactly these keys."""
    if not isinstance(value, dict):
        raise DeltaFormatError(f"{what} must be an object; got {short(value)}")
    missing, unknown = required - value.keys(), value.keys() - required - optional
    if missing or unknown:
        raise DeltaFormatError(
            f"{what} must hold exactly {', '.join(sorted(required))}; "
            f"missing: {', '.join(sorted(missing)) or 'none'}; "
            f"unknown: {', '.join(map(short, sorted(unknown))) or 'none'}"
        )
    return value


def check_text(value: Any, what: str, none: bool = False) -> None:
    """Refuse anything but a string that can be encoded (a lone surrogate cannot)."""
    if value is None and none:
        return
    if not isinstance(value, str) or len(value) > 4096 or any("\ud800" <= c <= "\udfff" for c in value):
        raise DeltaFormatError(f"{what} must be a string of at most 4096 characters; got {short(value)}")


def check_tree(value: Any, what: str, depth: int = 0) -> None:
    """Refuse anything but plain JSON: other types, non-finite floats, large integers, deep nesting."""
    if depth > MAX_DEPTH:
        raise DeltaFormatError(f"{what} is nested too deeply; at most {MAX_DEPTH} levels are allowed")
    if isinstance(value, dict):
        for key, item in value.items():
            check_text(key, f"a key of {what}")
            check_tree(item, what, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_tree(item, what, depth + 1)
    elif isinstance(value, str):
        check_text(value, f"a string in {what}")
    elif type(value) is int:
        check_int(value, f"an integer in {what}", -MAX_INT)
    elif type(value) is float:
        if not math.isfinite(value):
            raise DeltaFormatError(f"{what} holds {value}; only finite numbers are allowed")
    elif value is not None and type(value) is not bool:
        raise DeltaFormatError(f"{what} holds {short(value)}; only plain JSON is allowed")


def check_info(info: Any, total: int) -> None:
    """Check `info` against the closed schema; `total` is the number of scalars in the patches."""
    check_keys(info, _INFO, "info", {"created_by", "model", "module"})
    if not isinstance(info["method"], dict):
        raise DeltaFormatError(f"info.method must be an object; got {short(info['method'])}")
    check_tree(info["method"], "info.method", 2)
    check_int(info["selected"], "info.selected")
    if info["selected"] != total:
        raise DeltaFormatError(f"info.selected is {info['selected']}, but the patches hold {total} scalars")
    if info["budget"] is not None and check_int(info["budget"], "info.budget") < total:
        raise DeltaFormatError(f"info.budget is {info['budget']}, below the {total} scalars in the patches")
    if "created_by" in info:
        check_text(info["created_by"], "info.created_by")
    if not isinstance(info["versions"], dict):
        raise DeltaFormatError(f"info.versions must be an object; got {short(info['versions'])}")
    for package, version in info["versions"].items():
        check_text(package, "a key of info.versions")
        check_text(version, f"info.versions[{short(package)}]")
    if "module" in info:
        _check_adapter(check_keys(info["module"], {"kind", "options", "seed", "digest"}, "info.module"))
    if "model" in info:
        _check_model(check_keys(info["model"], _MODEL, "info.model"))
    _check_base(check_keys(info["base"], _BASE, "info.base"))


def _check_adapter(adapter: Mapping[str, Any]) -> None:
    """Check the form only. `selectune.adapters.rebuild`, which makes the adapter again, checks that the kind exists."""
    kind = adapter["kind"]
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise DeltaFormatError(
            f"info.module.kind must be a name of at most 64 lower-case letters, digits, - and _; got {short(kind)}"
        )
    options = adapter["options"]
    if not isinstance(options, dict) or len(options) > 32:
        raise DeltaFormatError(f"info.module.options must be an object of at most 32 keys; got {short(options)}")
    for name, value in options.items():
        check_text(name, "a key of info.module.options")
        if not isinstance(value, str | int | float | bool):
            raise DeltaFormatError(f"info.module.options[{short(name)}] must be a number, a string or a bool")
        check_tree(value, f"info.module.options[{short(name)}]")
    check_int(adapter["seed"], "info.module.seed", 0, 2**32 - 1)
    check_hex(adapter["digest"], 64, "info.module.digest")


def _check_model(model: Mapping[str, Any]) -> None:
    name, labels, path = model["architecture"], model["labels"], model["path"]
    if not isinstance(name, str) or len(name) > 128 or not (name.isascii() and name.isidentifier()) or name[0] == "_":
        raise DeltaFormatError(f"info.model.architecture must be the name of a class; got {short(name)}")
    if model["dtype"] is not None and model["dtype"] not in MODEL_DTYPES:
        allowed = ", ".join(MODEL_DTYPES)
        raise DeltaFormatError(f"info.model.dtype must be null or one of {allowed}; got {short(model['dtype'])}")
    for key in ("num_labels", "pad_token_id"):
        if model[key] is not None:
            check_int(model[key], f"info.model.{key}", -1 if key == "pad_token_id" else 0, 2**31 - 1)
    check_text(model["problem_type"], "info.model.problem_type", none=True)
    check_text(path, "info.model.path", none=True)
    absolute = path is None or PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    if path is not None and not (path.isprintable() and absolute):
        raise DeltaFormatError(f"info.model.path must be an absolute path in printable characters; got {short(path)}")
    if labels is None:
        return
    if not isinstance(labels, list) or len(labels) > MAX_LABELS or len(labels) != model["num_labels"]:
        raise DeltaFormatError(
            f"info.model.labels must be null or num_labels strings, at most {MAX_LABELS}; got {short(labels)}"
        )
    for label in labels:
        check_text(label, "a label in info.model.labels")


def _check_base(base: Mapping[str, Any]) -> None:
    for key in ("id", "revision"):
        check_text(base[key], f"info.base.{key}", none=True)
    if base["seed"] is not None:
        check_int(base["seed"], "info.base.seed", -MAX_INT)
    for key in ("structure", "fingerprint") if base["weights"] is None else ("structure", "fingerprint", "weights"):
        check_hex(base[key], 64, f"info.base.{key}")
    if not isinstance(base["initialised"], list):
        raise DeltaFormatError(f"info.base.initialised must be a list; got {short(base['initialised'])}")
    names = set()
    for row in base["initialised"]:
        check_keys(row, {"name", "digest"}, "a row of info.base.initialised")
        names.add(check_name(row["name"]))
        check_hex(row["digest"], 16, f'the digest of "{row["name"]}" in info.base.initialised')
    if len(names) != len(base["initialised"]):
        raise DeltaFormatError("info.base.initialised names a tensor twice")
