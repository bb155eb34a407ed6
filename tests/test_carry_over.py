"""State for a changed tree: what it gives is what the old run and a new one would have done."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rmsprop_jax
from rmsprop_jax import carry_over, diagnostics, dialects, rmsprop, storage


def everywhere(kept):
    return storage.large_leaves(kept, min_size=1, min_ndim=0)


BYTES = storage.per_statistic(nu=everywhere(storage.uint8()), trace=everywhere(storage.bfloat16()))
HALF = everywhere(storage.bfloat16())
MEANS = storage.per_statistic(nu=storage.large_leaves(storage.factored(), min_size=1))


def grouped(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: 'plain' if path[0].key == 'embed' else 'rest', params
    )


def without_body(params):
    return {name: name != 'body' for name in params}


def tree(*names, rows=4):
    """Parameters of the given names: an embedding, and layers of one size."""
    keys = jax.random.split(jax.random.key(0), 8)
    made = {name: {'w': jax.random.normal(keys[i], (3, 5))} for i, name in enumerate(names)}
    return {**made, 'embed': jax.random.normal(keys[7], (6, 5))[:rows]}


def gradients(params, seed=1):
    """Gradients that depend on a leaf's path alone, and for each entry on its index alone."""

    def leaf(path, p):
        key = jax.random.fold_in(jax.random.key(seed), len(jax.tree_util.keystr(path)))
        full = jax.random.normal(jax.random.fold_in(key, ord(path[0].key[-1])), (8, 8))
        return full[0, : p.size] if p.ndim == 1 else full[: p.shape[0], : p.shape[1]]

    return jax.tree_util.tree_map_with_path(leaf, params)


def stepped(tx, params, state=None, steps=3, seed=1):
    state = tx.init(params) if state is None else state
    for step in range(steps):
        _, state = jax.jit(tx.update)(gradients(params, seed + step), state, params)
    return state


TRANSFORMATIONS = {
    'rmsprop': (rmsprop(0.1, momentum=0.9, initial_scale=1.0), None),
    'centered': (rmsprop(0.1, centered=True, momentum=0.9), None),
    'schedule': (rmsprop(optax.linear_schedule(0.1, 0.0, 9), weight_decay=0.1), None),
    'torch': (dialects.torch(momentum=0.9, centered=True), None),
    'chain': (optax.chain(optax.clip(1.0), dialects.tensorflow(0.1, momentum=0.9)), None),
    'masked': (optax.masked(rmsprop(0.1), without_body), None),
    'partition': (
        optax.partition({'plain': rmsprop(0.1), 'rest': dialects.torch(momentum=0.9)}, grouped),
        None,
    ),
    'MultiSteps': (optax.MultiSteps(rmsprop(0.1), 1).gradient_transformation(), None),
    'inject': (rmsprop_jax.inject_hyperparams(rmsprop)(0.1, momentum=0.9), None),
    'skip_nonfinite': (rmsprop_jax.skip_nonfinite(rmsprop(0.1, momentum=0.9)), None),
    'bytes': (rmsprop(0.1, momentum=0.9, storage=BYTES), BYTES),
    'bfloat16': (rmsprop(0.1, centered=True, storage=HALF), HALF),
    'factored': (rmsprop(0.1, momentum=0.9, storage=MEANS), MEANS),
    'bytes, masked': (optax.masked(rmsprop(0.1, storage=BYTES), without_body), BYTES),
}
each = pytest.mark.parametrize(
    ('tx', 'kept'),
    [
        pytest.param(*x, id=name, marks=() if name == 'rmsprop' else pytest.mark.extended)
        for name, x in TRANSFORMATIONS.items()
    ],
)


