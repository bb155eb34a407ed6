"""Groups by path: Optax steps each parameter as its group says, in every model library."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import rmsprop_jax
from rmsprop_jax import labels_by_path, rmsprop
from rmsprop_jax.diagnostics import learning_rates

PARAMS = {'layers': [{'kernel': jnp.ones(2), 'bias': jnp.ones(2)} for _ in range(3)]}
RATES = {'^layers/0': 0.25, '^layers/1': 0.5, '': 1.0}


def test_the_first_match_decides():
    labels = labels_by_path({'bias': 'b', '1/': 'one', 'layers': 'rest'})(PARAMS)
    assert labels == {
        'layers': [
            {'kernel': 'rest', 'bias': 'b'},
            {'kernel': 'one', 'bias': 'b'},
            {'kernel': 'rest', 'bias': 'b'},
        ]
    }


def test_rates_by_layer_and_frozen_parameters():
    groups = {str(rate): rmsprop(rate) for rate in RATES.values()}
    patterns = {'bias$': 'frozen', **{pattern: str(rate) for pattern, rate in RATES.items()}}
    tx = optax.partition({**groups, 'frozen': optax.set_to_zero()}, labels_by_path(patterns))
    state = tx.init(PARAMS)
    found = learning_rates(tx, state, PARAMS)
    assert found == {f'layers/{i}/kernel': rate for i, rate in enumerate((0.25, 0.5, 1.0))}
    updates, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    for layer, rate in zip(updates['layers'], (0.25, 0.5, 1.0), strict=True):
        np.testing.assert_allclose(layer['kernel'], -rate / np.sqrt(0.1 + 1e-8), rtol=1e-6)
        np.testing.assert_array_equal(layer['bias'], 0)
    # What maps states finds the groups, too.
    fresh = rmsprop_jax.reset(tx, state, PARAMS, True)
    jax.tree.map(np.testing.assert_array_equal, learning_rates(tx, fresh, PARAMS), found)
    assert not any(x.any() for x in jax.tree.leaves(fresh) if x.dtype == jnp.float32)


def test_a_mask_of_what_decays():
    mask = labels_by_path({'(bias|scale)$': False, '': True})
    tx = rmsprop(0.1, weight_decay=0.5, mask=mask)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates['layers'][0]['kernel'], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates['layers'][0]['bias'], 0)


@pytest.mark.extended
def test_in_every_library():
    """One list of patterns, and one first step in each."""
    labels = labels_by_path({'bias': 'frozen', '': 'trained'})
    tx = optax.partition({'frozen': optax.set_to_zero(), 'trained': rmsprop(0.1)}, labels)

    def check(update):
        parts = [x for x in jax.tree.leaves(update) if x.ndim == 1]
        assert parts
        assert not any(x.any() for x in parts)
        assert all(x.any() for x in jax.tree.leaves(update) if x.ndim == 2)

    x = jnp.ones((4, 3))
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    check(optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(x)))(model)))

    dense = linen.Dense(2)
    params = dense.init(jax.random.key(0), x)['params']
    grads = jax.grad(lambda p: jnp.sum(dense.apply({'params': p}, x)))(params)
    check(tx.update(grads, tx.init(params), params)[0])

    module = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    arrays = eqx.filter(module, eqx.is_inexact_array)
    grads = eqx.filter_grad(lambda m: jnp.sum(jax.vmap(m)(x) ** 2))(module)
    check(tx.update(grads, tx.init(arrays), arrays)[0])


def test_what_does_not_match_is_named():
    with pytest.raises(
        ValueError, match=r"params\['layers'\]\[0\]\['bias'\].*'layers/0/bias', whi"
    ):
        labels_by_path({'kernel': 'k'})(PARAMS)
    with pytest.raises(ValueError, match="the pattern 'heed' is not the first match of any "):
        labels_by_path({'heed': 'h', '': 'rest'})(PARAMS)
    with pytest.raises(ValueError, match="the pattern 'bias' is not the first match"):
        labels_by_path({'': 'rest', 'bias': 'late'})(PARAMS)
    with pytest.raises(ValueError, match=r"the pattern '\(' is not a regular expression"):
        labels_by_path({'(': 'rest'})
