"""One table of cases: what is crossed with what, what is left out and why, and what fails today.

The dimensions:

- case: the list of `cases.py`, and a few of this file's own: storage with the thresholds that users
  get (4096 entries, two axes), a format chosen by path, and weights that decay by a mask.
- way: how it is run. `eager`, `jit`, `scan`, `vmap` and `donated` (parameters and state are given
  up at every step); meshes of `auto` and of `explicit` axes; and `jax.shard_map` with
  `partition_specs` (`mapped`), without `check_vma` (`unchecked`), or with a state that is made
  inside (`inside`). The number is the axis of every leaf that is split over two devices.
- home: what holds the parameters. A plain dictionary, Flax NNX with `nnx.Optimizer`, the
  `TrainState` of Flax Linen, an Equinox module and a `jax.tree_util.Partial`, which both can be
  called, and a dictionary in which some leaves are complex.
- mode of the derivative of an update where gradients are zero: forward or reverse.

Every case meets every way in the plain home, every home under `jit`, and both modes of the
derivative in the plain and the complex home. Every other pair of a way and a home meets in one
case. So does every mask, as a function and as a tree, every home. That is a quarter of all that
there could be. The slow suite takes all of these cells, and the fast one a sample, always the same:
every case and every mask once, where something has failed before or else in the way and the home
that the sample has the fewest of, so that every way and every home occurs; and a seventh of the
derivatives.

Results must be those of each leaf by itself in a plain dictionary. Leaves have the same names and
axes in each home, so that masks choose the same ones. A complex leaf must do what two real ones do
where a dialect takes it for pairs, and else what the real leaf of its magnitudes does. Programs are
compiled without optimization, in three quarters of the time; `test_contract.py` has optimized ones.

`EXCEPTIONS` says which cells make no sense, and `FAULTS` which fail today. Whoever mends a fault
deletes its line: the tests are strict.
"""

import collections
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import CASES, Case, masking

import rmsprop_jax
from rmsprop_jax import dialects, storage


def only_matrices(tree: Any) -> Any:
    """A mask of the leaves that have two axes or more."""
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, tree)


def _bytes_for_kernels(path: str, shape: tuple[int, ...]) -> storage.Format:
    del shape
    return storage.uint8() if path.endswith("['kernel']") else storage.float32()


_TORCH = ('nu', 'trace')
MORE = (
    Case(
        'rmsprop-bfloat16-large',
        lambda: rmsprop_jax.rmsprop(0.02, storage=storage.per_statistic(nu=storage.bfloat16())),
        ('nu',),
        compact=True,
    ),
    Case(
        'rmsprop-uint8-large',
        lambda: rmsprop_jax.rmsprop(
            0.02, centered=True, storage=storage.per_statistic(var=storage.uint8())
        ),
        ('mu', 'var'),
        compact=True,
    ),
    Case(
        'scale_by_rms-factored-large',
        lambda: rmsprop_jax.scale_by_rms(storage=storage.factored()),
        ('nu',),
        descends=False,
        elementwise=False,
        compact=True,
    ),
    Case(
        'torch-bfloat16-large',
        lambda: dialects.torch(0.02, momentum=0.5, storage=storage.bfloat16()),
        _TORCH,
        compact=True,
    ),
    Case(
        'rmsprop-per_leaf',
        lambda: rmsprop_jax.rmsprop(0.02, storage=storage.per_leaf(_bytes_for_kernels)),
        ('nu',),
        compact=True,
    ),
    Case(
        'torch-masked',
        lambda: dialects.torch(0.02, momentum=0.5, weight_decay=0.1, mask=only_matrices),
        _TORCH,
        needs_params=True,
    ),
    Case(
        'keras-masked',
        lambda: dialects.keras(0.02, weight_decay=0.1, mask=only_matrices),
        ('nu',),
        needs_params=True,
        real_only=True,
    ),
)
CROSSED = (*CASES, *MORE)

# Masks: each of these decays, or holds still, what its mask chooses.
MASKED: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    'rmsprop': lambda mask: rmsprop_jax.rmsprop(0.05, weight_decay=0.1, mask=mask),
    'inject_hyperparams': lambda mask: rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(
        0.05, weight_decay=0.1, mask=mask
    ),
    **masking(0.05, 0.1),
    'timm-decoupled': lambda mask: dialects.timm(
        0.05, weight_decay=0.1, decoupled_decay=True, mask=mask
    ),
}
FORMS = ('function', 'tree')

