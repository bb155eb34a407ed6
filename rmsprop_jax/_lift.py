"""The one place where array mathematics meets trees: state is made, matched and updated here.

Every leaf is visited once per update, in one flatten and one unflatten of the gradient tree, and
every complaint names the offending leaf by its path.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path
from jax.typing import ArrayLike

from rmsprop_jax._types import (
    RmsState,
    by_path,
    canonical,
    checked_leaves,
    checked_state,
    leaf_dtype,
    real_dtype,
    wide_dtype,
)
from rmsprop_jax.storage._choice import Storage, format_of
from rmsprop_jax.storage._formats import Format, held_as, stored_shape
from rmsprop_jax.storage._place import possible_shapes, whole_shape

KeyPath = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Statistic:
    """What is kept for each entry of the parameters between steps.

    Attributes:
      name: `nu`, `mu`, `var` or `trace`.
      real: Whether it is real even where parameters are complex.
      storage: Which format keeps which leaf; None means float32.
      of_pairs: Whether complex arrays are pairs of reals, with a statistic for each, as in PyTorch.
        They are then kept with a further axis of two, their last.
    """

    name: str
    real: bool = False
    storage: Storage | None = None
    of_pairs: bool = False

    def init(self, params: Any, fill: Any) -> Any:
        """The statistic of one number everywhere, sharded and placed like `params`.

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
        """Whether a parameter, or its gradient, is taken for pairs of reals."""
        return self.of_pairs and jnp.iscomplexobj(param)

    def dtype(self, name: str, param: Any) -> np.dtype:
        """In which it is accumulated for a parameter of that name."""
        dtype = wide_dtype(_inexact_dtype(name, param))
        return real_dtype(dtype) if self.real or self.splits(param) else dtype

    def format(self, path: KeyPath, shape: tuple[int, ...], param: Any) -> Format:
        """How it is kept for a parameter at `path`, where the whole array has that shape."""
        splits = self.splits(param)
        is_complex = jnp.iscomplexobj(param) and not (self.real or splits)
        chosen = format_of(self.storage, self.name, keystr(canonical(path)), shape, is_complex)
        return chosen.of_pairs() if splits else chosen

    def shape(self, param: Any) -> tuple[int, ...]:
        """Its own, for a parameter or one device's share of it."""
        return (*jnp.shape(param), 2) if self.splits(param) else jnp.shape(param)


