"""What compilers make of a training step whose state is split over the data axis."""

import functools

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import zero1
from benchmarks.zero1 import mesh_of
from rmsprop_jax import aot, sharding
from rmsprop_jax.aot._compile import update_and_apply

WIDTH, LAYERS = 2048, 3
LEAF = 4 * WIDTH**2
compiled = functools.partial(zero1.compiled, width=WIDTH, layers=LAYERS)


def bytes_of(report):
    return {found.kind: found.bytes for found in report.collectives}


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
def test_zero1_on_gpus_scatters_gradients_and_gathers_updates(kind):
    plain = compiled(mesh_of('cuda-h100', 8, (8,), ('data',)), 'cuda-h100', 'replicated')
    split = compiled(mesh_of('cuda-h100', 8, (8,), ('data',), kind), 'cuda-h100', 'zero1')
    all_gradients = LAYERS * LEAF
    assert bytes_of(plain) == {'all-reduce': all_gradients}
    # An all-reduce is both of these, one after the other.
    assert bytes_of(split) == {'reduce-scatter': all_gradients, 'all-gather': all_gradients}
    moments = plain.argument_bytes - split.argument_bytes
    assert moments == pytest.approx(2 * all_gradients * 7 / 8, rel=1e-3)
    assert split.temporary_bytes <= plain.temporary_bytes + LEAF


def test_zero1_on_gpus_beside_a_tensor_axis():
    mesh = mesh_of('cuda-h100', 8, (4, 2), ('data', 'model'))
    plain = compiled(mesh, 'cuda-h100', 'replicated', spec=P(None, 'model'))
    split = compiled(mesh, 'cuda-h100', 'zero1', spec=P(None, 'model'))
    own = LAYERS * LEAF // 2
    assert 'all-reduce' in bytes_of(plain)
    assert 'all-reduce' not in bytes_of(split)
    moments = plain.argument_bytes - split.argument_bytes
    assert moments == pytest.approx(2 * own * 3 / 4, rel=1e-3)
    assert split.temporary_bytes <= plain.temporary_bytes + LEAF


def test_zero1_on_a_tpu_needs_one_reduction_for_each_axis_of_the_torus():
    """Constraints alone keep the all-reduce there, and more temporary memory."""
    mesh = mesh_of('tpu-v5e', '4x4', (4, 4), ('x', 'y'))
    axis = ('x', 'y')
    plain = compiled(mesh, 'tpu-v5e', 'replicated', axis=axis)
    split = compiled(mesh, 'tpu-v5e', 'reduce_scatter', axis=axis)
    assert set(bytes_of(plain)) == {'all-reduce'}
    assert 'all-reduce' not in bytes_of(split)
    # Over the first axis all of it, over the second the quarter that is left; a tenth of padding.
    all_gradients = LAYERS * LEAF
    assert bytes_of(split)['reduce-scatter'] <= 1.1 * 1.25 * all_gradients
    assert bytes_of(split)['all-gather'] == all_gradients
    moments = plain.argument_bytes - split.argument_bytes
    assert moments == pytest.approx(2 * all_gradients * 15 / 16, rel=1e-2)
    assert split.temporary_bytes <= plain.temporary_bytes + 1.05 * LEAF


# The table of docs/scaling.md, in MiB. During the update an H100 holds the state of two layers at a
# time, and a TPU all of it.
@pytest.mark.parametrize(
    ('target', 'topology', 'temporary'),
    [('cuda-h100', 8, 64), ('tpu-v5e', '2x4', 277)],
    ids=['h100', 'v5e'],
)
def test_offloaded_state_leaves_the_device(target, topology, temporary):
    place = NamedSharding(mesh_of(target, topology, (8,), ('data',)), P())
    params = [jax.ShapeDtypeStruct((WIDTH, WIDTH), 'float32', sharding=place)] * 8
    reports = []
    for tx in (zero1.TX, sharding.offload(zero1.TX)):
        state = sharding.abstract_state(tx, params)
        kept = jax.tree.map(lambda x: x.sharding, (params, state))
        jitted = jax.jit(update_and_apply(tx), donate_argnums=(0, 1), out_shardings=kept)
        reports.append(aot.compile_step(jitted, params, state, params, target=target))
    in_mib = [
        [x / 2**20 for x in (r.argument_bytes, r.output_bytes, r.temporary_bytes)] for r in reports
    ]
    assert in_mib[0] == pytest.approx([512, 384, 0], rel=1e-3, abs=0.01)
    assert in_mib[1] == pytest.approx([256, 128, temporary], rel=0.02)
