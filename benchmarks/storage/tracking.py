"""Follows stored statistics and the steps taken with them over hard synthetic gradients.

::

    python -m benchmarks.storage.tracking build/storage-study
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.storage.metrics import WARM_UP, moment_errors, signed_errors
from benchmarks.storage.streams import STEPS, Stream
from rmsprop_jax import scale_by_rms, storage, trace

SEEDS = (1, 2)
DECAYS = (0.9, 0.99, 0.999)
FORMATS = {
    'bfloat16': storage.bfloat16(),
    'uint8': storage.uint8(),
}


class Followed(NamedTuple):
    """What became of one transformation.

    Attributes:
      state: At the end, as stored.
      worst: The largest |step| over float32's, by row.
      worst_large: The same among steps larger than 1, which is a root mean square step's size.
    """

    state: Any
    worst: np.ndarray
    worst_large: np.ndarray


def average(decay: float, power: int) -> optax.GradientTransformation:
    """The truth, in float64 and apart from the library: the running average of a power."""

    def update(gradient: jax.Array, state: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        del params
        new = gradient.astype(jnp.float64) ** power
        return gradient, decay * state + (1 - decay) * new

    return optax.GradientTransformation(lambda p: jnp.zeros(p.shape, jnp.float64), update)


def follow(
    txs: dict[str, optax.GradientTransformation],
    truth: optax.GradientTransformation,
    stream: Stream,
) -> tuple[dict[str, Followed], Any]:
    """Runs transformations, of which one is called float32, and the truth over the same gradients.

    Returns:
      What became of each, and the state of the truth.
    """

    def step(carry: Any, count: jax.Array) -> tuple[Any, None]:
        followed, true_state = carry
        gradient = stream(count)
        updates = {name: tx.update(gradient, followed[name].state) for name, tx in txs.items()}
        reference = jnp.abs(updates['float32'][0].astype(jnp.float32))
        for name, (update, state) in updates.items():
            size = jnp.abs(update.astype(jnp.float32))
            ratio = jnp.where((reference > 0) & (count >= WARM_UP), size / reference, 0)
            worst = ratio.max(axis=1), jnp.where(size > 1, ratio, 0).max(axis=1)
            followed[name] = Followed(state, *map(jnp.maximum, followed[name][1:], worst))
        return (followed, truth.update(gradient, true_state)[1]), None

    params = jnp.zeros((stream.rows, stream.columns), stream.dtype)
    none = jnp.zeros(stream.rows)
    start = {name: Followed(tx.init(params), none, none) for name, tx in txs.items()}
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(STEPS))[0])
    return jax.device_get(run((start, truth.init(params))))


def second_moment(stream: Stream, decay: float) -> Iterator[dict[str, Any]]:
    """`nu` against float64, and the steps against float32's."""
    formats = {'float32': storage.float32()} | FORMATS
    txs = {name: scale_by_rms(decay, eps=0.0, storage=format) for name, format in formats.items()}
    followed, truth = follow(txs, average(decay, 2), stream)
    for name, format in formats.items():
        found = followed[name]
        yield {
            'format': name,
            **moment_errors(storage.read(found.state, format).nu, truth),
            'worst': float(found.worst.max()),
            'worst_large': float(found.worst_large.max()),
            'saturated': saturated(found.state, format),
        }


def mean_and_trace(stream: Stream, decay: float) -> Iterator[dict[str, Any]]:
    """`mu` and `trace` in bfloat16, in units of their own standard deviation under gradients that
    are independent of each other."""
    both = storage.per_statistic(var=storage.float32(), mu=storage.bfloat16())
    velocity = storage.bfloat16()
    txs = {
        'float32': scale_by_rms(decay, eps=0.0, centered=True),
        'mu': scale_by_rms(decay, eps=0.0, centered=True, storage=both),
        'trace': trace(decay, storage=velocity),
    }
    truth = optax.chain(average(decay, 1), average(decay, 2))
    followed, (mean, square) = follow(txs, truth, stream)
    unit = np.sqrt(square * (1 - decay) / (1 + decay))
    mu = storage.read(followed['mu'].state, both).mu
    sum_ = (1 - decay) * storage.read(followed['trace'].state, velocity).trace
    for name, stored in (('mu', mu), ('trace', sum_)):
        yield {'format': f'{name} bfloat16', **signed_errors(stored, mean, unit)}


