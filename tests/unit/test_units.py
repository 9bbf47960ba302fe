from __future__ import annotations

import contextlib
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from testbed.units import (
    UnitError,
    format_byte_rate,
    format_fraction,
    format_rate,
    format_size,
    format_time,
    parse_byte_rate,
    parse_fraction,
    parse_number,
    parse_rate,
    parse_size,
    parse_time,
)

ALL_PARSERS = (parse_rate, parse_size, parse_byte_rate, parse_time, parse_fraction, parse_number)


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [
        ("400 Gbit/s", 400 * 10**9),
        ("400Gbit/s", 400 * 10**9),
        (" 100 Mbit/s ", 10**8),
        ("1.6 Tbit/s", 1600 * 10**9),
        ("0.001 kbit/s", 1),
        ("400.000000001 Gbit/s", 400 * 10**9 + 1),
    ],
)
def test_rate_is_read_exactly(text: str, bits_per_s: int) -> None:
    assert parse_rate(text) == bits_per_s


@pytest.mark.parametrize(
    "value",
    ["400G B", "400G", "400", 400, "400 bps", "400 Gbps", "400 gbit/s", "1 mbit/s", "1e9 bit/s", "-1 bit/s", "", None],
)
def test_ambiguous_rate_is_refused(value: object) -> None:
    with pytest.raises(UnitError, match='must be a rate such as "400 Gbit/s"'):
        parse_rate(value)


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        ("64 MiB", 64 * 2**20),
        ("800 KB", 800_000),
        ("800 kB", 800_000),
        ("4096", 4096),
        (4096, 4096),
        ("1.5 KiB", 1536),
        ("0", 0),
        ("3.2MB", 3_200_000),
    ],
)
def test_size_is_read_exactly(value: object, nbytes: int) -> None:
    assert parse_size(value) == nbytes


@pytest.mark.parametrize("value", ["64 Mb", "64 M", "64 mib", "1.5", "0.3 B", 1.5, True, -1, "1 KiB/s", "1/2"])
def test_ambiguous_size_is_refused(value: object) -> None:
    with pytest.raises(UnitError):
        parse_size(value)


@pytest.mark.parametrize(
    ("value", "ns"),
    [
        ("600 ns", 600),
        ("1.5 us", 1500),
        ("1.5 µs", 1500),
        ("1.5 μs", 1500),
        ("2 ms", 2 * 10**6),
        ("1 s", 10**9),
        (0, 0),
    ],
)
def test_time_is_read_exactly(value: object, ns: int) -> None:
    assert parse_time(value) == ns


@pytest.mark.parametrize("value", ["600", 600, "0.5 ns", "1 min", "1 S", False, None, "1 NS"])
def test_time_without_a_unit_or_below_a_nanosecond_is_refused(value: object) -> None:
    with pytest.raises(UnitError):
        parse_time(value)


@pytest.mark.parametrize(
    ("value", "fraction"),
    [
        ("1/8", Fraction(1, 8)),
        (0.2, Fraction(1, 5)),
        ("20 %", Fraction(1, 5)),
        ("0.2", Fraction(1, 5)),
        (1, Fraction(1)),
    ],
)
def test_fraction_is_read_exactly(value: object, fraction: Fraction) -> None:
    assert parse_fraction(value) == fraction


@pytest.mark.parametrize("value", ["1/0", float("nan"), float("inf"), -0.5, -1, "x", None, True, "1/8/2"])
def test_impossible_fraction_is_refused(value: object) -> None:
    with pytest.raises(UnitError):
        parse_fraction(value)


def test_byte_rate_is_read_with_si_and_iec_prefixes() -> None:
    assert parse_byte_rate("45.5 GB/s") == 45_500_000_000
    assert parse_byte_rate("1 GiB/s") == 2**30
    assert parse_byte_rate("7") == 7
    with pytest.raises(UnitError):
        parse_byte_rate("45 Gbit/s")


def test_formats_read_well() -> None:
    assert format_rate(400 * 10**9) == "400 Gbit/s"
    assert format_rate(1600 * 10**9) == "1.6 Tbit/s"
    assert format_rate(0) == "0 bit/s"
    assert format_size(64 * 2**20) == "64 MiB"
    assert format_size(800_000) == "800 KB"
    assert format_size(4170) == "4170 B"
    assert format_time(600) == "600 ns"
    assert format_time(2_734) == "2.734 us"
    assert format_time(2_734_567, significant=3) == "2.73 ms"
    assert format_time(999_999, significant=3) == "1 ms"
    assert format_byte_rate(45_000_000_000) == "45 GB/s"
    assert format_fraction(Fraction(1, 8)) == "1/8"
    assert format_fraction(Fraction(1, 5)) == "0.2"


@given(st.integers(0, 2**63))
def test_formats_are_read_back_exactly(value: int) -> None:
    assert parse_rate(format_rate(value)) == value
    assert parse_size(format_size(value)) == value
    assert parse_time(format_time(value)) == value
    assert parse_byte_rate(format_byte_rate(value)) == value


@example(Fraction(1, 167772160))  # 25 digits as a decimal
@given(st.fractions(min_value=0, max_value=10**6, max_denominator=10**9))
def test_fractions_are_read_back_exactly(value: Fraction) -> None:
    assert parse_fraction(format_fraction(value)) == value


HOSTILE = st.one_of(
    st.text(),
    st.from_regex(r"[0-9]{1,30}(\.[0-9]{1,30})?([eE][0-9]{1,9})? ?[a-zA-Zµ%/]{0,6}"),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.lists(st.integers()),
)


@given(HOSTILE)
def test_any_value_is_read_or_refused_by_name(value: object) -> None:
    for parse in ALL_PARSERS:
        with contextlib.suppress(UnitError):
            assert parse(value) >= 0


@pytest.mark.parametrize("text", ["1e999999 s", "9" * 100_000 + " B", "1" + " " * 100_000 + "B", "1/" + "9" * 5000])
def test_hostile_length_is_refused_at_once(text: str) -> None:
    for parse in ALL_PARSERS:
        with pytest.raises(UnitError):
            parse(text)
