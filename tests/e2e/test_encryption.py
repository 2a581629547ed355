"""Sealed links between real processes: right results, nothing to be read on the wire, strangers refused."""
import logging
import os
import socket
import threading

import numpy as np
import pytest

import pyfleet
from pyfleet import connections, engines, wiring
from pyfleet.config import ClusterConfig
from tests.e2e.test_training import difference, digits_weights, one_process  # noqa: F401 a fixture

PSK = "0123456789abcdef" * 4
PATTERN = np.array([1234.5678, -0.0009765, 3.14159e7, 42.4242], np.float32)


def sums():
    """In a rank: all-reduce awkward sizes; the ciphers of its links."""
    rank, size = pyfleet.rank(), pyfleet.world_size()
    for count in (0, 1, 1009, 1_000_003):
        for algorithm in ("ring", "direct", "tree"):
            x = (np.arange(count) % 251).astype(np.float32) * (rank + 1)
            pyfleet.all_reduce(x, algorithm=algorithm)
            assert np.array_equal(x, (np.arange(count) % 251).astype(np.float32) * (size * (size + 1) // 2))
    return used_ciphers()


def used_ciphers():
    executor = engines.current().group.executor
    return {link.stats().get("cipher", "plain") for link in executor.links + executor.controls if link is not None}


@pytest.mark.parametrize("secret", ({"PYFLEET_PSK": PSK, "PYFLEET_NAMESPACE": "lab"}, {"PYFLEET_PSK": "a passphrase"}, {}))
@pytest.mark.parametrize("size", (2, 5))
def test_all_reduce_over_sealed_links_is_right(fresh_ranks, size, secret):
    ends = fresh_ranks(size, "tcp", PYFLEET_ENCRYPTION="on", **secret).run(sums)
    assert len(set.union(*ends)) == 1 and set.union(*ends) <= {"aegis128l", "chacha20poly1305"}


def striped_counts():
    """In a rank: the counts of a link of several sealed connections."""
    sums()
    return list(pyfleet.init().stats()["links"].values())


def test_a_link_of_several_sealed_connections_is_counted(fresh_ranks):
    for link, in fresh_ranks(2, "tcp", PYFLEET_ENCRYPTION="on", PYFLEET_STRIPES="2").run(striped_counts):
        assert link["cipher"] in ("aegis128l", "chacha20poly1305") and link["sent_bytes"] > 4_000_000


def test_training_over_sealed_links_ends_with_the_weights_of_one_process(fresh_ranks, one_process):  # noqa: F811
    ends = fresh_ranks(3, "tcp", PYFLEET_ENCRYPTION="on", PYFLEET_PSK=PSK).run(digits_weights, 2, 128)
    assert all(np.array_equal(ends[0], end) for end in ends)
    assert difference(ends[0], one_process(2, 128)) < 1e-9


def join(settings, apart=False):
    """In a rank: init with the settings of its rank; the ciphers in use, or the error."""
    rank = int(os.environ["PYFLEET_RANK"])
    if apart:
        wiring.host_id = lambda: f"host {rank}"         # as if the ranks shared no memory
    try:
        pyfleet.init(config=ClusterConfig(**settings[rank]), timeout=3)
        pyfleet.barrier()
    except pyfleet.FleetError as error:
        return type(error).__name__, str(error)
    executor = engines.current().group.executor
    return [sorted({link.stats().get("cipher", "plain") for link in links if link is not None})
            for links in (executor.links, executor.controls)]


@pytest.mark.feature("P30")
@pytest.mark.parametrize("other", [{"psk": PSK[::-1]}, {}, {"psk": PSK, "namespace": "other"}, {"namespace": "lab"},
                                   {"psk": "a passphrase"}], ids=["other", "none", "name", "name only", "passphrase"])
def test_who_has_not_the_psk_is_refused(fresh_ranks, other):
    first, second = fresh_ranks(2, "tcp", init=False).run(join, [{"psk": PSK, "namespace": "lab"}, other])
    assert second[0] == "AuthFailed" and "its PSK, namespace" in second[1]
    assert first[0] == "NotEnoughPeers" and "another PSK or namespace" in first[1]
    assert PSK not in str(first) + str(second)


@pytest.mark.parametrize("other", [{"psk": PSK[::-1]}, {}, {"psk": PSK, "namespace": "other"}], ids=["other", "none", "name"])
def test_who_has_not_the_psk_does_not_even_meet_the_others_at_rank_0(fresh_ranks, other):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    ends = fresh_ranks(2, "tcp", init=False, PYFLEET_RENDEZVOUS=place).run(join, [{"psk": PSK, "namespace": "lab"}, other])
    assert ends[1] == ("AuthFailed", f"rank 0 at {place[6:]} hung up: its PSK, namespace or version is another")
    assert ends[0] == ("NotEnoughPeers", "found 1 of 2 ranks within 3 s; missing: 1; refused 1, for another PSK or namespace")


def test_members_of_a_namespace_meet_whatever_form_their_psk_has(fresh_ranks, tmp_path):
    path = tmp_path / "psk"
    path.write_text(PSK.upper() + "\n")
    path.chmod(0o600)
    ends = fresh_ranks(2, "tcp", init=False).run(join, [{"psk": PSK, "encryption": "on"},
                                                        {"psk_file": str(path), "encryption": "on"}])
    assert ends[0] == ends[1] and "plain" not in str(ends)


@pytest.mark.parametrize(("encryption", "apart", "data", "control"), [
    ("auto", False, "plain", "plain"), ("auto", True, "sealed", "sealed"), ("on", False, "sealed", "sealed"),
    ("off", True, "plain", "sealed"), ("off", False, "plain", "plain"),
])
def test_what_is_sealed_by_default_and_by_wish(fresh_ranks, encryption, apart, data, control):
    ends = fresh_ranks(2, "tcp", init=False).run(join, [{"encryption": encryption}] * 2, apart)
    assert ends[0] == ends[1]
    assert [["plain"] if kinds == ["plain"] else ["sealed"] for kinds in ends[0]] == [[data], [control]]


def test_ranks_that_disagree_on_encryption_say_so(fresh_ranks):
    ends = fresh_ranks(2, "tcp", init=False).run(join, [{"encryption": "on"}, {"encryption": "off"}])
    assert [kind for kind, _ in ends] == ["ConfigError"] * 2
    assert "encryption is 'on' here and 'off' on rank 1" in ends[0][1]


def join_and_listen(settings):
    """In a rank: join as if on another host; what was logged meanwhile."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("pyfleet.links").addHandler(handler)
    join(settings, apart=True)
    return said


def test_encryption_off_between_hosts_is_logged_once(fresh_ranks):
    assert fresh_ranks(2, "tcp", init=False).run(join_and_listen, [{"encryption": "off"}] * 2) == [
        ["encryption is off: gradients travel between hosts in the clear; peers still prove who they are"], []]
    assert fresh_ranks(2, "tcp", init=False).run(join_and_listen, [{}] * 2) == [[], []]


def test_a_key_that_can_not_be_stored_matters_only_where_a_psk_says_who_belongs(fresh_ranks):
    nowhere = {"home": "/proc/nowhere", "encryption": "on"}
    ends = fresh_ranks(2, "tcp", init=False).run(join, [nowhere] * 2)
    assert ends[0] == ends[1] and "plain" not in str(ends)
    ends = fresh_ranks(2, "tcp", init=False).run(join, [nowhere | {"psk": PSK}] * 2)
    assert {kind for kind, _ in ends} == {"Unwritable"} and "PYFLEET_HOME" in ends[0][1]


def tapped(encryption):
    """In a rank: rank 1 records all that its connections carry, both ways; rank 0 returns nothing."""
    wire = []

    def listen_in(address, timeout):
        near, inner = socket.socketpair()
        outer = connect(address, timeout=timeout)

        def carry(source, sink):
            while data := source.recv(1 << 16):
                wire.append(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        for pair in ((inner, outer), (outer, inner)):
            threading.Thread(target=carry, args=pair, daemon=True).start()
        return near
    connect = socket.create_connection
    if os.environ["PYFLEET_RANK"] == "1":
        connections.socket.create_connection = listen_in
    try:
        pyfleet.init(config=ClusterConfig(psk=PSK, encryption=encryption), timeout=10)
    finally:
        connections.socket.create_connection = connect
    for algorithm in ("ring", "tree"):
        x = np.tile(PATTERN, 10_000)
        pyfleet.all_reduce(x, "max", algorithm=algorithm)       # so that the result shows the pattern, too
    pyfleet.barrier()
    carried = b"".join(wire)
    secrets = {"psk": bytes.fromhex(PSK), "psk text": PSK.encode(), "psk half": bytes.fromhex(PSK)[:8]}
    return len(carried), PATTERN.tobytes() in carried, [name for name, secret in secrets.items() if secret in carried]


def test_neither_the_psk_nor_a_gradient_is_on_the_wire(fresh_ranks):
    _, (size, shown, secrets) = fresh_ranks(2, "tcp", init=False).run(tapped, "on")
    assert size > 2 * 160_000 and not shown and not secrets
    _, (size, shown, secrets) = fresh_ranks(2, "tcp", init=False).run(tapped, "off")
    assert size > 2 * 160_000 and shown and not secrets         # the tap works; off is off, and the PSK is safe even so
