"""What every public transformation must do, whatever it computes.

Ways of running it, homes of parameters and derivatives at zero are crossed in `test_crossing.py`.
"""

import collections
import functools
import inspect
import pickle
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from cases import CASES, Case
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_flatten_with_path

import rmsprop_jax
from rmsprop_jax._checks import inexact_dtype


def each(cases):
    return pytest.mark.parametrize('case', cases, ids=lambda case: case.name)


each_case = each(CASES)
each_with_moments = each([case for case in CASES if case.moments])
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64)


def tree(dtype=jnp.float32) -> dict:
    return {
        'dense': {'kernel': jnp.linspace(-2, 3, 12, dtype=dtype).reshape(4, 3)},
        'bias': jnp.array([0.5, 0.0, -1.5], dtype),
        'scale': jnp.array(2.0, dtype),
    }


def gradient(params: dict) -> dict:
    return jax.tree.map(lambda p: jnp.sin(2 * p), params)


def steps(tx, params, count=3, update=None):
    """Parameters and state after some steps from scratch."""
    state = tx.init(params)
    for _ in range(count):
        updates, state = (update or tx.update)(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def moments(case: Case, state):
    return [optax.tree.get(state, name) for name in case.moments]


def assert_variant_agrees(test: chex.TestCase, case: Case):
    """Compiled whole, the results are those of a step by itself."""
    params = tree()
    state = case.tx.init(params)
    expected = case.tx.update(gradient(params), state, params)
    got = test.variant(case.tx.update)(gradient(params), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    chex.assert_trees_all_close(got, expected, rtol=2e-6)


named_cases = parameterized.named_parameters((case.name, case) for case in CASES)


class JitTest(chex.TestCase):
    @chex.variants(with_jit=True)
    @named_cases
    def test_jit_agrees(self, case: Case):
        assert_variant_agrees(self, case)


@pytest.mark.extended
class PmapTest(chex.TestCase):
    @chex.variants(with_pmap=True)
    @named_cases
    def test_pmap_agrees(self, case: Case):
        assert_variant_agrees(self, case)


@pytest.mark.parametrize(
    ('case', 'dtype'),
    [(c, d) for c in CASES for d in DTYPES if not (c.real_only and d == jnp.complex64)],
    ids=lambda x: x.name if isinstance(x, Case) else jnp.dtype(x).name,
)
def test_dtypes(case, dtype):
    """Updates have the gradients' dtype; moments are as wide as float32, and never change."""
    params = tree(dtype)
    state = jax.eval_shape(case.tx.init, params)
    updates, after = jax.eval_shape(case.tx.update, gradient(params), state, params)
    rounded = case.rounds_params and dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree(jnp.float32) if rounded else params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    for leaf in jax.tree.leaves(moments(case, state)):
        assert case.compact or leaf.dtype in (jnp.float32, jnp.complex64)
        assert not leaf.weak_type


@pytest.mark.extended
@each_case
def test_narrow_gradients_of_wide_parameters(case):
    params = tree()
    narrow = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradient(params))
    state = jax.eval_shape(case.tx.init, params)
    updates, after = jax.eval_shape(case.tx.update, narrow, state, params)
    expected = params if case.rewrites_params else narrow
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.extended
@each_case
def test_float64_and_strict_promotion(case):
    dtypes = (jnp.float64, jnp.float32) if case.real_only else (jnp.float64, jnp.complex128)
    with jax.enable_x64(True), jax.numpy_dtype_promotion('strict'):
        for dtype in dtypes:
            params = tree(dtype)
            state = jax.eval_shape(case.tx.init, params)
            grads = jax.tree.map(jnp.square, params)
            updates, after = jax.eval_shape(case.tx.update, grads, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
            wide = jnp.complex128 if dtype == jnp.complex128 else dtype
            real = jnp.finfo(dtype).dtype
            for leaf in jax.tree.leaves(moments(case, state)):
                assert case.compact or leaf.dtype in (wide, real)


@each_case
def test_traces_once(case):
    chex.clear_trace_counter()
    tx = case.tx
    params = tree()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    init = jax.jit(chex.assert_max_traces(tx.init, n=1))
    chex.assert_trees_all_equal(init(params), init(gradient(params)))
    steps(tx, params, 4, update)


@each_case
def test_each_gradient_is_checked_once_a_trace(case):
    """At the edge of the transformation that is called; those inside of it trust it."""
    checked = collections.Counter()

    def look(frame, event, _):
        if event == 'call' and frame.f_code is inexact_dtype.__code__:
            checked[frame.f_locals['name']] += 1

    tx, params = case.tx, tree()
    state = jax.eval_shape(tx.init, params)
    sys.setprofile(look)
    try:
        # Another function each time, whose trace JAX has not kept from another test.
        jax.make_jaxpr(lambda *args: tx.update(*args))(params, state, params)
    finally:
        sys.setprofile(None)
    names = [f'updates{keystr(path)}' for path, _ in tree_flatten_with_path(params)[0]]
    assert checked == dict.fromkeys(names, 1)


@each([c for c in CASES if not (c.needs_params or c.rewrites_params or c.name == 'cautious')])
def test_parameters_that_no_step_reads_stay_as_they_are(case):
    """Nothing is computed from them, not even their conversion to float32."""
    tx, params = case.tx, tree(jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)
    program = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
    count = len(jax.tree.leaves(params))
    assert not {*program.invars[-count:]} & {
        x for eqn in program.eqns for x in eqn.invars if not hasattr(x, 'val')
    }


@pytest.mark.extended
@each_case
def test_scan_equals_loop(case):
    tx = case.tx

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = tree()
    scanned = jax.jit(
        lambda params: jax.lax.scan(step, (params, tx.init(params)), None, length=5)[0]
    )(params)
    # Different fusions round differently, and a small variance amplifies that.
    chex.assert_trees_all_close(scanned, steps(tx, params, 5), rtol=1e-4, atol=1e-5)


@pytest.mark.extended
@each([case for case in CASES if not case.compact])
def test_gradient_through_training_matches_finite_differences(case):
    with jax.enable_x64(True):
        tx = case.tx
        # Away from zero gradients, where updates turn over within sqrt(eps).
        params = jax.tree.map(lambda p: p + 0.3, tree(jnp.float64))

        def loss(shift):
            shifted = jax.tree.map(lambda p: p + shift, params)
            return sum(jnp.sum(jnp.sin(p)) for p in jax.tree.leaves(steps(tx, shifted)[0]))

        h = 1e-6
        numerical = (loss(h) - loss(-h)) / (2 * h)
        np.testing.assert_allclose(jax.grad(loss)(0.0), numerical, rtol=1e-4)


@each_case
def test_abstract_evaluation(case):
    tx = case.tx
    params = tree()
    abstract = jax.eval_shape(lambda: params)
    state = jax.eval_shape(tx.init, abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(abstract), tx.init(params))
    out = jax.eval_shape(tx.update, abstract, state, abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, (params, tx.init(params)))


@pytest.mark.extended
@each_case
def test_lowers_for_every_platform(case):
    """`jax.export` lowers for TPU and GPU without either; it does not compile."""
    tx = case.tx
    params = tree()
    state = tx.init(params)
    platforms = ('cpu', 'cuda', 'tpu')
    for function, arguments in ((tx.init, (params,)), (tx.update, (params, state, params))):
        exported = jax.export.export(jax.jit(function), platforms=platforms)(*arguments)
        assert exported.platforms == platforms
    got = exported.call(gradient(params), state, params)
    chex.assert_trees_all_close(got, tx.update(gradient(params), state, params), rtol=1e-5)


@pytest.mark.extended
@each_with_moments
@pytest.mark.parametrize('axis_type', [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize('memory', ['device', 'pinned_host'])
def test_init_keeps_sharding_and_memory(case, axis_type, memory):
    tx = case.tx
    mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(axis_type, axis_type))
    placed = functools.partial(NamedSharding, mesh, memory_kind=memory)
    sharding = placed(P('data', 'model'))
    params = {'w': jax.device_put(jnp.ones((8, 6), jnp.bfloat16), sharding)}
    for init in (tx.init, jax.jit(tx.init)):
        for leaf in jax.tree.leaves(moments(case, init(params))):
            rows, cols = leaf.shape == (8,), leaf.shape == (6,)
            spec = P('data') if rows else P('model') if cols else P('data', 'model')
            assert leaf.sharding.is_equivalent_to(placed(spec), leaf.ndim)
            assert leaf.sharding.memory_kind == memory
            # No device ever holds more than its own eighth, or its share of a row or column.
            own = (2,) if rows else (3,) if cols else (2, 3)
            assert {shard.data.shape for shard in leaf.addressable_shards} == {own}


@pytest.mark.extended
@each_with_moments
def test_init_leaves_open_where_unplaced_parameters_go(case):
    state = case.tx.init(tree())
    assert not any(leaf.committed for leaf in jax.tree.leaves(state))
    one = jax.device_put(tree(), jax.devices()[1])
    for leaf in jax.tree.leaves(moments(case, case.tx.init(one))):
        assert leaf.devices() == {jax.devices()[1]}


@each_case
def test_init_values_do_not_depend_on_parameters(case):
    """`init` under jit reads the parameters for their sharding only."""
    tx = case.tx
    odd = {'w': jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0])}
    plain = {'w': jnp.ones(4)}
    chex.assert_trees_all_equal(jax.jit(tx.init)(odd), tx.init(plain))


ODD_TREES = {
    'empty dict': {},
    'None': None,
    'empty array': {'empty': jnp.zeros((0, 3))},
    'None in a dict': {'none': None, 'w': jnp.ones(2)},
    'masked': {'masked': optax.MaskedNode(), 'w': jnp.ones(2)},
    'NumPy': {'numpy': np.ones(2, np.float32), 'scalar': np.float32(1)},
    'Python': {'python': 1.5},
    'list': [jnp.ones(2), (jnp.ones(()), jnp.zeros(1))],
    'array': jnp.ones(3),
}


@pytest.mark.extended
@pytest.mark.parametrize(
    ('case', 'name'),
    # An inner transformation cannot tell params=None from an empty tree that is None.
    [(c, name) for c in CASES for name in ODD_TREES if not (c.needs_params and name == 'None')],
    ids=lambda x: x.name if isinstance(x, Case) else x,
)
def test_odd_trees(case, name):
    tx, params = case.tx, ODD_TREES[name]
    state = tx.init(params)
    update = jax.jit(tx.update)
    _, state = update(params, state, params)
    updates, _ = update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for x, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert (x.shape, x.dtype) == (jnp.shape(p), jnp.result_type(p))
    optax.apply_updates(params, updates)


@pytest.mark.extended
@each_case
def test_extra_args_and_conditionals(case):
    tx = optax.with_extra_args_support(case.tx)
    params = tree()
    state = tx.init(params)

    @jax.jit
    def maybe(flag, state):
        taken = functools.partial(tx.update, gradient(params), params=params, value=1.0)
        return jax.lax.cond(flag, taken, lambda state: (params, state), state)

    chex.assert_trees_all_equal(
        maybe(True, state)[1], jax.jit(tx.update)(gradient(params), state, params)[1]
    )
    chex.assert_trees_all_equal(maybe(False, state)[1], state)


@pytest.mark.extended
@each_with_moments
def test_state_survives_storage(case, tmp_path):
    serialization = pytest.importorskip('flax.serialization')
    ocp = pytest.importorskip('orbax.checkpoint')
    tx = case.tx
    _, state = steps(tx, tree())
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state)), state)
    template = tx.init(tree())
    stored = serialization.to_bytes(state)
    chex.assert_trees_all_equal(serialization.from_bytes(template, stored), state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'state', state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / 'state', template)
    chex.assert_trees_all_equal(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


@each_case
def test_moments_are_found_by_name(case):
    tx = case.tx
    params = tree()
    _, state = steps(tx, params)
    for name in ('nu', 'mu', 'var', 'trace'):
        found = optax.tree.get_all_with_path(state, name)
        present = [moment for _, moment in found if moment is not None]
        assert len(present) == (name in case.moments), name
        for moment in present:
            if case.name != 'torch-factored':
                chex.assert_trees_all_equal_shapes(moment, params)


@pytest.mark.extended
@each_with_moments
def test_map_params(case):
    tx = case.tx
    state = tx.init(tree())
    doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
    back = optax.tree.map_params(tx, lambda x: x - 1, doubled)
    chex.assert_trees_all_equal(back, state)
    for before, after in zip(moments(case, state), moments(case, doubled), strict=True):
        chex.assert_trees_all_equal(after, jax.tree.map(lambda x: x + 1, before))


@pytest.mark.extended
@each([case for case in CASES if case.every == 1])
def test_accumulation_over_two_halves_of_a_step_is_the_step(case):
    params = tree()
    expected = steps(case.tx, params, 2)[0]
    accumulated = optax.MultiSteps(case.tx, every_k_schedule=2)
    state = accumulated.init(params)
    update = jax.jit(accumulated.update)
    got = params
    for _ in range(2):
        for half in (0.5, 1.5):
            grads = jax.tree.map(lambda g, half=half: half * g, gradient(got))
            updates, state = update(grads, state, got)
            held = got if half == 0.5 else None
            got = optax.apply_updates(got, updates)
            if held is not None:
                chex.assert_trees_all_equal(got, held)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.extended
@each([case for case in CASES if case.elementwise])
def test_masked_leaves_are_left_alone(case):
    params = tree()
    mask = {'dense': True, 'bias': False, 'scale': False}
    masked = optax.masked(case.tx, mask)
    grads = gradient(params)
    updates, _ = masked.update(grads, masked.init(params), params)
    alone, tx = {'dense': params['dense']}, case.tx
    expected, _ = tx.update({'dense': grads['dense']}, tx.init(alone), alone)
    chex.assert_trees_all_equal(updates, {**grads, **expected})


@each([case for case in CASES if case.descends])
def test_converges(case):
    tx = optax.chain(case.tx)
    target = jnp.array([1.0, -2.0])

    def loss(x):
        return jnp.sum((x - target) ** 2 * jnp.array([1.0, 10.0]))

    @jax.jit
    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(loss)(x), state, x)
        return (optax.apply_updates(x, updates), state), loss(x)

    x = jnp.zeros(2)
    _, losses = jax.lax.scan(step, (x, tx.init(x)), None, length=600)
    assert losses[-50:].max() < 0.05 * losses[0]


