"""`python -m bench collectives`: every verb gives what it promises before it is timed, and the bounds are counted right."""
import json
import subprocess
import sys

import numpy as np
import pytest

from bench import bounds
from bench.collectives import sizes_of
from bench.ranks import ROOT, Ranks
from bench.verbs import ALGORITHMS, LARGEST, VERBS, Arrays, Volume, create, parts, volume
from fleetcore.schedules import SCHEDULES


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "bench", "collectives", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False)


@pytest.mark.parametrize("arguments,complaint", [
    (["--verbs", "sing"], "no verb called 'sing'"), (["--ranks", "1"], "2 ranks or more"),
    (["--sizes", "6"], "multiple of 4 bytes"), (["--parties", "pigeon"], "no party called 'pigeon'")])
def test_arguments_that_make_no_sense_are_usage_errors(arguments, complaint):
    refused = run(*arguments)
    assert refused.returncode == 2
    assert complaint in refused.stderr


def test_every_verb_is_measured_by_all_who_offer_it(tmp_path):
    done = run("--ranks", "3", "--sizes", "64,64KB", "--reps", "2", "--algorithms", "--no-bounds", "--json", str(tmp_path / "all.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    record, = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert record["troubles"] == []
    measured = {}
    for row in record["rows"]:
        measured.setdefault((row["verb"], row["size"]), []).append(row["system"])
        assert len(row["seconds"]) == 2 and all(seconds > 0 for seconds in row["seconds"])
    assert list(measured) == [(verb, size) for verb in VERBS for size in sizes_of(verb, [64, 64 << 10])]
    for (verb, _), parties in measured.items():
        assert parties == ["arena", "ordinary", "tcp", *(name for name in ALGORITHMS if name in SCHEDULES.get(verb, ()))]


@pytest.mark.parametrize("transport,parties", [("shm", {"arena", "ordinary"}), ("tcp", {"tcp"})])
def test_a_row_tells_its_bound_and_how_much_faster_than_gloo_it_is(tmp_path, transport, parties):
    pytest.importorskip("torch.distributed")
    done = run("--verbs", "all_gather,one_way", "--sizes", "1MB", "--reps", "3", "--rivals", "--transport", transport,
               "--json", str(tmp_path / "all.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    record, = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert {row["system"] for row in record["rows"]} - {"mpi"} == parties | {"gloo"}
    for row in record["rows"]:
        moved = volume(row["verb"], 2)
        assert row["floor_s"] == pytest.approx(bounds.verb_floor_s(record["bounds"], row["bound"], moved, 2, 1 << 20))
    assert " x gloo" in done.stdout and "of bound" in done.stdout
    lines = [line for line in done.stdout.splitlines() if " x 3 " in line and " % " in line and not line.split()[-1].endswith("%")]
    assert len(lines) == 2 * len(parties)


def test_what_a_verb_must_move():
    assert volume("barrier", 4) is None and volume("all_gather_object", 4) is None
    assert volume("all_reduce", 4) == Volume(4, 4, 6, 1.5)
    assert volume("all_gather", 4) == Volume(1, 4, 3, 0.75)
    assert volume("scatter", 4) == Volume(1, 1, 0.75, 0.75)
    limits = {"copy_one": 5.0, "copy_all": 8.0, "rewrite": 2.0, "tcp": 1.0, "tcp_one_way": 2.0}
    # Four ranks rewrote 8 bytes a second together, so they read and wrote 16.
    assert bounds.verb_floor_s(limits, "memory", volume("all_reduce", 4), 4, 16) == 16 * 8 / 16
    assert bounds.verb_floor_s(limits, "tcp", volume("all_reduce", 4), 4, 16) == 16 * 1.5 / 1.0
    assert bounds.verb_floor_s(limits, "tcp", volume("one_way", 4), 4, 16) == 16 / 2.0
    assert bounds.verb_floor_s(limits, "tcp", volume("broadcast", 4), 4, 16) == 16 * 3 / 4
    assert bounds.verb_floor_s(limits, "tcp", volume("round_trip", 4), 4, 16) == 16


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "barrier"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_verb_that_does_nothing_is_found_out(verb, rank):
    """Somewhere: where rank 0's x is what comes out, rank 1 shows it, and the other way about."""
    arrays = Arrays(verb, rank, 2, 8, lambda count: np.full(count, -1, np.float32))
    at_home = rank == 0 and verb in ("broadcast", "round_trip", "one_way") or rank == 1 and verb in ("gather", "reduce")
    if at_home:
        arrays.check(None)
    else:
        with pytest.raises(ArithmeticError, match="WRONG RESULT"):
            arrays.check(None)


def test_parts_and_sizes():
    assert parts("all_gather", 4, 3) == 1 and parts("all_gather", 1000, 3) == 83 and parts("barrier", 0, 3) == 0
    assert sizes_of("barrier", [4, 8]) == [0] and sizes_of("broadcast", [4, 1 << 30]) == [4, 1 << 30]
    assert sizes_of("round_trip", [4, 1 << 30]) == [4]
    assert sizes_of("round_trip", [1 << 30]) == [1 << 30] and LARGEST["round_trip"] < 1 << 30


def test_a_forced_algorithm_offers_the_verbs_of_its_schedules():
    assert create("halving").verbs == ("all_reduce", "all_gather", "reduce_scatter")
    assert "round_trip" in create("tcp").verbs and "round_trip" not in create("direct").verbs


LIAR = '''
from bench import collectives, verbs

class Liar(verbs.Tcp):
    """Forgets to send to the last rank when it gathers."""
    def ready(self, verb, arrays):
        call = super().ready(verb, arrays)
        def spoil():
            call()
            if verb == "all_gather" and arrays.rank == 1: arrays.out[-1] += 1
        return spoil

def rank_main(team, options):
    verbs.PARTIES["liar"] = "liars:Liar"
    collectives.rank_main(team, options)
'''


def test_a_party_that_gives_a_wrong_result_has_no_rows_from_there_on(tmp_path, monkeypatch):
    (tmp_path / "liars.py").write_text(LIAR)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = {"parties": ["tcp", "liar"], "verbs": ["broadcast", "all_gather", "barrier"], "sizes": [16], "reps": 2, "budget": 1,
               "bounds": False}
    with Ranks("liars", 2, options) as ranks:
        events = list(ranks.events())
    assert [(event["system"], event["size"], event["reason"]) for event in events if event["kind"] == "trouble"] == [
        ("liar", 16, "ArithmeticError: WRONG RESULT in 1 of 4 elements, first in element 3: 3.0, not 2.0")]
    assert {event["verb"]: [row["system"] for row in event["rows"]] for event in events if event["kind"] == "rows"} == {
        "broadcast": ["tcp", "liar"], "all_gather": ["tcp"], "barrier": ["tcp"]}
