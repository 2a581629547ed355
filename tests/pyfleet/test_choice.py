"""compression="auto": the prediction, and what it makes ranks on hosts do."""
import logging
import time
from statistics import median

import numpy as np
import pytest
import torch
from torch import nn

import pyfleet
from fleetcore.schedules.model import Links
from pyfleet import choice, engines
from pyfleet.choice import WITH_FEEDBACK, WITHOUT_FEEDBACK, Codec, choose
from pyfleet.config import TrainingConfig

# GB/s of float32: 4 to encode, 8 to add up, 8 to decode.
CODECS = {"bf16": Codec(1e-9, 0.5e-9, 0.5e-9, 0.5), "int8": Codec(1e-9, 0.5e-9, 0.5e-9, 0.256)}
MB = 250_000        # elements


def links(*gbit_s, latency_s=1e-4):
    return Links(latency_s, tuple(rate * 0.125e9 for rate in gbit_s), 5e-6)


@pytest.mark.feature("P24", "P25", "P26")
@pytest.mark.parametrize(("gbit_s", "expected"), [(0.1, "int8"), (1, "int8"), (5, "int8"), (20, "none"), (100, "none")])
def test_only_links_that_are_slower_than_the_codecs_pay(gbit_s, expected):
    made = choose(25 * MB, links(*[gbit_s] * 4), range(4), CODECS)
    assert made.compression == expected
    assert set(made.seconds) == set(WITH_FEEDBACK)
    assert made.reason.startswith(f"{expected} ")
    assert all(f"{name} {1e3 * seconds:.3g} ms" in made.reason for name, seconds in made.seconds.items())
    assert f"4 hosts, the slowest link {125 * gbit_s:.4g} MB/s" in made.reason


def test_the_prediction_is_the_time_on_the_wire_and_on_the_core():
    seconds = choose(25 * MB, links(1, 1, latency_s=0), (0, 1), CODECS).seconds
    assert seconds["none"] == pytest.approx(25e6 / 0.125e9, rel=0.02)              # half the array, twice
    coding_s = 25 * MB * (1 + 0.5 + 1 / 2 + 0.5) * 1e-9
    assert seconds["int8"] == pytest.approx(0.256 * seconds["none"] + coding_s, rel=0.02)


def test_what_costs_a_core_more_than_it_spares_the_wire_is_not_used():
    slow = {name: codec._replace(encode_s=1e-6) for name, codec in CODECS.items()}
    assert choose(25 * MB, links(1, 1), (0, 1), slow).compression == "none"
    # bf16 alone is quick: half the bytes are better than none saved.
    assert choose(25 * MB, links(1, 1), (0, 1), slow | {"bf16": CODECS["bf16"]}).compression == "bf16"
    assert choose(25 * MB, links(1, 1), (0, 1), CODECS, WITHOUT_FEEDBACK).compression == "bf16"


def test_a_gain_that_a_prediction_cannot_see_is_not_worth_float32():
    gains = {rate: 1 - min(made.seconds.values()) / made.seconds["none"]
             for rate in np.geomspace(0.1, 50, 60) for made in [choose(25 * MB, links(rate, rate), (0, 1), CODECS)]}
    chosen = {rate: choose(25 * MB, links(rate, rate), (0, 1), CODECS).compression for rate in gains}
    assert any(0 < gain < choice.MIN_GAIN for gain in gains.values())
    assert all((chosen[rate] != "none") == (gain >= choice.MIN_GAIN) for rate, gain in gains.items())


def test_a_small_bucket_goes_as_it_is_where_latency_is_all():
    assert choose(100, links(1, 1), (0, 1), CODECS).compression == "none"


def test_on_one_host_and_for_nothing_there_is_nothing_to_choose():
    assert choose(25 * MB, None, (0, 0), {}) == ("none", {}, "all ranks are on one host")
    assert choose(0, links(1, 1), (0, 1), CODECS) == ("none", {}, "there is nothing to send")
    for hosts in ((0, 1), ()):              # not measured, and not known
        assert choose(25 * MB, None, hosts, {}) == ("none", {}, "no link between hosts was measured")


