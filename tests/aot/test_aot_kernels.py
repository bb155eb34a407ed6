"""What the compilers for TPU and GPU make of a step. Run by `make aot`, where they are installed.

Every configuration is compiled for one TPU and one GPU; AOT_TARGETS=all (or names) changes that.
"""

import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from configurations import BOUNDED, CONFIGURATIONS
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rmsprop_jax
from benchmarks import memory
from rmsprop_jax import aot, dialects
from rmsprop_jax.aot._compile import update_and_apply

ALL = tuple(name for name in aot.targets() if name != 'cpu')
CHOSEN = os.environ.get('AOT_TARGETS', 'tpu-v5e,cuda-h100')
TARGETS = ALL if CHOSEN == 'all' else tuple(CHOSEN.split(','))
OTHERS = tuple(name for name in ALL if name not in TARGETS)

LEAF = jax.ShapeDtypeStruct((2048, 1024), jnp.float32)
# More than the fast memory of a TPU, so that nothing stays there from one kernel to the next.
LARGE = jax.ShapeDtypeStruct((8192, 8192), jnp.float32)

everywhere = pytest.mark.parametrize('target', TARGETS)


def each(configurations):
    return pytest.mark.parametrize(
        'configuration', configurations, ids=lambda configuration: configuration.name
    )


def everything():
    """The longest elementwise chain, with schedules: what it needs is computed in the program."""
    return rmsprop_jax.rmsprop(
        optax.cosine_decay_schedule(1e-2, 1000),
        optax.linear_schedule(0.9, 0.99, 100),
        centered=True,
        momentum=optax.linear_schedule(0.5, 0.9, 100),
        nesterov=True,
        bias_correction=True,
        weight_decay=1e-4,
    )


def state_bytes(tx: optax.GradientTransformation, params) -> int:
    """Bytes of the arrays that the state holds."""
    state = jax.tree.leaves(jax.eval_shape(tx.init, params))
    return sum(x.size * x.dtype.itemsize for x in state if x.size > 1)


def assert_minimal(report: aot.Report, tx: optax.GradientTransformation, params) -> None:
    """Parameters and state are read and written once, gradients read; nothing beside."""
    own = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert report.bytes_minimum == 3 * own + 2 * state_bytes(tx, params)
    assert report.bytes_minimum <= report.bytes_moved <= 1.01 * report.bytes_minimum
    assert report.copies == 0
    assert report.temporary_bytes < own / 100
    assert report.donated_bytes >= own + state_bytes(tx, params)


def assert_self_contained(report: aot.Report) -> None:
    assert not report.host_transfers
    assert not report.collectives
    assert not report.dtypes & {'f64', 'c128', 's64', 'u64'}


@everywhere
@each(CONFIGURATIONS)
def test_an_elementwise_step_is_one_kernel_at_the_minimum(configuration, target):
    tx = configuration.make()
    report = aot.compile_update(tx, LARGE, target=target)
    assert report.kernels <= configuration.kernels(target)
    assert_self_contained(report)
    if beyond := configuration.beyond(target):
        assert report.bytes_moved <= report.bytes_minimum + (beyond + 0.1) * LARGE.size
        # What is written once and read once.
        assert report.temporary_bytes <= (beyond / 2 + 0.1) * LARGE.size
    else:
        assert_minimal(report, tx, LARGE)


@each((*CONFIGURATIONS, *BOUNDED))
def test_the_state_has_as_many_arrays_as_stated_and_no_step_compiles_anew(configuration):
    tx = configuration.make()
    state = jax.eval_shape(tx.init, LEAF)
    assert sum(x.size > 1 for x in jax.tree.leaves(state)) == configuration.moments
    before = LEAF, state
    after = jax.eval_shape(update_and_apply(tx), LEAF, state, LEAF)

    def kinds(tree):
        return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]

    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert kinds(after) == kinds(before)


@everywhere
@pytest.mark.parametrize(
    ('make', 'expected'),
    [
        (lambda: rmsprop_jax.rmsprop(1e-3), 20),
        (lambda: rmsprop_jax.rmsprop(1e-3, momentum=0.9), 28),
        (lambda: rmsprop_jax.rmsprop(1e-3, momentum=0.9, centered=True), 36),
        (everything, 36),
    ],
    ids=['plain', 'momentum', 'centered', 'everything'],
)
def test_bytes_of_a_large_float32_leaf(make, expected, target):
    report = aot.compile_update(make(), LARGE, target=target)
    assert report.kernels == 1
    assert report.bytes_per_parameter == report.minimum_per_parameter == expected
    if report.bytes_estimated is not None:
        # With nothing to bring to fast memory early, the compiler counts as we do.
        assert report.bytes_estimated == pytest.approx(report.bytes_moved, rel=1e-3)


