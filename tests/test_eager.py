"""Outside of jit a step is one compiled program: that of jit, and the same for all numbers."""

import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES

import rmsprop_jax
from rmsprop_jax import dialects, storage

pytestmark = pytest.mark.extended

PARAMS = {
    'kernel': jnp.linspace(-2, 3, 12).reshape(4, 3),
    'bias': jnp.array([0.5, 0.0, -1.5]),
    'scale': jnp.array(2.0, jnp.float32),
}


def gradient(params):
    return jax.tree.map(lambda p: jnp.sin(2 * p), params)


def steps(tx, update, count=4):
    """The updates and the state of each step."""
    params, state, seen = PARAMS, tx.init(PARAMS), []
    for _ in range(count):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        seen.append((updates, state))
    return seen


# Where the last place may differ, since numbers are constants in one program and arguments in the
# other.
EXCEPTIONS = {'torch-factored': 'means over rows and columns are fused in another way'}


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_a_step_is_that_of_jit_bit_for_bit(case):
    tx = case.make()
    eager, jitted = steps(tx, tx.update), steps(tx, jax.jit(tx.update))
    chex.assert_trees_all_equal_shapes_and_dtypes(eager, jitted)
    if case.name in EXCEPTIONS:
        chex.assert_trees_all_close(eager, jitted, rtol=1e-6)
        return
    for x, y in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_a_step_without_a_compiler_differs_by_rounding(case):
    tx = case.make()
    params = PARAMS
    state = tx.init(params)
    expected = tx.update(gradient(params), state, params)
    with jax.disable_jit():
        found = tx.update(gradient(params), state, params)
    chex.assert_trees_all_close(found, expected, rtol=2e-6)


@pytest.fixture
def compilations():
    """The number of programs that have been compiled since."""
    found = []

    def listen(event, duration, **_):
        del duration
        if event == '/jax/core/compile/backend_compile_duration':
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


MAKERS = {
    'rmsprop': lambda x: rmsprop_jax.rmsprop(x, decay=1 - x, eps=x, momentum=1 - x),
    'bytes': lambda x: rmsprop_jax.rmsprop(
        x, decay=1 - x, storage=storage.per_statistic(nu=storage.uint8())
    ),
    'torch': lambda x: dialects.torch(x, alpha=1 - x, eps=x, weight_decay=x, momentum=1 - x),
    'keras': lambda x: dialects.keras(x, rho=1 - x, epsilon=x, weight_decay=x, clipnorm=1.0),
    'injected': lambda x: optax.inject_hyperparams(rmsprop_jax.scale_by_rms)(decay=1 - x),
}


@pytest.mark.parametrize('name', MAKERS)
def test_new_numbers_compile_nothing(name, compilations):
    g = gradient(PARAMS)

    def step(x):
        tx = MAKERS[name](x)
        return tx.update(g, tx.init(PARAMS), PARAMS)

    first, _ = step(0.125)
    jax.jit(lambda x: x + 1.25)(1.0)
    assert compilations
    compilations.clear()
    other, _ = step(0.0625)
    assert not compilations
    assert not np.array_equal(first['kernel'], other['kernel'])


def test_a_schedule_compiles_once(compilations):
    tx = rmsprop_jax.rmsprop(optax.exponential_decay(0.1, 10, 0.5))
    state = tx.init(PARAMS)
    updates, state = tx.update(gradient(PARAMS), state)
    compilations.clear()
    for _ in range(3):
        updates, state = tx.update(updates, state)
    assert not compilations


def test_a_schedule_may_look_at_its_count():
    """Under jit nothing can; outside of it, it always could."""
    tx = rmsprop_jax.rmsprop(lambda count: 0.1 if count < 2 else 0.0, eps=0.0)
    found = [float(updates['scale']) for updates, _ in steps(tx, tx.update)]
    assert found[0] == pytest.approx(0.1 / np.sqrt(0.1))
    assert found[1] != 0
    assert found[2:] == [0, 0]


@pytest.mark.parametrize(
    'make',
    [
        lambda x: rmsprop_jax.rmsprop(0.1, weight_decay=0.1, mask=lambda p: x.shape == (3,)),
        lambda x: rmsprop_jax.rmsprop(lambda count: x[0]),
        lambda x: rmsprop_jax.rmsprop(x[0]),
        lambda x: rmsprop_jax.rmsprop(
            0.1, storage=storage.per_leaf(lambda path, shape: (x, storage.float32())[1])
        ),
        lambda x: rmsprop_jax.skip_nonfinite(rmsprop_jax.rmsprop(lambda count: x[0])),
    ],
    ids=['mask', 'schedule', 'array', 'per_leaf', 'skip_nonfinite'],
)
def test_nothing_that_a_transformation_refers_to_is_kept_alive(make):
    held = jnp.ones(3)
    tx, gone = make(held), weakref.ref(held)
    jax.block_until_ready(tx.update(gradient(PARAMS), tx.init(PARAMS), PARAMS))
    del tx, held
    gc.collect()
    assert gone() is None


def test_parameters_are_not_kept_alive():
    tx = rmsprop_jax.rmsprop(0.1, momentum=0.9)
    params = jax.tree.map(jnp.copy, PARAMS)
    gone = weakref.ref(params['kernel'])
    jax.block_until_ready(tx.update(gradient(params), tx.init(params), params))
    del params
    gc.collect()
    assert gone() is None


def test_shared_programs_tell_formats_apart():
    g = {'kernel': jnp.full((64, 64), 0.3)}
    for kept, dtype in ((storage.bfloat16(), jnp.bfloat16), (None, jnp.float32)):
        tx = rmsprop_jax.rmsprop(0.1, storage=kept)
        _, state = tx.update(g, tx.init(g))
        assert state[0].nu['kernel'].dtype == dtype


@pytest.mark.parametrize('x64', [False, True])
def test_numbers_are_as_precise_as_the_arithmetic(x64):
    with jax.enable_x64(x64):
        g = jnp.asarray([0.3], jnp.float64 if x64 else jnp.float32)
        tx = rmsprop_jax.scale_by_rms(decay=0.999, eps=0.0)
        _, state = tx.update(g, tx.init(g))
        exact = (1 - 0.999) * float(g[0]) ** 2
        np.testing.assert_allclose(state.nu, [exact], rtol=1e-15 if x64 else 1e-7)
