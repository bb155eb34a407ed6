"""Choosing a format for each leaf of each statistic."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from rmsprop_jax._checks import checked_steps
from rmsprop_jax.storage._formats import STATISTICS, Format, float32
from rmsprop_jax.storage._place import Shape


@dataclasses.dataclass(frozen=True)
class LargeLeaves:
    """A format for large arrays only: what `storage.large_leaves` returns."""

    format: Format
    min_size: int
    min_ndim: int

    def choose(self, path: str, shape: Shape) -> Format:
        """The format of a leaf of this shape."""
        del path
        large = len(shape) >= self.min_ndim and math.prod(shape) >= self.min_size
        return self.format if large else float32()


@dataclasses.dataclass(frozen=True)
class PerLeaf:
    """A format for each leaf: what `storage.per_leaf` returns."""

    function: Callable[[str, Shape], Format]

    def choose(self, path: str, shape: Shape) -> Format:
        """The format of the leaf at this path."""
        chosen = self.function(path, shape)
        if not isinstance(chosen, Format):
            raise TypeError(
                f'the function given to storage.per_leaf must return a format, such as '
                f'storage.float32(), but for params{path} it returned {chosen!r}.'
            )
        return chosen


@dataclasses.dataclass(frozen=True)
class PerStatistic:
    """A choice for each statistic: what `storage.per_statistic` returns."""

    nu: 'Format | LargeLeaves | PerLeaf | None'
    mu: 'Format | LargeLeaves | PerLeaf | None'
    var: 'Format | LargeLeaves | PerLeaf | None'
    trace: 'Format | LargeLeaves | PerLeaf | None'


LeafChoice = Format | LargeLeaves | PerLeaf
Storage = LeafChoice | PerStatistic


def large_leaves(format: Format, min_size: int = 4096, min_ndim: int = 2) -> LargeLeaves:
    """Keeps large leaves in a format and the others in float32.

    A plain format as `storage` means this function with its defaults: biases and the scales of
    norms take little memory, but much can go wrong with them.

    Args:
      format: The format of the large leaves.
      min_size: The smallest number of entries of a large leaf.
      min_ndim: The smallest number of axes of a large leaf.

    Example:
      >>> from rmsprop_jax import storage
      >>> choice = storage.large_leaves(storage.bfloat16(), min_size=1, min_ndim=0)
      >>> choice.choose("['bias']", (3,))
      bfloat16(seed=0)
    """
    if not isinstance(format, Format):
        raise TypeError(f'format must be a storage format, got {format!r}.')
    return LargeLeaves(
        format, checked_steps('min_size', min_size, 0), checked_steps('min_ndim', min_ndim, 0)
    )


def per_leaf(function: Callable[[str, Shape], Format]) -> PerLeaf:
    """Lets a function choose the format of each leaf.

    Args:
      function: Takes a parameter's path, such as `"['dense']['kernel']"`, and its shape, and
        returns a format. It is called during tracing, and must always return the same format.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import storage
      >>> tables = storage.per_leaf(
      ...     lambda path, shape: storage.uint8() if 'embed' in path else storage.float32()
      ... )
      >>> tx = rmsprop_jax.rmsprop(1e-3, storage=tables)
      >>> state = tx.init({'embed': jnp.zeros((8, 4)), 'dense': jnp.zeros((4, 4))})
      >>> state[0].nu['embed'].dtype, state[0].nu['dense'].dtype
      (dtype('uint8'), dtype('float32'))
    """
    if not callable(function):
        raise TypeError(f'storage.per_leaf needs a function of path and shape, got {function!r}.')
    return PerLeaf(function)


def per_statistic(
    *,
    nu: LeafChoice | None = None,
    mu: LeafChoice | None = None,
    var: LeafChoice | None = None,
    trace: LeafChoice | None = None,
) -> PerStatistic:
    """Chooses a format for each statistic; statistics without one stay in float32.

    Args:
      nu: For the second moment of uncentered forms: a format, or the result of `large_leaves` or
        `per_leaf`.
      mu: The same for the mean of centered forms.
      var: The same for the variance of centered forms.
      trace: The same for the velocity of momentum.

    Statistics that an optimizer does not have are ignored, so one choice can serve several
    optimizers.

    Example:
      >>> import rmsprop_jax
      >>> from rmsprop_jax import storage
      >>> choice = storage.per_statistic(nu=storage.uint8(), trace=storage.bfloat16())
      >>> tx = rmsprop_jax.rmsprop(1e-3, momentum=0.9, storage=choice)
    """
    choices = PerStatistic(nu, mu, var, trace)
    for statistic in STATISTICS:
        check_storage(getattr(choices, statistic), statistic, name=statistic)
    return choices


def check_storage(storage: Storage | None, *statistics: str, name: str = 'storage') -> None:
    """Raises if `storage` is not a choice of formats, or cannot hold one of the statistics."""
    if storage is not None and not isinstance(storage, Storage):
        hint = ' Call it: storage.bfloat16().' if isinstance(storage, type) else ''
        hint = hint or ' Wrap a function in storage.per_leaf.' * callable(storage)
        raise TypeError(
            f'{name} must be a format or a choice from rmsprop_jax.storage, got {storage!r}.{hint}'
        )
    for statistic in statistics:
        choice = _for_statistic(storage, statistic)
        if isinstance(choice, LargeLeaves) and statistic not in choice.format.holds:
            raise ValueError(choice.format.refusal(statistic, (), False))


def format_of(
    storage: Storage | None,
    statistic: str,
    path: str,
    shape: Shape,
    is_complex: bool,
    spec: PartitionSpec | None = None,
) -> Format:
    """The format of one leaf; `shape` is the shape of the whole array, also under `jax.shard_map`.

    Raises:
      ValueError: If the format cannot hold the leaf; the message names the leaf.
    """
    choice = _for_statistic(storage, statistic)
    if choice is None:
        return float32()
    chosen = choice.choose(path, shape)
    refusal = chosen.refusal(statistic, shape, is_complex, spec)
    if refusal is not None:
        raise ValueError(f'params{path}: {refusal}')
    return chosen


def rounds(storage: Storage | None, statistic: str) -> bool:
    """Whether some leaf of a statistic may be kept with fewer digits than float32."""
    choice = _for_statistic(storage, statistic)
    return choice.format.rounds if isinstance(choice, LargeLeaves) else choice is not None


def is_plain(x: Any) -> bool:
    """Whether `x` is None, a number, a string, or a choice of formats without a function.

    Such values can be cached for good, since they keep nothing else alive.
    """
    if isinstance(x, PerStatistic):
        return all(is_plain(getattr(x, statistic)) for statistic in STATISTICS)
    return x is None or isinstance(x, bool | int | float | str | np.generic | Format | LargeLeaves)


def _for_statistic(storage: Storage | None, statistic: str) -> LargeLeaves | PerLeaf | None:
    choice = getattr(storage, statistic) if isinstance(storage, PerStatistic) else storage
    return large_leaves(choice) if isinstance(choice, Format) else choice
