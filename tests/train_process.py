"""A process of test_processes: it trains the demo's network, alone or as one of two.

Each step's images are spread over all devices of all processes, and everything else is on each of
them. Training goes on from the last checkpoint in the output folder, if there is one.
"""

import argparse
import os
import signal
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from rmsprop_jax import demo, rmsprop

KEY = 0
EPOCHS = 6
# Five steps make an epoch.
BATCH_SIZE = 256
CHECKPOINT_EVERY = 2
# How long one process waits for the other on a busy machine.
SECONDS = 120


def experiment(sharding: Sharding | None = None) -> demo.Experiment:
    optimizer = demo.Optimizer('RMSProp', 3e-3, lambda rate: rmsprop(rate, momentum=0.9))
    return demo.Experiment(demo.load_digits(), optimizer, EPOCHS, BATCH_SIZE, sharding)


def train(output: Path, last: int, killed_in: int | None) -> None:
    import orbax.checkpoint as ocp

    mesh = Mesh(jax.devices(), 'data')
    everywhere = NamedSharding(mesh, PartitionSpec())
    data_parallel = experiment(NamedSharding(mesh, PartitionSpec('data')))
    key = jax.random.key(KEY)
    run_epoch = jax.jit(data_parallel.epoch, donate_argnums=1, out_shardings=everywhere)
    with demo.open_checkpoints(output / demo.CHECKPOINTS) as checkpoints:
        state = demo.restore(checkpoints, lambda: data_parallel.init(key), everywhere)
        if state is None:
            state = jax.jit(data_parallel.init, out_shardings=everywhere)(key)
        first = int(state.epoch) + 1
        print(f'{jax.process_count()} x {jax.local_device_count()} from {first}', flush=True)
        for epoch in range(first, last + 1):
            if epoch == killed_in:
                # The other process is in this epoch, or will be, and waits for this one there.
                os.kill(os.getpid(), signal.SIGKILL)
            state, metrics = run_epoch(key, state)
            print(f'epoch {epoch}: {float(metrics["loss"]).hex()}', flush=True)
            if epoch % CHECKPOINT_EVERY == 0:
                checkpoints.save(epoch, args=ocp.args.StandardSave(state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('output', type=Path)
    parser.add_argument('last', type=int, help='epoch to stop after')
    parser.add_argument('--address', help='where the first process coordinates')
    parser.add_argument('--index', type=int, help='which of the two processes this one is')
    parser.add_argument('--killed-in', type=int, help='epoch at the start of which to die')
    given = parser.parse_args()
    if given.address is not None:
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
        jax.distributed.initialize(
            given.address,
            num_processes=2,
            process_id=given.index,
            coordinator_bind_address=given.address,
            initialization_timeout=SECONDS,
            heartbeat_timeout_seconds=SECONDS,
            shutdown_timeout_seconds=SECONDS,
        )
    train(given.output, given.last, given.killed_in)


if __name__ == '__main__':
    main()
