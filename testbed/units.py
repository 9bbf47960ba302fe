"""Read and write quantities with units: the only place where text becomes a number with a unit.

Inside the program quantities are integers in base units (bit/s, bytes, ns). Arithmetic is exact: what cannot be
expressed in whole base units is refused, never rounded. SI prefixes count in 1000, IEC prefixes in 1024.

=========  ==========================================  =================================
Quantity   Units                                       Refused, because ambiguous
=========  ==========================================  =================================
rate       bit/s kbit/s Mbit/s Gbit/s Tbit/s           bps, Gb/s, mbit/s, G, GB
size       B, KB (or kB) MB GB TB, KiB MiB GiB TiB     kb, Mb, M; a bare integer is bytes
byte rate  the same, followed by /s                    bps, Gbit/s
time       ns us (or µs) ms s                          a bare number other than 0
fraction   0.2, "20 %", "1/8"
=========  ==========================================  =================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction

_MAX_TEXT = 64
"""No quantity is longer; bounds the work on hostile text."""

_NUMBER = r"[0-9]{1,24}(?:\.[0-9]{1,24})?"
_QUANTITY = re.compile(rf"({_NUMBER})\s*([^\s0-9.](?:.*\S)?)?", re.ASCII)
_RATIO = re.compile(r"([0-9]{1,24})\s*/\s*([0-9]{1,24})", re.ASCII)

_RATE_UNITS = {"bit/s": 1, "kbit/s": 10**3, "Mbit/s": 10**6, "Gbit/s": 10**9, "Tbit/s": 10**12}
_SI_SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_IEC_SIZE_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE_UNITS = {**_SI_SIZE_UNITS, "kB": 10**3, **_IEC_SIZE_UNITS}
_TIME_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
_MICRO_SIGNS = {"\u00b5s": "us", "\u03bcs": "us"}  # the micro sign and the Greek letter mu


class UnitError(ValueError):
    """Text is not a quantity of the kind asked for; the message is the rule that it breaks."""


def parse_rate(value: object) -> int:
    """Return a rate in bits per second.

    Args:
        value: Text such as ``"400 Gbit/s"``.

    Raises:
        UnitError: If ``value`` is not such text, or not a whole number of bits per second.
    """
    rule = 'must be a rate such as "400 Gbit/s"'
    number, unit = _split(value, rule)
    if unit not in _RATE_UNITS:
        raise UnitError(rule)
    return _whole(number * _RATE_UNITS[unit], "must be a whole number of bits per second")


def parse_size(value: object) -> int:
    """Return a size in bytes.

    Args:
        value: Text such as ``"64 MiB"`` or ``"800 KB"``; an integer, or its digits, are bytes.

    Raises:
        UnitError: If ``value`` is no size, or not a whole number of bytes.
    """
    rule = 'must be a size such as "64 MiB" or "800 KB"'
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise UnitError(rule)
        return int(value)
    number, unit = _split(value, rule)
    if unit == "" and number.denominator == 1:
        return number.numerator
    if unit not in _SIZE_UNITS:
        raise UnitError(rule)
    return _whole(number * _SIZE_UNITS[unit], "must be a whole number of bytes")


def parse_byte_rate(value: object) -> Fraction:
    """Return a rate in bytes per second, such as an algorithm's bandwidth.

    Args:
        value: Text such as ``"45.5 GB/s"``, or a plain number of bytes per second.

    Raises:
        UnitError: If ``value`` is not such text.
    """
    rule = 'must be a byte rate such as "45 GB/s"'
    number, unit = _split(value, rule)
    if unit == "":
        return number
    if not unit.endswith("/s") or unit[:-2] not in _SIZE_UNITS:
        raise UnitError(rule)
    return number * _SIZE_UNITS[unit[:-2]]


def parse_time(value: object) -> int:
    """Return a time in nanoseconds.

    Args:
        value: Text such as ``"600 ns"`` or ``"1.5 us"``. Without a unit only 0 is accepted.

    Raises:
        UnitError: If ``value`` is no time, or not a whole number of nanoseconds.
    """
    rule = 'must be a time such as "600 ns" or "1.5 us"'
    if isinstance(value, int) and not isinstance(value, bool) and value == 0:
        return 0
    number, unit = _split(value, rule)
    if unit == "" and number == 0:
        return 0
    unit = _MICRO_SIGNS.get(unit, unit)
    if unit not in _TIME_UNITS:
        raise UnitError(rule)
    return _whole(number * _TIME_UNITS[unit], "must be a whole number of nanoseconds")


def parse_fraction(value: object) -> Fraction:
    """Return a fraction, exactly as it was written in decimal.

    Args:
        value: A number such as ``0.2``, or text such as ``"0.2"``, ``"20 %"`` or ``"1/8"``.

    Raises:
        UnitError: If ``value`` is no such number, is negative, or divides by zero.
    """
    rule = 'must be a fraction such as 0.2, "20 %" or "1/8"'
    if isinstance(value, Fraction) and value >= 0:
        return value
    if isinstance(value, float) and value >= 0:
        decimal = Decimal(repr(float(value)))
        if not decimal.is_finite():
            raise UnitError(rule)
        return Fraction(decimal)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Fraction(value)
    if isinstance(value, str) and len(value) <= _MAX_TEXT and (match := _RATIO.fullmatch(value.strip())):
        if int(match[2]) == 0:
            raise UnitError(rule)
        return Fraction(int(match[1]), int(match[2]))
    number, unit = _split(value, rule)
    if unit not in ("", "%"):
        raise UnitError(rule)
    return number / 100 if unit == "%" else number


def parse_number(value: object) -> Fraction:
    """Return a plain number without a unit, exactly as it was written in decimal.

    Raises:
        UnitError: If ``value`` is not such text.
    """
    rule = "must be a number without a unit"
    number, unit = _split(value, rule)
    if unit:
        raise UnitError(rule)
    return number


def format_rate(bits_per_s: int, *, significant: int | None = None) -> str:
    """Return a rate as text; exact, and read back by `parse_rate`, unless rounded.

    Args:
        bits_per_s: The rate; at least 0.
        significant: Round to this many significant digits, for people; ``None`` is exact.
    """
    return _format_largest(bits_per_s, _RATE_UNITS, significant)


def format_byte_rate(bytes_per_s: int, *, significant: int | None = None) -> str:
    """Return a byte rate as text, with SI prefixes as nccl-tests does; see `format_rate`."""
    return _format_largest(bytes_per_s, {f"{unit}/s": scale for unit, scale in _SI_SIZE_UNITS.items()}, significant)


def format_time(ns: int, *, significant: int | None = None) -> str:
    """Return a time as text; exact, and read back by `parse_time`, unless rounded; see `format_rate`."""
    return _format_largest(ns, _TIME_UNITS, significant)


def format_size(nbytes: int) -> str:
    """Return a size as text, exact and read back by `parse_size`: the shortest, IEC before SI.

    Example:
        >>> format_size(64 * 2**20), format_size(3_200_000), format_size(4099)
        ('64 MiB', '3.2 MB', '4099 B')
    """
    _require_not_negative(nbytes)
    best = f"{nbytes} B"
    best_digits = len(str(nbytes))
    for unit, scale in reversed(list((_SI_SIZE_UNITS | _IEC_SIZE_UNITS).items())):
        if nbytes < scale:
            continue
        number = _exact_decimal(Fraction(nbytes, scale))
        if len(number) < best_digits:
            best, best_digits = f"{number} {unit}", len(number)
    return best


def format_fraction(fraction: Fraction) -> str:
    """Return a fraction as text, exact and read back by `parse_fraction`.

    Powers of two stay ratios, as switch vendors write alpha.

    Example:
        >>> format_fraction(Fraction(1, 8)), format_fraction(Fraction(1, 5)), format_fraction(Fraction(1, 3))
        ('1/8', '0.2', '1/3')
    """
    if fraction < 0:
        raise ValueError(f"a fraction is at least 0, not {fraction}")
    if fraction.denominator == 1:
        return str(fraction.numerator)
    is_power_of_two = fraction.denominator & (fraction.denominator - 1) == 0
    rest = fraction.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    ratio = f"{fraction.numerator}/{fraction.denominator}"
    if is_power_of_two or rest != 1:
        return ratio
    decimal = _exact_decimal(fraction)
    return decimal if _QUANTITY.fullmatch(decimal) else ratio  # more digits than are read back


def _split(value: object, rule: str) -> tuple[Fraction, str]:
    """Return number and unit of text such as ``"400 Gbit/s"``; the unit may be empty."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise UnitError(rule)
    match = _QUANTITY.fullmatch(value.strip())
    if match is None:
        raise UnitError(rule)
    return Fraction(match[1]), match[2] or ""


def _whole(number: Fraction, rule: str) -> int:
    if number.denominator != 1:
        raise UnitError(rule)
    return number.numerator


def _require_not_negative(value: int) -> None:
    if value < 0:
        raise ValueError(f"a quantity is at least 0, not {value}")


def _format_largest(value: int, units: Mapping[str, int], significant: int | None) -> str:
    """Return ``value`` in the largest unit of which it holds at least one; ``units`` ascend from 1."""
    _require_not_negative(value)
    if significant is not None and value:
        rounded = Context(prec=significant, rounding=ROUND_HALF_EVEN).create_decimal(value)
        value = int(rounded)
    unit, scale = next(
        ((unit, scale) for unit, scale in reversed(list(units.items())) if value >= scale), next(iter(units.items()))
    )
    return f"{_exact_decimal(Fraction(value, scale))} {unit}"


def _exact_decimal(number: Fraction) -> str:
    """Return a number whose denominator has no prime factors but 2 and 5 as digits, without an exponent."""
    context = Context(prec=200)
    text = format(context.divide(Decimal(number.numerator), Decimal(number.denominator)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
