"""A million steps: no drift, no counter that wraps, and the edges of every dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case
from drifting import OPTIONS, drift, everywhere, rounded_drift

import rmsprop_jax
from rmsprop_jax import diagnostics, storage

pytestmark = pytest.mark.extended

LAST = np.iinfo(np.int32).max
# As many in the fast suite as show the same, if they do.
for_long = pytest.mark.parametrize(
    'steps', [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)]
)


@for_long
@pytest.mark.parametrize('name', OPTIONS)
def test_float32_does_not_drift_from_float64(name: str, steps: int):
    error, limit = drift(name, steps)
    assert error < limit


@for_long
@pytest.mark.parametrize('kept', [storage.bfloat16(), storage.uint8()], ids=lambda x: x.name)
def test_rounded_moments_do_not_drift(kept: storage.Format, steps: int):
    found = rounded_drift(kept, steps)
    assert found.within, found


KEPT = {
    'float32': None,
    'bfloat16': everywhere(storage.bfloat16()),
    'uint8': everywhere(storage.uint8()),
    'factored': storage.large_leaves(storage.factored(), min_size=1),
}


@for_long
@pytest.mark.parametrize('corrected', [False, True])
@pytest.mark.parametrize(
    ('kept', 'centered'),
    # Variances cannot be factored.
    [(kept, centered) for kept in KEPT for centered in (False, True)][:-1],
)
def test_a_gradient_after_a_silence_is_as_the_first(
    kept: str, centered: bool, corrected: bool, steps: int
):
    """The average has decayed to nothing, and its weight to one: a step of `1 / sqrt(1 - decay)`,
    or over `sqrt(decay (1 - decay))` where the mean counts."""
    # Bytes have no sign for a mean.
    by_itself = centered and kept == 'uint8'
    choice = storage.per_statistic(var=KEPT[kept]) if by_itself else KEPT[kept]
    decay = 0.9
    tx = rmsprop_jax.scale_by_rms(
        decay, 0.0, bias_correction=corrected, centered=centered, storage=choice
    )
    g = jnp.array([[1.0, -1e-3], [1e3, 1e-6]])

    def silence(state: Any, _: Any) -> Any:
        updates, state = tx.update(jnp.zeros_like(g), state)
        return state, jnp.any(updates)

    @jax.jit
    def run(state: Any) -> Any:
        _, state = tx.update(g, state)
        state, moved = jax.lax.scan(silence, state, length=steps)
        updates, state = tx.update(g, state)
        return moved.any(), updates, state

    moved, updates, state = run(tx.init(g))
    assert not moved
    expected = 1 / np.sqrt(1 - decay) / (np.sqrt(decay) if centered else 1)
    # What bytes keep at the lower end of their window counts beside a square of 1e-12.
    rtol = 1e-5 if kept != 'uint8' else 1e-4
    np.testing.assert_allclose(updates, expected * np.sign(g), rtol=rtol)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(state))


COUNTED = [
    'rmsprop-everything',
    'inject_hyperparams',
    'optax.inject_hyperparams',
    'torch',
    'keras',
    'keras_legacy',
    'tensorflow',
    'timm',
    'rmsprop-bfloat16',
    'inject_hyperparams-uint8',
    'skip_nonfinite-coordinate',
]


MEASURED = Case(
    'measured',
    lambda: diagnostics.measured(rmsprop_jax.rmsprop(lambda count: 0.1, momentum=0.5), every=2),
    ('nu', 'trace'),
)


@pytest.mark.parametrize(
    'case', [*(c for c in CASES if c.name in COUNTED), MEASURED], ids=lambda c: c.name
)
def test_counters_saturate(case: Case):
    """At the largest int32 they stay, and steps go on as at a count a little lower."""
    tx = case.make()
    params = {'w': jnp.linspace(0.5, 2, 12).reshape(3, 4)}

    def is_count(path: Any) -> bool:
        return 'count' in jax.tree_util.keystr(path[-1:])

    def started(at: int) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.asarray(at, x.dtype) if is_count(path) else x, tx.init(params)
        )

    @jax.jit
    def run(params: Any, state: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, state), length=8)

    (_, state), updates = run(params, started(LAST - 3))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    counts = {jax.tree_util.keystr(path): x for path, x in leaves if is_count(path)}
    assert counts
    assert all(count == LAST for count in counts.values()), counts
    if case.every == 1 and not case.compact:
        _, lower = run(params, started(LAST - 100))
        np.testing.assert_allclose(updates['w'], lower['w'], rtol=1e-5)
    assert np.isfinite(updates['w']).all()


# By the dtype of gradients, and whether centered: the smallest whose first step is not zero and the
# largest whose square or variance is finite, without epsilon and at a decay of 0.9. They are those
# of docs/faults.md.
EDGES = {
    ('float32', False): (3.5e-19, 1.8e19),
    ('bfloat16', False): (3.5e-19, 1.8e19),
    ('complex64', False): (3.5e-19, 1.8e19),
    ('float64', False): (4.8e-154, 1.3e154),
    ('complex128', False): (4.8e-154, 1.3e154),
    ('float32', True): (3.7e-19, 6.1e19),
    ('bfloat16', True): (3.7e-19, 6.0e19),
    ('complex64', True): (5.2e-19, 6.1e19),
    ('float64', True): (5e-154, 4.4e154),
    ('complex128', True): (7.1e-154, 4.4e154),
}
# Magnitudes of complex numbers, wherever they point.
AROUND = (1, 1j, 0.6 - 0.8j, np.sqrt(0.5) * (1 + 1j))
DIRECTIONS = {'complex64': AROUND, 'complex128': AROUND}


def _first_step(tx: Any, g: jax.Array, jitted: bool) -> tuple[np.ndarray, Any]:
    update = jax.jit(tx.update) if jitted else tx.update
    u, state = update(g, tx.init(g))
    assert u.dtype == g.dtype
    return np.asarray(u, np.complex128 if jnp.iscomplexobj(g) else np.float64), state


@pytest.mark.parametrize(('dtype', 'centered'), EDGES)
@pytest.mark.parametrize('jitted', [False, True])
def test_edges_of_dtypes(dtype: str, centered: bool, jitted: bool):
    low, high = EDGES[dtype, centered]
    tx = rmsprop_jax.scale_by_rms(0.9, 0.0, centered=centered)
    inside = 1 / np.sqrt(0.1 * (0.9 if centered else 1))
    # The weighted squares of the two parts of a deviation underflow apart: the larger is at least
    # half of their sum, so that the edge is blurred by the root of two, and so are steps on it.
    blur = np.sqrt(2) if centered and dtype in DIRECTIONS else 1.0
    for unit in DIRECTIONS.get(dtype, (1, -1)):
        with jax.enable_x64(dtype in ('float64', 'complex128')):
            # Inside, outside, and far out.
            size = np.array([low, high, 0.9 * low / blur, 1.1 * high, 1e-3 * low, 1e3 * high, 0.0])
            u, state = _first_step(tx, jnp.asarray(size * unit, dtype), jitted)
            moment = np.asarray(state.var if centered else state.nu)
        np.testing.assert_allclose(u[1], inside * unit, rtol=1e-2)
        np.testing.assert_allclose(u[0], abs(u[0]) * unit, rtol=1e-2)
        assert 0.99 <= abs(u[0]) / inside <= 1.01 * blur
        np.testing.assert_array_equal(u[2:], np.zeros(5))
        assert np.isfinite(moment[[0, 1, 2, 4, 6]]).all()
        assert np.isinf(moment[[3, 5]]).all()


@pytest.mark.parametrize('centered', [False, True])
@pytest.mark.parametrize('jitted', [False, True])
def test_float16_has_no_edges(centered: bool, jitted: bool):
    g = jnp.array([6e-8, -65504.0, 1.0, 0.0], jnp.float16)
    tx = rmsprop_jax.scale_by_rms(0.9, 0.0, centered=centered)
    u, _ = _first_step(tx, g, jitted)
    inside = 1 / np.sqrt(0.1 * (0.9 if centered else 1))
    np.testing.assert_allclose(u, inside * np.sign(np.asarray(g, np.float64)), rtol=1e-2)


@pytest.mark.parametrize(('dtype', 'centered'), EDGES)
@pytest.mark.parametrize('eps_in_sqrt', [False, True])
def test_with_an_epsilon_there_is_no_lower_edge(dtype: str, centered: bool, eps_in_sqrt: bool):
    low, _ = EDGES[dtype, centered]
    tx = rmsprop_jax.scale_by_rms(0.9, 1e-8, 0.0, eps_in_sqrt, centered=centered)
    slope = 1e4 if eps_in_sqrt else 1e8
    for unit in DIRECTIONS.get(dtype, (1, -1)):
        with jax.enable_x64(dtype in ('float64', 'complex128')):
            # On the edge, and beyond it.
            g = jnp.asarray(np.array([low, 0.9 * low, 1e-3 * low, 1e-15 * low]) * unit, dtype)
            u, _ = _first_step(tx, g, jitted=False)
            wide = np.asarray(g, u.dtype)
        np.testing.assert_allclose(u, wide * slope, rtol=1e-2)


@pytest.mark.parametrize('momentum', [0.5, 0.99])
@pytest.mark.parametrize('kept', ['float32', 'bfloat16'])
def test_velocities_end(kept: str, momentum: float):
    """At zero below the smallest normal number, or at the smallest number of a format, whose steps
    are as small."""
    tx = rmsprop_jax.trace(momentum, storage=KEPT[kept])
    g = jnp.array([1.0, -1e-30, 1e-37, 0.0])

    @jax.jit
    def coast(state: Any) -> Any:
        def step(state: Any, _: Any) -> Any:
            u, state = tx.update(jnp.zeros_like(g), state)
            return state, u

        return jax.lax.scan(step, state, length=12_000)

    state, u = coast(tx.update(g, tx.init(g))[1])
    end = 0.0 if kept == 'float32' else 2.0**-118
    np.testing.assert_array_equal(np.asarray(state.trace, np.float64), end * np.sign(g))
    u, rest = np.asarray(u, np.float64), np.asarray(g, np.float64)
    np.testing.assert_allclose(u[-1], momentum * end * np.sign(rest), rtol=1e-6)
    # They never grow on the way, but by what rounding at random adds, and never turn.
    assert (np.abs(u) <= np.abs(rest) * (1 if kept == 'float32' else 1.1) + end).all()
    assert (u * np.sign(rest) >= 0).all()
