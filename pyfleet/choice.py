"""P2: compression="auto": how a bucket is best sent over the links that were measured, by codecs that were measured.

    as it is        what the quickest algorithm takes for float32 (fleetcore.schedules.model)
    compressed      an all-to-all and an all-gather of encodings, and what this takes a core besides: encode all, add up what
                    comes for the own segment, encode that once more, decode all. They are added although pieces of large
                    buckets overlap: a prediction that errs shall err for float32

Only what passes between hosts counts: within a host nothing is compressed. Where all of it takes little, what the formula
leaves out may be most (waking up, crossing from Python, ranks that share a core): then the best candidate has to win against
float32 in a trial, too. Ranks decide alike because they decide from the same figures: links as the group measured them,
codecs and trials as the slowest rank measured them.
"""
from __future__ import annotations

import functools
import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fleetcore.schedules import model
from pyfleet.compressors import parse_spec
from pyfleet.compressors.feedback import ErrorFeedback

AUTO = "auto"
WITH_FEEDBACK = ("none", "bf16", "int8")
WITHOUT_FEEDBACK = ("none", "bf16")     # int8 is off by up to 1/254 of a block's largest, and nothing would make up for it
MIN_GAIN = 0.2              # of the dense time: predictions are not better than that, and float32 loses nothing
TRIAL_S = 0.1               # buckets whose float32 takes less are tried: two seconds at most, once for each size
TRIAL_ROUNDS = 9
MIN_TRIED_GAIN = 0.1        # of the medians, and of the quickest calls, which other work on the machine disturbs least
PROBE_ELEMS = 1 << 20       # 4 MB: more than L2 holds, as buckets are, and coded in a millisecond
PROBE_ROUNDS = 4            # the first one touches the memory


class Codec(NamedTuple):
    """What a codec costs one core, and what it leaves of float32."""

    encode_s: float         # per element, with error feedback
    add_s: float            # per element that is decoded and added
    decode_s: float         # per element
    share: float            # bytes of an encoding per byte of float32


class Choice(NamedTuple):
    """What to send a bucket by, and why."""

    compression: str
    seconds: dict[str, float]       # predicted, of every candidate; or measured, of those that were tried
    reason: str


def choose(num_elems: int, links: model.Links | None, hosts: Sequence[int], codecs: Mapping[str, Codec],
           candidates: Sequence[str] = WITH_FEEDBACK) -> Choice:
    """The candidate that takes least for a bucket of float32; "none" while that saves less than MIN_GAIN. A pure function.

    Args:    links: of all ranks; None when they are on one host, or nobody knows.  hosts: the host of every rank.
             candidates: "none" and names of codecs.
    """
    if links is None or not num_elems:
        return Choice("none", {}, "there is nothing to send" if not num_elems else "all ranks are on one host"
                      if len(set(hosts)) == 1 else "no link between hosts was measured")
    of_host: dict[int, list[float]] = {}
    for host, bandwidth in zip(hosts, links.bandwidths, strict=True):
        of_host.setdefault(host, []).append(bandwidth)
    num_hosts, num_owners = len(of_host), min(map(len, of_host.values()))
    # Ranks were measured all at once, so that those of a host shared its link, as their segments do.
    links = links._replace(bandwidths=tuple(min(each) for each in of_host.values()))
    elems = -(-num_elems // num_owners)
    seconds = {name: _dense_s(num_hosts, 4 * elems, links) if name == "none" else
               _coded_s(num_hosts, elems, links, codecs[name]) for name in candidates}
    where = f"{4 * num_elems / 1e6:.3g} MB on {num_hosts} hosts, the slowest link {min(links.bandwidths) / 1e6:.4g} MB/s"
    return _better(seconds, MIN_GAIN, where)


def _better(seconds: dict[str, float], min_gain: float, where: str) -> Choice:
    best = min(seconds, key=seconds.__getitem__)
    chosen = best if seconds[best] <= (1 - min_gain) * seconds["none"] else "none"
    others = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items() if name != chosen)
    return Choice(chosen, seconds, f"{chosen} {1e3 * seconds[chosen]:.3g} ms, {others}: {where}")


def _dense_s(size: int, nbytes: int, links: model.Links) -> float:
    return min(model.choose("all_reduce", size, nbytes, links).seconds.values())


def _coded_s(size: int, elems: int, links: model.Links, codec: Codec) -> float:
    nbytes = int(4 * elems * codec.share)
    wire_s = sum(min(model.choose(verb, size, nbytes, links).seconds.values()) for verb in ("all_to_all", "all_gather"))
    return wire_s + elems * (codec.encode_s + codec.add_s + codec.encode_s / size + codec.decode_s)