def init_like(params: Any, fill: Any) -> Any:
    """A tree shaped, sharded and placed like `params`, of one number, in float32 or wider."""
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
    """Applies `step` to each leaf of `updates` with its statistics; returns a tree of each result.

    Args:
      step: Maps a gradient and the same leaf of each statistic, decoded and all in one precision,
        to a tuple: the new update, which is cast to the gradient's dtype, and the new leaf of each
        statistic, which is encoded. Its last argument is the `Arithmetic` of the first format.
      updates: The tree of gradients.
      moments: The statistics and their trees.
      count: Steps taken so far, of which rounding makes its random bits.
      units: What rounded magnitudes are multiples of before and after this step.
      params: The parameters, where the caller has them: a complex gradient of a real one is
        refused.
      specs: Under `jax.shard_map`, how the parameters are partitioned: a tree of `PartitionSpec`s,
        which may have more leaves than `updates`.

    Raises:
      ValueError: If a statistic's structure, or the shape or format of one of its leaves, is not
        what the gradients and its storage ask for.
      TypeError: If a gradient is not floating or complex, or is complex where its statistic or
        parameter is not.
    """
    leaves, treedef = tree_flatten_with_path(updates)
    statistics = [statistic for statistic, _ in moments]
    columns = [_match(treedef, updates, tree) for _, tree in moments]
    # Means and velocities are signed sums, which do not decay alike.
    before, after = ([unit if x.real else None for x in statistics] for unit in units)
    # Wrappers may pass any tree as params, so a different one is no error.
    known = params is not None and jax.tree.structure(params) == treedef
    kinds = jax.tree.leaves(params) if known else [None] * len(leaves)
    leaf_step = functools.partial(_leaf_step, step, (before, after), count)
    if _is_staged():
        # Leaves of one shape, dtype and format are then traced and lowered once. Outside of jit
        # this would compile anew at every update, because `step` is a new function each time.
        leaf_step = jax.jit(leaf_step, static_argnums=(0, 1, 2))
    partition = by_path(specs)
    results = []
    for (path, g), kind, *stored in zip(leaves, kinds, *columns, strict=True):
        name, spec = f'updates{keystr(path)}', partition.get(canonical(path))
        _check_kind(name, g, [] if kind is None else [kind])
        shape = whole_shape(jnp.shape(g), spec)
        formats = [x.format(path, shape, g) for x in statistics]
        for statistic, kept, leaf in zip(statistics, formats, stored, strict=True):
            _check_stored(name, g, statistic, kept, leaf, spec)
            _check_shard(name, g, kept, spec)
        keys = [
            kept.key(f'{statistic.name}{keystr(canonical(path))}')
            for kept, statistic in zip(formats, statistics, strict=True)
        ]
        split = any(x.splits(g) for x in statistics)
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
        kept.decode(leaf, unit) for kept, leaf, unit in zip(formats, stored, before, strict=True)
    ]
    wide = np.result_type(*[real_dtype(x.dtype) for x in decoded])
    parts = _as_pairs(g) if split else jnp.asarray(g)
    way = formats[0].arithmetic
    update, *new = step(*[_in_precision(x, wide) for x in (parts, *decoded)], way)
    encoded = [
        kept.encode(x, kept.bits(key, count, x.shape, spec), unit)
        for kept, key, x, unit in zip(formats, keys, new, after, strict=True)
    ]
    update = lax.complex(update[..., 0], update[..., 1]) if split else update
    return update.astype(jnp.result_type(g)), *encoded


def _as_pairs(x: Any) -> Any:
    """A complex array as a real one with a further axis of two, its last."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(shape=(*x.shape, 2), dtype=real_dtype(x.dtype))
    return jnp.stack([jnp.real(x), jnp.imag(x)], -1)


def _is_staged() -> bool:
    """Whether operations are recorded for a compiler: under jit, but not under vmap or grad alone.

    Those two leave an operation on a constant alone.
    """
    return isinstance(jnp.zeros(()), Tracer)


def _in_precision(x: jax.Array, wide: np.dtype) -> jax.Array:
    return x.astype(np.promote_types(wide, np.complex64) if jnp.iscomplexobj(x) else wide)


def widen(tree: Any) -> Any:
    """Casts floating and complex leaves to their accumulation dtype, and leaves others alone.

    Those may be anything, such as the functions in an Equinox model: who reads them checks them.
    """

    def leaf(x: Any) -> Any:
        if not jnp.issubdtype(getattr(x, 'dtype', type(x)), jnp.inexact):
            return x
        return jnp.asarray(x, wide_dtype(jnp.result_type(x)))

    return jax.tree.map(leaf, tree)


def cast_like(tree: Any, like: Any) -> Any:
    """Casts each leaf of `tree` to the dtype of the same leaf of `like`."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def checked_updates(updates: Any) -> Any:
    """Returns `updates`, refusing leaves that are not floating or complex."""
    for path, g in tree_flatten_with_path(updates)[0]:
        _inexact_dtype(f'updates{keystr(path)}', g)
    return updates


def checked_params(user: str, updates: Any, params: Any) -> Any:
    """Returns `params`, which `user` needs, refusing None and what is not like `updates`."""
    if params is None:
        raise ValueError(f'{user} needs params: call update(updates, state, params).')
    check_alike('params', params, 'updates', updates)
    return params


