"""Measurements against NumPy, and that measuring changes nothing and costs nothing when unread."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from reference import average_weights
from test_contract import gradient, tree

import rmsprop_jax
from rmsprop_jax import diagnostics, dialects, storage

BYTES = storage.large_leaves(storage.uint8(), min_size=1, min_ndim=0)
PATHS = ('bias', 'dense/kernel', 'scale')


def params(seed=0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {'dense': {'kernel': (40, 30), 'bias': (30,)}, 'out': {'kernel': (30, 7)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def gradients(steps=6) -> list[dict]:
    """Of sizes over many decades, with zeros."""

    def leaf(p: jax.Array, seed: int) -> jax.Array:
        rng = np.random.default_rng(seed)
        size = 10 ** rng.uniform(-6, 2, p.shape) * (rng.uniform(size=p.shape) > 0.1)
        return jnp.asarray(size * rng.normal(size=p.shape), jnp.float32)

    return [jax.tree.map(functools.partial(leaf, seed=i), params()) for i in range(steps)]


def run(tx, start, grads):
    """Parameters and state before and after the last of some steps, and its updates."""
    update = jax.jit(tx.update)
    p, state = start, tx.init(start)
    before = p, state, {}
    for g in grads:
        before = p, state, {}
        updates, state = update(g, state, p)
        p, before = optax.apply_updates(p, updates), (p, state, updates)
    return before


# Against NumPy


@pytest.mark.parametrize('size', [1, 2, 3, 10, 1000])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_step_sizes_are_quantiles(size, dtype):
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.normal(size=size) * 10.0 ** rng.integers(-30, 37, size), dtype)
    shares = (0.0, 0.1, 0.25, 0.5, 0.9, 1.0)
    measure = jax.jit(lambda x: diagnostics.step_sizes(x, quantiles=shares))
    expected = np.quantile(
        np.abs(np.asarray(x, np.complex64)), shares, method='inverted_cdf', axis=None
    )
    # Magnitudes of complex numbers are rounded twice.
    np.testing.assert_allclose(measure(x)[''], expected, rtol=2e-7 * jnp.iscomplexobj(x))


def test_step_sizes_of_what_is_no_number():
    x = [jnp.array([jnp.nan, 1.0, -jnp.inf, 0.0]), jnp.zeros((0, 3)), jnp.array(-2.0)]
    found = diagnostics.step_sizes(x, 'all', quantiles=(0.2, 0.4, 0.6, 0.8, 1.0))['all']
    np.testing.assert_array_equal(found, [0.0, 1.0, 2.0, np.inf, np.nan])
    np.testing.assert_array_equal(diagnostics.step_sizes(x)['1'], np.zeros(5))


def test_counts_are_exact_beyond_the_integers_of_float32():
    x = jnp.ones(2**24 + 5).at[0].set(jnp.nan)
    assert diagnostics.nonfinite_counts({'x': jnp.log(x - x)})['x'] == 2**24 + 5


def test_measurements_of_known_steps():
    grads = gradients()
    tx = diagnostics.measured(rmsprop_jax.rmsprop(0.1, momentum=0.9), quantiles=(0.1, 0.9))
    p, state, updates = run(tx, params(), grads)
    found = diagnostics.read(state, p)
    for name in ('dense/kernel', 'dense/bias', 'out/kernel'):
        layer, leaf = name.split('/')
        u, value = (np.asarray(x[layer][leaf], np.float64) for x in (updates, p))
        sizes = np.quantile(np.abs(u), (0.1, 0.9), method='inverted_cdf')
        np.testing.assert_array_equal(found[f'step_size/{name}'], sizes.astype(np.float32))
        ratio = np.linalg.norm(u) / np.linalg.norm(value)
        np.testing.assert_allclose(found[f'update_ratio/{name}'], ratio, rtol=1e-5)


def test_ratios_at_zero():
    updates = {'a': jnp.zeros(2), 'b': jnp.ones(2), 'c': jnp.zeros(2)}
    start = {'a': jnp.zeros(2), 'b': jnp.zeros(2), 'c': jnp.ones(2)}
    with jax.debug_nans(True):
        found = jax.jit(diagnostics.update_ratios)(updates, start)
    assert {name: float(x) for name, x in found.items()} == {'a': 0, 'b': np.inf, 'c': 0}


@pytest.mark.extended
@pytest.mark.parametrize('centered', [False, True])
@pytest.mark.parametrize('corrected', [False, True])
@pytest.mark.parametrize('inside', [False, True])
def test_epsilon_shares(centered, corrected, inside):
    grads, decay, eps = gradients(), 0.8, 0.3

    def small(count):
        return eps * (1.0 + count)

    inner = rmsprop_jax.rmsprop(
        0.1, decay, small, 0.01, inside, centered=centered, bias_correction=corrected
    )
    tx = diagnostics.measured(
        optax.chain(optax.identity(), inner), eps=small, eps_in_sqrt=inside, labels='all'
    )
    p, state, _ = run(tx, params(), grads)
    weights, left = average_weights([decay] * len(grads))
    total = weights.sum() if corrected else 1
    dominated = size = 0
    for past in zip(*map(jax.tree.leaves, grads), strict=True):
        g = np.stack(past).astype(np.longdouble)
        w = weights.reshape(-1, *[1] * (g.ndim - 1))
        moment = (w * g**2).sum(0) + left * 0.01
        if centered:
            moment = moment - (w * g).sum(0) ** 2 / (total if corrected else 1)
        moment = moment / total
        dominated += ((moment if inside else np.sqrt(moment)) < eps * len(grads)).sum()
        size += moment.size
    assert 0.1 < dominated / size < 0.9
    np.testing.assert_allclose(
        diagnostics.read(state, p, 'all')['epsilon_share/all'], float(dominated / size), rtol=1e-6
    )


@pytest.mark.extended
def test_compact_shares():
    grads = [jax.tree.map(lambda x: x * 1e-11, g) for g in gradients()]
    inner = rmsprop_jax.rmsprop(0.1, 0.99, storage=BYTES)
    tx = diagnostics.measured(inner, storage=BYTES, labels=diagnostics.by_depth(1))
    _, before, _ = run(tx, params(), grads[:-1])
    p, after, _ = run(tx, params(), grads)
    found = diagnostics.read(after, p, diagnostics.by_depth(1))
    for group in ('dense', 'out'):
        old, new, g = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree[group])])
            for tree in (before.inner[0].nu, after.inner[0].nu, grads[-1])
        )
        # Of 256 bytes the smallest positive number is byte 1, the largest is byte 255.
        expected = {
            'saturated_low': np.mean(new == 1),
            'saturated_high': np.mean(new == 255),
            'stalled': np.mean((old == new) & (g != 0)),
        }
        assert expected['stalled'] > 0.5
        assert expected['saturated_low'] > 0.1
        for name, share in expected.items():
            np.testing.assert_allclose(found[f'{name}/{group}'], share, rtol=1e-6)


def test_a_statistic_below_its_format_is_stalled_for_good():
    """What rounding to the nearest does to an average, the end of a format does here."""
    start = {'kernel': jnp.ones((64, 64))}
    tx = diagnostics.measured(
        rmsprop_jax.scale_by_rms(0.9, storage=storage.uint8()), storage=storage.uint8()
    )
    for size, least, most in ((1.0, 0.0, 0.9), (1e-14, 1.0, 1.0)):
        grads = [jax.tree.map(lambda p, size=size: size * p, start)] * 40
        p, state, _ = run(tx, start, grads)
        assert least <= diagnostics.read(state, p)['stalled/kernel'] <= most


def test_nonfinite_entries_are_counted_where_they_are():
    start = params()
    bad = jax.tree.map(jnp.ones_like, start)
    bad['dense']['bias'] = bad['dense']['bias'].at[:3].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    tx = diagnostics.measured(optax.apply_if_finite(rmsprop_jax.rmsprop(0.1), 3))
    updates, state = jax.jit(tx.update)(bad, tx.init(start), start)
    found = diagnostics.read(state, start)
    counts = {k: int(x) for k, x in found.items() if k.startswith('nonfinite') and x}
    assert counts == {'nonfinite_gradients/dense/bias': 3}
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, start))


# Groups


@pytest.mark.extended
@pytest.mark.parametrize(
    ('labels', 'names'),
    [
        (None, {'dense/bias', 'dense/kernel', 'out/kernel'}),
        ('all', {'all'}),
        ({'dense': 'first', 'out': {'kernel': 'last'}}, {'first', 'last'}),
        (diagnostics.by_depth(1), {'dense', 'out'}),
        (diagnostics.by_depth(9), {'dense/bias', 'dense/kernel', 'out/kernel'}),
        (lambda p: jax.tree.map(lambda x: f'{x.ndim} axes', p), {'1 axes', '2 axes'}),
    ],
)
def test_groups(labels, names):
    tx = diagnostics.measured(rmsprop_jax.rmsprop(0.1), labels=labels)
    p, state, updates = run(tx, params(), gradients(2))
    found = diagnostics.read(state, p, labels)
    assert {k.removeprefix('step_size/') for k in found if k.startswith('step_size')} == names
    assert sum(k.startswith('nonfinite_updates') for k in found) == 3
    if len(names) == 1:
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates)])
        median = np.quantile(np.abs(flat), 0.5, method='inverted_cdf')
        assert found['step_size/all'][2] == median


def test_a_single_array_has_no_path():
    tx = diagnostics.measured(rmsprop_jax.rmsprop(0.1))
    x = jnp.ones(3)
    _, state = tx.update(x, tx.init(x), x)
    assert set(diagnostics.read(state, x)) == {
        'step_size',
        'update_ratio',
        'nonfinite_gradients',
        'nonfinite_updates',
    }


# In programs


@pytest.mark.extended
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_every_optimizer_can_be_measured(case: Case):
    """In a chain, under jit, scan and donation; what is measured does not change."""
    tx = optax.chain(diagnostics.measured(case.tx), optax.scale(0.5))
    plain = optax.chain(case.tx, optax.scale(0.5))

    def steps(tx, carry):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(gradient(params), state, params)
            return (params, state), (updates, state)

        return jax.lax.scan(step, carry, length=2)

    start = tree()
    state = tx.init(start)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, start))
    # What walks over states by their parameters leaves measurements alone.
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)
    run = jax.jit(lambda one, other: (steps(tx, one), steps(plain, other)), donate_argnums=(0, 1))
    one, other = ((tree(), tx.init(start)), (tree(), plain.init(start)))
    (_, (updates, states)), (_, (expected, inner)) = run(one, other)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    chex.assert_trees_all_close(states[0].inner, inner[0], rtol=1e-6)
    found = diagnostics.read(optax.tree.get(states, 'measurements'), start)
    assert {k.removeprefix('update_ratio/') for k in found if 'ratio' in k} == set(PATHS)
    largest = 2 * np.abs(expected['bias']).max(axis=1)
    np.testing.assert_allclose(found['step_size/bias'][:, -1], largest, rtol=1e-6)


@pytest.mark.extended
def test_vmap_measures_each_run():
    tx = diagnostics.measured(rmsprop_jax.rmsprop(0.1, storage=BYTES), storage=BYTES, every=2)

    def last(p):
        state = tx.init(p)
        for _ in range(4):
            updates, state = tx.update(p, state, p)
            p = optax.apply_updates(p, updates)
        return state.measurements

    many = [params(i) for i in range(3)]
    together = jax.jit(jax.vmap(last))(jax.tree.map(lambda *x: jnp.stack(x), *many))
    apart = jax.tree.map(lambda *x: jnp.stack(x), *map(jax.jit(last), many))
    chex.assert_trees_all_close(together, apart, rtol=1e-5)
    found = diagnostics.read(together, many[0])
    assert found['step_size/out/kernel'].shape == (3, 5)
    assert found['stalled/out/kernel'].shape == (3,)


def test_every_so_many_steps():
    tx = diagnostics.measured(rmsprop_jax.rmsprop(lambda count: 1.0 + count, 0.0), every=3)
    p = jnp.ones(2)
    state, seen = tx.init(p), []
    update = jax.jit(tx.update)
    for _ in range(7):
        _, state = update(p, state, p)
        seen.append(float(diagnostics.read(state, p)['step_size'][2]))
    np.testing.assert_allclose(seen, [0, 0, 3, 3, 3, 6, 6])


@pytest.mark.extended
@pytest.mark.parametrize('axis_type', [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_meshes_do_not_matter(axis_type):
    mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(axis_type,) * 2)
    start = {'kernel': jnp.ones((8, 64)), 'bias': jnp.zeros(64)}
    grads = jax.tree.map(lambda p: jnp.linspace(-1, 2, p.size).reshape(p.shape), start)
    where = {
        'kernel': NamedSharding(mesh, P('data', 'model')),
        'bias': NamedSharding(mesh, P('model')),
    }
    tx = diagnostics.measured(
        rmsprop_jax.rmsprop(0.1, storage=BYTES), labels='all', storage=BYTES, eps=1e-8
    )

    def step(params, grads):
        return tx.update(grads, tx.init(params), params)[1].measurements

    alone = jax.jit(step)(start, grads)
    with jax.set_mesh(mesh):
        placed = jax.jit(step)(*(jax.device_put(tree, where) for tree in (start, grads)))
    chex.assert_trees_all_close(jax.device_get(placed), jax.device_get(alone), rtol=1e-5)


@pytest.mark.extended
def test_hyperparameters_may_be_injected():
    def make(learning_rate, eps):
        return diagnostics.measured(rmsprop_jax.rmsprop(learning_rate, eps=eps), eps=eps)

    start, grads = params(), gradients(1)
    tx = rmsprop_jax.inject_hyperparams(make)(learning_rate=0.1, eps=1e-3)
    state = tx.init(start)
    shares = []
    for eps in (1e-3, 10.0):
        state.hyperparams['eps'] = jnp.float32(eps)
        _, after = jax.jit(tx.update)(grads[0], state, start)
        shares.append(float(diagnostics.read(after, start)['epsilon_share/dense/kernel']))
        nu = 0.1 * np.square(np.asarray(grads[0]['dense']['kernel'], np.float64))
        np.testing.assert_allclose(shares[-1], np.mean(nu < eps), rtol=1e-6)
    assert shares[0] < shares[1]


def test_parts_without_moments_have_no_epsilon():
    start = params()
    tx = optax.partition(
        {'ours': rmsprop_jax.rmsprop(0.1, eps=1e6), 'sgd': optax.sgd(0.1)},
        {'dense': 'ours', 'out': 'sgd'},
    )
    tx = diagnostics.measured(tx, eps=1e6)
    p, state, _ = run(tx, start, gradients(1))
    found = diagnostics.read(state, p)
    shares = {k.removeprefix('epsilon_share/'): float(x) for k, x in found.items() if 'eps' in k}
    assert shares == {'dense/bias': 1.0, 'dense/kernel': 1.0, 'out/kernel': 0.0}


def test_the_part_of_a_partition_can_be_measured():
    start = params()
    ours = diagnostics.measured(rmsprop_jax.rmsprop(0.1), labels='all')
    tx = optax.partition({'ours': ours, 'sgd': optax.sgd(0.1)}, {'dense': 'ours', 'out': 'sgd'})
    _, state, updates = run(tx, start, gradients(1))
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates['dense'])])
    found = diagnostics.read(state, {'dense': start['dense']}, 'all')
    np.testing.assert_allclose(found['step_size/all'][-1], np.abs(flat).max(), rtol=1e-6)


def test_complex_arrays_as_pairs():
    start = {'w': jnp.array([3.0 + 4.0j, 0.0, 1.0j], jnp.complex64)}
    tx = diagnostics.measured(dialects.torch(0.1), eps=1e-8, eps_in_sqrt=False)
    _, state = tx.update(start, tx.init(start), start)
    found = diagnostics.read(state, start)
    # Of six real numbers three have a second moment of zero.
    np.testing.assert_allclose(found['epsilon_share/w'], 0.5)
    np.testing.assert_allclose(found['step_size/w'][-1], np.sqrt(2), rtol=1e-6)


@pytest.mark.extended
def test_derivatives_pass_by():
    def final(rate, wrap):
        tx = wrap(rmsprop_jax.rmsprop(rate))
        p, state = params(), tx.init(params())
        for g in gradients(2):
            updates, state = tx.update(g, state, p)
            p = optax.apply_updates(p, updates)
        return sum(jnp.sum(x) for x in jax.tree.leaves(p))

    measured = functools.partial(diagnostics.measured, eps=1e-8)
    slopes = [jax.grad(final)(0.1, wrap) for wrap in (measured, lambda tx: tx)]
    np.testing.assert_allclose(*slopes, rtol=1e-6)


@pytest.mark.parametrize('strict', ['standard', 'strict'])
def test_wide_precision(strict):
    with jax.enable_x64(True), jax.numpy_dtype_promotion(strict):
        p = {'w': jnp.linspace(-1, 1, 7, dtype=jnp.float64)}
        tx = diagnostics.measured(rmsprop_jax.rmsprop(0.1, bias_correction=True), eps=1e-8)
        _, state = jax.jit(tx.update)(p, tx.init(p), p)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(p))
        assert state.measurements.step_size.dtype == jnp.float32


@pytest.mark.extended
def test_measured_states_are_stored(tmp_path):
    serialization = pytest.importorskip('flax.serialization')
    ocp = pytest.importorskip('orbax.checkpoint')
    tx = diagnostics.measured(rmsprop_jax.rmsprop(0.1), eps=1e-8)
    _, state, _ = run(tx, params(), gradients(2))
    template = tx.init(params())
    stored = serialization.to_bytes(state)
    chex.assert_trees_all_equal(serialization.from_bytes(template, stored), state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'state', state)
        checkpointer.wait_until_finished()
        chex.assert_trees_all_equal(checkpointer.restore(tmp_path / 'state', template), state)


# No cost when absent


def program(tx, returned):
    """What XLA makes of a step, without the names of operations and where they come from."""
    start = tree()
    state = tx.init(start)
    step = jax.jit(lambda g, s, p: returned(tx.update(g, s, p)), keep_unused=False)
    compiled = step.lower(gradient(start), state, start).compile().as_text()
    compiled = re.sub(r', metadata=\{[^}]*\}|^HloModule.*$', '', compiled, flags=re.MULTILINE)
    operations = re.findall(r'= (\S+) ([a-z-]+)\(', compiled)
    return sorted(operations)


@pytest.mark.parametrize('every', [1, 10])
def test_measurements_that_nobody_reads_cost_nothing(every):
    inner = rmsprop_jax.rmsprop(0.1, momentum=0.9, centered=True)
    tx = diagnostics.measured(inner, eps=1e-8, every=every)
    plain = program(inner, lambda out: out)
    unread = program(tx, lambda out: (out[0], out[1].inner))
    assert unread == plain
    assert len(program(tx, lambda out: out)) > 2 * len(plain)


def test_an_optimizer_is_traced_alike_before_and_after_it_was_measured():
    start = tree()
    inner = rmsprop_jax.rmsprop(0.1)
    traced = [str(jax.make_jaxpr(inner.update)(start, inner.init(start), start))]
    tx = diagnostics.measured(inner)
    tx.update(start, tx.init(start), start)
    traced.append(str(jax.make_jaxpr(inner.update)(start, inner.init(start), start)))
    assert traced[0] == traced[1]


# Refusals


def measure(**options):
    return diagnostics.measured(rmsprop_jax.rmsprop(0.1), **options)


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        (lambda p: measure(quantiles=(0.5, 1.5)), ValueError, r'quantiles must be .*\[0, 1\]'),
        (lambda p: measure(quantiles=()), ValueError, 'quantiles must be one or more'),
        (lambda p: measure(every=0), ValueError, 'every must be an integer of at least 1'),
        (lambda p: measure(eps=-1.0), ValueError, 'eps must be in'),
        (lambda p: measure(eps_in_sqrt=1), TypeError, 'eps_in_sqrt must be True or False'),
        (lambda p: measure(storage='uint8'), TypeError, 'storage must be a format'),
        (lambda p: diagnostics.by_depth(0), ValueError, 'depth must be an integer'),
        (lambda p: measure(labels=3).init(p), TypeError, r"labels\['dense'\]\['bias'\] must be"),
        (lambda p: measure(storage=BYTES).init(p), ValueError, 'is stored as float32'),
        (lambda p: measure().update(p, measure().init(p)), ValueError, 'measured needs params'),
        (lambda p: diagnostics.read(measure().init(p), p, 'all'), ValueError, '3 groups, but'),
        (
            lambda p: diagnostics.read(rmsprop_jax.rmsprop(0.1).init(p), p),
            ValueError,
            'measurements of 0 optimizers',
        ),
        (
            lambda p: diagnostics.measured(optax.sgd(0.1), eps=1e-8).init(p),
            ValueError,
            'no second moment',
        ),
        (
            lambda p: diagnostics.measured(optax.flatten(rmsprop_jax.rmsprop(1.0)), eps=1.0).init(
                p
            ),
            ValueError,
            'does not exist, but a leaf with that path',
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(params())
