"""No function returns a state that shares a buffer with its arguments, or with itself.

Either could not be donated with the other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case

import rmsprop_jax
from rmsprop_jax import dialects, interchange, recipes, storage

pytestmark = pytest.mark.extended

BFLOAT16 = storage.large_leaves(storage.bfloat16(), 1, 0)


def parameters():
    return {'kernel': jnp.arange(1.0, 7.0).reshape(3, 2), 'bias': jnp.array([1.0, -2.0])}


def stepped(tx, params):
    return tx.update(jax.tree.map(jnp.sin, params), tx.init(params), params)[1]


def averaged():
    return dialects.keras(0.1, momentum=0.9, use_ema=True)


def injected():
    return rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(0.1)


def compact():
    return rmsprop_jax.rmsprop(0.1, momentum=0.9, storage=BFLOAT16)


MASK = {'kernel': True, 'bias': False}
FUNCTIONS = {
    'reset': (averaged, lambda tx, s, p: rmsprop_jax.reset(tx, s, p, MASK)),
    'reset-everything': (averaged, lambda tx, s, p: rmsprop_jax.reset(tx, s, p, True)),
    'reset-nothing': (averaged, lambda tx, s, p: rmsprop_jax.reset(tx, s, p, False)),
    'reset-injected': (injected, lambda tx, s, p: rmsprop_jax.reset(tx, s, p, MASK)),
    'reset-compact': (compact, lambda tx, s, p: rmsprop_jax.reset(tx, s, p, MASK, BFLOAT16)),
    'convert': (compact, lambda tx, s, p: storage.convert(s, p, BFLOAT16, BFLOAT16)),
    'convert-float32': (averaged, lambda tx, s, p: storage.convert(s, p, None, None)),
    'read': (averaged, lambda tx, s, p: storage.read(s, None)),
    'ema_init': (averaged, lambda tx, s, p: recipes.ema_init(p)),
    'ema_init-state': (averaged, lambda tx, s, p: recipes.ema_init(s)),
    'ema_update': (
        averaged,
        lambda tx, s, p: recipes.ema_update(recipes.ema_init(s), s, None, 0.5),
    ),
    'from_optax': (
        lambda: rmsprop_jax.rmsprop(0.1),
        lambda tx, s, p: interchange.from_optax(s, tx, p, count=1),
    ),
    'parameters_from': (
        averaged,
        lambda tx, s, p: interchange.parameters_from(
            p, p, [interchange.Pair('kernel', 'kernel'), interchange.Pair('bias', 'bias')]
        ),
    ),
    'update': (averaged, lambda tx, s, p: tx.update(p, s, p)[1]),
}


def buffers(tree):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize('name', FUNCTIONS)
def test_results_share_nothing(name):
    make, function = FUNCTIONS[name]
    tx, params = make(), parameters()
    state = stepped(tx, params)
    expected = jax.tree.map(np.array, function(tx, state, params))
    result = function(tx, state, params)
    assert not set(buffers(result)) & set(buffers((state, params)))
    assert len(set(buffers(result))) == len(buffers(result))
    for leaf in jax.tree.leaves((state, params)):
        leaf.delete()
    jax.tree.map(np.testing.assert_array_equal, result, expected)


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_init_shares_nothing(case: Case):
    tx, params = case.tx, parameters()
    state = tx.init(params)
    assert len(set(buffers((state, params)))) == len(buffers((state, params)))


def test_parameters_and_a_mended_average_are_donated_together():
    tx, params = averaged(), parameters()
    state = rmsprop_jax.reset(tx, stepped(tx, params), params, True)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params, state = jax.jit(step, donate_argnums=(0, 1))(params, state)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
