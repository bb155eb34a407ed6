"""The array mathematics at its edges: what vanishes, what overflows, what is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import rmsprop, scale_by_rms, scale_by_stddev, storage, trace
from rmsprop_jax._core import moments

TINY = float(np.finfo(np.float32).tiny)


@pytest.mark.parametrize('eps_in_sqrt', [True, False])
def test_a_root_that_vanishes_gives_no_step(eps_in_sqrt):
    """The square of a gradient of 1e-30 is zero in float32: its direction is not known."""
    g = jnp.array([1e-30, -1e-30, 1.0])
    tx = scale_by_rms(0.0, 0.0, eps_in_sqrt=eps_in_sqrt)
    update, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(update, [0.0, 0.0, 1.0])


@pytest.mark.parametrize('eps_in_sqrt', [True, False])
def test_an_array_epsilon_has_its_place(eps_in_sqrt):
    g, moment, eps = jnp.array([3.0]), jnp.array([16.0]), jnp.float32(9.0)
    exact = 3 / 5 if eps_in_sqrt else 3 / 13
    for given, is_positive in ((eps, False), (eps, True), (float(eps), True)):
        found = moments.direction(g, moment, given, eps_in_sqrt, is_positive=is_positive)
        np.testing.assert_allclose(found, exact, rtol=1e-6)


@pytest.mark.parametrize('bias_correction', [False, True])
@pytest.mark.parametrize('decay', [0.0, jnp.float32(0.0)], ids=['float', 'array'])
def test_without_memory_there_is_no_variance(decay, bias_correction):
    """The mean is the gradient itself, and the deviation from it zero, however it is traced."""
    tx = scale_by_rms(decay, 1e-2, bias_correction=bias_correction, centered=True)
    state = tx.init(jnp.zeros(2))
    for g in (jnp.array([1.0, -2.0]), jnp.array([3.0, 5.0])):
        update, state = tx.update(g, state)
        np.testing.assert_array_equal(state.var, [0.0, 0.0])
        np.testing.assert_allclose(update, g / 0.1, rtol=1e-6)


def test_the_reciprocal_of_nothing_is_nothing():
    assert moments.reciprocal_or_zero(0.0) == 0.0
    assert moments.reciprocal_or_zero(4.0) == 0.25
    x = jnp.array([0.0, TINY / 2, TINY, 4.0])
    np.testing.assert_allclose(moments.reciprocal_or_zero(x), [0.0, 0.0, 1 / TINY, 0.25])
    assert np.isfinite(jax.jacfwd(moments.reciprocal_or_zero)(x)[:2]).all()


def test_the_first_variance_has_no_mean_to_deviate_from():
    zero, g = jnp.zeros(2), jnp.array([1.0, 2.0])
    found = moments.variance(zero, g, zero, jnp.float32(0.0), 0.9, jnp.float32(0.0))
    np.testing.assert_array_equal(found, [0.0, 0.0])


@pytest.mark.parametrize('scale', [2.0**-20, 2.0**13])
def test_the_window_of_bytes_moves_with_its_scale(scale):
    """Every byte stands for `scale` times what it stands for at one."""
    moved, plain = storage.uint8(scale=scale), storage.uint8()
    codes = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(moved.decode(codes), scale * plain.decode(codes))
    np.testing.assert_array_equal(moved.encode(moved.decode(codes)), codes)


@pytest.mark.parametrize(
    ('kept', 'low', 'high'), [(storage.uint8(), 0.5, 0.625), (storage.bfloat16(), 1, 1 + 2.0**-7)]
)
def test_without_random_bits_rounding_is_to_the_nearest(kept, low, high):
    for share, nearest in ((0.0, low), (0.49, low), (0.51, high), (1.0, high)):
        assert kept.decode(kept.encode(jnp.float32(low + share * (high - low)))) == nearest


@pytest.mark.parametrize('bias_correction', [False, True])
def test_a_rounded_variance_is_the_variance(bias_correction):
    """Each rounding is off by at most 2^-7, and half of it is left after each step."""
    kept = storage.large_leaves(storage.bfloat16(), min_size=1)
    options = {'decay': 0.5, 'centered': True, 'bias_correction': bias_correction}
    rounded, exact = scale_by_rms(**options, storage=kept), scale_by_rms(**options)
    states = [tx.init(jnp.zeros((4, 16))) for tx in (rounded, exact)]
    for g in np.random.default_rng(0).normal(size=(12, 4, 16)).astype(np.float32):
        states = [tx.update(g, s)[1] for tx, s in zip((rounded, exact), states, strict=True)]
    found, expected = storage.read(states[0], kept).var, states[1].var
    np.testing.assert_allclose(found, expected, rtol=2.0**-6, atol=1e-3)


def test_the_standard_deviation_is_the_centered_form_argument_by_argument():
    arguments, g = (0.5, 1e-2, 2.0, False, True), jnp.array([1.0, -3.0])
    ours, same = scale_by_stddev(*arguments), scale_by_rms(*arguments, centered=True)
    found, expected = (tx.update(g, tx.init(g)) for tx in (ours, same))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1].var, expected[1].var)


def test_the_count_of_a_trace_stays_at_its_largest():
    tx, g = trace(lambda count: 0.5), jnp.ones(1)
    state = tx.init(g)._replace(count=jnp.array(2**31 - 1, jnp.int32))
    assert int(tx.update(g, state)[1].count) == 2**31 - 1


def test_narrow_updates_are_rounded_once():
    """The whole chain is taken in float32, and cast at its end."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=500), jnp.bfloat16)
    narrow, wide = (
        tx.update(x, tx.init(x))[0]
        for tx, x in ((rmsprop(0.3), g), (rmsprop(0.3), g.astype(jnp.float32)))
    )
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def test_every_statistic_of_a_leaf_is_rounded_with_bits_of_its_own(monkeypatch):
    labels, key = [], storage.bfloat16.key
    monkeypatch.setattr(
        storage.bfloat16, 'key', lambda kept, label: labels.append(label) or key(kept, label)
    )
    kept = storage.large_leaves(storage.bfloat16(), min_size=1, min_ndim=0)
    tx, params = rmsprop(0.1, centered=True, momentum=0.9, storage=kept), {'w': jnp.ones(2)}
    tx.update(params, tx.init(params), params)
    assert sorted(labels) == ["mu['w']", "trace['w']", "var['w']"]


def test_random_bits_are_those_of_the_published_hash():
    """Wellons's lowbias32 in Python's integers, of the index mixed with the salt."""

    def lowbias32(x: int) -> int:
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        return x ^ x >> 15

    key, count = int(storage.uint8(seed=3).key('nu')), 7
    mixed = lowbias32((count * 0x9E3779B9 + key) % 2**32)
    expected = [[lowbias32((3 * i + j) ^ mixed) for j in range(3)] for i in range(2)]
    found = storage.uint8(seed=3).bits(np.uint32(key), count, (2, 3))
    np.testing.assert_array_equal(found, np.array(expected, np.uint32))
