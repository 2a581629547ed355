"""init and shutdown: places, meeting, clear errors, never a hang."""
import os
import socket
import subprocess
import sys
import time

import pytest

from pyfleet.config import ClusterConfig
from pyfleet.errors import ConfigError, NotEnoughPeers
from pyfleet.fleet import open_engine
from pyfleet.placement import Placement
from tests.ranks import ROOT


def run(code, *, ranks=1, **env):
    """Run code in `ranks` processes with a torchrun-like environment: [(exit code, stderr, seconds)]."""
    base = {k: v for k, v in os.environ.items() if not k.startswith("PYFLEET_")} | {"PYTHONPATH": str(ROOT)}
    started, processes = time.monotonic(), []
    for rank in range(ranks):
        own = {"RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        processes.append(subprocess.Popen([sys.executable, "-c", code], env=base | own | env, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    ends = [process.communicate(timeout=60) for process in processes]
    return [(process.returncode, end[1], time.monotonic() - started)
            for process, end in zip(processes, ends, strict=True)]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


MEET = "import pyfleet; f = pyfleet.init(); pyfleet.barrier(); assert f.world_size == {n}; pyfleet.shutdown()"


@pytest.mark.feature("A2", "A26", "A27", "A28", "A29")
@pytest.mark.parametrize("size", (2, 5))
def test_ranks_meet_over_the_environment_of_torchrun(size):
    ends = run(MEET.format(n=size), ranks=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    assert [code for code, *_ in ends] == [0] * size, ends


def test_ranks_meet_under_the_real_torchrun(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text(MEET.format(n=2))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
                   env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=100, capture_output=True)


def test_alone_is_a_fleet_of_one():
    code = """
import numpy as np, pyfleet
f = pyfleet.init()
assert f is pyfleet.init() and (f.rank, f.world_size, f.local_rank, f.is_leader) == (0, 1, 0, True)
assert [str(node) for node in f.nodes] == [str(f.leader)] == list(f.view.peers) and f.epoch == 0 and f.status() == {}
x = np.ones(3); pyfleet.all_reduce(x, "mean"); pyfleet.broadcast(x); pyfleet.barrier()
assert x.tolist() == [1, 1, 1] and pyfleet.is_initialized()
pyfleet.shutdown(); pyfleet.shutdown()
assert not pyfleet.is_initialized()
f = pyfleet.init(); assert f.world_size == 1
"""
    (code, error, _), = run(code)
    assert code == 0, error


def test_a_missing_peer_is_named_at_the_timeout():
    started = time.monotonic()
    with pytest.raises(NotEnoughPeers, match=r"found 1 of 3 ranks within 0.5 s; missing: 1, 2"):
        open_engine(Placement(0, 3, rendezvous=f"tcp://127.0.0.1:{free_port()}"), ClusterConfig(), timeout=0.5)
    assert time.monotonic() - started < 3


def test_an_unreachable_master_is_an_error_within_the_timeout():
    started = time.monotonic()
    with pytest.raises(NotEnoughPeers, match="did not answer at 127.0.0.1:.* within 0.5 s"):
        open_engine(Placement(1, 2, rendezvous=f"tcp://127.0.0.1:{free_port()}"), ClusterConfig(), timeout=0.5)
    assert time.monotonic() - started < 3


def test_a_silent_master_is_an_error_within_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        started = time.monotonic()
        with pytest.raises(NotEnoughPeers):
            open_engine(Placement(1, 2, rendezvous=f"tcp://127.0.0.1:{deaf.getsockname()[1]}"), ClusterConfig(), timeout=0.5)
        assert time.monotonic() - started < 3


def test_a_taken_port_is_a_clear_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*choose another MASTER_PORT"):
            open_engine(Placement(0, 2, rendezvous=f"tcp://127.0.0.1:{port}"), ClusterConfig(), timeout=1)


@pytest.mark.parametrize(("place", "cluster", "match"), [
    (Placement(0, 2), {}, "nowhere to meet: set MASTER_ADDR"),
    (Placement(0, 2, rendezvous="carrier://pigeon"), {}, "rendezvous 'carrier://pigeon' is not one of agent://"),
    (Placement(0, 2, rendezvous="tcp://host:port"), {}, "not host:port"),
    (Placement(0, 2, rendezvous="tcp://no-such-host.invalid:1"), {}, "cannot resolve 'no-such-host.invalid'"),
    (Placement(0, 2, rendezvous="file:///proc/no/where"), {}, "cannot meet in /proc/no/where"),
    (Placement(0, 1), {"psk": "short"}, "a PSK of 5 characters keeps nobody out"),
    (Placement(0, 1), {"psk": "long enough", "psk_file": "/dev/null"}, "there are two PSKs"),
])
def test_a_place_that_cannot_work_is_refused(place, cluster, match):
    with pytest.raises(ConfigError, match=match):
        open_engine(place, ClusterConfig(**cluster), timeout=0.5)


@pytest.mark.feature("P7", "C7")
@pytest.mark.parametrize(("arguments", "match"), [
    ("rank=2, world_size=2", "rank is 2, which is not below"),
    ("rank=-1, world_size=2", "rank must be at least 0"),
    ("rank=0", "rank and world_size go together"),
    ("rank=0, world_size=2", "nowhere to meet"),
    ("peers=[], rank=0", "peers is empty"),
    ("peers=['a:1', 'a:1'], rank=0", "once"),
    ("peers=['a:1', 'b:1'], rank=2", "rank must be given, from 0 to 1"),
    ("peers=['a:1', 'b'], rank=0", "'b' is not host:port"),
    ("backend='carrier'", "backend 'carrier' is not one of fleet"),
    ("backend='gloo', config=pyfleet.ClusterConfig(encryption='on')", "neither sealed nor proven: use 'fleet'"),
    ("backend='mock', rank=2, world_size=2", "rank is 2, which is not below"),
    ("backend='gloo', peers=['a:1', 'b'], rank=0", "'b' is not host:port"),
    ("timeout=0", "timeout must be positive"),
    ("min_nodes=2", "need a secret"), ("min_nodes=0", "min_nodes must be an integer >= 1, not 0"),
    ("rank=0, world_size=1, min_nodes=2", "arguments has said which ranks"),
    ("psk_file='/no/such/psk'", "cannot read the PSK file /no/such/psk"),
    ("namespace=''", "cluster.namespace must be a non-empty string"),
    ("config='/no/such.yaml'", "no/such.yaml"),
])
def test_bad_arguments_are_refused(arguments, match):
    code = f"import pyfleet\ntry: pyfleet.init({arguments})\nexcept pyfleet.ConfigError as e: print(e); raise SystemExit(7)"
    process = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, text=True, capture_output=True,
                             timeout=60, check=False)
    assert process.returncode == 7, process.stderr
    assert match in process.stdout


@pytest.mark.feature("P6")
def test_a_list_of_peers_needs_no_environment():
    port = free_port()
    code = "import pyfleet, sys; f = pyfleet.init(peers={p}, rank=int(sys.argv[1])); pyfleet.barrier(); assert f.world_size == 3"
    peers = [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}", f"127.0.0.1:{port + 2}"]
    processes = [subprocess.Popen([sys.executable, "-c", code.format(p=peers), str(rank)], env={"PYTHONPATH": str(ROOT)})
                 for rank in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]


def test_strangers_at_the_meeting_place_and_at_the_links_get_nothing():
    port = free_port()
    code = f"""
import socket, threading, pyfleet, sys
from pyfleet import wiring
if pyfleet.__version__ and sys.argv[1] == "1":
    import time
    offered = wiring.socket.create_server
    def noisy(address, **kwargs):               # as soon as this rank listens, strangers knock
        listener = offered(address, **kwargs)
        for text in (b"GET / HTTP/1.0\\r\\n\\r\\n" * 4, b"", bytes(200)):
            stranger = socket.create_connection(("127.0.0.1", listener.getsockname()[1])); stranger.sendall(text)
            strangers.append(stranger)
        return listener
    strangers = []
    wiring.socket.create_server = noisy
    for text in (b"\\xff\\xff\\xff\\xff", b"GET / HTTP/1.0\\r\\n\\r\\n", b"\\0\\0\\0\\2\\xc1\\xc1"):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                stranger = socket.create_connection(("127.0.0.1", {port})); break
            except OSError:
                time.sleep(0.01)
        stranger.sendall(text); strangers.append(stranger)
f = pyfleet.init(); pyfleet.barrier(); assert f.world_size == 3
"""
    env = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3",
           "PYFLEET_TRANSPORT": "tcp", "PYFLEET_HOME": os.environ["PYFLEET_HOME"]}
    processes = [subprocess.Popen([sys.executable, "-c", code, str(rank)], env=env | {"RANK": str(rank)})
                 for rank in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
