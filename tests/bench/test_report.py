"""bench.report: sizes are read as written, figures are rounded right, tables line up."""
import pytest

from bench.report import (
    human_rate,
    human_ratio,
    human_size,
    human_time,
    machine,
    parse_list,
    parse_size,
    summary,
    table,
    tell_troubles,
)


@pytest.mark.parametrize("text,num_bytes", [
    ("4", 4), ("64B", 64), ("64 b", 64), ("1KB", 1024), ("16k", 16384), ("1 MB", 1 << 20), ("25MiB", 25 << 20),
    ("1.5KB", 1536), ("2GB", 2 << 30), (" 0 ", 0),
])
def test_a_size_is_read_as_written(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MB", "-4", "4 parsec", "0.3", "1e3", "4,8", "0.3KB"])
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_a_list_keeps_its_order_and_drops_repeats():
    assert parse_list("64KB, 4,4 ,1MB,", parse_size) == [65536, 4, 1 << 20]
    with pytest.raises(ValueError, match="names nothing"):
        parse_list(" , ")


@pytest.mark.parametrize("num_bytes,text", [(4, "4 B"), (1000, "1000 B"), (1024, "1 KB"), (1028, "1028 B"), (65536, "64 KB"),
                                            (25 << 20, "25 MB"), (1536 << 10, "1.5 MB"), (1 << 30, "1 GB")])
def test_a_size_is_named_exactly(num_bytes, text):
    assert human_size(num_bytes) == text
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("seconds,text", [(0.0, "0 ns"), (8.12e-7, "812 ns"), (9.999e-7, "1.00 us"), (1.2e-6, "1.20 us"),
                                          (0.01449, "14.5 ms"), (0.99951, "1.00 s"), (123.4, "123 s")])
def test_a_time_has_three_digits_and_the_unit_that_fits(seconds, text):
    assert human_time(seconds) == text


@pytest.mark.parametrize("ratio,text", [(0.0123, "0.012"), (0.5, "0.50"), (9.996, "10.0"), (99.96, "100"), (1234.5, "1234")])
def test_a_ratio_has_three_digits_at_most_before_the_point_is_dropped(ratio, text):
    assert human_ratio(ratio) == text


def test_the_summary_is_of_the_samples_in_any_order():
    assert summary([3, 1, 2]) == (1, 2, 3)
    assert summary(iter([4.0, 1.0])) == (1.0, 2.5, 4.0)
    assert summary([7]) == (7, 7, 7)


def test_table_columns_line_up():
    assert table(("size", "system", "time"), [("4 B", "gloo", "1"), ("64 KB", "arena", "12345")]).splitlines() == [
        "size   system   time",
        "--------------------",
        "4 B    gloo        1",
        "64 KB  arena   12345",
    ]


def test_the_machine_is_described_by_what_timings_depend_on():
    assert {"cpu", "cores", "kernel", "python", "numpy"} <= machine().keys()
    assert all(isinstance(value, str) and value for value in machine().values())


def test_what_went_wrong_is_told_one_line_each():
    troubles = [{"system": "mlx", "size": None, "reason": "no module"}, {"system": "tcp", "size": 4096, "reason": "WRONG SUM"}]
    assert tell_troubles(troubles, 0.0) == "  mlx: not available: no module\n  tcp: FAILED at 4 KB: WRONG SUM"
    assert "1.2 cores busy" in tell_troubles([], 1.2)
    assert tell_troubles([], 0.05) == ""


@pytest.mark.parametrize("bytes_per_s,text", [(2e9, "2.00"), (1.234e7, "0.012"), (999.0, "< 0.001")])
def test_a_rate_is_in_gigabytes_per_second(bytes_per_s, text):
    assert human_rate(bytes_per_s) == text