def test_every_public_factory_has_a_case():
    made = {case.name.split('-')[0].removeprefix('optax.') for case in CASES}
    public = {**vars(rmsprop_jax), **vars(rmsprop_jax.dialects)}
    others = {'carry_over', 'identify_dialect', 'labels_by_path', 'nonfinite_entries', 'reset'}
    factories = {
        name
        for name, value in public.items()
        if inspect.isfunction(value)
        and (value.__module__ == 'rmsprop_jax.dialects' or name in vars(rmsprop_jax))
        and not name.startswith('_')
    }
    assert factories - others == made


@pytest.mark.parametrize('name', ['rmsprop', 'scale_by_rms', 'scale_by_stddev', 'trace'])
def test_signatures_contain_those_of_optax(name):
    """Same names, order, kinds and defaults as the installed Optax; what we add is keyword-only."""
    # Accumulators have the widest dtype by themselves, and storage formats are to choose others.
    left_out = {'accumulator_dtype'}
    theirs = inspect.signature(getattr(optax, name)).parameters.values()
    ours = list(inspect.signature(getattr(rmsprop_jax, name)).parameters.values())
    shared = [p for p in theirs if p.name not in left_out]
    assert len(ours) >= len(shared) >= 1
    for their, our in zip(shared, ours[: len(shared)], strict=True):
        assert (our.name, our.kind, our.default) == (their.name, their.kind, their.default)
    assert all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in ours[len(shared) :])


