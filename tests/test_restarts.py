"""State that comes back from a disk: after a write that was killed, and from older releases.

`python tests/test_restarts.py`, in an environment with flax, records the states of this release.
"""

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsprop_jax
from rmsprop_jax import dialects, storage

pytestmark = pytest.mark.extended

OLDER = Path(__file__).parent / 'older_states'
BYTES = storage.per_statistic(
    nu=storage.large_leaves(storage.uint8(), min_size=1),
    trace=storage.large_leaves(storage.bfloat16(), min_size=1),
)
MEANS = storage.large_leaves(storage.factored(), min_size=1)
HALVES = storage.large_leaves(storage.bfloat16(), min_size=1)
HALVES_CENTERED = storage.per_statistic(
    mu=HALVES, var=storage.large_leaves(storage.uint8(scale=2.0), min_size=1, min_ndim=1)
)
HALVES_OF_PAIRS = storage.per_statistic(nu=HALVES, trace=HALVES)
MEANS_OF_PAIRS = storage.per_statistic(nu=MEANS)
STATES: dict[str, tuple[Callable[[], Any], Any]] = {
    'plain': (lambda: rmsprop_jax.rmsprop(0.1), None),
    'everything': (
        lambda: rmsprop_jax.rmsprop(
            optax.linear_schedule(0.1, 0.0, 10),
            initial_scale=1.0,
            centered=True,
            momentum=0.9,
            bias_correction=True,
            weight_decay=1e-3,
        ),
        None,
    ),
    'keras': (lambda: dialects.keras(use_ema=True, gradient_accumulation_steps=2), None),
    'bytes': (lambda: rmsprop_jax.rmsprop(0.1, momentum=0.9, storage=BYTES), BYTES),
    'means': (lambda: rmsprop_jax.rmsprop(0.1, storage=MEANS), MEANS),
    'skipping': (lambda: rmsprop_jax.skip_nonfinite(rmsprop_jax.rmsprop(0.1)), None),
    'halves': (lambda: rmsprop_jax.rmsprop(0.1, momentum=0.9, storage=HALVES), HALVES),
    'halves-centered': (
        lambda: rmsprop_jax.rmsprop(0.1, centered=True, storage=HALVES_CENTERED),
        HALVES_CENTERED,
    ),
    'complex': (lambda: rmsprop_jax.rmsprop(0.1, centered=True), None),
    'pairs': (lambda: dialects.torch(0.1, momentum=0.9, centered=True), None),
    'pairs-halves': (
        lambda: dialects.torch(0.1, momentum=0.9, storage=HALVES_OF_PAIRS),
        HALVES_OF_PAIRS,
    ),
    'pairs-means': (lambda: dialects.torch(0.1, storage=MEANS_OF_PAIRS), MEANS_OF_PAIRS),
}
PARAMS = {'kernel': jnp.linspace(-1, 1, 12).reshape(3, 4), 'bias': jnp.array([0.5, -0.25])}


def params_of(name: str) -> Any:
    """Complex ones where the state is that of complex arrays."""
    is_complex = name.partition('-')[0] in ('complex', 'pairs')
    return jax.tree.map(lambda p: p * (1 + 0.5j) if is_complex else p, PARAMS)


def have_the_same_means(before: Any, after: Any) -> None:
    """Means over other axes are another estimate, but the sums of rows and columns stay."""
    before, after = (optax.tree.get(state, 'nu') for state in (before, after))
    chex.assert_trees_all_close(before['bias'], after['bias'], rtol=1e-6)
    for axis in (0, 1):
        one, other = before['kernel'].mean(axis), after['kernel'].mean(axis)
        np.testing.assert_allclose(one, other, rtol=1e-6)


# Kept in other formats than in release 0.1: formats were chosen by the shape of the pairs.
OTHERWISE: dict[str, Callable[[Any, Any], None]] = {
    'pairs-halves': chex.assert_trees_all_equal,
    'pairs-means': have_the_same_means,
}


def step(tx: optax.GradientTransformation, params: Any, state: Any) -> tuple[Any, Any]:
    updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
    return optax.apply_updates(params, updates), state


def recorded() -> dict[str, Any]:
    """After three steps each state and its description, and the parameters a step later."""
    found = {}
    for name, (make, kept) in STATES.items():
        tx, params = make(), params_of(name)
        state = tx.init(params)
        for _ in range(3):
            params, state = step(tx, params, state)
        found[name] = {
            'params': params,
            'state': state,
            'description': json.dumps(storage.describe(state, kept)),
            'next': step(tx, params, state)[0],
        }
    return jax.tree.map(lambda x: x if isinstance(x, str) else np.asarray(x), found)


def record() -> None:
    """Writes them as Flax, pickle and Orbax do."""
    import orbax.checkpoint as ocp
    from flax import serialization

    OLDER.mkdir(exist_ok=True)
    found, version = recorded(), rmsprop_jax.__version__
    plain = {
        name: x | {'state': serialization.to_state_dict(x['state'])} for name, x in found.items()
    }
    (OLDER / f'{version}.msgpack').write_bytes(serialization.msgpack_serialize(plain))
    states = {name: x['state'] for name, x in found.items()}
    (OLDER / f'{version}.pickle').write_bytes(pickle.dumps(states))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(OLDER / f'{version}.orbax', states, force=True)
    # It holds the path of the folder.
    (OLDER / f'{version}.orbax' / 'commit_success.txt').unlink()


