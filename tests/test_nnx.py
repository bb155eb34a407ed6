"""Flax NNX gives `init` trees of variables, `update` trees of arrays: nothing depends on it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rmsprop_jax
from rmsprop_jax import diagnostics, dialects, sharding, storage

pytestmark = pytest.mark.extended

SHAPE = (64, 64)


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(*SHAPE, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(64, 2, rngs=rngs)])

    def __call__(self, x):
        return self.rest[0](jnp.tanh(self.first(x)))


def gradients(model):
    return nnx.grad(lambda model: jnp.sum(model(jnp.linspace(-1, 1, 64)) ** 2))(model)


def kernels(path, shape):
    del shape
    return storage.bfloat16() if path.endswith("['kernel']") else storage.float32()


CHOICES = {
    'factored': storage.per_statistic(nu=storage.factored()),
    'uint8': storage.per_statistic(nu=storage.uint8()),
    'by path': storage.per_leaf(kernels),
}


@pytest.mark.parametrize('choice', CHOICES.values(), ids=CHOICES)
def test_formats_in_an_nnx_optimizer(choice):
    """Three steps give what they give for a dictionary of the same arrays."""
    tx = rmsprop_jax.rmsprop(0.01, momentum=0.9, storage=choice)
    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = tx.init(params)
    for _ in range(3):
        grads = gradients(model)
        updates, state = tx.update(nnx.to_pure_dict(nnx.state(grads)), state, params)
        params = optax.apply_updates(params, updates)
        optimizer.update(model, grads)
    got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, got, params)
    dtypes = {x.dtype for x in jax.tree.leaves(optimizer.opt_state)}
    assert dtypes == {x.dtype for x in jax.tree.leaves(state)}


def test_a_step_in_jit_keeps_factored_states_as_they_are():
    tx = rmsprop_jax.rmsprop(0.01, storage=storage.factored())
    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, gradients(model))

    before = model.first.kernel[...]
    step(model, optimizer)
    step(model, optimizer)
    assert jnp.all(model.first.kernel[...] != before)
    assert jnp.isfinite(model.first.kernel[...]).all()
    # In a scan the state must keep its type.
    pure = nnx.as_pure(optimizer.opt_state)
    grads = nnx.as_pure(nnx.state(gradients(model)))
    _, after = tx.update(grads, pure, grads)
    assert jax.tree.structure(after) == jax.tree.structure(pure)


def test_means_that_flax_has_turned_into_a_mapping_are_not_read_as_parameters():
    tx = rmsprop_jax.rmsprop(0.01, storage=storage.factored())
    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, gradients(model))
    pure = nnx.as_pure(optimizer.opt_state)
    with pytest.raises(ValueError, match=r"\['kernel'\] has 'row' and 'col'.*storage.Factors"):
        storage.read(pure, storage.factored())
    # Two parameters of these names are no means where they are not stored as such.
    named = {'row': jnp.ones(8), 'col': jnp.ones(8)}
    assert storage.read(tx.init(named), storage.factored())[0].nu['row'].shape == (8,)


@pytest.mark.parametrize('shape', [(3, 4), (3, 3)])
def test_means_of_complex_parameters_are_read_as_without_flax(shape):
    """Or refused, where a real parameter of another shape could have means of the same shapes."""
    # The pair of reals that stands for a complex number is not in the shape that chooses.
    where = storage.per_leaf(
        lambda _, own: storage.factored() if own == shape else storage.float32()
    )
    tx = dialects.torch(0.01, storage=storage.per_statistic(nu=where))
    model = nnx.Module()
    model.w = nnx.Param(jax.random.normal(jax.random.key(0), shape, jnp.complex64))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    pure = nnx.to_pure_dict(grads)
    optimizer.update(model, grads)
    _, plain = tx.update(pure, tx.init(pure), pure)
    expected = storage.read(plain, where)[0].nu['w']
    assert expected.shape == (*shape, 2)
    state = optimizer.opt_state
    with pytest.raises(ValueError, match=r"\['w'\] has 'row' and 'col'.*storage.FactorsOfPairs"):
        storage.read(nnx.as_pure(state), where)
    if shape == (3, 4):
        nu = storage.read(state, where)[0].nu
        np.testing.assert_array_equal(jax.tree.leaves(nu)[0], expected)
        described = storage.describe(state, where)
        assert {'format': 'factored', 'of': 'pairs'}.items() <= (
            described['leaves']["[0].nu['w'].value['row']"].items()
        )
        storage.check(described, state, where)
        whole = nnx.Optimizer(model, dialects.torch(0.01), wrt=nnx.Param).opt_state
        with pytest.raises(ValueError, match=r'they differ in formats\. Restore it'):
            storage.check(described, whole, None)
        return
    with pytest.raises(
        ValueError, match=r"nu\['w'\].*real or to a complex.*FactorsOfPairs\(row, col"
    ):
        storage.read(state, where)
    # As the message says.
    mapping = nnx.as_pure(state)[0].nu['w']
    told = plain[0]._replace(nu={'w': storage.FactorsOfPairs(**mapping)})
    np.testing.assert_array_equal(storage.read(told, where).nu['w'], expected)


def test_labels_and_masks_see_one_path():
    model = Model()
    params = nnx.state(model, nnx.Param)
    pure = nnx.as_pure(params)
    assert (
        diagnostics.update_ratios(pure, pure).keys()
        == diagnostics.update_ratios(params, params).keys()
    )
    tx = diagnostics.measured(rmsprop_jax.rmsprop(0.1), labels=diagnostics.by_depth(1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, gradients(model))
    found = diagnostics.read(nnx.as_pure(optimizer.opt_state), pure, labels=diagnostics.by_depth(1))
    assert {'update_ratio/first', 'update_ratio/rest'} <= found.keys()


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4,), ('data',), (kind,), devices=jax.devices()[:4])


@pytest.mark.parametrize('given', [lambda state: state, nnx.as_pure], ids=['state', 'as_pure'])
def test_zero1_in_an_nnx_optimizer(given):
    place = NamedSharding(mesh(), P())
    model = Model()
    nnx.update(model, jax.device_put(nnx.state(model), place))
    inner = rmsprop_jax.rmsprop(0.01, momentum=0.9)
    tx = sharding.zero1(inner, given(nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    plain = Model()
    expected = nnx.Optimizer(plain, inner, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, gradients(model))

    for _ in range(2):
        step(model, optimizer)
        step(plain, expected)
    assert optimizer.opt_state[0].nu['first']['kernel'].get_value().sharding.spec == P('data')
    np.testing.assert_allclose(
        model.first.kernel[...], plain.first.kernel[...], rtol=1e-5, atol=1e-7
    )


class Split(nnx.Module):
    def __init__(self, **metadata):
        place = {'out_sharding': (None, 'model'), **metadata}
        kernel_init = nnx.with_metadata(nnx.initializers.lecun_normal(), **place)
        self.linear = nnx.Linear(*SHAPE, use_bias=False, kernel_init=kernel_init, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_zero1_agrees_with_the_sharding_that_flax_has_for_optimizers(kind):
    """It splits as `optimizer_sharding` would, and takes variables that have that."""
    inner = rmsprop_jax.rmsprop(0.01, momentum=0.9)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, gradients(model))

    def trained(wrap, **metadata):
        model = Split(**metadata)
        optimizer = nnx.Optimizer(model, wrap(nnx.state(model, nnx.Param)), wrt=nnx.Param)
        for _ in range(2):
            step(model, optimizer)
        nu = optimizer.opt_state[0].nu['linear']['kernel'].get_value()
        return nu.sharding.spec, np.asarray(nu), np.asarray(model.linear.kernel[...])

    said, zero1 = {'optimizer_sharding': ('data', 'model')}, lambda p: sharding.zero1(inner, p)
    with jax.set_mesh(jax.make_mesh((4, 2), ('data', 'model'), (kind, kind))):
        spec, *whole = trained(lambda _: inner)
        assert spec == P(None, 'model')
        for wrap, metadata in ((lambda _: inner, said), (zero1, {}), (zero1, said)):
            spec, *found = trained(wrap, **metadata)
            assert spec == P('data', 'model')
            chex.assert_trees_all_close(found, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('wrap', [lambda tx: tx, lambda tx: optax.chain(optax.clip(1.0), tx)])
def test_shardings_of_a_split_state_are_split(wrap, kind):
    place = NamedSharding(mesh(kind), P())
    params = jax.device_put({'kernel': jnp.ones((8, 3)), 'odd': jnp.ones(3)}, place)
    tx = wrap(sharding.zero1(rmsprop_jax.rmsprop(0.01, momentum=0.9), params))
    state = jax.jit(tx.init)(params)
    told = sharding.state_shardings(tx, params)
    shapes = sharding.abstract_state(tx, params)
    assert optax.tree.get(told, 'nu')['kernel'].spec[0] == 'data'
    for leaf, place, shape in zip(*map(jax.tree.leaves, (state, told, shapes)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
