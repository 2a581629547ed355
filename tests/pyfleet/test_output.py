"""Whole marked lines out of whatever pieces ranks print, handed on without ever blocking."""
import os
import random
import subprocess
import sys

import pytest

from pyfleet.output import LONGEST_LINE, TAIL_BYTES, Lines, Sink, rank_prefix


def pieces(data, seed):
    """data cut at random."""
    rng = random.Random(seed)
    while data:
        cut = rng.randint(1, 7)
        yield data[:cut]
        data = data[cut:]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("data,shown", [
    (b"", b""), (b"\n", b"> \n"), (b"a", b"> a\n"), (b"a\n", b"> a\n"), (b"a\n\nb", b"> a\n> \n> b\n"),
    (b"a\r\nb\r\n", b"> a\n> b\n"), (b"\xff\x00\n\xfe", b"> \xff\x00\n> \xfe\n"),
])
def test_lines_do_not_depend_on_the_pieces(data, shown, seed):
    lines = Lines(b"> ")
    lines._redrawn_at = float("inf")        # no snapshots of lines under way
    assert b"".join(lines.feed(piece) for piece in pieces(data, seed)) + lines.close() == shown
    assert lines.close() == b""


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("data", [b"\r1\r2\r3\n", b"1\r2\r3\r\n", b"1\r\r2\r3", b"\r\r12\r3\r"])
def test_of_a_line_redrawn_in_place_the_last_state_stays(data, seed):
    lines = Lines(b"> ")
    lines._redrawn_at = float("inf")
    assert b"".join(lines.feed(piece) for piece in pieces(data, seed)) + lines.close() == b"> 3\n"


def test_a_bar_under_way_is_shown_at_once_and_then_not_too_often():
    lines = Lines(b"> ")
    shown = b"".join(lines.feed(b"\r%d" % i) for i in range(1000))
    assert shown == b"> 0\n"
    lines._redrawn_at -= 2
    assert lines.feed(b"\r50%") == b"> 50%\n"
    assert lines.close() == b"", "what was shown last is not shown twice"
    assert lines.feed(b"\r50%\n50%") == b"> 50%\n"
    assert lines.close() == b"> 50%\n", "a line of its own, though it reads the same"


def test_a_line_without_end_is_cut_so_that_memory_stays_bounded():
    lines, shown = Lines(b""), b""
    for _ in range(40):
        shown += lines.feed(b"x" * 100_000)
        assert len(lines._pending) < LONGEST_LINE
    shown += lines.close()
    assert shown.replace(b"\n", b"") == b"x" * 4_000_000
    assert shown.count(b"\n") == 4


def test_raw_is_untouched():
    lines = Lines(raw=True)
    assert lines.feed(b"\r1\r2") + lines.feed(b"3\n4") + lines.close() == b"\r1\r23\n4"
    assert lines.tail() == b"\r1\r23\n4"


def test_the_tail_is_the_last_lines_or_the_whole_last_traceback():
    lines = Lines()
    lines.feed(b"".join(b"%d\n" % i for i in range(100_000)))
    assert lines.tail() == b"".join(b"%d\n" % i for i in range(99_960, 100_000))
    trace = b"Traceback (most recent call last):\n" + b"  at\n" * 200 + b"E: x"
    lines.feed(b"noise\n" + trace)
    assert lines.tail() == trace
    lines.feed(b"y" * 10 * TAIL_BYTES)
    assert lines.tail() == b"y" * TAIL_BYTES


def test_prefixes():
    assert rank_prefix(12, colour=False) == b"[rank 12] "
    assert rank_prefix(0, colour=True) != rank_prefix(1, colour=True)


def test_a_sink_never_blocks_and_loses_nothing():
    read, write = os.pipe()
    sink, data = Sink(write), os.urandom(3_000_000)
    for at in range(0, len(data), 10_000):
        sink.write(data[at:at + 10_000])
    assert sink.full
    taken = b""
    while not sink.empty:
        sink.pump()             # the pipe holds far less: a blocking write would hang here
        taken += os.read(read, 1 << 20)
    os.close(write)
    while piece := os.read(read, 1 << 20):
        taken += piece
    os.close(read)
    assert taken == data
    assert not sink.full


def test_a_sink_whose_reader_has_gone_says_so():
    read, write = os.pipe()
    os.close(read)
    sink = Sink(write)
    sink.write(b"x")
    sink.pump()
    assert (sink.broken, sink.empty) == (True, True)
    sink.write(b"y")
    assert sink.empty
    os.close(write)


@pytest.mark.parametrize("stderr,same", [(subprocess.STDOUT, True), (subprocess.DEVNULL, False)])
def test_one_file_gets_one_sink_so_that_lines_stay_whole(stderr, same):
    script = "from pyfleet.output import standard_sinks; out, err = standard_sinks(); print(out is err)"
    ended = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=stderr, text=True, check=True)
    assert ended.stdout == f"{same}\n"
