"""What a number of runs could have seen: power and the smallest difference to be seen, by the noncentral t."""

from __future__ import annotations

from selectune.errors import StudyError
from selectune.study.stats.given import Alternative, direction, scipy_stats, share


def power(
    difference: float, error: float, freedom: float, alpha: float = 0.05, alternative: Alternative = "greater"
) -> float:
    """The chance that a t-test at alpha finds a true difference of this size, in the direction that is tested.

    `error`: the standard error of the mean difference, with `freedom` degrees of freedom. With normal differences, t is
    noncentral with the parameter difference / error. Source: Cohen (1988), chapter 2.

    >>> round(power(1.0, 0.5, 9), 3)
    0.58
    """
    share(alpha, "Alpha")
    direction(alternative)
    if error <= 0 or freedom <= 0:
        raise StudyError(f"Power needs a spread and degrees of freedom above 0; got {error} and {freedom}.")
    stats = scipy_stats()
    bar = stats.t.isf(alpha / 2 if alternative == "two-sided" else alpha, freedom)
    return float(stats.nct.sf(bar, freedom, abs(difference) / error))


def detectable(
    error: float, freedom: float, alpha: float = 0.05, wanted: float = 0.8, alternative: Alternative = "greater"
) -> float:
    """The smallest true difference that a t-test would have found with probability `wanted`: 80 % by custom.

    In the units of `error`; see `power`. A spread of 0 gives 0.

    >>> round(detectable(0.5, 9), 3)
    1.348
    """
    share(wanted, "The wanted power")
    if error == 0:
        return 0.0
    most = 1.0
    while power(most * error, error, freedom, alpha, alternative) < wanted:
        most *= 2
    low = 0.0
    for _ in range(60):  # halves: nct is smooth and rises with the difference
        middle = (low + most) / 2
        found = power(middle * error, error, freedom, alpha, alternative)
        low, most = (low, middle) if found >= wanted else (middle, most)
    return most * error