# Derivatives: clipping has its own points at which a formula is not smooth.
CLIPPING = tuple(
    Case(name, make, (), elementwise=False, real_only='torch' not in name)
    for name, make in {
        'torch_clip_grad_norm-1': lambda: dialects.torch_clip_grad_norm(0.5, 1.0),
        'torch_clip_grad_norm-3': lambda: dialects.torch_clip_grad_norm(0.5, 3.0),
        'torch_clip_grad_norm-inf': lambda: dialects.torch_clip_grad_norm(0.5, float('inf')),
        'keras-clipnorm': lambda: dialects.keras(clipnorm=0.5),
        'keras-global_clipnorm': lambda: dialects.keras(global_clipnorm=0.5),
        'keras-clipvalue': lambda: dialects.keras(clipvalue=0.5),
        'keras_legacy-clipnorm': lambda: dialects.keras_legacy(clipnorm=0.5),
        'keras_legacy-global_clipnorm': lambda: dialects.keras_legacy(global_clipnorm=0.5),
    }.items()
)
DERIVED = (*CROSSED, *CLIPPING)
MODES = ('forward', 'reverse')
# Where derivatives are finite, but not those of differences.
JUMPS = {
    'cautious': 'caution holds entries back by their sign',
    'timm': 'caution holds entries back by their sign',
    'tensorflow': 'sparse holds rows of zeros back',
    'hinton': 'has no epsilon: a second moment of zero gives zero, and any other one does not',
}
DERIVED_HOMES = ('plain', 'complex')

AXES = (0, 1, 2)
MAPPED = tuple(f'{kind}-{axis}' for kind in ('mapped', 'unchecked') for axis in AXES)
MESHES = tuple(f'{kind}-{axis}' for kind in ('auto', 'explicit') for axis in AXES)
WAYS = ('eager', 'jit', 'scan', 'vmap', 'donated', *MESHES, *MAPPED, 'inside-0')
HOMES = ('plain', 'nnx', 'linen', 'equinox', 'partial', 'complex')

# Parameters are rounded in these cases.
ROUNDED = tuple(case.name for case in CROSSED if case.rounds_params)

# Complex arrays are pairs of reals in these cases, and squares are |g|^2 in the others.
PAIRS = ('torch', 'torch-factored', 'torch-bfloat16-large', 'torch-masked')

# The leaves, with complex ones where the home is. Axes can be split in two.
Leaves = dict[str, Any]
SMALL = {'bias': (6,), 'cube': (2, 4, 2), 'kernel': (4, 6), 'scale': ()}
# On both sides of the thresholds of storage: 4096 entries, and two axes.
LARGE = {'bias': (8192,), 'cube': (2, 32, 64), 'head': (32, 64), 'kernel': (64, 64), 'scale': ()}
COMPLEX = ('bias', 'cube', 'head')


def leaves_of(case: str, scale: float = 1.0) -> Leaves:
    """Parameters with a row of zeros, which has a gradient of zero, and one entry that is far off
    where one is to be skipped. Where parameters are rounded, they are bfloat16."""
    leaves = {}
    for name, shape in (LARGE if case.endswith('-large') else SMALL).items():
        x = np.linspace(-2, 3, math.prod(shape), dtype=np.float32).reshape(shape)
        if shape:
            x[1] = 0.0
        if name == 'kernel' and 'skip_nonfinite' in case:
            x[2, 3] = 50.0
        dtype = jnp.bfloat16 if case in ROUNDED else jnp.float32
        leaves[name] = jnp.asarray(np.float32(scale) * x, dtype)
    return leaves


class Cell(NamedTuple):
    """A place in the table.

    Attributes:
      kind: `run`, `mask` or `derivative`: which test looks at it.
      case: The name of the case, or in a `mask` cell one of `MASKED`.
      way: The way, the form of the mask, or the mode of the derivative.
      home: The home.
    """

    kind: str
    case: str
    way: str
    home: str

    @property
    def name(self) -> str:
        return f'{self.case}-{self.way}-{self.home}'

    @property
    def of(self) -> Case:
        """The case itself, or for a mask the case of its dialect."""
        name = self.case.split('-')[0] if self.kind == 'mask' else self.case
        return _BY_NAME[name]

    @property
    def is_mapped(self) -> bool:
        """Whether it runs under `jax.shard_map`."""
        return self.way in (*MAPPED, 'inside-0')

    @property
    def has_bytes(self) -> bool:
        """Whether some statistic is kept in bytes."""
        return 'uint8' in self.case or 'per_leaf' in self.case


_BY_NAME = {case.name: case for case in DERIVED}


class Row(NamedTuple):
    """Why some cells are left out, or fail."""

    reason: str
    holds: Callable[[Cell], bool]


