"""State in the host's memory between steps: where it is, and that no number changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rmsprop_jax
from rmsprop_jax import sharding, storage

pytestmark = pytest.mark.extended

EVERYWHERE = storage.large_leaves(storage.uint8(), min_size=1)
TRANSFORMATIONS = {
    'momentum': rmsprop_jax.rmsprop(0.1, momentum=0.9, bias_correction=True),
    'bytes': rmsprop_jax.rmsprop(0.1, storage=storage.per_statistic(nu=EVERYWHERE)),
    'factored': rmsprop_jax.rmsprop(0.1, storage=storage.per_statistic(nu=storage.factored())),
    'chain': optax.chain(optax.clip(1.0), optax.masked(optax.adam(0.1), {'w': True, 'b': False})),
}
PARAMS = {'w': jnp.linspace(-1, 1, 64 * 8).reshape(64, 8), 'b': jnp.ones(8)}


def kinds(state):
    return {(bool(x.ndim), x.sharding.memory_kind) for x in jax.tree.leaves(state)}


@pytest.mark.parametrize('wrap', [jax.jit, lambda f: f], ids=['jit', 'eager'])
@pytest.mark.parametrize('inner', TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_numbers_are_those_of_the_optimizer(inner, wrap):
    tx = sharding.offload(inner)
    state, expected = wrap(tx.init)(PARAMS), wrap(inner.init)(PARAMS)
    for _ in range(3):
        updates, state = wrap(tx.update)(PARAMS, state, PARAMS)
        same, expected = wrap(inner.update)(PARAMS, expected, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, (updates, state), (same, expected))
        assert kinds(state) <= {(True, 'pinned_host'), (False, 'device')}
        assert (True, 'pinned_host') in kinds(state)
        assert {kind for _, kind in kinds(updates)} == {'device'}


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_a_donated_step_of_a_split_state(kind):
    """As the page has it: shardings are told, parameters and state are donated together."""
    mesh = jax.make_mesh((8,), ('data',), (kind,))
    params = jax.device_put(jax.tree.map(jnp.copy, PARAMS), NamedSharding(mesh, P()))
    inner = sharding.zero1(TRANSFORMATIONS['momentum'], params)
    tx = sharding.offload(inner)
    places = sharding.state_shardings(tx, params)
    abstract = sharding.abstract_state(tx, params)
    state = jax.jit(tx.init, out_shardings=places)(params)
    assert places[0].nu['w'].spec[0] == 'data'
    assert kinds(state) == {(True, 'pinned_host'), (False, 'device')}

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    kept = (jax.tree.map(lambda x: x.sharding, params), places)
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=kept)
    expected, plain = jax.device_get(params), jax.jit(inner.init)(params)
    for _ in range(3):
        updates, plain = jax.jit(inner.update)(expected, plain, expected)
        expected = optax.apply_updates(expected, jax.device_get(updates))
        params, state = step(params, state)
        for x, place, shape in zip(*map(jax.tree.leaves, (state, places, abstract)), strict=True):
            assert x.sharding.is_equivalent_to(place, x.ndim)
            assert place == shape.sharding
            assert x.sharding.memory_kind == place.memory_kind
    np.testing.assert_allclose(params['w'], expected['w'], rtol=1e-6)


def test_a_jax_without_memory_spaces_is_named(monkeypatch):
    monkeypatch.delattr(jax, 'memory')
    with pytest.raises(NotImplementedError, match=r'offload needs jax.memory, which JAX \d'):
        sharding.offload(TRANSFORMATIONS['momentum'])
