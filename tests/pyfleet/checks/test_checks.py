"""Checks whose trouble cannot be caused here: what others have said, and what only other machines have."""
from dataclasses import replace
from pathlib import Path

import pytest

from pyfleet import checks
from pyfleet.checks import CHECKS, FAIL, OK, SKIPPED, WARN, Subject, clock, identity, interfaces, limits, versions
from pyfleet.config import ClusterConfig
from pyfleet.interfaces import ETHERNET, THUNDERBOLT, WIFI, Interface
from pyfleet.members import PROTOCOL, Node, Sighting

ANA, BOB = "a" * 52, "b" * 52


def seen(check, **facts):
    """{name: finding} of a check."""
    return {finding.name: finding for finding in check.check(Subject(ClusterConfig(), **facts))}


def sighting(peer, incarnation, address, name=""):
    return Sighting((address,), 52415, peer, incarnation, name)


def test_an_identity_that_two_nodes_claim_is_named_with_both():
    twins = [sighting(ANA, "1" * 16, "10.0.0.1", "ana"), sighting(ANA, "2" * 16, "10.0.0.2", "copy"),
             sighting(ANA, "1" * 16, "10.0.1.1", "ana"), sighting(BOB, "3" * 16, "10.0.0.3"), sighting("", "", "10.0.0.4")]
    finding = seen(identity, sightings=twins)["identity of others"]
    assert finding.status == FAIL
    assert finding.seen == "2 nodes are aaaaaaaaaaaa at once: ana at 10.0.0.1; copy at 10.0.0.2"
    assert "pyfleet keys new --replace" in finding.advice
    finding = seen(identity, sightings=[twins[0], *twins[2:]])["identity of others"]
    assert (finding.status, finding.seen) == (OK, "2 nodes seen, no identity twice")
    assert seen(identity)["identity of others"].status == SKIPPED


def test_clocks(monkeypatch):
    assert {name: each.status for name, each in seen(clock).items()} == {"clock": OK, "clock of others": SKIPPED}
    finding = seen(clock, skews_s={ANA: 0.2, BOB: -7.25})["clock of others"]
    assert (finding.status, finding.seen) == (WARN, "bbbbbbbbbbbb is 7.2 s behind") and "NTP" in finding.advice
    finding = seen(clock, skews_s={ANA: 0.2, BOB: -0.25})["clock of others"]
    assert (finding.status, finding.seen) == (OK, "2 peers, at most 0.25 s apart")
    monkeypatch.setattr(clock.time, "time", lambda: 86400.0)           # 1970, as a Raspberry Pi without a network has it
    finding = seen(clock)["clock"]
    assert finding.status == WARN and finding.seen.startswith("it is 1970-01-02 00:00:00 UTC, before pyfleet was installed")


def test_versions(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: "1.2")
    nodes = [Node(peer=ANA, incarnation="1", version="1.2"), Node(peer=BOB, incarnation="2", name="bob", version="1.3")]
    assert seen(versions)["versions of others"].status == SKIPPED
    finding = seen(versions, nodes=nodes[:1])["versions of others"]
    assert (finding.status, finding.seen) == (OK, "1 peers, the same version")
    finding = seen(versions, nodes=nodes)["versions of others"]
    assert (finding.status, finding.seen) == (WARN, "bob has pyfleet 1.3")
    nodes.append(Node(peer="c" * 52, incarnation="3", version="2.0", protocol=PROTOCOL + 1))
    finding = seen(versions, nodes=nodes)["versions of others"]
    assert finding.status == FAIL and f"cccccccccccc speaks protocol {PROTOCOL + 1} (pyfleet 2.0); this one {PROTOCOL}" in finding.seen


def test_a_core_that_does_not_load_is_a_failure(monkeypatch):
    monkeypatch.setattr(versions, "CORE", "fleetcore.built_for_another_python")
    finding = seen(versions)["versions"]
    assert finding.status == FAIL and "fleetcore does not load: No module named" in finding.seen and "install pyfleet again" in finding.advice


