import pytest

from tests.pyfleet.discovery.nodes import Capture, Node


@pytest.fixture
def start():
    """start(network, host, letter, ...): a Node of this test; letter names it, None for one that only looks."""
    made = []

    def get(*args, **options):
        made.append(Node(*args, **options))
        return made[-1]
    yield get
    for node in made:
        node.close()


@pytest.fixture
def capture():
    """capture(network, host): what the host sends of mDNS from now on."""
    made = []

    def get(*args):
        made.append(Capture(*args))
        return made[-1]
    yield get
    for each in made:
        each.close()
