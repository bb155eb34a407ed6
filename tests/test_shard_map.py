"""Under `jax.shard_map` an optimizer does what it does to whole arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import rmsprop_jax
from rmsprop_jax import diagnostics, sharding, storage

pytestmark = pytest.mark.extended

SPECS = {'split': P('data'), 'corner': P('data', 'model'), 'whole': P()}
CHECKED = pytest.mark.parametrize('check_vma', [True, False])


def mesh():
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh((2, 2), ('data', 'model'), kinds, devices=jax.devices()[:4])


def parameters(side=64):
    """At 64, each is as large as the smallest that formats keep small, and a share of it is not."""
    draws = np.random.default_rng(0)
    return {name: jnp.asarray(draws.normal(size=(side, side)), jnp.float32) for name in SPECS}


def mapped(tx, params, check_vma, **extra):
    of_state = sharding.state_shardings(tx, params, SPECS)
    return jax.jit(
        jax.shard_map(
            functools.partial(tx.update, **extra),
            mesh=mesh(),
            in_specs=(SPECS, of_state, SPECS),
            out_specs=(SPECS, of_state),
            check_vma=check_vma,
        )
    )


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, 'f'), np.asarray(other, 'f'))


CHOICES = {
    'bfloat16': storage.bfloat16(),
    'uint8': storage.per_statistic(nu=storage.uint8()),
    'by shape': storage.per_leaf(
        lambda path, shape: storage.bfloat16() if shape == (64, 64) else storage.float32()
    ),
}


@CHECKED
@pytest.mark.parametrize('choice', CHOICES.values(), ids=CHOICES)
def test_formats_are_those_of_whole_arrays(choice, check_vma):
    tx, params = rmsprop_jax.rmsprop(0.1, momentum=0.9, storage=choice), parameters()
    state = tx.init(params)
    assert all(x.dtype.itemsize < 4 for x in jax.tree.leaves(state[0].nu))
    expected = jax.jit(tx.update)(params, state, params)
    got = mapped(tx, params, check_vma, partition_specs=SPECS)(params, state, params)
    assert_equal(got, expected)


@CHECKED
def test_untold_of_the_whole_the_error_says_what_to_give(check_vma):
    tx, params = rmsprop_jax.scale_by_rms(storage=storage.bfloat16()), parameters()
    with pytest.raises(
        ValueError, match=r"updates\['corner'\].*give update the argument partition"
    ):
        mapped(tx, params, check_vma)(params, tx.init(params), params)


def made_inside(tx, params, specs, check_vma):
    return jax.jit(
        jax.shard_map(tx.init, mesh=mesh(), in_specs=(specs,), out_specs=specs, check_vma=check_vma)
    )(params)


@CHECKED
def test_init_inside_is_refused_where_the_whole_shape_decides(check_vma):
    tx = rmsprop_jax.scale_by_rms(storage=storage.bfloat16())
    with pytest.raises(ValueError, match=r"params\['corner'\] of shape \(32, 32\).*outside"):
        made_inside(tx, parameters(), SPECS, check_vma)
    # All shares are large, or small whatever the whole.
    for side, dtype in ((256, jnp.bfloat16), (8, jnp.float32)):
        seen = []

        def init(params, seen=seen):
            seen.extend(x.dtype for x in jax.tree.leaves(tx.init(params).nu))
            return params

        jax.shard_map(init, mesh=mesh(), in_specs=(SPECS,), out_specs=SPECS, check_vma=check_vma)(
            parameters(side)
        )
        assert seen == [dtype] * 3


def test_init_inside_knows_what_is_the_same_on_every_device():
    tx = rmsprop_jax.scale_by_rms(storage=storage.bfloat16())
    state = made_inside(tx, {'w': jnp.ones((32, 32))}, P(), check_vma=True)
    assert state.nu['w'].dtype == jnp.float32


@CHECKED
@pytest.mark.parametrize('told', [True, False])
@pytest.mark.parametrize('per', ['coordinate', 'leaf', 'step'])
def test_what_is_skipped_is_counted_for_whole_arrays(per, told, check_vma):
    choice = storage.large_leaves(storage.bfloat16(), 1, 0)
    tx = rmsprop_jax.skip_nonfinite(
        rmsprop_jax.rmsprop(0.1, momentum=0.9, bias_correction=True, storage=choice),
        per,
        storage=choice,
    )
    params = parameters(8)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    grads = jax.tree.map(lambda g: g.at[0, 0].set(jnp.nan).at[7, 7].set(jnp.inf), params)
    grads['whole'] = params['whole']
    expected = jax.jit(tx.update)(grads, state, params)
    if not told and not check_vma:
        return  # Nobody knows then what is split; the docstring says so.
    extra = {'partition_specs': SPECS} if told else {}
    got = mapped(tx, params, check_vma, **extra)(grads, state, params)
    if told:
        assert_equal(got, expected)
    np.testing.assert_array_equal(
        jax.tree.leaves(got[1].total_notfinite), jax.tree.leaves(expected[1].total_notfinite)
    )
    skipped = {'coordinate': 4, 'leaf': 2, 'step': 1}
    assert got[1].total_notfinite == skipped[per]


@pytest.mark.parametrize('every', [1, 2])
def test_measurements_are_those_of_whole_arrays(every):
    choice = storage.large_leaves(storage.bfloat16(), 1, 0)
    tx = diagnostics.measured(
        rmsprop_jax.rmsprop(0.1, eps=1e-2, storage=choice), eps=1e-2, storage=choice, every=every
    )
    params = parameters(8)
    state, whole = tx.init(params), tx.init(params)
    update = mapped(tx, params, True, partition_specs=SPECS)
    for _ in range(2):
        _, state = update(params, state, params)
        _, whole = jax.jit(tx.update)(params, whole, params)
    for field, expected in whole.measurements._asdict().items():
        # Sums of squares are added in another order.
        np.testing.assert_allclose(getattr(state.measurements, field), expected, rtol=1e-6)
    assert np.all(whole.measurements.update_ratio > 0)
