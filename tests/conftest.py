import atexit
import os
import shutil
import tempfile

import pytest

from tests import network as networks
from tests.ranks import Ranks

# Node keys of the tests, and not that of whoever runs them.
os.environ["PYFLEET_HOME"] = tempfile.mkdtemp(prefix="pyfleet-test-home-")
atexit.register(shutil.rmtree, os.environ["PYFLEET_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def _rank_pool():
    pool = {}
    yield pool
    for group in pool.values():
        group.close()


@pytest.fixture
def ranks(_rank_pool):
    """ranks(size, transport="auto"): living, initialised ranks, shared between tests; see tests/ranks.py."""
    def get(size, transport="auto", **env):
        key = (size, transport, *sorted(env.items()))
        group = _rank_pool.pop(key, None)
        if group is not None and not group.usable():
            group.close()
            group = None
        while group is None and len(_rank_pool) >= 3:       # idle processes still cost memory
            _rank_pool.pop(next(iter(_rank_pool))).close()
        group = _rank_pool[key] = group or Ranks(size, transport, env=env)
        return group
    return get


@pytest.fixture
def fresh_ranks():
    """As `ranks`, but made for this test and ended with it: for tests in which ranks die."""
    made = []

    def get(size, transport="auto", *, init=True, **env):
        made.append(Ranks(size, transport, init=init, env=env))
        return made[-1]
    yield get
    for group in made:
        group.close()


@pytest.fixture
def network():
    """network(num_hosts, rate="1gbit", ...): hosts with links between them, for this test; see tests/network.py."""
    if reason := networks.unavailable():
        pytest.skip(f"no network of hosts: {reason}")
    made = []

    def get(num_hosts, rate="1gbit", **options):
        made.append(networks.Network(num_hosts, rate, **options))
        return made[-1]
    yield get
    for each in made:
        each.close()
