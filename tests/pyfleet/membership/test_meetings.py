"""Where the ranks of a view meet: the first value stands, who asks early is served when it comes, memory is bounded."""
import pytest

from pyfleet.membership import meetings
from pyfleet.membership.meetings import Meetings


def test_the_first_value_stands_and_reaches_everybody():
    there, got = Meetings(), []
    there.get("f", 1, "key", got.append)
    there.put("f", 1, "key", b"one")
    there.put("f", 1, "key", b"two")
    there.get("f", 1, "key", got.append)
    assert got == [b"one", b"one"]


def test_views_do_not_mix():
    there, got = Meetings(), []
    there.put("f", 1, "key", b"old")
    there.put("g", 2, "key", b"other fleet")
    there.get("f", 2, "key", got.append)
    assert got == []
    there.put("f", 2, "key", b"new")
    assert got == [b"new"]


def test_old_meetings_are_forgotten_with_those_who_waited():
    there, got = Meetings(), []
    there.get("f", 0, "never", got.append)
    for epoch in range(1, meetings.MOST_MEETINGS + 1):
        there.put("f", epoch, "key", b"x")
    assert not there._waiting and len(there._values) == meetings.MOST_MEETINGS
    there.put("f", 0, "never", b"too late")
    assert got == []


def test_a_meeting_takes_only_so_much(monkeypatch):
    monkeypatch.setattr(meetings, "MOST_BYTES", 10)
    there = Meetings()
    there.put("f", 1, "a", bytes(10))
    with pytest.raises(ValueError, match="more than 10 bytes"):
        there.put("f", 1, "b", b"x")
    there.put("f", 2, "b", b"x")