ETH0, WLAN0 = Interface("eth0", ETHERNET, ("10.0.0.1", "fe80::1%eth0"), (24, 64), 1500), Interface("wlan0", WIFI, ("10.0.0.2",), (24,), 1500)


@pytest.mark.parametrize(("there", "way_out", "status", "told"), [
    ([ETH0, WLAN0], "10.0.0.1", OK, "eth0 leads out"), ([ETH0, WLAN0], "10.0.0.2", WARN, "PYFLEET_IFACE=eth0"),
    ([WLAN0], "10.0.0.2", WARN, "WiFi alone"), ([replace(ETH0, addresses=("169.254.7.7",))], None, WARN, "only self-assigned addresses"),
    ([replace(ETH0, medium=THUNDERBOLT)], None, OK, "eth0 (thunderbolt: 10.0.0.1)"),
])
def test_the_choice_of_an_interface(monkeypatch, there, way_out, status, told):
    monkeypatch.setattr(interfaces, "candidates", lambda: there)
    monkeypatch.setattr(interfaces, "leads_out", lambda: way_out)
    finding = seen(interfaces)["interfaces"]
    assert finding.status == status and told in f"{finding.seen} {finding.advice}"


def put(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_quota_of_the_control_group_counts_as_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "num_cores", lambda: 8)
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    assert seen(limits, num_ranks=8)["limits cores"].status == OK
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert seen(limits, num_ranks=8)["limits cores"].seen == "8 usable, for 8 ranks"
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{3 << 30}\n")
    finding = seen(limits, num_ranks=2)["limits cores"]
    assert finding.status == WARN and finding.seen == "2 ranks on 8 usable, of which this control group may use 1.5"
    assert "OMP_NUM_THREADS=1" in seen(limits)["limits cores"].advice
    assert seen(limits)["limits memory"].seen == "this control group may use 3072 MiB"


def test_what_stands_between_ranks_of_one_machine(monkeypatch, tmp_path):
    if "limits reading memory" not in seen(limits):
        pytest.skip("Linux")
    monkeypatch.setattr(limits, "KERNEL", tmp_path)
    put(tmp_path, yama__ptrace_scope="1\n")
    assert seen(limits)["limits reading memory"].status == (OK if limits.may_read() else WARN)
    put(tmp_path, yama__ptrace_scope="2\n")
    finding = seen(limits)["limits reading memory"]
    assert finding.status == WARN and finding.seen == "Yama forbids it (ptrace_scope 2)" and "ptrace_scope=1" in finding.advice
    (tmp_path / "yama" / "ptrace_scope").unlink()
    monkeypatch.setattr(limits, "may_read", lambda: False)
    assert "container forbids it" in seen(limits)["limits reading memory"].seen


def test_huge_pages(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "HUGE_PAGES", tmp_path)
    put(tmp_path, enabled="always madvise [never]\n", shmem_enabled="always [advise] never\n")
    if "limits huge pages" not in seen(limits):
        pytest.skip("Linux")
    finding = seen(limits)["limits huge pages"]
    assert finding.status == WARN and finding.seen == "enabled: never, shmem_enabled: advise" and "echo madvise" in finding.advice
    put(tmp_path, enabled="always [madvise] never\n")
    assert seen(limits)["limits huge pages"].status == OK


def test_a_check_that_breaks_does_not_keep_the_others_from_looking(monkeypatch):
    def broken(subject):
        raise OSError("no such device")
    monkeypatch.setattr(clock, "check", broken)
    found = checks.run(Subject(ClusterConfig()), ["clock", "versions"])
    assert found[0].status == WARN and found[0].seen == "could not be checked: OSError: no such device"
    assert "versions" in {finding.name for finding in found}


def test_every_kind_is_in_the_table():
    assert {target for target in CHECKS.values()} == {
        f"pyfleet.checks.{path.stem}:check" for path in Path(checks.__file__).parent.glob("*.py") if path.stem not in ("__init__", "base")}
