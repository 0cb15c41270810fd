"""How options are written: a name with options, `id3:exp=1` or `lora:r=16`, and a budget, `103k` or `0.17%`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation

from selectune.errors import BudgetError, ConfigError

Value = int | float | bool | str | None
_MARKS = re.compile(r"[^,_]*|\d{1,3}([,_]\d{3})+\D?")  # no marks, or 1,234,567
_UNITS = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def split(text: str) -> tuple[str, dict[str, Value]]:
    """The name and the given options. Raises ConfigError if the text has another form.

    >>> split("id3:exp=1,every=10")
    ('id3', {'exp': 1, 'every': 10})
    >>> split("pafi")
    ('pafi', {})
    """
    name, colon, rest = text.strip().partition(":")
    given: dict[str, Value] = {}
    for part in rest.split(",") if colon else ():
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not (option and equals and value):
            raise ConfigError(f"'{text}': options are written name=value, separated by commas; '{part}' is not.")
        if option in given:
            raise ConfigError(f"'{text}': the option {option} is given twice.")
        given[option] = read(value)
    return name, given


def read(text: str) -> Value:
    """The value of a text: true, false, none, a number, else the text itself."""
    plain = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def join(name: str, options: Mapping[str, Value]) -> str:
    """The text of a name with its options.

    >>> join("id3", {"exp": 1.0}), join("pafi", {})
    ('id3:exp=1.0', 'pafi')
    """
    given = ",".join(f"{option}={value}" for option, value in options.items())
    return f"{name}:{given}" if given else name


def names(text: str) -> tuple[str, ...]:
    """Splits a list of such texts at commas, but not at those between the options of one.

    >>> names("full, id3:exp=1,every=10, lora:r=8,alpha=16, id3+pfeiffer")
    ('full', 'id3:exp=1,every=10', 'lora:r=8,alpha=16', 'id3+pfeiffer')
    """
    found: list[str] = []
    for part in (piece.strip() for piece in text.split(",") if piece.strip()):
        if found and ":" in found[-1] and "=" in part and ":" not in part:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return tuple(found)


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