EXCEPTIONS = (
    Row(
        'the case makes no sense for complex arrays, or its formats cannot keep them',
        lambda c: c.home == 'complex' and (c.of.real_only or c.of.rounds_params),
    ),
    Row(
        'a norm, or a share of entries, is that of the shard: dialects do not talk across devices',
        lambda c: c.is_mapped and c.case in ('torch_clip_grad_norm', 'keras', 'timm', 'cautious'),
    ),
    Row(
        'means over split axes are refused by name, as test_sharding.py looks at',
        lambda c: c.is_mapped and 'factored' in c.case,
    ),
    Row(
        'TrainState.apply_gradients hands no partition_specs on to update',
        lambda c: c.is_mapped and c.home == 'linen',
    ),
    Row(
        'a format by path is written for the paths of dictionaries',
        lambda c: c.case == 'rmsprop-per_leaf' and c.home in ('equinox', 'partial'),
    ),
    Row(
        'a byte has no derivative: differentiating through a step is refused',
        lambda c: c.kind == 'derivative' and c.has_bytes,
    ),
)
REFUSABLE = Row(
    'init under shard_map does not see the whole array: right, or refused with the name of a leaf',
    lambda c: c.way == 'inside-0' and c.case.endswith('-large'),
)

_CALLABLE = ('equinox', 'partial')
_NORMS = (
    *('torch_clip_grad_norm', 'torch_clip_grad_norm-1', 'torch_clip_grad_norm-3'),
    *('torch_clip_grad_norm-inf', 'keras', 'keras-clipnorm', 'keras-global_clipnorm'),
    *('keras_legacy-clipnorm', 'keras_legacy-global_clipnorm'),
)
FAULTS: tuple[Row, ...] = ()


# Every cell that there could be.
ALL = {
    kind: [Cell(kind, *values) for values in itertools.product(*dimensions)]
    for kind, dimensions in {
        'run': ([case.name for case in CROSSED], WAYS, HOMES),
        'mask': (MASKED, FORMS, HOMES),
        'derivative': ([case.name for case in DERIVED], MODES, DERIVED_HOMES),
    }.items()
}


def _allowed(cell: Cell) -> bool:
    return not any(row.holds(cell) for row in EXCEPTIONS)


def _in_full(cell: Cell) -> bool:
    return _allowed(cell) and (cell.kind != 'run' or cell.way == 'jit' or cell.home == 'plain')


def _others() -> list[Cell]:
    """For each other pair of a way and a home a cell, with the next case that may be there."""
    cells, cases = [], itertools.cycle(CROSSED)
    for way, home in itertools.product(WAYS, HOMES):
        if way != 'jit' and home != 'plain':
            tried = (Cell('run', next(cases).name, way, home) for _ in CROSSED)
            cells += itertools.islice(filter(_allowed, tried), 1)
    return cells


# Cells that have failed once: the fast suite keeps looking at one of each kind.
ONCE_BROKEN = (
    Cell('run', 'rmsprop-everything', 'jit', 'partial'),
    Cell('run', 'torch-masked', 'jit', 'complex'),
    Cell('run', 'torch-factored', 'jit', 'complex'),
    Cell('run', 'tensorflow', 'explicit-1', 'plain'),
    Cell('run', 'torch-bfloat16-large', 'mapped-0', 'plain'),
    Cell('run', 'rmsprop-bfloat16-large', 'inside-0', 'plain'),
    Cell('run', 'skip_nonfinite-coordinate', 'mapped-0', 'plain'),
    Cell('run', 'scale_by_rms-factored-large', 'jit', 'nnx'),
    Cell('run', 'rmsprop-per_leaf', 'jit', 'nnx'),
    Cell('mask', 'rmsprop', 'function', 'equinox'),
    Cell('mask', 'inject_hyperparams', 'tree', 'partial'),
    Cell('derivative', 'torch_clip_grad_norm-1', 'reverse', 'plain'),
    Cell('derivative', 'keras-clipnorm', 'forward', 'plain'),
)


def _sample(cells: list[Cell], every: int) -> set[Cell]:
    """A cell for each `every`th other case, at the way and home that has the fewest so far."""
    sample = {cell for cell in cells if cell in ONCE_BROKEN}
    by_case: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.case not in {broken.case for broken in sample}:
            by_case.setdefault(cell.case, []).append(cell)
    taken = collections.Counter((cell.way, cell.home) for cell in sample)
    for ours in list(by_case.values())[::every]:
        cell = min(ours, key=lambda cell: taken[cell.way, cell.home])
        taken[cell.way, cell.home] += 1
        sample.add(cell)
    return sample


CELLS = {kind: list(filter(_in_full, cells)) for kind, cells in ALL.items()}
SAMPLE = set[Cell]().union(
    *(_sample(CELLS[kind], every) for kind, every in {'run': 1, 'mask': 1, 'derivative': 7}.items())
)
CELLS['run'] += _others()
