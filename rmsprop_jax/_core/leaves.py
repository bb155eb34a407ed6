"""The only place where array mathematics meets trees: it decodes, steps and encodes each leaf.

Every leaf is visited once per update, in one flatten and one unflatten of the gradient tree.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path
from jax.typing import ArrayLike

from rmsprop_jax._checks import check_kind, inexact_dtype, matched
from rmsprop_jax._types import KeyPath, by_path, canonical, real_dtype, wide_dtype
from rmsprop_jax.storage._choice import Storage, format_of
from rmsprop_jax.storage._formats import Format, float32, held_as, stored_shape
from rmsprop_jax.storage._place import possible_shapes, whole_shape


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A statistic that is kept for each entry of the parameters between steps.

    Attributes:
      name: `nu`, `mu`, `var` or `trace`.
      real: Whether it is real even if parameters are complex.
      storage: The format of each leaf; None means float32.
      of_pairs: Whether complex arrays are treated as pairs of reals, with a statistic for each, as
        in PyTorch. Such a statistic has a further axis of two, its last.
    """

    name: str
    real: bool = False
    storage: Storage | None = None
    of_pairs: bool = False

    def init(self, params: Any, fill: Any) -> Any:
        """The statistic filled with one number, sharded and placed like `params`.

        Args:
          params: Any tree of floating or complex arrays (or `jax.ShapeDtypeStruct`s).
          fill: A scalar, possibly traced.
        """

        def leaf(path: KeyPath, param: Any) -> Any:
            dtype = self.dtype(f'params{keystr(path)}', param)
            chosen = {self.format(path, shape, param) for shape in possible_shapes(param)}
            if len(chosen) > 1:
                raise ValueError(
                    f"params{keystr(path)} of shape {jnp.shape(param)} may be one device's share "
                    f'of an array under jax.shard_map, and the format of its {self.name} depends '
                    'on the shape of the whole array: call init outside of shard_map.'
                )
            return chosen.pop().init(_as_pairs(param) if self.splits(param) else param, fill, dtype)

        return tree_map_with_path(leaf, params)

    def splits(self, param: Any) -> bool:
        """Whether a parameter, or its gradient, is treated as pairs of reals."""
        return self.of_pairs and jnp.iscomplexobj(param)

    def dtype(self, name: str, param: Any) -> np.dtype:
        """The accumulation dtype for this parameter, which errors call `name`."""
        dtype = wide_dtype(inexact_dtype(name, param))
        return real_dtype(dtype) if self.real or self.splits(param) else dtype

    def format(
        self,
        path: KeyPath,
        shape: tuple[int, ...],
        param: Any,
        spec: PartitionSpec | None = None,
    ) -> Format:
        """The format for a parameter at `path`. `shape` is the shape of the whole array."""
        if self.storage is None:
            return float32()
        splits = self.splits(param)
        is_complex = jnp.iscomplexobj(param) and not (self.real or splits)
        own = keystr(canonical(path))
        chosen = format_of(self.storage, self.name, own, shape, is_complex, spec)
        return chosen.of_pairs() if splits else chosen


def init_like(params: Any, fill: Any) -> Any:
    """A tree filled with one number, in float32 or wider, shaped and placed like `params`."""
    return Statistic('parameters').init(params, fill)


def map_leaves(
    step: Callable[..., tuple[jax.Array, ...]],
    updates: Any,
    moments: Sequence[tuple[Statistic, Any]],
    *,
    count: ArrayLike,
    units: tuple[Any, Any] = (None, None),
    params: Any = None,
    specs: Any = None,
) -> tuple[Any, ...]:
    """Applies `step` to each leaf of `updates` and its statistics; returns a tree for each result.

    The caller has checked that gradients are floating or complex.

    Args:
      step: Takes the `Arithmetic` of the first format, a gradient, and the same leaf of each
        statistic. The leaves are decoded and all in one precision. Returns a tuple: the new update,
        which is then cast to the gradient's dtype, and the new leaf of each statistic, which is
        then encoded.
      updates: The tree of gradients.
      moments: The statistics and their trees.
      count: Steps taken so far. The random bits of rounding depend on it.
      units: The units of rounded magnitudes before and after this step.
      params: The parameters, if the caller has them. They serve to refuse complex gradients of real
        parameters.
      specs: The partition of the parameters under `jax.shard_map`: a tree of `PartitionSpec`s,
        which may have more leaves than `updates`.

    Raises:
      ValueError: If a statistic does not match the gradients in structure, or if one of its leaves
        does not match its gradient in shape or its storage in format.
      TypeError: If only one of a gradient and its parameter or statistic is complex.
    """
    leaves, treedef = tree_flatten_with_path(updates)
    statistics = [statistic for statistic, _ in moments]
    columns = [matched(treedef, updates, tree) for _, tree in moments]
    # Means and velocities are signed sums, which do not decay as the unit does.
    before, after = ([unit if x.real else None for x in statistics] for unit in units)
    # Wrappers may pass any tree as params, so another structure is not an error.
    known = params is not None and jax.tree.structure(params) == treedef
    param_leaves = jax.tree.leaves(params) if known else [None] * len(leaves)
    leaf_step = functools.partial(_leaf_step, step, (before, after), count)
    if _is_staged():
        # Leaves of one shape, dtype and format are then traced and lowered once. Outside of jit
        # this would compile anew at every update, because `step` is a new function each time.
        leaf_step = jax.jit(leaf_step, static_argnums=(0, 1, 2))
    partition = by_path(specs)
    results = []
    for (path, g), param, *stored in zip(leaves, param_leaves, *columns, strict=True):
        own = canonical(path)
        name, spec = f'updates{keystr(path)}', partition.get(own)
        if param is not None:
            check_kind(name, g, param)
        shape = whole_shape(jnp.shape(g), spec)
        split = statistics[0].splits(g)
        formats, keys = [], []
        for statistic, leaf in zip(statistics, stored, strict=True):
            kept = statistic.format(own, shape, g, spec)
            _check_stored(name, g, split, statistic, kept, leaf, spec)
            formats.append(kept)
            keys.append(kept.key(f'{statistic.name}{keystr(own)}') if kept.rounds else None)
        update, *new = leaf_step(tuple(formats), spec, split, g, stored, keys)
        held = (held_as(x, old) for x, old in zip(new, stored, strict=True))
        results.append((update, *held))
    outputs = zip(*results, strict=True) if results else [()] * (1 + len(columns))
    return tuple(treedef.unflatten(output) for output in outputs)