@functools.cache
def measure_codecs() -> dict[str, Codec]:
    """What every candidate costs here, with nothing else on this core; measured once per process, in some 30 ms."""
    return {name: _measured(name) for name in WITH_FEEDBACK if name != "none"}


def _measured(name: str) -> Codec:
    x = np.random.default_rng(0).standard_normal(PROBE_ELEMS, np.float32)
    codec, total = ErrorFeedback(parse_spec(name), x.size), np.zeros_like(x)
    data = np.zeros(codec.wire_bytes(x.size), np.uint8)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: codec.encode(x, data), lambda: codec.decode_add(data, total), lambda: codec.decode(data, total))
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(PROBE_ROUNDS):
        for call, seconds in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return Codec(*(min(seconds[1:]) / x.size for seconds in taken), data.size / x.nbytes)


# ---- of an engine -------------------------------------------------------------------------------------------------------

class _Known(NamedTuple):
    """What an engine's choices rest on, and those made so far: (elements, choice) by the class of size and the candidates."""

    links: model.Links | None
    hosts: tuple[int, ...]
    codecs: dict[str, Codec]
    made: dict[tuple[int, tuple[str, ...]], tuple[int, Choice]]


_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def decide(engine: Any, num_elems: int, attempt: Callable[[str, np.ndarray], None],
           candidates: tuple[str, ...] = WITH_FEEDBACK, *, timeout: float | None = None) -> Choice:
    """What the engine's ranks send a bucket of so many elements by. All ranks ask, in the same order; they get the same.

    The first time links and codecs are measured, where ranks are on several hosts: a fraction of a second. What is chosen for
    one size goes for those that are like it.

    Args:    attempt: makes the mean of an array over the ranks, by one of the candidates: for trials.
    Raises:  what the engine raises.
    """
    known = _known.get(engine)
    if known is None:
        known = _known[engine] = _learn(engine, timeout)
    key = (int(2 * math.log2(num_elems)) if num_elems else -1, candidates)     # sizes within a factor of 1.4 are alike
    if key not in known.made:
        choice = choose(num_elems, known.links, known.hosts, known.codecs, candidates)
        if choice.compression != "none" and choice.seconds["none"] < TRIAL_S:
            choice = _tried(engine, num_elems, choice, attempt, timeout)
        known.made[key] = (num_elems, choice)
    return known.made[key][1]


def _tried(engine: Any, num_elems: int, choice: Choice, attempt: Callable[[str, np.ndarray], None],
           timeout: float | None) -> Choice:
    """The choice, when it wins against float32 in turns; else "none"."""
    names, x = ("none", choice.compression), np.random.default_rng(0).standard_normal(num_elems, np.float32)
    taken = np.empty((TRIAL_ROUNDS + 1, len(names)))
    for row in taken:
        for i, name in enumerate(names):
            engine.barrier(timeout=timeout)
            start = time.perf_counter()
            attempt(name, x)
            row[i] = time.perf_counter() - start
    engine.all_reduce(taken, "max", timeout=timeout)
    measured = np.median(taken[1:], axis=0).tolist()            # the first round makes room
    least = taken[1:].min(axis=0)
    min_gain = MIN_TRIED_GAIN if least[1] <= (1 - MIN_TRIED_GAIN) * least[0] else 1.0
    return _better(dict(zip(names, measured, strict=True)), min_gain, "tried with " + choice.reason.partition(": ")[2])


def choices(engine: Any) -> list[dict[str, Any]]:
    """What "auto" stood for on this engine: {"bytes", "compression", "predicted_s": by candidate, or measured in a trial,
    "reason"} of each class of sizes, by the first one of it."""
    known = _known.get(engine)
    return [] if known is None else [
        {"bytes": 4 * num_elems, "compression": choice.compression, "predicted_s": choice.seconds, "reason": choice.reason}
        for num_elems, choice in known.made.values()]


def _learn(engine: Any, timeout: float | None) -> _Known:
    links = engine.measure_links(timeout=timeout)
    if links is None:
        return _Known(None, tuple(engine.hosts), {}, {})
    mine = measure_codecs()
    worst = np.array(list(mine.values()))
    engine.all_reduce(worst, "max", timeout=timeout)
    return _Known(links, tuple(engine.hosts), {name: Codec(*row) for name, row in zip(mine, worst.tolist(), strict=True)}, {})
