"""Parameters that several recipes share, checked early."""

from __future__ import annotations

import math

from selectune import scores
from selectune.errors import ConfigError
from selectune.types import Score


def d3(exp: float, eps: float) -> Score:
    """The D3 score with exponent and epsilon checked: |g| / (|w| + eps)^exp stays in float32."""
    for name, value in (("exp", exp), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{name}={value!r}: a finite number is needed.")
    if eps <= 0:
        raise ConfigError(f"eps={eps}: must be above 0, or a weight of 0 divides by 0.")
    if not 1e-30 < float(eps) ** abs(float(exp)) < 1e30:
        raise ConfigError(f"eps={eps} to the power exp={exp} leaves the range of float32 scores (1e-30 to 1e30).")
    return scores.d3(exp=float(exp), eps=float(eps))


def count(name: str, value: int | None, none: str = "") -> int | None:
    """An int of at least 1, or None where that stands for what `none` says."""
    if value is None and none:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        other = f", or None for {none}" if none else ""
        raise ConfigError(f"{name}= must be an int of at least 1{other}, got {value!r}.")
    return value


def early(steps: int | None, until: float) -> int | None:
    """The steps after which a share of all of them has passed; at least 1. A number that is none is left to others."""
    if isinstance(until, bool) or not isinstance(until, int | float) or not 0 < until <= 1:
        raise ConfigError(f"until={until!r}: must be a share of the steps, above 0 and at most 1.")
    if until == 1 or type(steps) is not int or steps < 1:
        return steps
    return max(1, round(until * steps))


def number(name: str, value: float) -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name}= must be a finite number above 0, got {value!r}.")
    return float(value)