@each
def test_the_next_step_is_that_of_the_old_run_and_of_a_new_parameter(tx, kept):
    params, new = tree('body', 'head'), tree('body', 'tail')
    state = stepped(tx, params)
    found, report = carry_over(tx, state, params, new, storage=kept)
    assert jax.tree.structure(found) == jax.tree.structure(tx.init(new))
    by_step, _ = tx.update(gradients(new, 9), found, new)
    expected, _ = tx.update(gradients(params, 9), state, params)
    np.testing.assert_array_equal(by_step['body']['w'], expected['body']['w'])
    np.testing.assert_array_equal(by_step['embed'], expected['embed'])
    # The same as if the new parameter had been made anew in the place of an old one.
    old = {**params, 'tail': params['head']}
    del old['head']
    beside = stepped(tx, old)
    mask = {'body': False, 'embed': False, 'tail': True}
    anew = rmsprop_jax.reset(tx, beside, new, mask, kept)
    jax.tree.map(np.testing.assert_array_equal, found, anew)
    without_state = ('body/w',) if isinstance(state, optax.MaskedState) else ()
    assert report.dropped == ('head/w',)
    assert report.fresh == ('tail/w',)
    assert {*report.kept, *without_state} == {'body/w', 'embed'}
    assert report.stateless == without_state
    assert report.partly == ()


@pytest.mark.parametrize('rows', [2, 6])
@each
def test_what_overlaps_keeps_its_statistics(tx, kept, rows):
    params, new = tree('body'), tree('body', rows=rows)
    state = stepped(tx, params)
    found, report = carry_over(tx, state, params, new, resize=True, storage=kept)
    assert report.partly == ('embed',)
    shared = min(rows, 4)
    start = storage.read(tx.init(new), kept)
    for got, old, fresh in zip(
        *map(jax.tree.leaves, (storage.read(found, kept), storage.read(state, kept), start)),
        strict=True,
    ):
        if got.shape != (rows, 5):
            continue
        # Bytes and means of a block beside start values are rounded anew.
        rtol = {None: 0.0, HALF: 1e-2, BYTES: 0.13, MEANS: 1e-5}[kept]
        if kept is MEANS and (rows < 4 or fresh.any()):
            # The means of fewer rows are other means.
            continue
        np.testing.assert_allclose(got[:shared], old[:shared], rtol=rtol, atol=1e-7)
        np.testing.assert_allclose(got[shared:], fresh[shared:], rtol=rtol, atol=1e-7)
    fresh, told = carry_over(tx, state, params, new, storage=kept)
    assert told.fresh == ('embed',)
    tx.update(gradients(new), found, new)
    tx.update(gradients(new), fresh, new)


def test_counts_schedules_and_injected_numbers_go_on():
    params, new = tree('body'), tree('body', 'tail')
    tx = rmsprop_jax.inject_hyperparams(rmsprop)(optax.linear_schedule(0.1, 0.0, 10), decay=0.5)
    state = stepped(tx, params)
    state.hyperparams['decay'] = jnp.float32(0.75)
    found, _ = carry_over(tx, state, params, new)
    assert found.count == 3
    assert found.hyperparams['decay'] == 0.75
    assert found.inner_state[0].count == 3


def test_the_sum_of_weights_goes_on_unless_all_start_again():
    tx, params = rmsprop(0.1, bias_correction=True), {'a': jnp.ones(3)}
    _, state = tx.update(params, tx.init(params))
    found, _ = carry_over(tx, state, params, {**params, 'b': jnp.ones(2)})
    assert found[0].weight == state[0].weight
    found, _ = carry_over(tx, state, params, {'b': jnp.ones(2)})
    assert found[0].weight == 0
    assert found[0].count == 1


def test_an_average_of_a_new_parameter_starts_from_it():
    tx, params = dialects.keras(use_ema=True), {'a': jnp.full(3, 2.0)}
    _, state = tx.update(params, tx.init(params), params)
    new = {**params, 'b': jnp.full(2, 5.0)}
    found, _ = carry_over(tx, state, params, new)
    average = optax.tree.get(found, 'ema')
    assert average['b'].tolist() == [5, 5]
    np.testing.assert_array_equal(average['a'], optax.tree.get(state, 'ema')['a'])