def check_alike(name: str, tree: Any, other_name: str, other: Any) -> None:
    """Refuses a tree whose structure, or the shape of one of whose leaves, is not the other's."""
    if jax.tree.structure(tree) != jax.tree.structure(other):
        raise ValueError(_structure_difference(name, tree, other_name, other))
    for (path, x), y in zip(checked_leaves(name, tree), jax.tree.leaves(other), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f'{name}{keystr(path)} has shape {jnp.shape(x)}, but {other_name} has '
                f'{jnp.shape(y)} there.'
            )


def guarded(
    inner: optax.GradientTransformation, kind: type, user: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """`inner`, refusing updates that are no arrays of real or complex numbers, a state that is no
    `kind`, and, where `user` needs them, params unlike the updates."""
    inner_ = for_state(inner, kind)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        checked_updates(updates)
        if user is not None:
            checked_params(user, updates, params)
        return inner_.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def for_state(
    inner: optax.GradientTransformation, kind: type
) -> optax.GradientTransformationExtraArgs:
    """`inner`, refusing a state that is not of that kind."""
    inner_ = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return inner_.update(updates, checked_state(state, kind), params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def chain(
    *steps: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` of the steps that are not None, refusing a state of another chain."""
    inner = optax.chain(*[step for step in steps if step is not None])
    length = sum(step is not None for step in steps)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if len(checked_state(state, tuple)) != length:
            raise TypeError(
                f'state must be the tuple of {length} that init returned, got a '
                f'{type(state).__name__} of {len(state)}.'
            )
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def map_with_moments(function: Callable[..., Any], tree: Any, moments: Any, *others: Any) -> Any:
    """`moments` with `function` of each leaf of `tree`, of what is kept in its place, and of the
    same leaf of others.

    Where a mask has left out a branch, all of it is one `optax.MaskedNode`, which stays.

    Args:
      function: Maps a leaf, the part of `moments` in its place, and leaves of `others`.
      tree: A tree like the parameters.
      moments: A tree of which those are a prefix, but for what has been masked out.
      others: Trees like `tree`.
    """

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    nodes = tree_flatten_with_path(moments, is_leaf=is_masked)[0]
    masked = {path for path, node in nodes if is_masked(node)}

    def leaf(path: KeyPath, x: Any, part: Any, *same: Any) -> Any:
        return part if path in masked else function(x, part, *same)

    return tree_map_with_path(
        leaf,
        tree,
        moments,
        *others,
        is_leaf=lambda path, _: path in masked,
        is_leaf_takes_path=True,
    )


def placed(tx: optax.GradientTransformation, state: Any, tree: Any, elsewhere: Any) -> Any:
    """A tree like `state`: the leaf of `tree` at each parameter for all that `state` keeps in that
    parameter's place, and `elsewhere` for the rest."""

    def moments_of(x: Any, part: Any) -> Any:
        return jax.tree.map(lambda _: x, part)

    return optax.tree.map_params(
        tx,
        lambda moments, tree: map_with_moments(moments_of, tree, moments),
        state,
        tree,
        transform_non_params=lambda _: elsewhere,
        # Whole trees are handed over, so that what wrappers have masked out can be skipped.
        is_leaf=lambda _: True,
    )


def select(mark: Any, new: Any, old: Any) -> Any:
    """`new` where `mark` is true, else `old`: a bool, or a boolean array of shape () or that of the
    parameter whose statistic the other two are.

    Raises:
      ValueError: If a mark of the parameter's shape does not tell which entries of the statistic
        are meant.
    """
    if isinstance(mark, bool):
        return new if mark else old
    if jnp.ndim(mark) and jnp.shape(mark) != jnp.shape(new):
        # Statistics of complex numbers as pairs of reals have one more axis, of two.
        if jnp.shape(new) != (*jnp.shape(mark), 2):
            raise ValueError(
                f'a statistic of shape {jnp.shape(new)} has no entry for each of a parameter of '
                f'shape {jnp.shape(mark)}, as factored ones have none: it can be selected as a '
                'whole only.'
            )
        mark = jnp.expand_dims(mark, -1)
    return jnp.where(mark, new, old)


def rms_states(state: Any) -> list[RmsState]:
    """The `RmsState`s anywhere in an optimizer's state."""
    parts = jax.tree.leaves(state, is_leaf=_is_rms_state)
    return [part for part in parts if _is_rms_state(part)]


def map_rms_states(function: Callable[..., Any], state: Any, *others: Any) -> Any:
    """`state` with `function` of each of its `RmsState`s, and of the same ones of `others`, in its
    place."""
    nodes = zip(*map(rms_states, (state, *others)), strict=True)
    return jax.tree.map(
        lambda node: function(*next(nodes)) if _is_rms_state(node) else node,
        state,
        is_leaf=_is_rms_state,
    )


def check_storage_is_given(state: Any, storage: Storage | None) -> None:
    """Refuses a state with units where it is not known what is kept in them."""
    if storage is None and any(node.unit is not None for node in rms_states(state)):
        raise ValueError(
            'give the storage that the transformation was given: the state is kept in compact '
            'formats.'
        )


def _is_rms_state(node: Any) -> bool:
    return isinstance(node, RmsState)


def _inexact_dtype(name: str, leaf: Any) -> np.dtype:
    dtype = leaf_dtype(name, leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f'{name} has dtype {dtype}, but RMSProp needs floating or complex leaves. Leave it out '
            'with optax.masked or optax.partition.'
        )
    return dtype


def _match(treedef: Any, updates: Any, moment: Any) -> list[Any]:
    try:
        return treedef.flatten_up_to(moment)
    except (ValueError, TypeError):
        raise ValueError(_structure_difference('updates', updates, 'the state', moment)) from None


def _structure_difference(name: str, tree: Any, other_name: str, other: Any) -> str:
    here, there = _paths(tree), _paths(other)
    lines = [f'the structure of {name} does not match that of {other_name}.']
    lines += [f'  only in {name}: {_listed(here - there)}'] * bool(here - there)
    lines += [f'  only in {other_name}: {_listed(there - here)}'] * bool(there - here)
    lines += [f'  {name}: {jax.tree.structure(tree)}']
    lines += [f'  {other_name}: {jax.tree.structure(other)}']
    return '\n'.join(lines)


def _paths(tree: Any) -> set[str]:
    return {keystr(path) or 'a single leaf' for path, _ in tree_flatten_with_path(tree)[0]}


def _listed(names: Iterable[str], most: int = 8) -> str:
    ordered = sorted(names)
    more = [f'and {len(ordered) - most} more'] * (len(ordered) > most)
    return ', '.join(ordered[:most] + more)


def _check_stored(
    name: str, g: Any, statistic: Statistic, kept: Format, stored: Any, spec: PartitionSpec | None
) -> None:
    shape = statistic.shape(g)
    fault = kept.fault(stored, shape)
    if fault is not None:
        message = f'{name} has shape {jnp.shape(g)}, but {statistic.name} {fault} there.'
        # A statistic of the right shape is of another format.
        if stored_shape(stored) == shape:
            message += ' If the storage has changed, use storage.convert.'
            if spec is None and len(possible_shapes(g)) > 1:
                message += (
                    ' Under jax.shard_map a format is chosen by the shape of the whole array: give '
                    'update the argument partition_specs.'
                )
        raise ValueError(message)
    if not (statistic.real or statistic.splits(g)):
        _check_kind(name, g, [stored])


def _check_shard(name: str, g: Any, kept: Format, spec: PartitionSpec | None) -> None:
    fault = kept.shard_fault(spec, jnp.ndim(g))
    if fault is not None:
        raise ValueError(f'{name}: {fault}')


def _check_kind(name: str, g: Any, kindred: Sequence[Any]) -> None:
    dtype = _inexact_dtype(name, g)
    for other in kindred:
        if jnp.iscomplexobj(other) != jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f'{name} has dtype {dtype}, but its parameter or state is {jnp.result_type(other)}.'
            )
