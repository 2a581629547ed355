"""Heartbeats between made-up ends of a connection."""
import heapq
import itertools
import math
import random

import pytest

from pyfleet.membership.health import GAPS_KEPT, HEALTHY, LATE, SILENT, Beat, Changed, Health, HealthSettings
from pyfleet.membership.messages import Ping, Pong, Status

SETTINGS = HealthSettings(ping_every_s=1.0, dead_after_s=3.0)      # round figures; the times below are in these


class Pair:
    """Two ends, a and b, with a wire of some delay between them."""

    def __init__(self, delay_s=0.001):
        self.ends = {"a": Health("a", SETTINGS), "b": Health("b", SETTINGS)}
        self.delay_s, self.cut = delay_s, set()         # directions that lose everything
        self.stopped = set()                            # ends that are not running
        self.now, self.num_sent = 50.0, {"a": 0, "b": 0}
        self.told = {"a": [], "b": []}
        self._wire, self._numbers = [], itertools.count()
        for name, other in ("ab", "ba"):
            self.act(name, self.ends[name].add(other, self.now))

    def act(self, name, actions):
        for action in actions:
            if isinstance(action, Beat):
                self.num_sent[name] += 1
                if name not in self.cut:
                    delay_s = self.delay_s() if callable(self.delay_s) else self.delay_s
                    heapq.heappush(self._wire, (self.now + delay_s / 2, next(self._numbers), action))
            else:
                self.told[name].append(action)

    def run(self, seconds):
        end = self.now + seconds
        while True:
            due = [(health.deadline, name) for name, health in self.ends.items()
                   if health.deadline is not None and name not in self.stopped]
            arrives = [wire[0] for wire in self._wire[:1] if wire[2].peer not in self.stopped]
            first = min([*(when for when, _ in due), *arrives], default=math.inf)
            if first > end:
                self.now = end
                return self
            self.now = max(self.now, first)
            if arrives and arrives[0] == first:
                _, _, beat = heapq.heappop(self._wire)
                other = "ab"[beat.peer == "a"]
                self.act(beat.peer, self.ends[beat.peer].received(other, beat.message, self.now))
            else:
                name = min(due)[1]
                self.act(name, self.ends[name].tick(self.now))


def test_the_usual_settings_leave_room():
    """Proof of being heard is two heartbeats old at most, and must not be too old by then; one lost heartbeat kills nobody."""
    usual = HealthSettings()
    assert 2 * usual.ping_every_s < usual.dead_after_s - 2 * usual.margin_s
    assert usual.ping_every_s < usual.dead_after_s / 2


def test_a_pair_costs_one_message_each_way_per_second():
    pair = Pair().run(60)
    assert 59 <= pair.num_sent["a"] <= 61
    assert 59 <= pair.num_sent["b"] <= 61
    assert pair.told == {"a": [], "b": []}
    assert pair.ends["a"].state("b") == HEALTHY


def test_20_ms_more_show_up_in_the_latency():
    pair = Pair(0.001).run(20)
    before = pair.ends["a"].latency_ms("b")
    assert before == pytest.approx(1.0, abs=0.1)
    pair.delay_s = 0.021
    pair.run(2)
    after_2 = pair.ends["a"].latency_ms("b")
    assert before + 20 * (1 - 0.8) < after_2 < before + 20 * (1 - 0.8 ** 3) + 0.1
    pair.run(20)
    assert pair.ends["a"].latency_ms("b") == pytest.approx(21.0, abs=0.5)
    assert pair.ends["b"].latency_ms("a") is None


def test_what_the_other_end_was_busy_is_not_the_wires():
    health = Health("a", SETTINGS)
    (beat,) = health.add("b", 0.0)
    health.received("b", Pong(beat.message.number, busy_ms=30.0), 0.05)
    assert health.latency_ms("b") == pytest.approx(20.0)
    (beat,) = health.tick(1.0)
    health.received("b", Pong(beat.message.number, busy_ms=300.0), 1.05)
    assert health.latency_ms("b") == pytest.approx(16.0)


def test_a_silent_peer_is_late_then_silent_at_both_ends():
    pair = Pair().run(10)
    pair.cut = {"a", "b"}
    pair.run(10)
    for name in "ab":
        late, silent = pair.told[name]
        assert (late.state, silent.state) == (LATE, SILENT)
        assert late.silent_s == pytest.approx(SETTINGS.dead_after_s / 2, abs=0.01)
        assert silent.silent_s == pytest.approx(SETTINGS.dead_after_s, abs=0.01)
        assert pair.ends[name].deadline is None


