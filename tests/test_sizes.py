import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from djinn.errors import ConfigError
from djinn.sizes import Bytes, exact_bytes, format_bytes, parse_bytes, parse_rate

field = TypeAdapter(Bytes | None)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24 GB", 24 * 10**9), ("64 MiB", 64 * 2**20), ("1.5 GB", 1_500_000_000), ("7B", 7), (" 4 KiB ", 4096)],
)
def test_a_number_with_a_unit_is_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("value", ["24", "24 gb", "-1 GB", "GB", "", "1e9 B", "0 B", 0, -5, 1.5, True, None, "0.2 B"])
def test_anything_else_is_refused_by_name(value):
    with pytest.raises(ConfigError) as caught:
        parse_bytes(value)
    assert repr(value) in str(caught.value)


def test_a_field_of_a_file_needs_a_unit():
    assert field.validate_python("5 MB") == 5_000_000
    for value in (5_000_000, "5000000", "-5 MB"):
        with pytest.raises(ValidationError):
            TypeAdapter(Bytes).validate_python(value)


@given(st.integers(min_value=1, max_value=10**15))
def test_exact_bytes_and_json_give_the_size_back(size):
    assert parse_bytes(exact_bytes(size)) == size
    assert field.validate_json(field.dump_json(size)) == size


@pytest.mark.parametrize(("size", "text"), [(2**24, "16 MiB"), (2 * 10**9, "2 GB"), (1_500_000_000, "1500 MB")])
def test_exact_bytes_is_short(size, text):
    assert exact_bytes(size) == text


@pytest.mark.parametrize(("size", "text"), [(1_710_000_000, "1.71 GB"), (999, "999 B"), (0, "0 B"), (-2000, "-2 KB")])
def test_sizes_are_read_in_decimal_units(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize("value", ["9" * 500 + " GB", "9" * 5000 + " B", 10**5000, "1001 TB", 10**18], ids=range(5))
def test_more_than_any_machine_has_is_refused(value):
    with pytest.raises(ConfigError, match="more than 1000 TB"):
        parse_bytes(value)


def test_a_rate_is_a_size_per_second():
    assert parse_rate("25 GB/s") == parse_rate("25GB/s ") == 25 * 10**9
    for value in ("25 GB", "25 GB/min", "/s", "25/s"):
        with pytest.raises(ConfigError):
            parse_rate(value)
