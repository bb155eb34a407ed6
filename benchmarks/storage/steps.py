"""Records gradients for the peer, and takes our own steps on them.

::

    python -m benchmarks.storage.steps build/storage-study
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.storage.metrics import exact_steps, step_errors
from benchmarks.storage.streams import STEPS, Stream
from benchmarks.storage.training import language, trainer
from rmsprop_jax import scale_by_rms, storage

# PyTorch's default, which bitsandbytes shares: outside the root.
EPS = 1e-8
DECAYS = (0.99, 0.999)
RECORDED = ('embedding', 'expand0')


def record() -> dict[str, jax.Array]:
    """Gradients of a synthetic leaf, and of two leaves of a transformer in training."""
    task = language()
    run = trainer(task, task.optimizer(), RECORDED)
    stream = jax.lax.map(Stream(1, rows=16), jnp.arange(STEPS))
    return {'synthetic': stream} | run(0, 0)[1]


def steps(gradients: jax.Array, decay: float, format: Any) -> jax.Array:
    """The directions of `scale_by_rms` in a format."""
    format = storage.large_leaves(format, min_size=1)
    tx = scale_by_rms(decay, eps=EPS, eps_in_sqrt=False, storage=format)

    def step(state: Any, gradient: jax.Array) -> tuple[Any, Any]:
        update, state = tx.update(gradient, state)
        return state, update

    return jax.jit(lambda state: jax.lax.scan(step, state, gradients))(tx.init(gradients[0]))[1]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    formats = {
        'bfloat16': storage.bfloat16(),
        'uint8': storage.uint8(),
        'factored': storage.factored(),
    }
    cases, results = [], []
    for name, gradients in record().items():
        np.save(folder / f'gradients-{name}.npy', gradients)
        for decay in DECAYS:
            cases.append({'stream': name, 'decay': decay, 'eps': EPS})
            truth = np.stack(list(exact_steps(np.asarray(gradients), decay, EPS)))
            for label, format in formats.items():
                errors = step_errors(np.asarray(steps(gradients, decay, format)), truth)
                results.append(cases[-1] | {'format': label} | errors)
                print(json.dumps(results[-1]), flush=True)
    (folder / 'steps-cases.json').write_text(json.dumps(cases))
    (folder / 'steps-ours.json').write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
