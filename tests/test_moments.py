"""The array mathematics at its edges: what vanishes, what overflows, what is traced."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import rmsprop, scale_by_rms, scale_by_stddev, storage, trace
from rmsprop_jax._core import moments
from rmsprop_jax._core.moments import Arithmetic, Scalars

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
    assert moments.reciprocal_or_zero(TINY / 2) == 0.0
    assert moments.reciprocal_or_zero(4.0) == 0.25
    x = jnp.array([0.0, TINY / 2, TINY, 4.0])
    np.testing.assert_allclose(moments.reciprocal_or_zero(x), [0.0, 0.0, 1 / TINY, 0.25])
    assert np.isfinite(jax.jacfwd(moments.reciprocal_or_zero)(x)[:2]).all()


def test_what_is_subnormal_in_float32_counts_as_zero_beside_float64():
    with jax.enable_x64(True):
        for x in (jnp.float32(TINY / 2), np.float32(TINY / 2)):
            assert moments.reciprocal_or_zero(x) == 0
        for is_positive in (True, False):
            found = moments.direction(
                jnp.float32(1), jnp.float32(TINY / 2), 1e-30, False, is_positive=is_positive
            )
            np.testing.assert_allclose(found, 1e30, rtol=1e-6)
        step = functools.partial(moments.direction, eps_in_sqrt=False)
        assert step(jnp.float32(1), jnp.float32(TINY / 2), 0.0) == 0
        assert jax.grad(step, 1)(jnp.float32(1), jnp.float32(TINY / 2), 0.0) == 0


def test_the_first_variance_has_no_mean_to_deviate_from():
    zero, g = jnp.zeros(2), jnp.array([1.0, 2.0])
    found = moments.variance(zero, g, zero, jnp.float32(0.0), 0.9, jnp.float32(0.0))
    np.testing.assert_array_equal(found, [0.0, 0.0])


def test_magnitudes_are_those_of_numpy():
    z = np.array([3 - 4j, 0, -2j, 1e-3], np.complex64)
    x = np.array([-3, 0, 2], np.float32)
    for function, exact in ((moments.magnitude, np.abs), (moments.squared_magnitude, np.square)):
        np.testing.assert_allclose(function(jnp.asarray(z)), exact(np.abs(z)), rtol=1e-6)
        np.testing.assert_array_equal(function(jnp.asarray(x)), exact(np.abs(x)))
    assert moments.magnitude(jnp.float32(-1e30)) == np.float32(1e30)
    slope = jax.grad(lambda x, y: moments.magnitude(jax.lax.complex(x, y)))(0.0, 0.0)
    assert slope == 0


@pytest.mark.parametrize('order', [2, 3, 0.5])
def test_roots_and_their_derivatives_at_zero(order):
    x = jnp.array([0.0, 0.25, 1.0, 8.0])
    root = functools.partial(moments.root_or_zero, order=order)
    np.testing.assert_allclose(root(x), np.asarray(x) ** (1 / order), rtol=1e-6)
    assert jax.grad(root)(0.0) == 0


def test_square_roots_are_rounded_once():
    """A power of one half is not."""
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 10, 10_000), jnp.float32)
    np.testing.assert_array_equal(moments.root_or_zero(x), jnp.sqrt(x))
    assert (x**0.5 != jnp.sqrt(x)).any()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.complex64])
def test_the_parts_of_a_step_are_their_formulas(dtype):
    g, mu = jnp.array([3, -1], dtype), jnp.array([1, 1], dtype)
    assert moments.averaging_weight(jnp.float32(0.5), 0.75, 0.25) == 0.625
    np.testing.assert_array_equal(moments.second_moment(jnp.ones(2), g, 0.75, 0.25), [3, 1])
    found = moments.mean(mu, g, 0.25)
    np.testing.assert_array_equal(found, jnp.array([1.5, 0.5], dtype))
    assert found.dtype == dtype
    z = jax.lax.complex(g.real, g.real)
    with jax.numpy_dtype_promotion('strict'):
        twice = moments.componentwise(operator.mul, z, jnp.float32(2))
    np.testing.assert_array_equal(twice, z + z)


@pytest.mark.parametrize('eps_in_sqrt', [True, False])
@pytest.mark.parametrize('is_positive', [True, False])
@pytest.mark.parametrize('weights', [None, (0.25, 0.5)])
def test_a_plain_step_is_its_formula(eps_in_sqrt, is_positive, weights):
    """What keeps the root of a positive sum doubles it here, so that it is seen."""
    keep = Arithmetic(keep=lambda root: 2 * root)
    by = Scalars(0.75, 0.25, 9.0, weights)
    step, nu = moments.plain_step(
        jnp.array([4.0]), jnp.array([16.0]), by, eps_in_sqrt, is_positive, keep
    )
    moment = 32.0 if weights else 16.0
    root = np.sqrt(moment + 9) if eps_in_sqrt else np.sqrt(moment) + 9
    np.testing.assert_array_equal(nu, [16.0])
    np.testing.assert_allclose(step, 4 / (root * (1 + (eps_in_sqrt and is_positive))), rtol=1e-6)


@pytest.mark.parametrize('from_old_mean', [True, False])
@pytest.mark.parametrize('corrected', [True, False])
@pytest.mark.parametrize('eps_in_sqrt', [True, False])
@pytest.mark.parametrize('is_positive', [True, False])
def test_a_centered_step_is_its_definition(from_old_mean, corrected, eps_in_sqrt, is_positive):
    """`nu - |mu|^2 / c`, of three complex gradients, with the moments themselves as witness."""
    way = Arithmetic(from_old_mean=from_old_mean, keep=lambda root: 2 * root)
    var, mu = jnp.zeros(4), jnp.zeros(4, jnp.complex64)
    nu, mean, c = np.zeros(4), np.zeros(4, complex), 0.0
    rng = np.random.default_rng(0)
    for g in rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4)):
        before, c = c, 0.75 * c + 0.25
        nu, mean = 0.75 * nu + 0.25 * abs(g) ** 2, 0.75 * mean + 0.25 * g
        weights = (jnp.float32(before), jnp.float32(c)) if corrected else None
        by, narrow = Scalars(0.75, 0.25, 0.5, weights), jnp.asarray(g, jnp.complex64)
        step, var, mu = moments.centered_step(narrow, var, mu, by, eps_in_sqrt, is_positive, way)
        weight = c if corrected else 1
        exact = nu - abs(mean) ** 2 / weight
        moment = np.maximum(exact / weight, 0)
        root = np.sqrt(moment + 0.5) if eps_in_sqrt else np.sqrt(moment) + 0.5
        root *= 1 + (eps_in_sqrt and is_positive)
        np.testing.assert_allclose(mu, mean, rtol=1e-5)
        np.testing.assert_allclose(var, exact, rtol=1e-5, atol=1e-6)
        # The root of a first variance that is zero but for rounding.
        np.testing.assert_allclose(step, g / root, rtol=1e-5 if eps_in_sqrt else 1e-2)


@pytest.mark.parametrize('from_old_mean', [True, False])
@pytest.mark.parametrize('weights', [None, (0.25, 0.5)])
def test_a_variance_at_the_end_of_its_format_has_the_mean_added(from_old_mean, weights):
    """The largest number is two units of a half: the second and third variance have reached it."""
    by = Scalars(0.5, 0.5, 1.0, weights, 0.5)
    g, mu = jnp.array([6.0, 6.0, 6.0]), jnp.array([2.0, 2.0, 2.0])
    step, var, mu = moments.centered_step(
        g, jnp.array([0.75, 1.0, 3.0]), mu, by, True, True, Arithmetic(2.0, from_old_mean)
    )
    c = weights[1] if weights else 1
    moment = np.asarray(var) / c + np.array([0, 1, 1]) * np.square(4 / c)
    np.testing.assert_array_equal(mu, [4.0, 4.0, 4.0])
    np.testing.assert_allclose(step, 6 / np.sqrt(moment + 1), rtol=1e-6)


def test_a_format_as_wide_as_the_arithmetic_has_no_end():
    """A variance at bfloat16's largest number is one that float32 has reached as well."""
    largest = storage.bfloat16().largest
    g = mu = jnp.array([1e18])
    step, var, _ = moments.centered_step(
        g, jnp.array([largest]), mu, Scalars(0.5, 0.5, 1.0), True, True, Arithmetic(largest)
    )
    np.testing.assert_allclose(var, [largest / 2])
    np.testing.assert_allclose(step, 1e18 / np.sqrt(largest / 2), rtol=1e-6)


def test_the_smallest_normal_root_is_a_root():
    """And NaN stays NaN."""
    g = jnp.array([3 * TINY])
    for is_positive in (True, False):
        found = moments.direction(g, jnp.zeros(1), TINY, False, is_positive=is_positive)
        np.testing.assert_array_equal(found, [3.0])
    root = float(np.sqrt(np.float32(TINY)))
    found = moments.direction(jnp.array([1.0, 1.0]), jnp.array([TINY, jnp.nan]), 0.0, False)
    np.testing.assert_allclose(found, [1 / root, jnp.nan], rtol=1e-6)
    assert moments.kept_apart(jnp.float32(TINY)) == np.float32(TINY)
    assert moments.reciprocal_or_zero(TINY) == 1 / TINY


@pytest.mark.parametrize('eps_in_sqrt', [True, False])
def test_derivatives_of_a_direction_that_vanishes_are_finite(eps_in_sqrt):
    slopes = jax.grad(moments.direction, (0, 1))(0.0, 0.0, 0.0, eps_in_sqrt)
    assert np.isfinite(slopes).all()


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
