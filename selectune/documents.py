"""A document that people write: YAML, or JSON."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any

from selectune.errors import DeltaError, SelectuneError
from selectune.files.durable import read_owned
from selectune.files.reading import NotPlain, plain, sentence

MAX_YAML = 1 << 16
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(r"([-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
"""As in YAML 1.2, which json has too: `on` is a word, and 1e-3 a number."""


def read_document(path: str | os.PathLike[str], *, error: type[SelectuneError], limit: int) -> Any:
    """The value of a YAML or JSON file. YAML may have no aliases and no key twice, and at most `MAX_YAML` bytes.

    Raises `error`, which names the path, for every fault.
    """
    try:
        data = read_owned(path, limit=limit)
    except DeltaError as why:
        raise error(sentence(why)) from why
    with contextlib.suppress(NotPlain):
        return plain(data)
    if len(data) > MAX_YAML:
        raise error(f"{path} is no JSON, and of YAML at most {MAX_YAML:,} bytes are read.")
    try:
        import yaml
    except ImportError as why:
        raise error(f"{path} needs the package pyyaml: pip install 'selectune[hf]'.") from why

    class Plain(yaml.SafeLoader):
        """Refuses aliases, which can expand to more than memory holds, and keys that are given twice."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"{twice} is given twice")
            return super().construct_mapping(node, deep)

    Plain.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in rules if not tag.endswith((":bool", ":float"))]
        for first, rules in Plain.yaml_implicit_resolvers.items()
    }
    Plain.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
    Plain.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    try:
        return yaml.load(data.decode("utf-8-sig"), Plain)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as why:
        raise error(f"{path} is neither YAML nor JSON: {' '.join(str(why).split())[:200]}") from why