@everywhere
@each(BOUNDED)
def test_a_step_that_needs_more_than_one_pass_stays_below_its_ceiling(configuration, target):
    def at_most(ceilings, default=None):
        return ceilings.get(target.split('-')[0], default)

    tx = configuration.make()
    report = aot.compile_update(tx, LARGE, target=target)
    assert report.minimum_per_parameter == 12 + 8 * configuration.moments
    beyond = report.bytes_per_parameter - report.minimum_per_parameter
    assert beyond <= at_most(configuration.beyond) + 0.01
    assert report.kernels <= at_most(configuration.kernels)
    leaf = 4 * LARGE.size
    assert report.temporary_bytes <= at_most(configuration.temporary, 0.01) * leaf
    assert_self_contained(report)


@everywhere
def test_factored_second_moments_stay_below_their_ceiling(target):
    """Rows and columns are two reductions over the gradient, beside the step itself."""
    tx = rmsprop_jax.rmsprop(1e-3, storage=rmsprop_jax.storage.factored())
    report = aot.compile_update(tx, LARGE, target=target)
    assert report.bytes_moved <= 16.1 * LARGE.size
    assert report.kernels <= 8
    # A GPU sums columns in parts: a hundredth of the leaf's bytes.
    assert report.temporary_bytes < 4 * LARGE.size / 100
    assert_self_contained(report)


@everywhere
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    'shape', [(2048, 1024), (1000, 3, 7), (100_003,), (3, 3, 256, 512)], ids=str
)
def test_narrow_parameters_of_any_shape_are_one_kernel_too(shape, dtype, target):
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    tx = rmsprop_jax.rmsprop(1e-3, momentum=0.9, bias_correction=True, weight_decay=1e-4)
    report = aot.compile_update(tx, leaf, target=target)
    assert report.kernels == 1
    assert_minimal(report, tx, leaf)


@everywhere
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_the_longest_chain_with_narrow_parameters_is_one_kernel_too(dtype, target):
    leaf = jax.ShapeDtypeStruct(LARGE.shape, dtype)
    report = aot.compile_update(everything(), leaf, target=target)
    assert report.kernels == 1
    assert report.minimum_per_parameter == 30
    assert_minimal(report, everything(), leaf)


def in_three_bytes(**options):
    kept = rmsprop_jax.storage.per_statistic(
        nu=rmsprop_jax.storage.uint8(), trace=rmsprop_jax.storage.bfloat16()
    )
    return rmsprop_jax.round_parameters(rmsprop_jax.rmsprop(1e-3, storage=kept, **options))


@everywhere
@pytest.mark.parametrize(
    ('make', 'expected'),
    [
        (lambda: rmsprop_jax.round_parameters(rmsprop_jax.rmsprop(1e-3)), 14),
        (in_three_bytes, 8),
        (lambda: in_three_bytes(weight_decay=1e-2), 8),
        (lambda: in_three_bytes(momentum=0.9), 12),
    ],
    ids=['float32', 'uint8', 'weight_decay', 'momentum'],
)
def test_rounded_parameters_are_updated_at_the_minimum(make, expected, target):
    leaf = jax.ShapeDtypeStruct(LARGE.shape, jnp.bfloat16)
    report = aot.compile_update(make(), leaf, target=target)
    # What the random bits of a row have in common is a kernel of its own.
    assert report.kernels <= 2
    assert report.minimum_per_parameter == expected
    assert_minimal(report, make(), leaf)
    assert_self_contained(report)


@pytest.mark.parametrize(
    ('form', 'target', 'arguments', 'temporaries'),
    [
        # A TPU's compiler takes a minute for the layers unrolled.
        ('layers unrolled', 'cuda-h100', 3.00, 0.80),
        ('unrolled, clipped by global norm', 'cuda-h100', 3.00, 2.06),
        ('layers in lax.scan', 'cuda-h100', 3.00, 2.62),
        ('layers in lax.scan', 'tpu-v5e', 3.00, 2.00),
        ('4 layers unrolled, optax.MultiSteps', 'cuda-h100', 7.02, 1.39),
    ],
)
def test_a_whole_step_in_three_bytes_a_parameter(form, target, arguments, temporaries):
    """The table of docs/storage.md: a gradient that is kept longer would add 0.08 a layer."""
    found = memory.layers_bytes(form, target)
    assert found[0] == pytest.approx(arguments, abs=0.01)
    assert found[1] < temporaries + 0.04


class Network(nn.Module):
    """A small convolutional network with normalization, 13 leaves."""

    @nn.compact
    def __call__(self, x):
        for features in (64, 128, 256):
            x = nn.relu(nn.GroupNorm(32)(nn.Conv(features, (3, 3))(x)))
        return nn.Dense(1000)(x.mean((1, 2)))


IMAGES = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)
NETWORK = jax.eval_shape(Network().init, jax.random.key(0), IMAGES)


@pytest.mark.parametrize('target', ALL)
@pytest.mark.parametrize(
    'make',
    [everything, lambda: dialects.torch(momentum=0.9), lambda: dialects.keras()],
    ids=['everything', 'torch', 'keras'],
)
def test_a_whole_network_is_updated_at_the_minimum(make, target):
    report = aot.compile_update(make(), NETWORK, target=target)
    assert report.leaves == len(jax.tree.leaves(NETWORK))
    # TPUs run small leaves in fast memory, the longest chain in two kernels.
    assert report.kernels <= (2 if target.startswith('tpu') else 1) * report.leaves
    assert_minimal(report, make(), NETWORK)
    assert_self_contained(report)