def by_flax(file: Path, name: str, template: Any) -> Any:
    from flax import serialization

    older = serialization.msgpack_restore(file.read_bytes())
    state = serialization.from_state_dict(template, older[name]['state'])
    if name != 'pairs-means':
        return state
    # Where there are no means any more, Flax restores them as it finds them.
    bias = storage.Factors(**state[0].nu['bias'])
    return (state[0]._replace(nu=state[0].nu | {'bias': bias}), *state[1:])


def by_pickle(file: Path, name: str, template: Any) -> Any:
    del template
    return pickle.loads(file.with_suffix('.pickle').read_bytes())[name]


@functools.cache
def _orbax_states(file: Path) -> Any:
    import orbax.checkpoint as ocp

    template = pickle.loads(file.with_suffix('.pickle').read_bytes())
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(file.with_suffix('.orbax').absolute(), template)


def by_orbax(file: Path, name: str, template: Any) -> Any:
    del template
    return _orbax_states(file)[name]


@pytest.mark.parametrize('read', [by_flax, by_pickle, by_orbax])
@pytest.mark.parametrize('file', sorted(OLDER.glob('*.msgpack')), ids=lambda file: file.stem)
@pytest.mark.parametrize('name', STATES)
def test_states_of_older_releases_go_on(
    file: Path, name: str, read: Callable[[Path, str, Any], Any]
) -> None:
    serialization = pytest.importorskip('flax.serialization')
    older = serialization.msgpack_restore(file.read_bytes())
    (make, kept), was = STATES[name], older[name]
    tx, params = make(), jax.tree.map(jnp.asarray, was['params'])
    description = json.loads(was['description'])
    assert description['rmsprop_jax'] == file.stem
    template = tx.init(params)
    state = jax.tree.map(jnp.asarray, read(file, name, template))
    if name in OTHERWISE:
        with pytest.raises(ValueError, match='they differ in .*formats'):
            storage.check(description, template, kept)
        with pytest.raises(ValueError, match=r"updates\['bias'\].* nu .*storage.convert"):
            tx.update(params, state, params)
        before = storage.read(state, kept)
        state = storage.convert(state, params, kept, kept)
        OTHERWISE[name](before, storage.read(state, kept))
    else:
        storage.check(description, template, kept)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, template)
    after = step(tx, params, state)[0]
    if name != 'pairs-means':
        chex.assert_trees_all_close(after, was['next'], rtol=1e-6, atol=1e-7)


def test_this_release_has_recorded_its_states() -> None:
    assert (OLDER / f'{rmsprop_jax.__version__}.msgpack').exists()


# Trains a little, writing a checkpoint after each step; the second is long in the writing.
WRITER = """
import sys
import jax, jax.numpy as jnp, orbax.checkpoint as ocp, optax, rmsprop_jax
from test_restarts import LARGE, large_step
options = ocp.CheckpointManagerOptions(enable_async_checkpointing=sys.argv[2] == 'async')
with ocp.CheckpointManager(sys.argv[1], options=options) as manager:
    params = jnp.full(LARGE, 0.5)
    state = params, rmsprop_jax.rmsprop(0.1, momentum=0.9).init(params)
    for i in range(2):
        state = large_step(i, state)
        manager.save(i, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
"""
LARGE = (4096, 2048)


@jax.jit
def large_step(i: int, state: Any) -> Any:
    params, opt_state = state
    # Random, so that it cannot be compressed.
    grads = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), LARGE)
    updates, opt_state = rmsprop_jax.rmsprop(0.1, momentum=0.9).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def written(folder: Path) -> int:
    """The bytes in the files below a folder that others are changing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total


@pytest.mark.parametrize('mode', ['sync', 'async'])
def test_a_write_that_is_killed_leaves_the_last_good_checkpoint(tmp_path: Path, mode: str) -> None:
    ocp = pytest.importorskip('orbax.checkpoint')
    folder = tmp_path / 'checkpoints'
    inherited = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    command = [sys.executable, '-c', WRITER, str(folder), mode]
    with subprocess.Popen(command, env=inherited | {'PYTHONPATH': path}) as process:
        deadline = time.monotonic() + 200
        # The second checkpoint has 96 MiB; a few of them are there.
        while sum(map(written, folder.glob('1.*tmp*'))) < 2**20:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert list(folder.glob('1.*tmp*'))
    tx = rmsprop_jax.rmsprop(0.1, momentum=0.9)
    start = jnp.full(LARGE, 0.5)
    expected = large_step(0, (start, tx.init(start)))
    with ocp.CheckpointManager(folder) as manager:
        assert manager.latest_step() == 0
        restored = manager.restore(0, args=ocp.args.StandardRestore(expected))
        chex.assert_trees_all_equal(restored, expected)
        # And the run goes on from there, over the remains.
        after = large_step(1, restored)
        manager.save(1, args=ocp.args.StandardSave(after))
        manager.wait_until_finished()
        again = manager.restore(1, args=ocp.args.StandardRestore(expected))
    chex.assert_trees_all_equal(again, large_step(1, expected))


if __name__ == '__main__':
    record()
