"""Values of a command line: budgets and dtypes."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from selectune.cli import catalogue
from selectune.errors import BudgetError

_MARKS = re.compile(r"[^,_]*|\d{1,3}([,_]\d{3})+\D?")  # no marks, or 1,234,567
_UNITS = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def budget_or_adapter(text: str) -> int | float | str:
    """A budget, or an adapter whose number of scalars is the budget: lora:r=2.

    >>> budget_or_adapter("lora:r=2"), budget_or_adapter("103k")
    ('lora:r=2', 103000)
    """
    name = text.strip().partition(":")[0]
    return text.strip() if any(name == m["name"] for m in catalogue.methods() if "through" in m) else budget(text)


def budget(text: str, option: str = "--budget") -> int | float:
    """A budget: a count (103000, 320_000, 103k, 1.5m) or a density (0.17%, 0.0017).

    >>> [budget(text) for text in ("103k", "1.5m", "320_000", "0.17%", "0.0017")]
    [103000, 1500000, 320000, 0.0017, 0.0017]
    """
    plain = text.strip().lower()
    if not _MARKS.fullmatch(plain):
        raise _refuse(option, text, "commas and underscores may stand between thousands only; decimals have a point")
    plain = plain.replace("_", "").replace(",", "")
    unit = _UNITS.get(plain[-1:], 1)
    percent = plain.endswith("%")
    try:
        number = Decimal(plain[:-1] if percent or unit > 1 else plain)
    except InvalidOperation:
        raise _refuse(option, text, "this is no number") from None
    if not number.is_finite():
        raise _refuse(option, text, "it must be finite")
    if number <= 0:
        raise _refuse(option, text, "at least 1 scalar must be trained")
    if percent:
        if number >= 100:
            raise _refuse(option, text, "a share must be below 100 %; `--method full` trains everything")
        return float(number / 100)
    count = number * unit
    if count == count.to_integral_value():
        return int(count)
    if unit == 1 and count < 1:
        return float(count)
    raise _refuse(option, text, "a count must be a whole number, a density below 1")


def _refuse(option: str, text: str, why: str) -> BudgetError:
    return BudgetError(f"{option} {text}: {why}. Give a count (103000, 103k, 1.5m) or a share (0.17%, 0.0017).")


def dtype(text: str) -> str:
    """The short name of a dtype, for `plan` and `bench`.

    >>> dtype("bfloat16"), dtype("bf16")
    ('bf16', 'bf16')
    """
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(text, text)
