"""Which buckets are launched when; that the numbers come out right is told by strategies/test_data_parallel.py."""
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pyfleet.gradients import GradientHooks, Reducer, make_buckets

TINY_MB = 1e-6      # one parameter per bucket


class Recorder:
    """An engine of one rank that writes down what happens in which order."""

    rank = 0

    def __init__(self):
        self.events = []

    def submit(self, verb, flat, op):
        self.events.append((verb, flat.tolist(), op))
        return self

    def wait(self):
        self.events.append("wait")

    def allocate(self, nbytes):
        return bytearray(nbytes)


class Scale(torch.nn.Module):
    """y = x * product of the named scalars, which are used first to last."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(torch.ones(1)))
        self.used = names

    def forward(self, x):
        for name in self.used:
            x = x * getattr(self, name)
        return x


def watched(model):
    engine = Recorder()
    hooks = GradientHooks(make_buckets(model.named_parameters(), TINY_MB, engine.allocate), Reducer(engine))
    return hooks, engine.events


def run(hooks, model, x=2.0):
    hooks.prepare()
    out = model(torch.full((1,), float(x), requires_grad=True))
    hooks.watch({"out": [out]})
    return out


def sent(*flats):
    return [("all_reduce", list(flat), "mean") for flat in flats] + ["wait"] * len(flats)


def test_buckets_go_in_reverse_order_during_backward():
    model = Scale("a", "b")
    hooks, events = watched(model)
    seen_by_a = []
    model.a.register_hook(lambda _: seen_by_a.extend(events))
    run(hooks, model).backward()
    assert events == sent((2, 1), (2, 1))
    assert seen_by_a == [("all_reduce", [2.0, 1.0], "mean")]        # b's was on its way before a's gradient was there


def test_every_rank_sends_the_same_sequence_whatever_order_gradients_come_in():
    model = Scale("a", "b", "c")
    model.a.data, model.b.data, model.c.data = torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([5.0])
    hooks, events = watched(model)
    for model.used in (("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c")):
        events.clear()
        model.zero_grad()
        run(hooks, model, 1).backward()
        assert events == sent((6, 1), (10, 1), (15, 1))


def test_unused_parameters_go_as_zeros_at_the_end_and_keep_no_gradient():
    model = Scale("a", "b", "c")
    hooks, events = watched(model)
    model.used = ("a", "c")
    for _ in range(2):
        events.clear()
        run(hooks, model).backward()
        assert events == sent((2, 1), (0, 0), (2, 1))
        assert model.b.grad is None
        model.zero_grad()


def test_nothing_is_sent_while_disabled_and_the_sum_after():
    model = Scale("a")
    hooks, events = watched(model)
    hooks.enabled = False
    run(hooks, model, 2).backward()
    run(hooks, model, 3).backward()
    assert events == []
    hooks.enabled = True
    run(hooks, model, 4).backward()
    assert events == sent((9, 1))


def test_a_parameter_used_twice_counts_once():
    model = Scale("a")
    hooks, events = watched(model)
    model.used = ("a", "a")
    run(hooks, model).backward()
    assert events == sent((4, 1))


def test_two_forwards_one_backward_send_once():
    model = Scale("a", "b")
    hooks, events = watched(model)
    (run(hooks, model, 2) + run(hooks, model, 3)).backward()
    assert events == sent((5, 1), (5, 1))


def test_retained_graphs_send_once_per_backward():
    model = Scale("a")
    hooks, events = watched(model)
    out = run(hooks, model)
    out.backward(retain_graph=True)
    out.backward()
    assert events == sent((2, 1)) + sent((4, 1))


def test_autograd_grad_sends_nothing():
    model = Scale("a")
    hooks, events = watched(model)
    x = torch.ones(1, requires_grad=True)
    out = model(x)
    hooks.watch(out)
    penalty, = torch.autograd.grad(out, x, create_graph=True)
    assert events == []
    (out + penalty).backward()
    assert events == sent((2, 1))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_with_a_graph_are_sent_as_numbers():
    model = Scale("a")
    hooks, events = watched(model)
    model.used = ("a", "a")
    run(hooks, model).backward(create_graph=True)
    assert events == sent((4, 1))
    assert not model.a.grad.requires_grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_segments_send_once_at_the_real_end(use_reentrant):
    model = Scale("a", "b", "c")
    hooks, events = watched(model)
    hooks.prepare()
    x = torch.full((1,), 2.0, requires_grad=True)
    out = checkpoint(lambda x: checkpoint(lambda x: x * model.a, x, use_reentrant=use_reentrant) * model.b, x,
                     use_reentrant=use_reentrant) * model.c
    hooks.watch(out)
    out.backward()
    assert events == sent((2, 1), (2, 1), (2, 1))


def test_a_parameter_shared_by_reentrant_checkpoints_is_a_clear_error():
    model = Scale("a")
    hooks, _ = watched(model)
    x = torch.full((1,), 2.0, requires_grad=True)
    for _ in range(2):
        x = checkpoint(lambda x: x * model.a, x, use_reentrant=True)
    hooks.watch(x)
    with pytest.raises(RuntimeError, match="gradient of a changed after it had been sent.*use_reentrant=False"):
        x.backward()


def test_a_failed_backward_leaves_nothing_behind():
    model = Scale("a", "b")
    hooks, events = watched(model)

    def fail(_):
        raise ArithmeticError("on purpose")
    handle = model.a.register_hook(fail)
    with pytest.raises(ArithmeticError, match="on purpose"):
        run(hooks, model).backward()
    handle.remove()
    model.zero_grad()
    run(hooks, model).backward()
    assert events == [("all_reduce", [2.0, 1.0], "mean"), "wait", *sent((2, 1), (2, 1))]


def test_an_error_of_the_engine_comes_out_of_backward_and_the_next_step_works():
    model = Scale("a", "b")
    hooks, events = watched(model)
    engine = hooks._reducer._engine

    class Refused:
        def wait(self):
            raise ConnectionError("gone")
    engine.submit = lambda *_: Refused()
    with pytest.raises(ConnectionError, match="gone"):
        run(hooks, model).backward()
    del engine.submit
    model.zero_grad()
    run(hooks, model).backward()
    assert events == sent((2, 1), (2, 1))


def test_flush_sends_what_there_is():
    model = Scale("a", "b")
    hooks, events = watched(model)
    model.a.grad = torch.full((1,), 7.0)
    hooks.flush()
    assert events == sent((0, 0), (7, 1))
    hooks.flush()
    assert len(events) == 8


def test_release_stops_listening():
    model = Scale("a")
    hooks, events = watched(model)
    hooks.release()
    hooks.release()
    run(hooks, model).backward()
    assert events == []
    assert hooks.released


def test_the_model_does_not_keep_the_hooks_alive():
    model = Scale("a")
    hooks, events = watched(model)
    gone = weakref.ref(hooks)
    del hooks
    gc.collect()
    assert gone() is None
    model(torch.ones(1)).backward()
    assert events == []
    assert model.a.grad.item() == 1
