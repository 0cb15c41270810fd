"""A name with options as one word: `name:option=value,option=value`, such as `id3:exp=1` or `lora:r=16`."""

from __future__ import annotations

from collections.abc import Mapping

from selectune.errors import ConfigError

Value = int | float | bool | str | None


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
