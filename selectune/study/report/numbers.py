"""How numbers are written in a report."""

from __future__ import annotations

from selectune.study.report.estimates import Estimate

MINUS = "\N{MINUS SIGN}"


def metric(value: float) -> str:
    """A value of a metric, with three decimals or, from 10 on, fewer.

    >>> metric(0.86123), metric(-12.3456), metric(12345.6)
    ('0.861', '−12.35', '12,346')
    """
    places = 3 if abs(value) < 10 else 2 if abs(value) < 1000 else 0
    return f"{value:,.{places}f}".replace("-", MINUS)


def signed(value: float) -> str:
    """A difference, with its sign.

    >>> signed(0.0041), signed(-0.5)
    ('+0.004', '−0.500')
    """
    text = metric(value)
    return text if text.startswith(MINUS) else f"+{text}"


def span(low: float, high: float, sign: bool = False) -> str:
    """An interval in brackets.

    >>> span(-0.012, 0.004, sign=True)
    '[−0.012,\xa0+0.004]'
    """
    write = signed if sign else metric
    return f"[{write(low)},\N{NO-BREAK SPACE}{write(high)}]"


def interval(found: Estimate, sign: bool = False) -> str:
    """The interval of an estimate; nothing where a single run has none."""
    return "" if found.low is None or found.high is None else span(found.low, found.high, sign)


def spread(found: Estimate) -> str:
    """The standard deviation behind a mean; nothing for a single run."""
    return "" if found.sd is None else f" ± {metric(found.sd)}"


def counted(count: int, noun: str) -> str:
    """
    >>> counted(1, "run"), counted(1200, "run")
    ('1 run', '1,200 runs')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def unit_of(cost: str, value: float) -> tuple[str, float]:
    """The unit in which a cost is written, and how much it is in bytes or seconds.

    >>> unit_of("seconds", 71.3), unit_of("peak_bytes", 2.1e9)
    (('s', 1), ('GB', 1000000000.0))
    """
    if cost.endswith("bytes"):
        units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1))
        return next((unit, scale) for unit, scale in units if value >= scale or scale == 1)
    units = (("h", 3600), ("min", 60), ("s", 1))
    return next((unit, scale) for unit, scale in units if value >= 1.5 * scale or scale == 1)


def size(cost: str, value: float) -> str:
    """A cost with its unit: bytes or seconds.

    >>> size("seconds", 71.3), size("seconds", 5400), size("delta_bytes", 238966), size("peak_bytes", 2.1e9)
    ('71 s', '1.5 h', '239 kB', '2.1 GB')
    """
    unit, scale = unit_of(cost, value)
    scaled = value / scale
    return f"{f'{scaled:,.{0 if scaled >= 20 else 1}f}'.removesuffix('.0')} {unit}"


def brief(count: float) -> str:
    """A count in at most four characters.

    >>> brief(7), brief(950), brief(1234), brief(38613), brief(2_500_000)
    ('7', '950', '1.2k', '39k', '2.5M')
    """
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * scale:
            scaled = count / scale
            return f"{scaled:.{1 if scaled < 9.95 else 0}f}{unit}"
    return f"{count:.0f}"


def percent(share: float) -> str:
    """A share with two digits.

    >>> percent(1), percent(0.123), percent(0.00456)
    ('100 %', '12 %', '0.46 %')
    """
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"
