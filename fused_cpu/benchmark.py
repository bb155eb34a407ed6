"""Time the fused step against `optax.rmsprop` and the plain one, interleaved in one run.

    python benchmark.py [--rounds N] [row ...]

Each step is update and apply in one jit, with donated parameters and state. Printed are the median
of Optax's time, and the medians of the ratios to it in the same round, with quartiles; `optax
again` is the noise. Compile time is that of trace, lowering and compilation.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rmsprop_jax_fused

import rmsprop_jax
from rmsprop_jax.aot._compile import update_and_apply


def resnet() -> list[tuple[int, ...]]:
    """Shapes like those of ResNet-50 without its head."""
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64), (64,), (64,)]
    channels = 64
    for blocks, width in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        for block in range(blocks):
            out = 4 * width
            shapes += [(1, 1, channels, width), (width,), (width,)]
            shapes += [(3, 3, width, width), (width,), (width,)]
            shapes += [(1, 1, width, out), (out,), (out,)]
            shapes += [(1, 1, channels, out), (out,), (out,)] * (block == 0)
            channels = out
    return shapes


ROWS = {
    'one leaf of 32M': [(2**25,)],
    'ResNet-50-like': resnet(),
    '1000 leaves of 1000': [(1000,)] * 1000,
    'small MLP': [(784, 128), (128,), (128, 128), (128,), (128, 10), (10,)],
}
FORMS: dict[str, dict[str, Any]] = {
    'plain': {},
    'momentum': {'momentum': 0.9},
    'centered + momentum': {'momentum': 0.9, 'centered': True},
}


def contestants(form: dict[str, Any]) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """The `init` and the step of each."""
    theirs, again = (optax.rmsprop(1e-3, **form) for _ in range(2))
    ours, fused = rmsprop_jax.rmsprop(1e-3, **form), rmsprop_jax_fused.rmsprop(1e-3, **form)
    return {
        'optax': (theirs.init, update_and_apply(theirs)),
        'optax again': (again.init, update_and_apply(again)),
        'plain path': (ours.init, update_and_apply(ours)),
        'fused': (fused.init, lambda params, state, grads: fused.apply(grads, state, params)),
    }


def measure(shapes: list[tuple[int, ...]], form: dict[str, Any], rounds: int) -> str:
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    steps, trees, compile_times = {}, {}, {}
    for name, (init, step) in contestants(form).items():
        params = [jnp.zeros(shape) for shape in shapes]
        trees[name] = params, init(params)
        # Nobody profits from what another one has traced.
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*trees[name], grads)
        steps[name] = lowered.compile()
        compile_times[name] = time.perf_counter() - start
        trees[name] = jax.block_until_ready(steps[name](*trees[name], grads))
    repeats = max(1, min(50, 4_000_000 // sum(map(np.prod, shapes))))
    times = {name: [] for name in steps}
    for i in range(rounds):
        # In turn, so that nobody always follows the same one.
        for name in np.roll(list(steps), i):
            start = time.perf_counter()
            for _ in range(repeats):
                trees[name] = steps[name](*trees[name], grads)
            jax.block_until_ready(trees[name])
            times[name].append((time.perf_counter() - start) / repeats)
    columns = [f'{1e3 * statistics.median(times["optax"]):9.3f} ms']
    for name in list(steps)[1:]:
        low, middle, high = np.percentile(np.divide(times[name], times['optax']), [25, 50, 75])
        columns.append(f'{middle:.2f} ({low:.2f} to {high:.2f})')
    first = compile_times['optax']
    columns.append(f'{compile_times["fused"] / first:.2f} x {first:.1f} s')
    return ' | '.join(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('rows', nargs='*', choices=[[], *ROWS], metavar='row', help=', '.join(ROWS))
    parser.add_argument('--rounds', type=int, default=31)
    arguments = parser.parse_args()
    if not rmsprop_jax_fused.available():
        raise SystemExit('The kernel is not compiled: run make fused.')
    print('jax', jax.__version__, 'optax', optax.__version__, 'time', time.strftime('%Y-%m-%d'))
    print('| work | form | Optax | Optax again | plain path | fused | compilation, fused |')
    print('|---|---|---|---|---|---|---|')
    for row in arguments.rows or ROWS:
        for name, form in FORMS.items():
            print(f'| {row} | {name} | {measure(ROWS[row], form, arguments.rounds)} |', flush=True)


if __name__ == '__main__':
    main()