def test_hosts_with_several_ranks_are_rated_by_the_segments_that_pass_between_them():
    # Each of two ranks was measured with half its host's link, and moves half the array.
    pair = choose(25 * MB, links(0.5, 0.5, 0.5, 0.5, latency_s=0), (0, 0, 1, 1), CODECS)
    alone = choose(25 * MB, links(1, 1, latency_s=0), (0, 1), CODECS)
    assert pair.seconds["none"] == pytest.approx(alone.seconds["none"], rel=0.01)
    assert alone.seconds["int8"] * 0.7 < pair.seconds["int8"] < alone.seconds["int8"]      # two cores code


def test_the_slowest_link_counts():
    assert choose(25 * MB, links(40, 40, 0.1), range(3), CODECS).compression == "int8"


def test_codecs_are_measured_once_and_plausibly():
    measured = choice.measure_codecs()
    assert measured is choice.measure_codecs()
    assert set(measured) == set(WITH_FEEDBACK) - {"none"}
    assert measured["bf16"].share == 0.5
    assert 0.25 < measured["int8"].share < 0.26
    for codec in measured.values():
        assert all(1e-12 < seconds < 1e-6 for seconds in codec[:3])


class Engine:
    """One of two ranks on hosts of their own, with links of a Gbit/s and a clock that only attempts move."""

    hosts = (0, 1)

    def __init__(self, others=()):
        self.others, self.now, self.barriers = others, 0.0, 0

    def measure_links(self, *, timeout=None):
        return links(1, 1)

    def barrier(self, *, timeout=None):
        self.barriers += 1

    def all_reduce(self, x, op, *, timeout=None):
        assert op == "max"
        if x.shape == (choice.TRIAL_ROUNDS + 1, 2):
            np.maximum(x, self.others or 0, out=x)


@pytest.mark.parametrize(("int8_s", "others", "expected"), [
    (0.005, (), "int8"), (0.0095, (), "none"), (0.02, (), "none"), (0.005, (0.0, 0.02), "none"), (0.005, (0.03, 0.02), "int8")])
def test_a_small_bucket_has_to_win_a_trial_on_the_slowest_rank(monkeypatch, int8_s, others, expected):
    engine, arrays = Engine(others), set()
    monkeypatch.setattr(choice, "measure_codecs", lambda: CODECS)
    monkeypatch.setattr(choice.time, "perf_counter", lambda: engine.now)

    def attempt(name, x):
        arrays.add((name, x.size))
        engine.now += {"none": 0.01, "int8": int8_s}[name]
    made = choice.decide(engine, MB, attempt)
    assert made.compression == expected
    assert arrays == {("none", MB), ("int8", MB)}
    assert engine.barriers == 2 * (choice.TRIAL_ROUNDS + 1)
    assert made.seconds == pytest.approx({"none": max(0.01, *others[:1], 0), "int8": max(int8_s, *others[1:], 0)})
    assert made.reason.endswith("tried with 1 MB on 2 hosts, the slowest link 125 MB/s")
    for like in (MB, int(0.95 * MB)):
        assert choice.decide(engine, like, attempt) is made and engine.barriers == 2 * (choice.TRIAL_ROUNDS + 1)    # once
    assert [entry["compression"] for entry in choice.choices(engine)] == [expected]


def test_a_codec_that_wins_only_while_others_disturb_loses(monkeypatch):
    engine, calls = Engine(), []
    monkeypatch.setattr(choice, "measure_codecs", lambda: CODECS)
    monkeypatch.setattr(choice.time, "perf_counter", lambda: engine.now)

    def attempt(name, x):
        calls.append(name)
        engine.now += 0.006 if name == "int8" else 0.005 if len(calls) % 8 == 1 else 0.02     # undisturbed, float32 takes less
    made = choice.decide(engine, MB, attempt)
    assert made.seconds["int8"] < made.seconds["none"]
    assert made.compression == "none" and made.reason.startswith("none ")


