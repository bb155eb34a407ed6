"""The gradients that every optimizer is fed, in NumPy alone: shared by recorders and tests.

It runs in the frameworks' own environments, so it imports neither a framework nor JAX.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np

SHAPES = {'matrix': (4, 3), 'vector': (5,), 'scalar': ()}
# The table gets rows of gradients, as an embedding does; the vector stays dense.
SPARSE_SHAPES = {'table': (6, 3), 'vector': (5,)}
RECORDED = (1, 2, 3, 10, 30, 100, 300, 1000)

Arrays = dict[str, np.ndarray]


class Problem(NamedTuple):
    """Start values, and gradients with a leading axis of steps.

    Attributes:
      params: Start values by name.
      gradients: Dense gradients by name.
      rows: For the table of a sparse problem, at each step the indices, with repetitions unless it
        is 'sparse without repetitions', and the values whose sum by index is the dense gradient.
        Empty otherwise.
    """

    params: Arrays
    gradients: Arrays
    rows: list[tuple[np.ndarray, np.ndarray]]


def problem(configuration: dict[str, Any]) -> Problem:
    """The problem of a configuration, which names its kind, dtype, seed and number of steps.

    With 'float32 inputs' a problem in float64 has the same numbers as the one in float32.
    """
    rng = np.random.default_rng(configuration['seed'])
    kind, steps = configuration['problem'], configuration['steps']
    sparse = kind.startswith('sparse')
    shapes = SPARSE_SHAPES if sparse else SHAPES
    params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    gradients = {name: _gradients(rng, kind, (steps, *shape)) for name, shape in shapes.items()}
    rows = []
    if sparse:
        rows = [_rows(rng, shapes['table'], kind != 'sparse') for _ in range(steps)]
        gradients['table'] = np.stack([_dense(r, shapes['table']) for r in rows])
    if kind == 'complex':
        params = {n: p + 1j * rng.standard_normal(p.shape) for n, p in params.items()}
        gradients = {n: g + 1j * _gradients(rng, kind, g.shape) for n, g in gradients.items()}
    dtype = np.dtype(configuration['dtype'])
    if kind == 'complex':
        dtype = np.result_type(dtype, np.complex64)
    if configuration.get('float32 inputs'):
        params, gradients = (
            {n: x.astype('float32') for n, x in t.items()} for t in (params, gradients)
        )
    return Problem(
        {n: p.astype(dtype) for n, p in params.items()},
        {n: g.astype(dtype) for n, g in gradients.items()},
        [(i, v.astype(dtype)) for i, v in rows],
    )


def _gradients(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.standard_normal(shape)
    if kind == 'nearly constant':
        return 37.3 * (1 + 1e-5 * noise)
    # Entries differ in size by four orders, and each is zero now and then. Powers of two are the
    # same on every machine, where those of other numbers may differ in the last digit.
    sizes = np.ldexp(1.0, rng.integers(-10, 4, shape[1:]))
    return sizes * noise * (rng.uniform(size=shape) > 0.1)


def _rows(
    rng: np.random.Generator, shape: tuple[int, ...], unique: bool
) -> tuple[np.ndarray, np.ndarray]:
    indices = rng.permutation(shape[0])[:3] if unique else rng.integers(0, shape[0], size=3)
    return indices, rng.standard_normal((len(indices), *shape[1:]))


def _dense(rows: tuple[np.ndarray, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    total = np.zeros(shape)
    np.add.at(total, rows[0], rows[1])
    return total


def learning_rates(configuration: dict[str, Any]) -> np.ndarray | None:
    """The learning rate of every step, or None where it is an option that does not change."""
    schedule = configuration.get('schedule')
    if schedule is None:
        return None
    step = np.arange(configuration['steps'])
    warm = np.minimum(1.0, (step + 1) / schedule['warmup'])
    return schedule['peak'] * warm * schedule['factor'] ** (step // schedule['every'])


def recorded_steps(configuration: dict[str, Any]) -> list[int]:
    """After how many steps parameters are recorded; the last step always is."""
    last = configuration['steps']
    return [s for s in RECORDED if s < last] + [last]


def flat(arrays: Arrays) -> np.ndarray:
    """All arrays in one vector, in the order of their names."""
    return np.concatenate([np.ravel(arrays[name]) for name in sorted(arrays)])


def unflat(vector: np.ndarray, like: Arrays) -> Arrays:
    """The inverse of `flat`."""
    names = sorted(like)
    ends = np.cumsum([like[name].size for name in names])
    parts = np.split(vector, ends[:-1])
    return {n: part.reshape(like[n].shape) for n, part in zip(names, parts, strict=True)}


def fingerprint(given: Problem) -> str:
    """Changes when NumPy draws other numbers from the same seed."""
    digest = hashlib.sha256()
    for arrays in (given.params, given.gradients):
        for name in sorted(arrays):
            digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()[:16]
