"""How fast a step is: beside Optax's, beside PyTorch's, and beside a copy of the same bytes."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import rmsprop_jax
from benchmarks import jax_steps, works
from benchmarks.accelerator.rows import (
    MET,
    MISSED,
    NO_BOUND,
    NOT_JUDGED,
    NOT_RUN,
    Measured,
    NotRunError,
    Row,
    failed,
)
from benchmarks.timing import Contestant, Plan, Spread, interleave, ratios, stopwatch
from benchmarks.worker import Remote, Worker
from rmsprop_jax import storage
from rmsprop_jax.aot._compile import update_and_apply

OURS, BASE, AGAIN, COPY = 'rmsprop_jax', 'optax', 'optax again', 'copy'
PEERS = ('torch foreach', 'torch compiled', 'bitsandbytes 8-bit')
# Beyond this many leaves torch.compile takes minutes.
MOST_COMPILED = 200
COPY_SHARE, SAVED_SHARE = 0.9, 0.8
# Smaller ones fit in the cache of a device.
LARGE_LEAF = 2**25


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is timed, and how much.

    Attributes:
      device: Where.
      quick: Whether only the script is tried.
      torch: The interpreter of PyTorch, or None.
      plan: For the time of a step.
    """

    device: Any
    quick: bool
    torch: str | None

    @property
    def plan(self) -> Plan:
        return Plan(2, 2, 1e-3) if self.quick else Plan(placements=4, rounds=5)

    @property
    def memory(self) -> int:
        """Bytes that JAX may take on the device; half of all on a CPU."""
        stats = self.device.memory_stats() or {}
        pages = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        return stats.get('bytes_limit', pages // 2)

    def verdict(self, within: bool) -> dict[str, str]:
        """The verdict of a row and its reason."""
        if self.device.platform == 'cpu':
            return {'verdict': NOT_JUDGED, 'why': 'this is a CPU'}
        return {'verdict': MET if within else MISSED}


class Copy:
    """Reads and writes so many bytes: the negation of an array, in its place."""

    # Arrays of this many numbers, at most.
    LARGEST = 2**28

    def __init__(self, nbytes: int) -> None:
        numbers = max(1, nbytes // 8)
        self._sizes = [self.LARGEST] * (numbers // self.LARGEST) + [numbers % self.LARGEST]
        self._step = jax.jit(lambda xs: [-x for x in xs], donate_argnums=0)

    def place(self) -> None:
        self.xs: Any = None
        self.xs = [jnp.ones(size) for size in self._sizes]

    def run(self, steps: int) -> float:
        def steps_in_a_row() -> None:
            for _ in range(steps):
                self.xs = self._step(self.xs)
            jax.block_until_ready(self.xs)

        return stopwatch(steps_in_a_row)


def gigabytes(nbytes: float) -> str:
    return f'{nbytes / 1e9:.3g} GB'


def needed(contestants: Sequence[jax_steps.JaxContestant]) -> int:
    """The memory of all of them, which have their arrays at the same time, and of a copy."""
    return sum(x.memory for x in contestants) + max(x.bytes_moved // 2 for x in contestants)


def check_memory(setup: Setup, contestants: Sequence[jax_steps.JaxContestant]) -> None:
    least, most = needed(contestants), setup.memory
    if least > most:
        raise NotRunError(f'needs {gigabytes(least)}, the device has {gigabytes(most)}')


# A step


def steps(setup: Setup) -> Iterator[Row]:
    """Update and apply, on the trees of `make bench` and on larger leaves."""
    trees = works.trees(setup.quick)
    if not setup.quick:
        trees |= {
            'one leaf of 1e8': works.one_leaf(10**8),
            'one leaf of 1e9': works.one_leaf(10**9),
        }
    with _torch(setup) as worker:
        for tree, shapes in trees.items():
            for variant, options in works.VARIANTS.items():
                try:
                    yield from _step(setup, worker, f'{tree}, {variant}', shapes, options)
                except Exception as error:
                    yield failed('steps', f'{tree}, {variant}', 'time at most that of Optax', error)


@contextlib.contextmanager
def _torch(setup: Setup) -> Iterator[Worker | None]:
    worker = Worker(setup.torch, 'benchmarks.torch_steps') if setup.torch else None
    yield worker
    if worker is not None:
        worker.close()


def _step(
    setup: Setup, worker: Worker | None, name: str, shapes: list[works.Shape], options: dict
) -> Iterator[Row]:
    ours = jax_steps.prepare(OURS, shapes, options)
    base = jax_steps.prepare(BASE, shapes, options)
    check_memory(setup, [ours, base])
    contestants: dict[str, Contestant] = {OURS: ours, BASE: base}
    if needed([ours, base, base]) <= setup.memory:
        contestants[AGAIN] = base.again()
    is_large = len(shapes) == 1 and (works.size(shapes) >= LARGE_LEAF or setup.quick)
    if is_large:
        contestants[COPY] = Copy(ours.bytes_moved)
    absent = {}
    # What JAX leaves of a device, where it takes three quarters at most.
    room = setup.memory // 3
    try:
        for peer in PEERS:
            try:
                contestants[peer] = _peer(setup, worker, peer, shapes, options, ours.memory, room)
                room -= 2 * ours.memory
            except (NotRunError, RuntimeError) as error:
                absent[peer] = str(error).splitlines()[0][:200]
        seconds = interleave(contestants, setup.plan)
    finally:
        for contestant in contestants.values():
            if isinstance(contestant, Remote):
                contestant.close()
    yield against_optax(setup, 'steps', name, seconds)
    if is_large:
        yield beside_copy(setup, name, seconds, ours.bytes_moved)
    for peer in PEERS:
        if peer in absent:
            yield Row('steps', f'{name}, over {peer}', '', NOT_RUN, why=absent[peer])
        else:
            ratio = figures(ratios(seconds, peer)[OURS], 'ratio')
            yield Row('steps', f'{name}, over {peer}', '', NO_BOUND, ratio)


def figures(spread: Spread, name: str) -> Measured:
    return {name: spread.median, 'low': spread.low, 'high': spread.high}


def against_optax(setup: Setup, section: str, name: str, seconds: dict[str, list[float]]) -> Row:
    """Ours over Optax's, beside the noise: Optax's over its own, where there is room for it."""
    found = ratios(seconds, BASE)
    noise = max(1.0, found[AGAIN].high) if AGAIN in found else 1.0
    measured = figures(found[OURS], 'ratio') | {
        'noise': noise,
        'ms': 1e3 * Spread.of(seconds[OURS]).median,
    }
    bound = 'time at most that of Optax, but for the noise'
    within = found[OURS].median <= noise
    return Row(section, name, bound, measured=measured, **setup.verdict(within))


def beside_copy(setup: Setup, name: str, seconds: dict[str, list[float]], nbytes: int) -> Row:
    share = ratios({COPY: seconds[COPY], OURS: seconds[OURS]}, OURS)[COPY]
    measured = figures(share, 'share') | {
        'GB/s': nbytes / Spread.of(seconds[OURS]).median / 1e9,
        'copy GB/s': nbytes / Spread.of(seconds[COPY]).median / 1e9,
    }
    bound = f'bytes a second at least {COPY_SHARE} of a copy'
    within = share.median >= COPY_SHARE
    return Row('steps', f'{name}, beside a copy', bound, measured=measured, **setup.verdict(within))


def _peer(
    setup: Setup,
    worker: Worker | None,
    peer: str,
    shapes: list[works.Shape],
    options: dict,
    memory: int,
    room: int,
) -> Contestant:
    """One of PyTorch's, which may need twice our memory.

    Raises:
      NotRunError: If it cannot be measured here.
      RuntimeError: What was wrong in its process.
    """
    device = {'gpu': 'cuda', 'cuda': 'cuda', 'rocm': 'cuda', 'cpu': 'cpu'}.get(
        setup.device.platform
    )
    if worker is None:
        raise NotRunError('PyTorch is not installed')
    if device is None:
        raise NotRunError(f'PyTorch does not run on {setup.device.platform} here')
    if peer == 'torch compiled' and (setup.quick or len(shapes) > MOST_COMPILED):
        raise NotRunError('compiling takes long')
    if 'bitsandbytes' in peer and options:
        raise NotRunError('it has no momentum and no centered form')
    if 2 * memory > room:
        raise NotRunError('memory is too small for both processes')
    try:
        return worker.prepare(peer, shapes, options | {'device': device})
    except RuntimeError as error:
        if 'ModuleNotFoundError' in str(error):
            raise NotRunError(f'{peer.split()[0]} is not installed') from error
        raise


# Storage formats

BFLOAT16, BYTES = storage.bfloat16(), storage.uint8()
Make = Callable[..., optax.GradientTransformation]


def _stored(**formats: Any) -> dict[str, Any]:
    return {'storage': storage.per_statistic(**formats)}


# By form: the arguments of float32, and those of each format beside them.
COMPACT: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    'plain': (
        {},
        {
            'bfloat16': _stored(nu=BFLOAT16),
            'uint8': _stored(nu=BYTES),
            'factored': _stored(nu=storage.factored()),
        },
    ),
    'momentum': (
        {'momentum': 0.9},
        {
            'bfloat16': _stored(nu=BFLOAT16, trace=BFLOAT16),
            'uint8 and bfloat16': _stored(nu=BYTES, trace=BFLOAT16),
        },
    ),
    'centered, momentum': (
        {'momentum': 0.9, 'centered': True},
        {
            'bfloat16': _stored(mu=BFLOAT16, var=BFLOAT16, trace=BFLOAT16),
            'uint8 and bfloat16': _stored(mu=BFLOAT16, var=BYTES, trace=BFLOAT16),
        },
    ),
}


def compact(setup: Setup) -> Iterator[Row]:
    """Formats over float32 on one leaf, and parameters in bfloat16 over those in float32."""
    leaves = [(64, 128)] if setup.quick else [(8192, 4096), (32768, 8192)]
    for shape in leaves:
        for form, (options, formats) in COMPACT.items():
            try:
                yield from _compact(setup, shape, form, options, formats)
            except Exception as error:
                yield failed('compact', f'{shape}, {form}', 'faster by the bytes saved', error)


def _compact(
    setup: Setup, shape: works.Shape, form: str, options: dict, formats: dict[str, dict]
) -> Iterator[Row]:
    def contestant(dtype: Any = jnp.float32, **kept: Any) -> jax_steps.JaxContestant:
        tx = jax_steps.transformation(OURS, options | kept)
        tx = rmsprop_jax.round_parameters(tx) if dtype == jnp.bfloat16 else tx
        return jax_steps.JaxContestant(update_and_apply(tx), tx.init, [shape], dtype)

    contestants = {'float32': contestant()}
    contestants |= {name: contestant(**kept) for name, kept in formats.items()}
    contestants['bfloat16 parameters'] = contestant(jnp.bfloat16)
    last = list(formats)[-1 if 'factored' not in formats else -2]
    contestants[f'bfloat16 parameters, {last}'] = contestant(jnp.bfloat16, **formats[last])
    check_memory(setup, list(contestants.values()))
    base = contestants['float32']
    seconds = interleave({**contestants, COPY: Copy(base.bytes_moved)}, setup.plan)
    moved = {name: one.bytes_moved for name, one in contestants.items()}
    label = f'{"x".join(map(str, shape))}, {form}'
    yield from beside_float32(setup, label, works.size([shape]), moved, seconds)


def beside_float32(
    setup: Setup, label: str, size: int, moved: dict[str, int], seconds: dict[str, list[float]]
) -> Iterator[Row]:
    """A row for each format: its time over that of float32, and what that may be."""
    copied = moved['float32'] / Spread.of(seconds[COPY]).median / 1e9
    found = ratios(seconds, 'float32')
    for name, nbytes in moved.items():
        if name == 'float32':
            continue
        most = 1 - SAVED_SHARE * (1 - nbytes / moved['float32'])
        measured = figures(found[name], 'ratio') | {
            'limit': most,
            'bytes': f'{nbytes / size:.3g} for {moved["float32"] / size:.3g}',
            'GB/s': nbytes / Spread.of(seconds[name]).median / 1e9,
            'copy GB/s': copied,
        }
        bound = f'faster than float32 by {SAVED_SHARE} of the bytes saved'
        verdict = setup.verdict(found[name].median <= most)
        yield Row('compact', f'{label}, {name}', bound, measured=measured, **verdict)


# Training


def training(setup: Setup) -> Iterator[Row]:
    """A whole training step of a network of dense layers, with momentum."""
    networks = [((784, 128, 64, 10), 128), ((784, 2048, 2048, 10), 128)]
    networks.append(((4096, 8192, 8192, 4096), 4096))
    for widths, batch in [((8, 8, 4), 8)] if setup.quick else networks:
        name = f'MLP {"-".join(map(str, widths))}, batch {batch}'
        make = functools.partial(
            jax_steps.train_step,
            shapes=works.mlp(widths),
            options=works.VARIANTS['momentum'],
            batch=batch,
        )
        try:
            base = make(BASE)
            contestants = {OURS: make(OURS), BASE: base, AGAIN: base.again()}
            yield against_optax(setup, 'training', name, interleave(contestants, setup.plan))
        except Exception as error:
            yield failed('training', name, 'time at most that of Optax', error)


def python_with_torch() -> str | None:
    return sys.executable if importlib.util.find_spec('torch') else None


SECTIONS = {'steps': steps, 'compact': compact, 'training': training}
