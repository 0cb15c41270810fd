"""A griffe extension for the reference: makes Markdown out of docstrings that are plain text with `>>>` examples.

Examples become fenced blocks, indented text becomes a block, and letters that Markdown reads as markup are escaped.
Where a function has the name of the module that it lives in, the package's public name means the function.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_CODE = re.compile(r"(`[^`]*`)")
_MARKUP = re.compile(r"([*_<\[\]#])")
_BULLET = re.compile(r"^(\s*)([*-]) ")


def as_markdown(text: str) -> str:
    """A docstring as Markdown."""
    parts = []
    for part in re.split(r"\n\s*\n", text):
        lines = part.splitlines()
        if any(line.lstrip().startswith(">>> ") for line in lines):
            first = next(n for n, line in enumerate(lines) if line.lstrip().startswith(">>> "))
            if first:
                parts.append(_escaped("\n".join(lines[:first])))
            parts.append("```pycon\n" + "\n".join(lines[first:]) + "\n```")
        elif any("├" in line for line in lines) or all(line.startswith("    ") for line in lines):
            parts.append("```text\n" + textwrap.dedent(part) + "\n```")
        else:
            parts.append(_escaped(part))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    lines = []
    for line in text.splitlines():
        bullet = _BULLET.match(line)
        start = bullet.group() if bullet else ""
        pieces = _CODE.split(line[len(start) :])
        lines.append(start + "".join(p if n % 2 else _MARKUP.sub(r"\\\1", p) for n, p in enumerate(pieces)))
    return "\n".join(lines)


class Doctests(griffe.Extension):
    """Rewrites every docstring once its package has been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        del kwargs
        for name, member in list(pkg.members.items()):
            if not member.is_alias:
                continue
            target = _found(pkg, member.target_path)  # pyright: ignore[reportAttributeAccessIssue]  # it is an alias
            if isinstance(target, griffe.Module) and name in target.members and name == target.name:
                pkg.set_member(name, griffe.Alias(name, f"{target.path}.{name}", parent=pkg))


def _found(pkg: griffe.Module, path: str) -> griffe.Object | griffe.Alias | None:
    """What lies at a dotted path below the package, without resolving aliases on the way."""
    at: griffe.Object | griffe.Alias | None = pkg
    for part in path.split(".")[1:]:
        at = at.members.get(part) if isinstance(at, griffe.Object) else None
    return at