def test_count_saturates():
    tx = rmsprop_jax.scale_by_rms()
    params = jnp.ones(2)
    last = np.iinfo(np.int32).max
    state = tx.init(params)._replace(count=jnp.int32(last))
    assert tx.update(params, state)[1].count == last


def test_schedules_see_the_zero_based_count():
    seen = []

    def schedule(count):
        seen.append(int(count))
        return 0.9

    tx = optax.chain(rmsprop_jax.scale_by_rms(decay=schedule, eps=schedule))
    steps(tx, tree(), 3)
    assert seen == [0, 0, 1, 1, 2, 2]


@pytest.mark.extended
def test_hyperparameters_can_be_swept_and_differentiated():
    params = jnp.array([0.5, -2.0])

    def final(learning_rate, decay, eps, momentum, initial_scale, weight_decay):
        tx = rmsprop_jax.rmsprop(
            learning_rate,
            decay,
            eps,
            initial_scale,
            momentum=momentum,
            bias_correction=True,
            weight_decay=weight_decay,
        )
        return steps(tx, params, 3)[0]

    values = (0.1, 0.9, 1e-3, 0.5, 0.2, 0.01)
    chex.assert_trees_all_close(final(*map(jnp.float32, values)), final(*values), rtol=1e-5)
    sweep = jnp.array([[1.0], [0.5]]) * jnp.array(values)
    swept = jax.vmap(lambda row: final(*row))(sweep)
    chex.assert_trees_all_close(swept[0], final(*values), rtol=1e-5)
    with jax.enable_x64(True):
        params = jnp.array([0.5, -2.0], jnp.float64)
        at = np.array(values)
        gradients = jax.jacobian(lambda row: final(*row).sum())(jnp.asarray(at))
        for i, step in enumerate(at * 1e-5):
            up, down = (final(*(at + sign * step * np.eye(6)[i])).sum() for sign in (1, -1))
            np.testing.assert_allclose(gradients[i], (up - down) / (2 * step), rtol=1e-6)
        # At decay 0 (a warm-up's start, say) the derivative is finite too.
        tx = functools.partial(rmsprop_jax.scale_by_stddev, bias_correction=True)
        slope = jax.grad(lambda d: steps(tx(d), params, 3)[0].sum())(0.0)
        assert np.isfinite(slope)


def test_injected_hyperparameters_can_be_changed_between_steps():
    params = tree()
    tx = rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(0.1, momentum=0.9)
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(gradient(params), state, params)
    state.hyperparams['learning_rate'] = jnp.float32(0.2)
    doubled, _ = jax.jit(tx.update)(gradient(params), state, params)
    chex.assert_trees_all_close(doubled, jax.tree.map(lambda u: 2 * u, updates), rtol=1e-6)


def test_inject_hyperparams_needs_no_params_unless_weights_decay():
    g = jnp.ones(2)
    tx = rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(0.1)
    tx.update(g, tx.init(g))
    adjustable = rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match='weight_decay needs params'):
        adjustable.update(g, adjustable.init(g))
