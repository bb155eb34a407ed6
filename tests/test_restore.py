"""Checkpoints move between numbers of devices and lose nothing; what does not fit is refused."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import rmsprop_jax
from rmsprop_jax import sharding, storage

pytestmark = pytest.mark.extended

SHAPES = {'kernel': (64, 128), 'table': (4, 64, 32), 'bias': (128,), 'scale': ()}
SPECS = {'kernel': P(None, 'data'), 'table': P(None, 'data'), 'bias': P('data'), 'scale': P()}
BYTES = storage.per_statistic(
    nu=storage.uint8(), var=storage.uint8(), mu=storage.bfloat16(), trace=storage.bfloat16()
)
CASES = {
    'float32': (None, {'centered': True}),
    'bfloat16': (storage.bfloat16(), {'centered': True}),
    'uint8': (BYTES, {}),
    'uint8-centered': (BYTES, {'centered': True}),
    'factored': (storage.per_statistic(nu=storage.factored()), {}),
}


def optimizer(choice=None, **options):
    everything = {'momentum': 0.9, 'bias_correction': True, 'storage': choice} | options
    return rmsprop_jax.rmsprop(0.01, **everything)


def parameters(devices=1):
    mesh = Mesh(jax.devices()[:devices], 'data')
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {
        name: jax.device_put(jax.random.normal(key, shape), NamedSharding(mesh, SPECS[name]))
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def begun(tx, devices):
    """Parameters and state before training, on that many devices."""
    params = parameters(devices)
    return params, jax.jit(tx.init)(params)


@jax.jit(static_argnums=0)
def step(tx, params, state):
    gradients = jax.tree.map(lambda p: jnp.sin(3 * p), params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def save(folder, state, choice):
    with ocp.StandardCheckpointer() as checkpointer:
        description = storage.describe(state, choice)
        checkpointer.save(folder, state, custom_metadata=description)


def restore(folder, like, choice):
    with ocp.StandardCheckpointer() as checkpointer:
        storage.check(checkpointer.metadata(folder).custom_metadata, like, choice)
        return checkpointer.restore(folder, like)


def assert_same_bits(one, other):
    chex.assert_trees_all_equal_shapes_and_dtypes(one, other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_placed_alike(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.parametrize(('choice', 'options'), CASES.values(), ids=CASES)
def test_nothing_is_lost_between_devices(choice, options, tmp_path):
    tx = optimizer(choice, **options)
    # Collectives of several steps at once can lock up simulated devices.
    middle = jax.block_until_ready(step(tx, *begun(tx, devices=8)))
    state = saved = jax.block_until_ready(step(tx, *middle))
    assert len(saved[0]['kernel'].sharding.device_set) == 8
    for devices in (2, 1, 8):
        save(tmp_path / f'for-{devices}', state, choice)
        params = parameters(devices)
        like = params, sharding.abstract_state(tx, params)
        state = restore(tmp_path / f'for-{devices}', like, choice)
        assert_placed_alike(state, begun(tx, devices))
        assert_same_bits(state, saved)
    after = jax.block_until_ready(step(tx, *saved))
    assert_same_bits(step(tx, *state), after)


def each(prefix, names=tuple(SHAPES)):
    return {f"{prefix}['{name}']" for name in names}


LARGE = ('kernel', 'table')
SEED = storage.per_statistic(nu=storage.uint8(seed=3), trace=storage.bfloat16())
# Optimizer and choice to restore into, changes to the parameters, every path named, and one line.
REFUSED = {
    'another optimizer': (
        optimizer(BYTES, centered=True),
        BYTES,
        {},
        each('[1][0].nu') | each('[1][0].mu') | each('[1][0].var'),
        "[1][0].mu['bias']: absent in the checkpoint, "
        "{'dtype': 'float32', 'shape': [128], 'format': 'float32'} here",
    ),
    'without momentum': (
        optimizer(BYTES, momentum=None),
        BYTES,
        {},
        each('[1][2].trace') | {'[1][2].count'},
        "[1][2].count: {'dtype': 'int32', 'shape': []} in the checkpoint, absent here",
    ),
    'of Optax': (
        optax.rmsprop(0.01, momentum=0.9),
        None,
        {},
        each('[1][0].nu')
        | each('[1][2].trace')
        | {'[1][0].count', '[1][0].unit', '[1][0].weight', '[1][2].count'},
        "[1][0].nu['bias']: {'format': 'float32'} in the checkpoint, none of this here",
    ),
    'another format': (
        optimizer(),
        None,
        {},
        each('[1][0].nu', LARGE) | each('[1][2].trace', LARGE) | {'[1][0].unit'},
        "[1][2].trace['table']: {'dtype': 'bfloat16', 'format': 'bfloat16', 'seed': 0, "
        "'version': 1} in the checkpoint, {'dtype': 'float32', 'format': 'float32'} here",
    ),
    'another seed': (
        optimizer(SEED),
        SEED,
        {},
        each('[1][0].nu', LARGE),
        "[1][0].nu['table']: {'seed': 0} in the checkpoint, {'seed': 3} here",
    ),
    'another shape': (
        optimizer(BYTES),
        BYTES,
        {'bias': jax.ShapeDtypeStruct((64,), jnp.float32)},
        {"[0]['bias']", "[1][0].nu['bias']", "[1][2].trace['bias']"},
        "[0]['bias']: {'shape': [128]} in the checkpoint, {'shape': [64]} here",
    ),
    'another dtype': (
        optimizer(BYTES),
        BYTES,
        {'bias': jax.ShapeDtypeStruct((128,), jnp.bfloat16)},
        {"[0]['bias']"},
        "[0]['bias']: {'dtype': 'float32'} in the checkpoint, {'dtype': 'bfloat16'} here",
    ),
    'another leaf': (
        optimizer(BYTES),
        BYTES,
        {'extra': jax.ShapeDtypeStruct((), jnp.float32)},
        {"[0]['extra']", "[1][0].nu['extra']", "[1][2].trace['extra']"},
        "[0]['extra']: absent in the checkpoint, {'dtype': 'float32', 'shape': []} here",
    ),
}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved') / 'state'
    save(folder, begun(optimizer(BYTES), devices=2), BYTES)
    return folder


@pytest.mark.parametrize(
    ('tx', 'choice', 'changes', 'paths', 'line'), REFUSED.values(), ids=REFUSED
)
def test_what_does_not_fit_is_refused(saved, tx, choice, changes, paths, line):
    params = jax.eval_shape(parameters) | changes
    like = params, jax.eval_shape(tx.init, params)
    with pytest.raises(ValueError, match='the checkpoint does not match the state') as refusal:
        restore(saved, like, choice)
    lines = str(refusal.value).splitlines()[1:]
    assert {line.strip().partition(': ')[0] for line in lines} == paths
    assert f'  {line}' in lines


def test_the_checkpoint_of_the_page():
    """Saved on eight devices, restored on two, split over the data axis on both."""
    page = (Path(__file__).parents[1] / 'docs' / 'scaling.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    names = {}
    for block in blocks:
        if block.startswith('import'):
            exec(block, names)
    run, restored = names['run'], names['restored']
    chex.assert_trees_all_equal(restored, run)
    for part, devices in ((run, 8), (restored, 2), (names['continued'], 2)):
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(part)} == {devices}
        (nu, _, velocity), kernel = part['state'], (512 // devices, 256)
        assert nu.nu['kernel'].dtype == jnp.uint8
        for x in (nu.nu['kernel'], velocity.trace['kernel']):
            assert x.sharding.shard_shape(x.shape) == kernel
        assert part['params']['kernel'].sharding.is_fully_replicated
    # The next step is the one that eight devices take, random bits included.
    tx, places = names['on'](jax.devices())
    expected = names['step'](tx, places, run)
    chex.assert_trees_all_equal(names['continued'], expected)
