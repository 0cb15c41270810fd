"""What the statistics take: samples of finite numbers, a direction, and scipy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from selectune.errors import ConfigError, StudyError, did_you_mean

Numbers = Sequence[float] | NDArray[np.float64]
Alternative = Literal["greater", "less", "two-sided"]
"""What a test looks for: that the differences lie above 0, below 0, or apart from 0."""


def sample(values: Any, least: int = 1, name: str = "the sample", axes: int = 1) -> NDArray[np.float64]:
    """Numbers as a float64 array. Raises StudyError for too few of them and for any that is not finite.

    >>> sample([1, 2])
    array([1., 2.])
    >>> sample([1.0, float("nan")], name="id3")
    Traceback (most recent call last):
    selectune.errors.StudyError: Number 2 of id3 is nan; statistics need finite numbers.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as why:
        raise StudyError(f"{name} must be numbers: {why}.") from why
    if array.ndim != axes:
        raise StudyError(f"{name} must have {axes} axis or axes; got the shape {array.shape}.")
    if array.size < least:
        raise StudyError(f"{name} has {array.size} numbers; at least {least} are needed.")
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        raise StudyError(f"Number {wrong[0] + 1} of {name} is {array.flat[wrong[0]]}; statistics need finite numbers.")
    return array


def blocks(
    first: Sequence[Any], second: Sequence[Any], least: int = 1
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """The runs of two methods, configuration by configuration, at least `least` of each. Raises StudyError."""
    if not first or len(first) != len(second):
        raise StudyError(
            f"Both methods need runs in the same configurations, and at least one; got {len(first)} and {len(second)}."
        )
    return [
        (sample(a, least, "the first method's runs"), sample(b, least, "the second method's runs"))
        for a, b in zip(first, second, strict=True)
    ]


def direction(alternative: str) -> None:
    """Raises ConfigError unless the alternative is one of `Alternative`."""
    known = get_args(Alternative)
    if alternative not in known:
        raise ConfigError(
            f"The alternative '{alternative}' is unknown. Known: {', '.join(known)}.{did_you_mean(alternative, known)}"
        )


def share(value: float, name: str) -> None:
    """Raises ConfigError unless a value lies between 0 and 1."""
    if not 0 < value < 1:
        raise ConfigError(f"{name} must lie between 0 and 1; got {value}.")


def beyond(null: NDArray[np.float64], observed: float, alternative: str) -> NDArray[np.bool_]:
    """Which values of a null distribution are at least as extreme as the observed one.

    Values that differ by rounding alone count as equal.
    """
    near = 1e-9 * max(abs(observed), float(np.abs(null).max(initial=0.0)))
    if alternative == "two-sided":
        return np.abs(null) >= abs(observed) - near
    return null >= observed - near if alternative == "greater" else null <= observed + near


def scipy_stats() -> Any:
    """The module `scipy.stats`. Raises ConfigError, which names the extra, where scipy is missing."""
    try:
        from scipy import stats
    except ImportError as why:
        raise ConfigError(
            "These statistics need scipy, which is not installed. Install it: pip install 'selectune[hf]'."
        ) from why
    return stats
