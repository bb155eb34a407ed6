"""What compilers make of a training step whose state is split over the data axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import rmsprop_jax
from rmsprop_jax import aot, sharding
from rmsprop_jax.aot._compile import update_and_apply

WIDTH = 2048
LAYERS = ('w0', 'w1', 'w2')
LEAF = 4 * WIDTH**2
TX = rmsprop_jax.rmsprop(1e-3, momentum=0.9)


def loss(params, x):
    for name in LAYERS:
        x = jnp.tanh(x @ params[name])
    return jnp.sum(x**2)


def compiled(mesh, target, form, axis='data', spec=None):
    """The report on a step: with state like the parameters, with ZeRO-1, or with both its parts."""
    place = NamedSharding(mesh, spec or P())
    params = {k: jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=place) for k in LAYERS}
    batch = jax.ShapeDtypeStruct((4096, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(axis)))
    split = params if form == 'plain' else sharding.zero1_shardings(params, axis=axis)
    split = jax.tree.map(lambda x: getattr(x, 'sharding', x), split)
    tx = TX if form == 'plain' else sharding.zero1(TX, params, axis=axis)
    state = sharding.abstract_state(TX, params, split)
    specs = jax.tree.map(lambda x: x.spec, split)

    def scattered(params, x):
        gradients = jax.grad(loss)(params, x)
        return sharding.reduce_scatter(gradients, specs, axis)

    gradients = jax.grad(loss)
    if form == 'scatter':
        gradients = jax.shard_map(
            scattered, mesh=mesh, in_specs=(P(), P(axis)), out_specs=specs, check_vma=False
        )

    def step(params, state, x):
        return update_and_apply(tx)(params, state, gradients(params, x))

    kept = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=kept)
    return aot.compile_step(jitted, params, state, batch, target=target, params=params)


def mesh_of(target, topology, shape, names, kind=AxisType.Auto):
    devices = np.array(aot.devices(target, topology)).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def bytes_of(report):
    return {found.kind: found.bytes for found in report.collectives}


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
def test_zero1_on_gpus_scatters_gradients_and_gathers_updates(kind):
    plain = compiled(mesh_of('cuda-h100', 8, (8,), ('data',)), 'cuda-h100', 'plain')
    split = compiled(mesh_of('cuda-h100', 8, (8,), ('data',), kind), 'cuda-h100', 'zero1')
    all_gradients = len(LAYERS) * LEAF
    assert bytes_of(plain) == {'all-reduce': all_gradients}
    # An all-reduce is both of these, one after the other.
    assert bytes_of(split) == {'reduce-scatter': all_gradients, 'all-gather': all_gradients}
    moments = plain.argument_bytes - split.argument_bytes
    assert moments == pytest.approx(2 * all_gradients * 7 / 8, rel=1e-3)
    assert split.temporary_bytes <= plain.temporary_bytes + LEAF


def test_zero1_on_gpus_beside_a_tensor_axis():
    mesh = mesh_of('cuda-h100', 8, (4, 2), ('data', 'model'))
    plain = compiled(mesh, 'cuda-h100', 'plain', spec=P(None, 'model'))
    split = compiled(mesh, 'cuda-h100', 'zero1', spec=P(None, 'model'))
    own = len(LAYERS) * LEAF // 2
    assert 'all-reduce' in bytes_of(plain)
    assert 'all-reduce' not in bytes_of(split)
    moments = plain.argument_bytes - split.argument_bytes
    assert moments == pytest.approx(2 * own * 3 / 4, rel=1e-3)
    assert split.temporary_bytes <= plain.temporary_bytes + LEAF


def test_zero1_on_a_tpu_needs_one_reduction_for_each_axis_of_the_torus():
    """Constraints alone keep the all-reduce there, and more temporary memory."""
    mesh = mesh_of('tpu-v5e', '4x4', (4, 4), ('x', 'y'))
    axis = ('x', 'y')
    plain = compiled(mesh, 'tpu-v5e', 'plain', axis)
    split = compiled(mesh, 'tpu-v5e', 'scatter', axis)
    assert set(bytes_of(plain)) == {'all-reduce'}
    assert 'all-reduce' not in bytes_of(split)
    # Over the first axis all of it, over the second the quarter that is left; a tenth of padding.
    all_gradients = len(LAYERS) * LEAF
    assert bytes_of(split)['reduce-scatter'] <= 1.1 * 1.25 * all_gradients
    assert bytes_of(split)['all-gather'] == all_gradients
    moments = plain.argument_bytes - split.argument_bytes
    assert moments == pytest.approx(2 * all_gradients * 15 / 16, rel=1e-2)
    assert split.temporary_bytes <= plain.temporary_bytes + 1.05 * LEAF
