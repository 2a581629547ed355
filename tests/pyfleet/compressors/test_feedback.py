"""Nothing that error feedback guards is ever lost: sum(sent) + residual = sum(gradients)."""
import functools

import numpy as np
import pytest

from pyfleet.compressors import parse_spec
from pyfleet.compressors.feedback import ErrorFeedback
from pyfleet.errors import ConfigError, ShapeError
from tests.pyfleet.compressors.test_contract import CODES, encoded, gradients

N = 700


def sent(feedback, grad, step, **where):
    data = encoded(feedback, grad, step=step, **where)
    out = np.empty(grad.size, np.float32)
    feedback.decode(data, out)
    return out


@pytest.mark.feature("P28", "C79")
@pytest.mark.parametrize("spec", CODES)
def test_a_thousand_steps_neither_lose_nor_invent(spec):
    feedback = ErrorFeedback(parse_spec(spec), N)
    total, given, allowed = np.zeros(N), np.zeros(N), np.zeros(N)
    for step in range(1000):
        grad = gradients(N, step)
        given += grad
        total += sent(feedback, grad, step)
        allowed += np.spacing(np.abs(feedback.residual)) * 0.5001
    assert (np.abs(total + feedback.residual - given) <= allowed + 1e-12).all()     # 1e-12: what float64 sums round
    assert allowed.max() < 1e-3


@pytest.mark.feature("P28")
@pytest.mark.parametrize("spec", ("none", "fp16", "bf16"))
def test_on_a_grid_the_accounts_balance_to_the_last_bit(spec):
    feedback, rng = ErrorFeedback(parse_spec(spec), N), np.random.default_rng(0)
    total, given = np.zeros(N), np.zeros(N)
    for step in range(1000):
        grad = rng.integers(-2**18, 2**18, N).astype(np.float32) / 2**16
        given += grad
        total += sent(feedback, grad, step)
        np.testing.assert_array_equal(total + feedback.residual, given)


@pytest.mark.parametrize("spec", [spec for spec in CODES if parse_spec(spec).lossy])
def test_the_mean_of_what_is_sent_approaches_a_steady_gradient(spec):
    grad, feedback, total = gradients(N), ErrorFeedback(parse_spec(spec), N), np.zeros(N)
    for step in range(300):
        total += sent(feedback, grad, step)
    once = np.linalg.norm(sent(ErrorFeedback(parse_spec(spec), N), grad, 0) - grad)
    assert np.linalg.norm(total / 300 - grad) < once / 3


def test_a_piece_uses_its_part_of_the_residual():
    grad, where = gradients(1000), {"step": 1, "stream": 2}
    for spec in ("int4", "sign", "int8(stochastic=True)"):
        whole, parts = (ErrorFeedback(parse_spec(spec), 1000) for _ in range(2))
        for _ in range(3):
            expected = sent(whole, grad, **where)
            got = [sent(parts, grad[512:], offset=512, **where), sent(parts, grad[:512], offset=0, **where)]
            np.testing.assert_array_equal(np.concatenate(got[::-1]), expected)
            np.testing.assert_array_equal(parts.residual, whole.residual)
    for offset, n in ((-256, 10), (0, 1001), (768, 300)):
        with pytest.raises(ShapeError, match="of a bucket of 1000"):
            parts.encode(np.zeros(n, np.float32), np.empty(4096, np.uint8), offset=offset)


@pytest.mark.parametrize("spec", CODES)
def test_rollback_makes_a_step_not_have_happened(spec):
    feedback = ErrorFeedback(parse_spec(spec), N, undo=True)
    sent(feedback, gradients(N, 1), 1)
    feedback.commit()
    before = feedback.residual.copy()
    first = sent(feedback, gradients(N, 2), 2)
    feedback.rollback()
    np.testing.assert_array_equal(feedback.residual, before)
    np.testing.assert_array_equal(sent(feedback, gradients(N, 2), 2), first)
    feedback.commit()
    after = feedback.residual.copy()
    feedback.rollback()                                         # nothing since the commit
    np.testing.assert_array_equal(feedback.residual, after)