def train_step(params, state, images, labels):
    def loss(params):
        logits = Network().apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    return *update_and_apply(everything())(params, state, gradients), value


def batch(sharding=None):
    labels = jax.ShapeDtypeStruct(IMAGES.shape[:1], jnp.int32, sharding=sharding)
    return jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype, sharding=sharding), labels


@everywhere
def test_a_train_step_is_compiled_without_host_or_copies_of_the_state(target):
    state = jax.eval_shape(everything().init, NETWORK)
    report = aot.compile_step(
        train_step, NETWORK, state, *batch(), target=target, donate=(0, 1), params=NETWORK
    )
    own = sum(4 * x.size for x in jax.tree.leaves(NETWORK))
    assert report.donated_bytes >= own + state_bytes(everything(), NETWORK)
    assert_self_contained(report)


@pytest.mark.parametrize(('target', 'topology'), [('tpu-v5e', '4x4'), ('cuda-h100', '8')])
def test_a_data_parallel_step_reduces_each_gradient_once(target, topology):
    mesh = Mesh(np.array(aot.devices(target, topology)), ('data',))
    images, labels = batch(NamedSharding(mesh, PartitionSpec('data')))
    state = jax.eval_shape(everything().init, NETWORK)
    report = aot.compile_step(
        train_step, NETWORK, state, images, labels, target=target, donate=(0, 1), params=NETWORK
    )
    assert report.devices == len(mesh.devices)
    (found,) = report.collectives
    assert found.kind == 'all-reduce'
    own = sum(4 * x.size for x in jax.tree.leaves(NETWORK))
    assert own <= found.bytes <= 1.01 * own + 1000
    assert not report.host_transfers


@pytest.mark.parametrize(
    ('target', 'topology'),
    [
        ('tpu-v4', '4x4x4'),
        ('tpu-v5e', '16x16'),
        ('tpu-v5p', '4x4x4'),
        ('tpu-v6e', '16x16'),
        ('tpu-7x', '4x4x4'),
        ('cuda-a100', '8'),
        ('cuda-h100', '1x2x8'),
        ('cuda-b200', '8'),
    ],
)
def test_a_sharded_update_on_many_devices_needs_no_communication(target, topology):
    params = sharded(target, topology)
    report = aot.compile_update(everything(), params, target=target)
    assert report.devices == params.sharding.mesh.size
    assert report.parameters == params.size // report.devices
    assert report.kernels == 1
    assert report.bytes_per_parameter == 36
    assert_self_contained(report)


@pytest.mark.parametrize('name', ['float32', 'bfloat16', 'uint8'])
@pytest.mark.parametrize(('target', 'topology'), [('tpu-v5e', '4x4'), ('cuda-h100', '8')])
def test_init_gives_state_sharded_like_the_parameters(target, topology, name):
    params = sharded(target, topology)
    tx = rmsprop_jax.scale_by_rms(storage=getattr(rmsprop_jax.storage, name)())
    init = jax.jit(tx.init).lower(params).compile()
    assert init.output_shardings.nu.is_equivalent_to(params.sharding, params.ndim)


def sharded(target, topology):
    mesh = Mesh(np.array(aot.devices(target, topology)), ('data',))
    sharding = NamedSharding(mesh, PartitionSpec('data'))
    return jax.ShapeDtypeStruct((8192, 1024), jnp.float32, sharding=sharding)


def test_donation_out_of_order_costs_copies_on_gpus():
    """Why `compile_step` says to begin with parameters and state."""

    def step(gradients, nu, p):
        nu = 0.9 * nu + 0.1 * gradients**2
        return p - 1e-3 * gradients / jnp.sqrt(nu + 1e-8), nu

    report = aot.compile_step(
        step, LEAF, LEAF, LEAF, target='cuda-h100', donate=(1, 2), params=LEAF
    )
    assert report.copies == 2
    assert report.bytes_per_parameter == 20 + 16
    ordered = aot.compile_step(
        lambda p, nu, gradients: step(gradients, nu, p),
        *(LEAF, LEAF, LEAF),
        target='cuda-h100',
        donate=(0, 1),
        params=LEAF,
    )
    assert ordered.copies == 0
    assert ordered.bytes_per_parameter == 20


@pytest.mark.parametrize('target', ALL)
def test_each_target_compiles_for_the_hardware_it_names(target):
    (device, *_) = aot.devices(target)
    kinds = {'tpu-v5e': 'TPU v5 lite', 'tpu-v5p': 'TPU v5', 'tpu-v6e': 'TPU v6 lite'}
    known = kinds.get(target, target.replace('-', ' ').removeprefix('cuda '))
    assert re.sub(r'\W', '', known).lower() in re.sub(r'\W', '', device.device_kind).lower()
