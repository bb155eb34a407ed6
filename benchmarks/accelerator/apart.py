"""How far the results of a step are from those of another device."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

# Of the statistics: each is a few roundings from its definition, and compilers choose where.
STATISTIC_ULPS = 16
# Of the codes: they differ only where a number lies next to a boundary between two codes.
CODE_SHARE = 1e-3
BOUND = f'parameters 1 ulp, statistics {STATISTIC_ULPS} ulps, 1 code in {CODE_SHARE:.1%} of entries'


@dataclasses.dataclass(frozen=True)
class Apart:
    """The largest differences so far.

    Attributes:
      params: Of parameters, in float32 units in the last place: of the parameter before or after
        the step, whichever is larger, or of one if both are smaller.
      statistics: Of what a state keeps in float32, in units in the last place of the number before
        or after the step, whichever is larger.
      codes: Of what is kept in fewer bits, in steps between neighbours.
      changed: The number of codes that differ.
      entries: The number of codes.
      wrong: The name of an array that differs in its type, its shape, its infinities and NaN, or as
        integers do.
    """

    params: float = 0.0
    statistics: float = 0.0
    codes: int = 0
    changed: int = 0
    entries: int = 0
    wrong: str = ''

    def __or__(self, other: 'Apart') -> 'Apart':
        return Apart(
            max(self.params, other.params),
            max(self.statistics, other.statistics),
            max(self.codes, other.codes),
            self.changed + other.changed,
            self.entries + other.entries,
            self.wrong or other.wrong,
        )

    @property
    def within(self) -> bool:
        return (
            self.params <= 1
            and self.statistics <= STATISTIC_ULPS
            and self.codes <= 1
            and self.changed <= CODE_SHARE * self.entries
            and not self.wrong
        )

    @property
    def measured(self) -> dict[str, Any]:
        codes = {'codes': self.codes, 'changed': self.changed} if self.entries else {}
        wrong = {'wrong': self.wrong} if self.wrong else {}
        return {'parameters': self.params, 'statistics': self.statistics} | codes | wrong


def apart(before: Any, got: Any, expected: Any) -> Apart:
    """Compares two results of a step, `(params, state)` in NumPy, which started `before`."""
    if jax.tree.structure(got) != jax.tree.structure(expected):
        return Apart(wrong='structure')
    leaves = zip(
        jax.tree_util.tree_flatten_with_path(expected)[0],
        jax.tree.leaves(got),
        jax.tree.leaves(before),
        strict=True,
    )
    found = Apart()
    for (path, x), y, old in leaves:
        found |= _leaf(jax.tree_util.keystr(path), old, np.asarray(y), np.asarray(x))
    return found


def _leaf(name: str, old: Any, got: np.ndarray, expected: np.ndarray) -> Apart:
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        return Apart(wrong=name)
    if expected.dtype == np.float32:
        finite = np.isfinite(got) & np.isfinite(expected)
        if not np.array_equal(got[~finite], expected[~finite], True):
            return Apart(wrong=name)
        is_param = name.startswith('[0]')
        sizes = [np.abs(np.where(finite, x, np.float32(0))) for x in (old, got, expected)]
        largest = functools.reduce(np.maximum, sizes)
        unit = np.spacing(np.maximum(largest, np.float32(1 if is_param else 2.0**-126)))
        difference = got[finite].astype(float) - expected[finite]
        most = float(np.max(np.abs(difference) / unit[finite], initial=0.0))
        return Apart(params=most) if is_param else Apart(statistics=most)
    if not (expected.dtype.name == 'bfloat16' or expected.dtype == np.uint8):
        return Apart() if np.array_equal(got, expected) else Apart(wrong=name)
    difference = np.abs(_rank(got) - _rank(expected))
    return Apart(
        codes=int(difference.max(initial=0)),
        changed=int(np.count_nonzero(difference)),
        entries=difference.size,
    )


def _rank(codes: np.ndarray) -> np.ndarray:
    """Integers in the order of the numbers that the codes stand for, one for each code."""
    if codes.dtype == np.uint8:
        return codes.astype(np.int32)
    bits = codes.view(np.uint16).astype(np.int32)
    return np.where(bits < 2**15, bits, 2**15 - bits)
