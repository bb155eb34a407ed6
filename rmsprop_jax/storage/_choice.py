"""Which format keeps which leaf of which statistic."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from rmsprop_jax._checks import checked_steps
from rmsprop_jax.storage._formats import STATISTICS, Format, float32


@dataclasses.dataclass(frozen=True)
class LargeLeaves:
    """A format for large arrays only: what `storage.large_leaves` returns."""

    format: Format
    min_size: int
    min_ndim: int

    def choose(self, path: str, shape: tuple[int, ...]) -> Format:
        """The format of a leaf of that shape."""
        del path
        large = len(shape) >= self.min_ndim and math.prod(shape) >= self.min_size
        return self.format if large else float32()


@dataclasses.dataclass(frozen=True)
class PerLeaf:
    """A format for each leaf: what `storage.per_leaf` returns."""

    function: Callable[[str, tuple[int, ...]], Format]

    def choose(self, path: str, shape: tuple[int, ...]) -> Format:
        """The format of the leaf at that path."""
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

    A format given by itself means this with its defaults: biases and the scales of norms are a
    small part of the memory and a large part of what can go wrong.

    Args:
      format: The format of the large leaves.
      min_size: The least number of entries of such a leaf.
      min_ndim: The least number of its axes.

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


def per_leaf(function: Callable[[str, tuple[int, ...]], Format]) -> PerLeaf:
    """Lets a function choose the format of each leaf.

    Args:
      function: From the path of a parameter, such as `"['dense']['kernel']"`, and its shape to a
        format. It is called while tracing, and must always give the same answer.

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
    """Chooses for each statistic by itself; what is left out stays float32.

    Args:
      nu: For the second moment of uncentered forms: a format, or what `large_leaves` or `per_leaf`
        return.
      mu: For the mean of centered forms.
      var: For the variance of centered forms.
      trace: For the velocity of momentum.

    Entries for statistics that an optimizer does not have are without effect, so that one choice
    can serve several optimizers.

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
    """Refuses what is no choice of formats, or cannot hold one of these statistics."""
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
    shape: tuple[int, ...],
    is_complex: bool,
    spec: PartitionSpec | None = None,
) -> Format:
    """The format of one leaf, of which `jax.shard_map` may give each device a share.

    Raises:
      ValueError: If it cannot hold that leaf; the message names it.
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
    """Whether some leaf of a statistic may be kept in fewer digits than float32."""
    choice = _for_statistic(storage, statistic)
    return choice.format.rounds if isinstance(choice, LargeLeaves) else choice is not None


def is_plain(x: Any) -> bool:
    """Whether it is None, a number, a word, or a choice of formats without a function.

    Those can be kept for good, since they keep nothing else alive.
    """
    if isinstance(x, PerStatistic):
        return all(is_plain(getattr(x, statistic)) for statistic in STATISTICS)
    return x is None or isinstance(x, bool | int | float | str | np.generic | Format | LargeLeaves)


def _for_statistic(storage: Storage | None, statistic: str) -> LargeLeaves | PerLeaf | None:
    choice = getattr(storage, statistic) if isinstance(storage, PerStatistic) else storage
    return large_leaves(choice) if isinstance(choice, Format) else choice
