"""Values of a command line: budgets, patterns and dtypes."""

from __future__ import annotations

from selectune.cli import catalogue
from selectune.spec import budget


def budget_or_adapter(text: str) -> int | float | str:
    """A budget, or an adapter whose number of scalars is the budget: lora:r=2.

    >>> budget_or_adapter("lora:r=2"), budget_or_adapter("103k")
    ('lora:r=2', 103000)
    """
    name = text.strip().partition(":")[0]
    return text.strip() if any(name == m["name"] for m in catalogue.methods() if "through" in m) else budget(text)


def pattern(text: str | None) -> str | None:
    """A pattern, in which \\n is a new line, as a shell has no short way to write one.

    >>> pattern(r"{}\\nTopic:")
    '{}\\nTopic:'
    """
    return text and text.replace("\\n", "\n")


def dtype(text: str) -> str:
    """The short name of a dtype, for `plan` and `bench`.

    >>> dtype("bfloat16"), dtype("bf16")
    ('bf16', 'bf16')
    """
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(text, text)
