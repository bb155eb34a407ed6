"""Steps outside of jit, beside Optax's: `python -m benchmarks.eager`.

Prints the time of `init`, of `update`, and of a first `init` and `update` in a process of its own,
each over that of `optax.rmsprop(1e-3, momentum=0.9)` in float32: the median of several rounds in
which the two take turns.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import optax

import rmsprop_jax
from rmsprop_jax import storage

LEAVES = (2, 50)
ROUNDS, CALLS, PROCESSES = 15, 10, 5


def _kept(**formats: Any) -> optax.GradientTransformation:
    choice = storage.per_statistic(**formats) if formats else None
    return rmsprop_jax.rmsprop(1e-3, momentum=0.9, storage=choice)


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    'optax': lambda: optax.rmsprop(1e-3, momentum=0.9),
    'float32': _kept,
    'bfloat16': lambda: _kept(nu=storage.bfloat16(), trace=storage.bfloat16()),
    'uint8 and bfloat16': lambda: _kept(nu=storage.uint8(), trace=storage.bfloat16()),
    'factored': lambda: _kept(nu=storage.factored()),
}


def parameters(leaves: int) -> dict[str, jax.Array]:
    return {f'layer {i}': jnp.full((64, 64), 0.5) for i in range(leaves)}


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def steps(tx: optax.GradientTransformation, params: Any) -> Callable[[], Any]:
    """Several updates, one after the other."""

    def run() -> Any:
        updates, state = params, tx.init(params)
        for _ in range(CALLS):
            updates, state = tx.update(params, state, params)
        return updates

    return run


def inits(tx: optax.GradientTransformation, params: Any) -> Callable[[], Any]:
    return lambda: [tx.init(params) for _ in range(CALLS)]


def over_optax(make: Callable[..., Callable[[], Any]], name: str, params: Any) -> float:
    ours, theirs = (make(OPTIMIZERS[x](), params) for x in (name, 'optax'))
    ours()
    theirs()
    return statistics.median(seconds(ours) / seconds(theirs) for _ in range(ROUNDS))


def first(name: str) -> float:
    """The seconds of a first init and update of two leaves, in a process of its own."""
    command = [sys.executable, '-m', 'benchmarks.eager', name]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def main() -> None:
    if len(sys.argv) > 1:
        tx, params = OPTIMIZERS[sys.argv[1]](), parameters(2)
        print(seconds(lambda: tx.update(params, tx.init(params), params)))
        return
    heads = [f'{what}, {n} leaves' for n in LEAVES for what in ('update', 'init')]
    print(f'| storage | {" | ".join(heads)} | first step |')
    print('|---' * (len(heads) + 2) + '|')
    for name in OPTIMIZERS:
        cells = [over_optax(f, name, parameters(n)) for n in LEAVES for f in (steps, inits)]
        cells.append(statistics.median(first(name) / first('optax') for _ in range(PROCESSES)))
        print(f'| {name} | {" | ".join(f"{cell:.2f}" for cell in cells)} |', flush=True)


if __name__ == '__main__':
    main()