@pytest.mark.extended
def test_another_group_and_a_group_that_is_new_start_fresh():
    members = {'a': rmsprop(0.1, storage=BYTES), 'b': rmsprop(0.2, storage=BYTES)}
    params = {'x': jnp.ones(8), 'y': jnp.ones(8)}
    tx = optax.partition({'a': members['a']}, {'x': 'a', 'y': 'a'})
    new_tx = optax.partition(members, {'x': 'a', 'y': 'b'})
    state = stepped(tx, params)
    found, report = carry_over(tx, state, params, params, new_tx=new_tx, storage=BYTES)
    assert report == (('x',), (), ('y',), (), ())
    assert str(report) == 'kept       x\nfresh      y'
    assert jax.tree.structure(found) == jax.tree.structure(new_tx.init(params))
    new_tx.update(params, found, params)


@pytest.mark.extended
def test_measurements_of_a_new_layer_begin():
    params, new = tree('body'), tree('body', 'tail')
    tx = diagnostics.measured(rmsprop(0.1))
    found, _ = carry_over(tx, stepped(tx, params), params, new)
    assert jax.tree.structure(found) == jax.tree.structure(tx.init(new))
    tx.update(gradients(new), found, new)


@pytest.mark.extended
def test_parameters_of_another_rank_or_kind_start_fresh():
    params = {'rank': jnp.ones(3), 'kind': jnp.ones(3), 'dtype': jnp.ones(3)}
    new = {
        'rank': jnp.ones((3, 1)),
        'kind': jnp.ones(3, jnp.complex64),
        'dtype': jnp.ones(3, jnp.bfloat16),
    }
    tx = optax.trace(0.9)
    _, report = carry_over(tx, stepped(tx, params), params, new, resize=True)
    assert report == ((), ('dtype',), ('kind', 'rank'), (), ())


@pytest.mark.extended
@pytest.mark.parametrize('kept', [None, storage.large_leaves(storage.factored(), min_size=1)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.complex64])
def test_in_flax_nnx(dtype, kept):
    """A head of another width, in the tree of variables that nnx gives to init."""

    def model(outputs):
        layers = (nnx.Linear(4, n, rngs=nnx.Rngs(0), param_dtype=dtype) for n in (4, outputs))
        return nnx.Sequential(*layers)

    old, new = model(2), model(3)
    tx = dialects.torch(0.1, momentum=0.9, storage=kept and storage.per_statistic(nu=kept))
    optimizer = nnx.Optimizer(old, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(jnp.abs(m(jnp.ones((1, 4)))) ** 2))(old)
    optimizer.update(old, grads)
    trees = [nnx.state(m, nnx.Param) for m in (old, new)]
    found, report = carry_over(tx, optimizer.opt_state, *trees)
    assert report.kept == ('layers/0/bias', 'layers/0/kernel')
    assert report.fresh == ('layers/1/bias', 'layers/1/kernel')
    pure = [nnx.as_pure(x) for x in (optimizer.opt_state, *trees)]
    same, told = carry_over(tx, *pure)
    jax.tree.map(np.testing.assert_array_equal, found, same)
    assert told == report
    means = jax.tree.leaves(optax.tree.get(optimizer.opt_state, 'nu')['layers'][0]['kernel'])
    assert len(means) == (1 if kept is None else 2)
    # `update` takes what nnx.Optimizer hands to it.
    tx.update(pure[2], found, pure[2])


def test_the_result_may_be_donated():
    params = tree('body')
    tx = rmsprop(0.1)
    state = stepped(tx, params)
    found, _ = carry_over(tx, state, params, tree('body', 'tail'))
    held = {id(x) for x in jax.tree.leaves((state, params))}
    assert not [x for x in jax.tree.leaves(found) if id(x) in held]


@pytest.mark.extended
def test_compact_states_need_their_storage():
    params, new = tree('body'), tree('body', 'tail')
    for tx, kept in (TRANSFORMATIONS['bytes'], TRANSFORMATIONS['factored']):
        with pytest.raises(ValueError, match='storage|has Factors'):
            carry_over(tx, stepped(tx, params), params, new, resize=True)
        carry_over(tx, stepped(tx, params), params, new, resize=True, storage=kept)
