"""Time of one update of one large leaf in each format, as a multiple of float32's, on this machine.

::

    python -m benchmarks.storage.cost build/storage-study
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rmsprop_jax import rmsprop, storage
from rmsprop_jax.aot._compile import update_and_apply

SHAPE = (4096, 4096)
ROUNDS = 15


def stepper(format: Any) -> Callable[[], float]:
    """Seconds of a step, with parameters and state donated as in training."""
    tx = rmsprop(1e-3, 0.99, storage=format)

    gradient = jax.random.normal(jax.random.key(0), SHAPE)
    compiled = jax.jit(update_and_apply(tx), donate_argnums=(0, 1))
    carry = [jnp.zeros(SHAPE), tx.init(jnp.zeros(SHAPE))]

    def timed() -> float:
        start = time.perf_counter()
        carry[:] = jax.block_until_ready(compiled(*carry, gradient))
        return time.perf_counter() - start

    timed()
    return timed


def main(folder: Path) -> None:
    formats = {
        'float32': storage.float32(),
        'bfloat16': storage.bfloat16(),
        'uint8': storage.uint8(),
        'factored': storage.factored(),
    }
    steppers = {name: stepper(format) for name, format in formats.items()}
    # One round times each format once, so that a busy machine slows them alike.
    rounds = [{name: timed() for name, timed in steppers.items()} for _ in range(ROUNDS)]
    results = []
    for name, format in formats.items():
        ratios = [times[name] / times['float32'] for times in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        shape = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
        size = format.nbytes(shape.shape) / shape.size
        results.append({'format': name, 'bytes': size, 'ratio': middle, 'from': low, 'to': high})
        print(json.dumps(results[-1]), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'cost.json').write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