def test_large_buckets_and_those_that_stay_as_they_are_need_no_trial(monkeypatch):
    monkeypatch.setattr(choice, "measure_codecs", lambda: CODECS)
    assert choice.decide(Engine(), 25 * MB, None).compression == "int8"
    assert choice.decide(Engine(), 10, None).compression == "none"


# ---- between processes ------------------------------------------------------------------------------------------------

def auto_in_memory(n):
    """In a rank: a sum by "auto" where all are on one host."""
    x = np.full(n, float(pyfleet.rank() + 1), np.float32)
    pyfleet.all_reduce(x, compression="auto")
    stats = pyfleet.fleet.current().stats()
    return x[[0, -1]].tolist(), stats["compression_choices"], "none" in stats["compression"]


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_within_a_host_auto_is_the_plain_sum(ranks, transport):
    for ends, choices, counted in ranks(2, transport).run(auto_in_memory, 1000):
        assert ends == [3.0, 3.0] and not counted
        assert {"bytes": 4000, "compression": "none", "predicted_s": {}, "reason": "all ranks are on one host"} in choices


def train_by_auto(num_steps, dense_below):
    """In a rank: what buckets travel by, the weights after some steps, and what was logged."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("pyfleet.compression")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    trainer = pyfleet.Trainer(
        nn.Sequential(nn.Linear(1000, 2000), nn.Tanh(), nn.Linear(2000, 10)),
        (torch.randn(8 * num_steps, 1000, generator=torch.Generator().manual_seed(1)), torch.zeros(8 * num_steps, dtype=torch.int64)),
        training_config=TrainingConfig(epochs=1, batch_size=8, learning_rate=0.01, compression="auto", dense_below=dense_below,
                                       device="cpu", progress=False))
    trainer.fit()
    logger.removeHandler(handler)
    state = trainer.strategy.compression_state()
    again = pyfleet.DistributedDataParallel(trainer.model, compression="auto", dense_below=dense_below)
    again.load_compression_state(state)
    same = all(np.array_equal(mine["state"]["residual"], theirs["state"]["residual"])
               for mine, theirs in zip(state, again.compression_state(), strict=True))
    weights = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]).numpy()
    return ([(entry["parameters"], entry["compression"]) for entry in state], weights, said,
            pyfleet.fleet.current().stats()["compression_choices"], same)


@pytest.mark.feature("P24", "P28")
def test_buckets_over_a_slow_link_are_compressed_with_feedback_and_small_tensors_are_not(network):
    ranks = network(2, "200mbit").ranks(per_host=2)
    reports = ranks.run(train_by_auto, 3, 5000)
    for state, weights, _, choices, same in reports:
        assert state == [(["2.weight", "0.weight"], "int8")]            # and two biases of 2010 elements are not
        assert choices == reports[0][3]
        assert "int8" in [made["compression"] for made in choices]
        assert same
        np.testing.assert_array_equal(weights, reports[0][1])
    said = reports[0][2]
    assert len(said) == 1 and said[0].startswith("bucket 2 of 2 travels by int8 ") and "MB/s" in said[0]
    assert not any(report[2] for report in reports[1:])


def calls_in_turns(n, rounds):
    """In a rank: seconds of a plain sum and of one by "auto", in turns, and what auto stood for."""
    x, seconds = np.zeros(n, np.float32), {None: [], "auto": []}
    for turn in range(rounds + 2):
        for compression, taken in seconds.items():
            pyfleet.barrier()
            start = time.perf_counter()
            pyfleet.all_reduce(x, compression=compression)
            if turn > 1:                                        # the first ones measure and make room
                taken.append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in seconds.items()}, choice.choices(engines.current())[-1]


@pytest.mark.feature("P25")
def test_over_a_slow_link_auto_is_faster_and_says_why(network):
    for seconds, made in network(2, "200mbit").ranks().run(calls_in_turns, 2_000_000, 5):
        assert made["compression"] == "bf16" and made["bytes"] == 8_000_000
        assert seconds["auto"] < 0.7 * seconds[None]
        assert made["predicted_s"]["bf16"] < 0.7 * made["predicted_s"]["none"]
        assert made["predicted_s"]["none"] == pytest.approx(seconds[None], rel=0.4)
