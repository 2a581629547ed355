"""How often an address may fail."""
from pyfleet.identity.throttle import BURST, MOST_ADDRESSES, REFILL_S, Throttle


def test_a_burst_may_fail_and_then_one_per_second():
    throttle = Throttle()
    for _ in range(BURST):
        assert throttle.allows("a", 100.0)
        throttle.failed("a", 100.0)
    assert not throttle.allows("a", 100.0 + 0.9 * REFILL_S)
    assert throttle.allows("b", 100.0)
    tried = allowed = 0
    for tick in range(1000):                            # ten attempts per second for a hundred seconds
        now = 100.0 + tick * REFILL_S / 10
        tried += 1
        if throttle.allows("a", now):
            allowed += 1
            throttle.failed("a", now)
    assert 95 <= allowed <= 105 < tried


def test_silence_is_forgiven_and_what_is_kept_is_bounded():
    throttle = Throttle()
    for _ in range(1000):
        throttle.failed("a", 0.0)
    assert not throttle.allows("a", BURST * REFILL_S)
    assert throttle.allows("a", (BURST + 1) * REFILL_S)
    for number in range(10 * MOST_ADDRESSES):
        throttle.failed(f"address {number}", 50.0)
    assert len(throttle._spent) == MOST_ADDRESSES