def test_a_late_peer_recovers():
    pair = Pair().run(10)
    pair.cut = {"a", "b"}
    pair.run(1.8)
    pair.cut = set()
    pair.run(2)
    assert [changed.state for changed in pair.told["a"]] == [LATE, HEALTHY]
    assert [changed.state for changed in pair.told["b"]] == [LATE, HEALTHY]


@pytest.mark.parametrize("direction", ["a", "b"])
def test_an_end_that_is_heard_no_more_is_never_taken_for_dead(direction):
    """When one direction fails, the end that gives up is not current in the other's eyes any more."""
    pair = Pair().run(10)
    assert pair.ends["a"].is_current("b", pair.now)
    assert pair.ends["b"].is_current("a", pair.now)
    pair.cut = {direction}
    gives_up = "ab"[direction == "a"]
    while not any(changed.state == SILENT for changed in pair.told[gives_up]):
        pair.run(0.01)
    assert not pair.ends[direction].is_current(gives_up, pair.now)


def test_a_living_pair_is_current_nearly_always():
    pair = Pair(0.05).run(5)
    for _ in range(1000):
        pair.run(0.037)
        assert pair.ends["a"].is_current("b", pair.now)
        assert pair.ends["b"].is_current("a", pair.now)
    assert not pair.ends["a"].is_current("c", pair.now)


def test_uneven_heartbeats_make_patient():
    jitter = random.Random(1)
    pair = Pair(lambda: jitter.uniform(0.01, 2.5)).run(60)
    assert SETTINGS.dead_after_s < pair.ends["b"].patience_s("a") <= SETTINGS.most_s
    pair = Pair(0.01).run(60)
    assert pair.ends["b"].patience_s("a") == SETTINGS.dead_after_s
    assert len(pair.ends["b"]._peers["a"].gaps) == GAPS_KEPT


def test_a_clock_that_jumps_kills_nobody():
    pair = Pair().run(10)
    pair.stopped = {"a"}
    pair.run(2.9)
    pair.now += 3600                                                # both ends sleep: a lid is closed
    for name, other in ("ab", "ba"):
        pair.act(name, pair.ends[name].tick(pair.now))
        assert pair.ends[name].state(other) != SILENT
    pair.stopped = set()
    pair.run(5)
    assert pair.ends["a"].state("b") == pair.ends["b"].state("a") == HEALTHY
    assert pair.ends["a"].latency_ms("b") < 10                    # the sleep is no latency
    assert SILENT not in {changed.state for changed in (*pair.told["a"], *pair.told["b"])}


def test_after_a_jump_the_dead_are_still_found():
    pair = Pair().run(10)
    pair.cut = {"b"}
    pair.now += 100
    pair.act("a", pair.ends["a"].tick(pair.now))
    pair.run(SETTINGS.dead_after_s + 0.1)
    assert pair.ends["a"].state("b") == SILENT


def test_a_clock_that_goes_back_does_nothing():
    health = Health("a", SETTINGS)
    health.add("b", 100.0)
    assert health.tick(40.0) == []
    assert health.state("b") == HEALTHY


def test_any_message_counts_as_life():
    health = Health("b", SETTINGS)
    health.add("a", 0.0)
    for tenth in range(100):
        assert health.received("a", Status("", 0, 0, 0, ""), tenth / 10) == []
    assert health.received("a", Ping(1), 10.0) == [Beat("a", Pong(1, 0.0))]
    assert health.received("c", Ping(1), 10.0) == []
    assert health.tick(10.0 + SETTINGS.dead_after_s) == [Changed("a", SILENT, SETTINGS.dead_after_s)]
    assert health.remove("a", 14.0) == []
    assert health.deadline is None


def test_how_busy_this_node_is_goes_to_the_others():
    health = Health("b", SETTINGS)
    health.add("a", 0.0)
    for _ in range(50):
        health.tick(health.deadline + 0.1)
        health.received("a", Status("", 0, 0, 0, ""), health._now)
    (beat,) = health.received("a", Ping(1), health._now)
    assert beat.message.busy_ms == pytest.approx(100, rel=0.05)