def _leaf_step(
    step: Callable[..., tuple[jax.Array, ...]],
    units: tuple[Sequence[Any], Sequence[Any]],
    count: ArrayLike,
    formats: tuple[Format, ...],
    spec: PartitionSpec | None,
    split: bool,
    g: jax.Array,
    stored: Sequence[Any],
    keys: Sequence[Any],
) -> tuple[Any, ...]:
    """Decodes the statistics of one leaf, steps, and encodes them."""
    before, after = units
    decoded = [
        kept._decode(leaf, unit) for kept, leaf, unit in zip(formats, stored, before, strict=True)
    ]
    wide = real_dtype(np.result_type(*[x.dtype for x in decoded]))
    dtypes = {False: wide, True: np.promote_types(wide, np.complex64)}
    parts = _as_pairs(g) if split else jnp.asarray(g)
    alike = [x.astype(dtypes[jnp.iscomplexobj(x)]) for x in (parts, *decoded)]
    update, *new = step(formats[0].arithmetic, *alike)
    encoded = [
        kept.encode(x, kept.bits(key, count, x.shape, spec), unit)
        for kept, key, x, unit in zip(formats, keys, new, after, strict=True)
    ]
    update = lax.complex(update[..., 0], update[..., 1]) if split else update
    return update.astype(jnp.result_type(g)), *encoded


def _as_pairs(x: Any) -> Any:
    """A complex array as a real one with a further, last axis of two."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(shape=(*x.shape, 2), dtype=real_dtype(x.dtype))
    return jnp.stack([jnp.real(x), jnp.imag(x)], -1)


def _is_staged() -> bool:
    """Whether operations are recorded for a compiler: under jit, but not under vmap or grad alone.

    These two do not trace an operation on a constant.
    """
    return isinstance(jnp.zeros(()), Tracer)


def widen(tree: Any) -> Any:
    """Casts floating and complex leaves to their accumulation dtype; other leaves are unchanged.

    Other leaves may be anything, such as the functions in an Equinox model. The code that uses them
    checks them.
    """

    def leaf(x: Any) -> Any:
        if not jnp.issubdtype(getattr(x, 'dtype', type(x)), jnp.inexact):
            return x
        return jnp.asarray(x, wide_dtype(jnp.result_type(x)))

    return jax.tree.map(leaf, tree)


def cast_like(tree: Any, like: Any) -> Any:
    """Casts each leaf of `tree` to the dtype of the same leaf of `like`."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def _check_stored(
    name: str,
    g: Any,
    split: bool,
    statistic: Statistic,
    kept: Format,
    stored: Any,
    spec: PartitionSpec | None,
) -> None:
    shape = (*jnp.shape(g), 2) if split else jnp.shape(g)
    fault = kept.fault(stored, shape)
    if fault is not None:
        message = f'{name} has shape {jnp.shape(g)}, but {statistic.name} {fault} there.'
        # If the shape is right, the format is wrong.
        if stored_shape(stored) == shape:
            message += ' If the storage has changed, use storage.convert.'
            if spec is None and len(possible_shapes(g)) > 1:
                message += (
                    ' Under jax.shard_map, formats depend on the shape of the whole array: give '
                    'update the argument partition_specs.'
                )
        raise ValueError(message)
    if not (statistic.real or split):
        check_kind(name, g, stored)