def test_rollback_of_one_piece_leaves_the_others():
    feedback = ErrorFeedback(parse_spec("int4"), N, undo=True)
    sent(feedback, gradients(N, 1), 1)
    feedback.commit()
    before = feedback.residual.copy()
    sent(feedback, gradients(256, 2), 2, offset=256)
    assert (feedback.residual[256:512] != before[256:512]).any()
    feedback.rollback()
    np.testing.assert_array_equal(feedback.residual, before)


@pytest.mark.parametrize("spec", CODES)
def test_a_state_goes_on_elsewhere(spec):
    here = ErrorFeedback(parse_spec(spec), N)
    for step in range(3):
        sent(here, gradients(N, step), step)
    there = ErrorFeedback(parse_spec(spec), N)
    there.load_state_dict(here.state_dict())
    np.testing.assert_array_equal(sent(there, gradients(N, 3), 3), sent(here, gradients(N, 3), 3))
    np.testing.assert_array_equal(there.residual, here.residual)


def half_of_the_mean(x, all_reduce, num_ranks, *, step=0):
    """A rule of the route "own" that carries half of what it is given."""
    all_reduce(x)
    x /= 2 * num_ranks


def test_on_the_route_own_the_residuals_of_all_ranks_balance(monkeypatch):
    ranks = [ErrorFeedback(parse_spec("none"), 50) for _ in range(2)]
    grads = [gradients(50, seed) for seed in range(2)]
    total, given = np.zeros(50), np.zeros(50)
    for rank in ranks:
        monkeypatch.setattr(rank.inner, "exchange", half_of_the_mean)
    for _ in range(20):
        both = grads[0] + ranks[0].residual + (grads[1] + ranks[1].residual)
        results = [grad.copy() for grad in grads]
        for rank, x in zip(ranks, results, strict=True):
            rank.exchange(x, functools.partial(np.copyto, src=both), 2)
        np.testing.assert_array_equal(*results)
        total += 2 * results[0].astype(np.float64)
        given += grads[0].astype(np.float64) + grads[1]
    kept = ranks[0].residual.astype(np.float64) + ranks[1].residual
    np.testing.assert_allclose(total + kept, given, rtol=0, atol=1e-6 * np.abs(given).max())


def test_what_is_wrong_is_named():
    feedback = ErrorFeedback(parse_spec("int8"), N)
    with pytest.raises(ConfigError, match="undo=True"):
        feedback.rollback()
    with pytest.raises(ConfigError, match="feedback already"):
        ErrorFeedback(feedback, N).encode(gradients(N), np.empty(4 * N, np.uint8))
    with pytest.raises(ConfigError, match="no state of error feedback"):
        feedback.load_state_dict({"residual": np.zeros(N)})
    with pytest.raises(ShapeError, match=r"\(3,\), the bucket \(700,\)"):
        feedback.load_state_dict({"residual": np.zeros(3), "inner": {}})
    fresh = feedback.fresh()
    assert (fresh.residual == 0).all() and fresh.name == "int8" and fresh.route == "shard" and fresh.stateful


def test_what_an_owner_keeps_joins_the_residual_when_it_owns_another_segment():
    feedback = ErrorFeedback(parse_spec("int4"), N, undo=True)
    sent(feedback, gradients(N, 1), 0)
    sent(feedback.for_segment(256, 512, 3), gradients(256, 2), 0)
    assert feedback.for_segment(256, 512, 3) is feedback.owner
    before, kept = feedback.residual.copy(), feedback.owner.residual.copy()
    assert (kept != 0).any()
    again = ErrorFeedback(parse_spec("int4"), N)
    again.load_state_dict(feedback.state_dict())
    assert again.segment == (256, 512, 3)
    np.testing.assert_array_equal(again.owner.residual, kept)
    for each in (feedback, again):
        assert (each.for_segment(0, 256, 3).residual == 0).all()
        before_here = before.copy()
        before_here[256:512] += 3 * kept
        np.testing.assert_array_equal(each.residual, before_here)


