"""What frameworks take at the edges of ranges, and derivatives where a norm or a root is zero."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsprop_jax
from rmsprop_jax import dialects

DECAY_ONE = {
    'rmsprop': lambda: rmsprop_jax.rmsprop(0.1, 1.0, 0.0, initial_scale=1.0),
    'centered': lambda: rmsprop_jax.rmsprop(0.1, 1.0, 0.0, initial_scale=1.0, centered=True),
    'array': lambda: rmsprop_jax.rmsprop(0.1, jnp.array(1.0), 0.0, initial_scale=1.0),
    'tensorflow': lambda: dialects.tensorflow(0.1, 1.0, epsilon=0.0),
    'timm': lambda: dialects.timm(0.1, 1.0, 0.0),
    'stable_baselines3': lambda: dialects.stable_baselines3(0.1, 1.0, 0.0),
}


@pytest.mark.parametrize('make', DECAY_ONE.values(), ids=DECAY_ONE)
def test_decay_one_keeps_the_start_value(make):
    """A second moment of one that stays: gradient descent, in every framework that starts there."""
    tx, params = make(), jnp.array([1.0, -2.0])
    state = tx.init(params)
    for g in (jnp.array([3.0, 0.5]), jnp.array([-1.0, 0.0])):
        updates, state = tx.update(g, state, params)
        np.testing.assert_allclose(updates, -0.1 * g, rtol=1e-6)


def test_momentum_one_is_a_sum():
    """PyTorch's own tests of RMSprop use it."""
    tx, g = dialects.torch(0.1, alpha=0.5, eps=0.0, momentum=1), jnp.array([2.0])
    state, nu, buffer = tx.init(g), 0.0, 0.0
    for _ in range(4):
        updates, state = tx.update(g, state, g)
        nu = 0.5 * nu + 0.5 * 4.0
        buffer += 2.0 / math.sqrt(nu)
        np.testing.assert_allclose(updates, [-0.1 * buffer], rtol=1e-6)


def test_decay_one_is_refused_where_it_would_divide_by_zero():
    for make in (rmsprop_jax.scale_by_rms, rmsprop_jax.scale_by_stddev):
        with pytest.raises(ValueError, match='decay must be below 1 with bias_correction'):
            make(1.0, bias_correction=True)


@pytest.mark.parametrize('make', [dialects.torch, dialects.timm, dialects.stable_baselines3])
def test_a_negative_rate_is_refused_where_the_framework_does(make):
    with pytest.raises(ValueError, match=r'lr must be in \[0, inf\), got -1'):
        make(lr=-1)


def test_a_decay_that_underflows_is_zero():
    g = jnp.array([1.0, -3.0])
    for centered in (False, True):
        tx = rmsprop_jax.scale_by_rms(1e-40, 1e-3, centered=centered)
        _, state = tx.update(g, tx.init(g))
        updates, _ = tx.update(g, state)
        expected = g / np.sqrt((0 if centered else g**2) + 1e-3)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)


CLIPPINGS = {
    **{
        f'torch_clip_grad_norm-{order}': lambda order=order: dialects.torch_clip_grad_norm(1, order)
        for order in (0.5, 1, 2, 3, math.inf)
    },
    **{
        f'keras-{kind}': lambda kind=kind: dialects.keras(0.1, **{kind: 1.0})
        for kind in ('clipnorm', 'global_clipnorm', 'clipvalue')
    },
    'tensorflow': lambda: dialects.tensorflow(0.1),
    'torch': lambda: dialects.torch(0.1),
}
GRADIENTS = {
    'one entry of zero': {'a': jnp.array([3.0, 0.0]), 'b': jnp.array(2.0)},
    'all zero': {'a': jnp.zeros(2), 'b': jnp.zeros(())},
    'one complex entry of zero': {'a': jnp.array([3j, 0.0]), 'b': jnp.array(2.0 + 0j)},
    'all zero, complex': {'a': jnp.zeros(2, complex), 'b': jnp.zeros((), complex)},
}


@pytest.mark.extended
@pytest.mark.parametrize('gradient', GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize('name', CLIPPINGS)
def test_derivatives_at_zero_are_finite(name, gradient):
    if name == 'keras-clipvalue' and jnp.iscomplexobj(gradient['a']):
        return  # Keras has no complex parameters, and complex numbers have no order.
    tx = CLIPPINGS[name]()
    state = tx.init(gradient)

    def updates(g):
        return tx.update(g, state, gradient)[0]

    _, forward = jax.jvp(updates, (gradient,), (jax.tree.map(jnp.ones_like, gradient),))
    out, reverse = jax.vjp(updates, gradient)
    for leaf in jax.tree.leaves((out, forward, reverse(out))):
        assert jnp.isfinite(leaf).all()


@pytest.mark.extended
def test_derivative_of_clipping_is_that_of_its_formula():
    """Away from zero: `g c / (|g| + 1e-6)` for a norm above `c`."""
    g = jnp.array([3.0, 0.0, -4.0])
    for order in (1, 2, 3, math.inf):
        tx = dialects.torch_clip_grad_norm(1.0, order)

        def formula(g, order=order):
            return g / (np.linalg.norm(g, order) + 1e-6)

        h = 1e-2 * jnp.array([1.0, 0.0, 2.0])
        _, got = jax.jvp(lambda g, tx=tx: tx.update(g, tx.init(g))[0], (g,), (h,))
        slope = 50 * (
            formula(np.asarray(g + h / 100, float)) - formula(np.asarray(g - h / 100, float))
        )
        np.testing.assert_allclose(got, slope, rtol=1e-2, atol=1e-7)


@pytest.mark.extended
def test_parameters_that_nothing_reads_may_be_anything():
    """Users of Equinox hand over whole models, whose activations are functions."""
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    arrays = eqx.filter(model, eqx.is_array)
    for make in (
        lambda: rmsprop_jax.rmsprop(0.1, momentum=0.9),
        lambda: dialects.torch(0.1, momentum=0.9),
        lambda: dialects.keras(0.1, clipnorm=1.0),
        lambda: dialects.timm(0.1, caution=True),
        lambda: rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(0.1),
    ):
        tx = make()
        expected = tx.update(arrays, tx.init(arrays), arrays)
        got = tx.update(arrays, tx.init(arrays), model)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    tx = rmsprop_jax.rmsprop(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r'(?s)the structure of params does not match.*activation'):
        tx.update(arrays, tx.init(arrays), model)


def test_nesterov_without_momentum_warns():
    with pytest.warns(UserWarning, match='nesterov has no effect if momentum is None'):
        tx = rmsprop_jax.rmsprop(0.1, nesterov=True)
    g = jnp.array([1.0, 2.0])
    expected = optax.rmsprop(0.1, nesterov=True)
    np.testing.assert_array_equal(
        tx.update(g, tx.init(g))[0], expected.update(g, expected.init(g))[0]
    )
