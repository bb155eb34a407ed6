"""Two processes train as one does, and a run outlives the death of one of them.

Two processes of one device each and one process of two devices add the same two halves of every
gradient, so that they must agree bit for bit. One device adds all of a batch in another order.
"""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import train_process
from jax.tree_util import keystr, tree_flatten_with_path
from test_demo import environment
from train_process import BATCH_SIZE, EPOCHS, KEY

from rmsprop_jax import demo

pytestmark = pytest.mark.slow


class Ended(NamedTuple):
    """A process that is no more."""

    code: int
    log: str

    @property
    def losses(self) -> list[str]:
        return [line for line in self.log.splitlines() if line.startswith('epoch ')]


@contextlib.contextmanager
def reserved_address() -> Iterator[str]:
    """An address on this machine that nobody else is given as long as it is held."""
    with socket.socket() as held:
        # The coordinator sets the same option, so that it may listen where this one does not.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(('127.0.0.1', 0))
        yield '{}:{}'.format(*held.getsockname())


def run(commands: Sequence[Sequence[object]], devices: int, logs: Path) -> list[Ended]:
    """Runs processes side by side until all have ended, one has failed, or time is up."""
    forced = {'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
    paths = [logs / f'{index}.log' for index in range(len(commands))]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command, path in zip(commands, paths, strict=True):
            with path.open('w') as log:
                arguments = [sys.executable, train_process.__file__, *map(str, command)]
                started.append(
                    subprocess.Popen(
                        arguments,
                        env=environment() | forced | {'JAX_PLATFORMS': 'cpu'},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        deadline = time.monotonic() + train_process.SECONDS
        while time.monotonic() < deadline:
            codes = [process.poll() for process in started]
            if None not in codes or any(codes):
                break
            time.sleep(0.05)
    finally:
        # One without the other cannot go on.
        for process in started:
            process.kill()
            process.wait()
    return [
        Ended(process.returncode, path.read_text())
        for process, path in zip(started, paths, strict=True)
    ]


def alone(output: Path, last: int) -> list[Ended]:
    """One process with two devices."""
    return run([[output, last]], devices=2, logs=output)


def together(output: Path, last: int, killed_in: int | None = None) -> list[Ended]:
    """Two processes with one device each, of which the second may be killed."""
    killed = [] if killed_in is None else ['--killed-in', killed_in]
    with reserved_address() as address:
        both = [[output, last, '--address', address, '--index', index] for index in (0, 1)]
        both[1] += killed
        return run(both, devices=1, logs=output)


def assert_trained(ended: Sequence[Ended], first: int, last: int) -> list[str]:
    """Each has gone through these epochs with the same losses, which are returned."""
    devices = '1 x 2' if len(ended) == 1 else '2 x 1'
    for process in ended:
        assert process.code == 0, shown(ended)
        assert f'{devices} from {first}\n' in process.log, shown(ended)
        assert len(process.losses) == last - first + 1, shown(ended)
        assert process.losses == ended[0].losses, shown(ended)
    return ended[0].losses


def shown(ended: Sequence[Ended]) -> str:
    return '\n'.join(
        f'process {index} ended with {process.code}:\n{process.log[-4000:]}'
        for index, process in enumerate(ended)
    )


def final_state(output: Path) -> dict[str, np.ndarray[Any, Any]]:
    made = train_process.experiment()
    with demo.open_checkpoints(output / demo.CHECKPOINTS) as checkpoints:
        state = demo.restore(checkpoints, lambda: made.init(jax.random.key(KEY)))
    assert state is not None
    assert int(state.epoch) == EPOCHS
    return {keystr(path): np.asarray(leaf) for path, leaf in tree_flatten_with_path(state)[0]}


def assert_same_bits(one: Path, other: Path) -> None:
    here, there = final_state(one), final_state(other)
    assert here.keys() == there.keys()
    assert [path for path in here if here[path].tobytes() != there[path].tobytes()] == []


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What two processes leave that nobody has killed, and their losses."""
    output = tmp_path_factory.mktemp('undisturbed')
    return output, assert_trained(together(output, EPOCHS), 1, EPOCHS)


def test_two_processes_train_as_one(undisturbed: tuple[Path, list[str]], tmp_path: Path) -> None:
    output, losses = undisturbed
    assert assert_trained(alone(tmp_path, EPOCHS), 1, EPOCHS) == losses
    assert_same_bits(tmp_path, output)

    made, key = train_process.experiment(), jax.random.key(KEY)
    state = jax.jit(made.init)(key)
    run_epoch = jax.jit(made.epoch, donate_argnums=1)
    for _ in range(EPOCHS):
        state, _ = run_epoch(key, state)
    two, steps = final_state(output), EPOCHS * (demo.TRAIN_IMAGES // BATCH_SIZE)
    for path, one in tree_flatten_with_path(state.params)[0]:
        # Weights are below 1. Each step may add one rounding error of that size.
        np.testing.assert_allclose(two[f'.params{keystr(path)}'], one, rtol=0, atol=steps * 2**-23)


def test_a_killed_run_is_resumed_by_one_process_and_by_two(
    undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    output, losses = undisturbed
    survivor, killed = before = together(tmp_path, EPOCHS, killed_in=4)
    assert killed.code == -signal.SIGKILL, shown(before)
    assert survivor.code != 0, shown(before)
    assert survivor.losses == killed.losses == losses[:3], shown(before)
    # The third epoch was not in a checkpoint, and is run again.
    assert assert_trained(alone(tmp_path, 4), 3, 4) == losses[2:4]
    assert assert_trained(together(tmp_path, EPOCHS), 5, EPOCHS) == losses[4:]
    assert_same_bits(tmp_path, output)
