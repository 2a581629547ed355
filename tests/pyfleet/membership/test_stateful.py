"""Elections of many nodes under whatever Hypothesis thinks of."""
import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.pyfleet.membership.world import World

NAMES = "abcdefg"


class Fleet(RuleBasedStateMachine):
    """The world itself checks at every event: one view per epoch, epochs that grow, never two leaders of one fleet."""

    @initialize(num_nodes=st.integers(2, 7), seed=st.integers(0, 1000), delay_s=st.sampled_from([0.001, 0.05, 0.4]))
    def begin(self, num_nodes, seed, delay_s):
        self.world = World(seed, num_nodes=num_nodes, delay_s=delay_s)
        self.names = NAMES[:num_nodes]
        self.world.run(4)

    @rule(seconds=st.sampled_from([0.02, 0.1, 0.5, 2.0, 4.0]))
    def run(self, seconds):
        self.world.run(seconds)

    @precondition(lambda self: len(self.world.living) > 1)
    @rule(data=st.data())
    def kill(self, data):
        self.world.kill(data.draw(st.sampled_from(sorted(self.world.living))))

    @precondition(lambda self: len(self.world.living) > 1)
    @rule(data=st.data())
    def leave(self, data):
        self.world.leave(data.draw(st.sampled_from(sorted(self.world.living))))

    @precondition(lambda self: len(self.world.living) < len(self.names))
    @rule(data=st.data())
    def start(self, data):
        self.world.start(data.draw(st.sampled_from(sorted(set(self.names) - set(self.world.living)))))

    @rule(data=st.data())
    def cut(self, data):
        some = data.draw(st.sets(st.sampled_from(self.names), min_size=1))
        self.world.cut(some, set(self.names) - some)

    @rule(pair=st.lists(st.sampled_from(NAMES), min_size=2, max_size=2, unique=True))
    def cut_pair(self, pair):
        self.world.cut(pair[:1], pair[1:])

    @rule()
    def heal(self):
        self.world.heal()

    @precondition(lambda self: any(election.leading for election in self.world.living.values()))
    @rule(steps=st.integers(1, 100))
    def commit(self, steps):
        """A leader and those who share its view finish steps."""
        (leader, *_) = self.world.leaders()
        view = self.world.living[leader].view
        for election in self.world.living.values():
            if election.view == view:
                election.committed(view.step + steps)

    def teardown(self):
        """With the network healed and all machines started, everybody ends up in one view."""
        world = self.world
        world.heal()
        for name in self.names:
            if name not in world.living:
                world.start(name)
        world.until(world.agreed, 40)
        world.run(5)
        assert world.agreed(), world.told()
        assert world.leaders() == [world.agreed().leader]


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=100, stateful_step_count=30, deadline=None,
                              suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
