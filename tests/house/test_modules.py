"""The parts of the cluster can be taken one by one: each imports alone, says what it is, and has tests of its own."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What each of the twelve is called elsewhere -> where it lives here, and where its tests are.
PARTS = {
    "auto": ("pyfleet.autodiscovery", "tests/e2e/test_join.py"),
    "ring": ("fleetcore.schedules.ring", "tests/fleetcore/schedules"),
    "discovery": ("pyfleet.discovery.mdns", "tests/pyfleet/discovery/test_mdns.py"),
    "transport": ("fleetcore.transports.tcp", "tests/fleetcore/transports/test_links.py"),
    "collective": ("fleetcore.group", "tests/fleetcore/test_group.py"),
    "compression": ("pyfleet.compression", "tests/pyfleet/test_compression.py"),
    "topology": ("pyfleet.membership.topology", "tests/pyfleet/membership/test_topology.py"),
    "identity": ("pyfleet.identity.keys", "tests/pyfleet/identity/test_keys.py"),
    "election": ("pyfleet.membership.election", "tests/pyfleet/membership/test_election.py"),
    "health": ("pyfleet.membership.health", "tests/pyfleet/membership/test_health.py"),
    "namespace": ("pyfleet.identity.namespace", "tests/pyfleet/identity/test_namespace.py"),
    "metrics": ("pyfleet.metrics", "tests/pyfleet/test_metrics.py"),
}


@pytest.mark.feature("P39")
@pytest.mark.parametrize("part", PARTS)
def test_a_part_stands_alone(part):
    module, tests = PARTS[part]
    code = f"import sys, {module} as part; print(len(part.__doc__)); print('torch' in sys.modules)"
    size, has_torch = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True,
                                     timeout=60).stdout.split()
    assert int(size) > 20 and has_torch == "False"
    assert (ROOT / tests).exists()
