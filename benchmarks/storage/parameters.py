"""Trains models whose parameters are kept in bfloat16, beside float32.

::

    python -m benchmarks.storage.parameters build/storage-study

Arithmetic is in float32, so that what differs is how parameters, and their gradients, are kept.
A second series of seeds shows which differences of the first repeat.
"""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.storage.metrics import paired
from benchmarks.storage.training import SEEDS, Task, digits, everywhere, language, window_language
from rmsprop_jax import round_parameters, storage

TASKS = {'digits': digits, 'language, MLP': window_language, 'language': language}
Transformation = optax.GradientTransformationExtraArgs


class CompensatedState(NamedTuple):
    """What the parameters lack in bfloat16, in bfloat16, and the state of what is wrapped."""

    lack: Any
    inner: Any


def compensated(inner: Transformation) -> Transformation:
    """Kahan's summation, the peer: rounds to nearest and adds at the next step what was lost.

    ::

        t    = bfloat16(p + u + lack)
        lack <- bfloat16(u + lack - (t - p))

    Two bytes a parameter more than stochastic rounding. Source: Zamirai et al., Revisiting BFloat16
    Training, arXiv:2010.06192.
    """

    def wide(tree: Any) -> Any:
        return optax.tree.cast(tree, jnp.float32)

    def narrow(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    def init(params: Any) -> Any:
        return CompensatedState(optax.tree.zeros_like(params), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        updates, after = inner.update(wide(updates), state.inner, wide(params))
        due = jax.tree.map(jnp.add, updates, wide(state.lack))
        moved = jax.tree.map(lambda p, u: narrow(p + u) - p, wide(params), due)
        lack = jax.tree.map(lambda u, m: (u - m).astype(jnp.bfloat16), due, moved)
        return moved, CompensatedState(lack, after)

    return optax.GradientTransformationExtraArgs(init, update)


class Variant(NamedTuple):
    """How parameters are kept and updated; `state` is the bytes of its statistics a parameter."""

    dtype: Any
    around: Callable[[Transformation], Transformation]
    options: dict[str, Any]
    state: int


def variants() -> dict[str, Variant]:
    """By name. The first is what the others are paired with."""
    uint8 = {'storage': everywhere(storage.uint8())}
    return {
        'float32': Variant(jnp.float32, lambda tx: tx, {}, 4),
        'bfloat16, to nearest': Variant(jnp.bfloat16, lambda tx: tx, {}, 4),
        'bfloat16, stochastic': Variant(jnp.bfloat16, round_parameters, {}, 4),
        'bfloat16, stochastic, nu uint8': Variant(jnp.bfloat16, round_parameters, uint8, 1),
        'bfloat16, Kahan': Variant(jnp.bfloat16, compensated, {}, 6),
        'bfloat16, Kahan, nu uint8': Variant(jnp.bfloat16, compensated, uint8, 3),
    }


def held_out_losses(task: Task, variant: Variant, seeds: range) -> list[float]:
    """One loss a seed, which decides the parameters and the order of the data."""
    tx = variant.around(task.optimizer(**variant.options))

    def loss(params: Any, batch: Any) -> jax.Array:
        return task.loss(optax.tree.cast(params, jnp.float32), batch)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        gradients = jax.grad(loss)(params, task.batch(key))
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(seed: int) -> jax.Array:
        params = optax.tree.cast(task.init(jax.random.key(seed)), variant.dtype)
        keys = jax.random.split(jax.random.key(seed), task.steps)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        return loss(params, task.held_out)

    with ThreadPoolExecutor(2) as pool:
        return [float(x) for x in pool.map(run, seeds)]


def main(folder: Path) -> None:
    results = []
    for name, make in TASKS.items():
        task = make()
        reference: dict[str, list[float]] = {}
        for label, variant in variants().items():
            kept = jnp.dtype(variant.dtype).itemsize
            result: dict[str, Any] = {'task': name, 'format': label}
            result['bytes'] = kept + variant.state
            for series, first in (('', 0), ('second_', SEEDS)):
                losses = held_out_losses(task, variant, range(first, first + SEEDS))
                result[f'{series}losses'] = losses
                if label == 'float32':
                    reference[series] = losses
                else:
                    pairs = paired(np.array(losses), np.array(reference[series]))
                    result |= {f'{series}{key}': value for key, value in pairs.items()}
            results.append(result)
            print(json.dumps(result), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'parameters.json').write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