def test_rollback_is_the_owners_too():
    feedback = ErrorFeedback(parse_spec("int4"), N, undo=True)
    owner = feedback.for_segment(0, 256, 1)
    sent(owner, gradients(256, 2), 0)
    feedback.commit()
    kept = owner.residual.copy()
    sent(owner, gradients(256, 3), 1)
    assert (owner.residual != kept).any()
    feedback.rollback()
    np.testing.assert_array_equal(feedback.owner.residual, kept)


def test_a_state_with_an_impossible_segment_is_refused():
    feedback = ErrorFeedback(parse_spec("int4"), N)
    feedback.for_segment(0, 256, 1)
    state = feedback.state_dict()
    with pytest.raises(ShapeError, match="a segment from 600 to 800 of a bucket of 700"):
        feedback.load_state_dict(state | {"segment": [600, 800, 1]})
    with pytest.raises(ConfigError, match="no state of error feedback"):
        feedback.load_state_dict({key: value for key, value in state.items() if key != "owner"})


# ---- momentum -------------------------------------------------------------------------------------------------------------

MOMENTUM = "topk(ratio=0.02, momentum=0.9)"


def with_momentum(num_steps, ratio, momentum, grads):
    """Momentum correction as its paper writes it: the sums that were sent, and what is kept at the end."""
    velocity, kept, total = (np.zeros(N, np.float32) for _ in range(3))
    for grad in grads[:num_steps]:
        velocity = np.float32(momentum) * velocity + grad
        kept = kept + velocity
        chosen = np.argsort(-np.abs(kept), kind="stable")[:round(ratio * N)]
        total[chosen] += kept[chosen]
        kept[chosen] = velocity[chosen] = 0
    return total, kept, velocity


def test_velocities_are_kept_and_sent_and_start_anew_where_they_were_sent():
    grads = [gradients(N, step) for step in range(50)]
    feedback, total = ErrorFeedback(parse_spec(MOMENTUM), N), np.zeros(N, np.float32)
    for step, grad in enumerate(grads):
        total += sent(feedback, grad, step)
    expected, kept, velocity = with_momentum(50, 0.02, 0.9, grads)
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(feedback.residual, kept, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(feedback.velocity, velocity, rtol=1e-5, atol=1e-5)
    assert 0 < np.count_nonzero(velocity) < N


def test_a_steady_gradient_counts_as_with_a_momentum_that_sees_it_at_once():
    """Of 1/(1 - momentum) of it; less what is under way, and what starting anew takes away."""
    grad, feedback, total = np.ones(N, np.float32), ErrorFeedback(parse_spec("topk(ratio=0.02, momentum=0.5)"), N), np.zeros(N)
    for step in range(500):
        total += sent(feedback, grad, step)
    assert (0.85 * 2 * 500 < total + feedback.residual).all()
    assert (total + feedback.residual < 2 * 500).all()


def test_a_velocity_goes_on_from_its_state_and_is_rolled_back():
    feedback, again = (ErrorFeedback(parse_spec(MOMENTUM), N, undo=True) for _ in range(2))
    sent(feedback, gradients(N), 0)
    feedback.commit()
    state = feedback.state_dict()
    first = sent(feedback, gradients(N, 1), 1)
    feedback.rollback()
    np.testing.assert_array_equal(feedback.velocity, state["velocity"])
    again.load_state_dict(state)
    np.testing.assert_array_equal(sent(feedback, gradients(N, 1), 1), first)
    np.testing.assert_array_equal(sent(again, gradients(N, 1), 1), first)
    with pytest.raises(ConfigError, match="no state of error feedback"):
        ErrorFeedback(parse_spec("topk"), N).load_state_dict(state)
    with pytest.raises(ShapeError, match="the velocity has shape"):
        again.load_state_dict(state | {"velocity": np.zeros(3)})


def test_a_step_that_is_not_finite_leaves_velocities_that_are():
    feedback, bad = ErrorFeedback(parse_spec(MOMENTUM), N), gradients(N, 1)
    sent(feedback, gradients(N), 0)
    bad[100:200], bad[300] = np.nan, np.inf
    assert not np.isfinite(sent(feedback, bad, 1)).all()
    assert np.isfinite(feedback.velocity).all() and np.isfinite(feedback.residual).all()
    assert np.isfinite(sent(feedback, gradients(N, 2), 2)).all()