def centered(stream: Stream, decay: float) -> Iterator[dict[str, Any]]:
    """`var` against float32-centered's, and the steps against float32-centered's."""
    formats = {'float32': storage.float32()}
    for mean_name, mean in (('float32', storage.float32()), ('bfloat16', storage.bfloat16())):
        for name, format in FORMATS.items():
            both = storage.per_statistic(var=format, mu=mean)
            formats[f'var {name}, mu {mean_name}'] = both
    txs = {
        name: scale_by_rms(decay, eps=0.0, centered=True, storage=format)
        for name, format in formats.items()
    }
    followed, _ = follow(txs, average(decay, 2), stream)
    truth = followed['float32'].state.var
    for name, format in formats.items():
        found = followed[name]
        var = storage.read(found.state, format).var
        yield {
            'format': name,
            **moment_errors(var, truth),
            'low': float(np.sqrt(np.percentile(var[truth > 0] / truth[truth > 0], 0.1))),
            'worst': float(found.worst.max()),
            'worst_large': float(found.worst_large.max()),
        }


def window() -> Iterator[dict[str, Any]]:
    """Saturation and worst steps of uint8 by the size of the gradient, a row for each size."""
    sizes = tuple(10.0**exponent for exponent in range(-16, 11))
    stream = Stream(1, len(sizes), 512, sizes, decades=0.3, eventful=False)
    windows = {
        f'uint8(scale=2.0**{n})' if n else 'uint8()': storage.uint8(scale=2.0**n)
        for n in (-24, 0, 24)
    }
    decay = 0.99
    txs = {name: scale_by_rms(decay, eps=0.0, storage=format) for name, format in windows.items()}
    txs['float32'] = scale_by_rms(decay, eps=0.0)
    followed, truth = follow(txs, average(decay, 2), stream)
    for name, format in windows.items():
        found = followed[name]
        stored = storage.read(found.state, format).nu
        for row, size in enumerate(sizes):
            one = found.state._replace(nu=found.state.nu[row])
            yield {
                'format': name,
                'size': size,
                'saturated': saturated(one, storage.large_leaves(format, min_size=1, min_ndim=1)),
                'root_ratio': float(np.median(np.sqrt(stored[row] / truth[row]))),
                'worst': float(found.worst[row]),
            }


def saturated(state: Any, format: Any) -> float:
    """The share of entries at either end of their window."""
    return float(
        sum(share.low + share.high for share in storage.saturation(state, format).values())
    )


def main(folder: Path) -> None:
    """Writes tracking.json: one list of records for each table."""
    jax.config.update('jax_enable_x64', True)
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[dict[str, Any]]] = {}

    def add(table: str, records: Iterator[dict[str, Any]], **case: Any) -> None:
        for record in records:
            tables.setdefault(table, []).append(case | record)
            print(table, json.dumps(tables[table][-1]), flush=True)

    for seed in SEEDS:
        for decay in DECAYS:
            case = {'seed': seed, 'decay': decay}
            add('second moment', second_moment(Stream(seed), decay), **case)
            add('mean and trace', mean_and_trace(Stream(seed), decay), **case)
        for dtype in ('float16', 'bfloat16'):
            stream = Stream(seed, dtype=dtype)
            add('gradient dtype', second_moment(stream, 0.99), seed=seed, dtype=dtype)
        for mean in (0.0, 30.0, 1000.0):
            stream = Stream(seed, mean=mean)
            add('centered', centered(stream, 0.99), seed=seed, mean=mean)
    add('window', window())
    (folder / 'tracking.json').write_text(json.dumps(tables, indent=1))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
