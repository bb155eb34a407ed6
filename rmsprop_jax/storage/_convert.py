"""Stored statistics outside of a step: reading, converting, describing and checking them."""

import operator
import re
import reprlib
import types
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path, tree_map_with_path

from rmsprop_jax._checks import checked_leaves, leaf_dtype
from rmsprop_jax._core.moments import componentwise
from rmsprop_jax._types import (
    KeyPath,
    RmsState,
    TraceState,
    by_path,
    canonical,
    real_dtype,
    wide_dtype,
)
from rmsprop_jax.storage._choice import Storage, check_storage, format_of, rounds
from rmsprop_jax.storage._formats import (
    MAGNITUDES,
    STATISTICS,
    Format,
    Means,
    as_factors,
    factored,
    float32,
    is_mapping_of_factors,
    possible_kinds,
    stored_shape,
)
from rmsprop_jax.storage._place import unshared, whole_shape

_VERSION = 1
_REPLACE = (
    'replace the mapping by storage.Factors(row, col), or by storage.FactorsOfPairs(row, col) for '
    'a complex parameter'
)
Partition = Mapping[KeyPath, PartitionSpec]


class Saturation(NamedTuple):
    """The shares of a leaf's entries at the two ends of its format's range.

    Attributes:
      low: Share at the smallest positive number, of shape (); true values may be smaller.
      high: Share at the largest number, of shape (); true values may be larger.
    """

    low: jax.Array
    high: jax.Array


def read(state: Any, storage: Storage | None) -> Any:
    """Decodes every statistic in an optimizer's state, to float32 or wider.

    Args:
      state: The state of a transformation of this package, alone or inside chains and wrappers.
      storage: The `storage` of the transformation.

    Example:
      >>> import jax.numpy as jnp, optax, rmsprop_jax
      >>> from rmsprop_jax import storage
      >>> tx = rmsprop_jax.rmsprop(1e-3, storage=storage.factored())
      >>> params = {'kernel': jnp.ones((64, 64))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> decoded = storage.read(state, storage.factored())
      >>> optax.tree.get(decoded, 'nu')['kernel'].shape
      (64, 64)
    """
    decoded = _map_statistics(lambda leaf: leaf.decoded(), state, storage, lambda _: None)
    return unshared(decoded, state)


def convert(state: Any, params: Any, from_: Storage | None, to: Storage | None) -> Any:
    """Converts an optimizer's state to other formats, so that training can go on with them.

    Rounds to nearest. Digits that the old format lost do not come back.

    Args:
      state: The state of a transformation of this package, alone or inside chains and wrappers.
      params: The parameters that the state belongs to.
      from_: The `storage` of the transformation so far.
      to: The `storage` of the transformation from now on.

    Raises:
      ValueError: If the state is not in the formats of `from_`, if `to` cannot hold a leaf, or if
        the parameters lack a leaf of the state.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import storage
      >>> params = {'kernel': jnp.ones((64, 64))}
      >>> _, state = rmsprop_jax.rmsprop(0.1).update(params, rmsprop_jax.rmsprop(0.1).init(params))
      >>> state = storage.convert(state, params, storage.float32(), storage.uint8())
      >>> tx = rmsprop_jax.rmsprop(0.1, storage=storage.uint8())
      >>> updates, state = tx.update(params, state)
      >>> state[0].nu['kernel'].dtype
      dtype('uint8')
    """
    known = by_path(params)

    def leaf(leaf: Leaf) -> Any:
        if leaf.path not in known:
            raise ValueError(f'params{keystr(leaf.path)} does not exist, but the state has it.')
        param, decoded = known[leaf.path], leaf.decoded()
        wide = wide_dtype(leaf_dtype(f'params{keystr(leaf.path)}', param))
        # The parameter's shape chooses the format, without the further axis of pairs of reals.
        of_pairs = jnp.iscomplexobj(param) and decoded.shape == (*jnp.shape(param), 2)
        shape = jnp.shape(param) if of_pairs else decoded.shape
        is_complex = jnp.iscomplexobj(decoded)
        kept = format_of(to, leaf.statistic, keystr(leaf.path), shape, is_complex)
        kept = kept.of_pairs() if of_pairs else kept
        if isinstance(kept, float32):
            return decoded.astype(wide if jnp.iscomplexobj(decoded) else real_dtype(wide))
        return kept.encode(decoded, unit=leaf.unit)

    def unit(node: RmsState) -> jax.Array | None:
        if not rounds(to, 'nu' if node.mu is None else 'var'):
            return None
        return jnp.ones([], jnp.float32) if node.unit is None else node.unit

    check_storage(from_, name='from_')
    check_storage(to, name='to')
    return unshared(_map_statistics(leaf, state, from_, unit), state, params)


def restated(
    old: RmsState, new: RmsState, storage: Storage | None, partition: Partition
) -> RmsState:
    """The averages of `old`, stored with the sum of weights and the unit of `new`.

    Args:
      old: The state before a step, whose random bits are used for rounding.
      new: The state after it.
      storage: The `storage` of the transformation.
      partition: The partition of each parameter under `jax.shard_map`, by path.
    """
    if old.weight is None and old.unit is None:
        return old
    factor = None
    if old.weight is not None and new.weight is not None:
        started = old.weight != 0
        factor = jnp.where(started, new.weight / jnp.where(started, old.weight, 1), 1)

    def leaf(leaf: Leaf) -> Any:
        x = leaf.decoded()
        if factor is not None:
            x = componentwise(operator.mul, x, factor.astype(real_dtype(x.dtype)))
        key = leaf.format.key(f'{leaf.statistic}{keystr(leaf.path)}')
        unit = None if leaf.unit is None else new.unit
        bits = leaf.format.bits(key, old.count, x.shape, partition.get(leaf.path))
        return leaf.format.encode(x, bits, unit)

    return _map_statistics(leaf, old, storage, partition=partition)


def saturation(state: Any, storage: Storage | None) -> dict[str, Saturation]:
    """The shares of entries at the ends of their format's range, for each leaf with such a range.

    Works under `jax.jit`. If a share grows, the format's window does not fit the gradients: see the
    argument `scale` of `storage.uint8`.

    Args:
      state: The state of a transformation of this package, alone or inside chains and wrappers.
      storage: The `storage` of the transformation.

    Returns:
      A dictionary whose keys are paths in the state.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import storage
      >>> tx = rmsprop_jax.scale_by_rms(storage=storage.uint8())
      >>> params = {'kernel': jnp.ones((64, 64))}
      >>> _, state = tx.update({'kernel': 1e-13 * params['kernel']}, tx.init(params))
      >>> for path, share in storage.saturation(state, storage.uint8()).items():
      ...     print(path, share.low, share.high)
      .nu['kernel'] 1.0 0.0
    """
    return {
        leaf.name: Saturation(*map(jnp.mean, leaf.ends()))
        for leaf in stored_leaves(state, storage)
        if leaf.format.smallest > 0
    }


def describe(state: Any, storage: Storage | None) -> dict[str, Any]:
    """Describes a state in a form that `json` can save beside its checkpoint.

    The description has the dtype and shape of every leaf and the format of each statistic, without
    which the statistic cannot be decoded.

    Args:
      state: The state, or only its shapes: `jax.eval_shape(tx.init, params)`. It may be part of a
        tree that also holds other arrays, such as the parameters.
      storage: The `storage` of the transformation.

    Example:
      >>> import jax, jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import storage
      >>> tx = rmsprop_jax.scale_by_rms(storage=storage.uint8())
      >>> state = tx.init({'kernel': jnp.ones((64, 64)), 'bias': jnp.ones(64)})
      >>> leaves = storage.describe(state, storage.uint8())['leaves']
      >>> leaves['.count']
      {'dtype': 'int32', 'shape': []}
      >>> leaves[".nu['bias']"]
      {'dtype': 'float32', 'shape': [64], 'format': 'float32'}
      >>> kernel = leaves[".nu['kernel']"]
      >>> kernel['format'], kernel['scale'], kernel['version']
      ('uint8', 1.0, 1)
    """
    checked_leaves('state', state)
    leaves = {
        keystr(path): {'dtype': str(leaf.dtype), 'shape': list(leaf.shape)}
        for path, leaf in tree_flatten_with_path(jax.eval_shape(lambda x: x, state))[0]
    }
    for leaf in stored_leaves(state, storage):
        for part, _ in tree_flatten_with_path(leaf.stored)[0]:
            name = leaf.name + keystr(part)
            if name not in leaves:  # Flax NNX holds means in a mapping.
                name = f"{leaf.name}['{keystr(part, simple=True)}']"
            leaves[name].update(leaf.format.description())
    return {'rmsprop_jax': _release(), 'rmsprop_jax.storage': _VERSION, 'leaves': leaves}


def check(description: Mapping[str, Any], state: Any, storage: Storage | None) -> None:
    """Raises if a checkpoint's description does not match the state that is to be restored.

    This finds other parameters, another optimizer and other formats, which libraries that restore
    checkpoints may cast silently. It cannot distinguish optimizers whose states have the same
    leaves.

    Args:
      description: The result of `describe` when the checkpoint was made.
      state: The state to restore into, or only its shapes, as for `describe`.
      storage: The `storage` of the transformation now.

    Raises:
      ValueError: If they differ, or if this release cannot read the description's version. The
        message names the kinds of differences, lists them by path, and names the release that wrote
        the description if it is another one.
      TypeError: If the description is not a mapping.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import storage
      >>> state = rmsprop_jax.scale_by_rms().init({'kernel': jnp.ones((64, 64))})
      >>> storage.check(storage.describe(state, None), state, storage.float32())
    """
    if not isinstance(description, Mapping):
        raise TypeError(
            f'description must be a result of storage.describe, got {reprlib.repr(description)}.'
        )
    version, there = description.get('rmsprop_jax.storage'), description.get('leaves')
    if type(version) is not int or not isinstance(there, Mapping):
        raise ValueError(
            f'the description was not made by storage.describe: {reprlib.repr(description)}'
        )
    writer = _plain(description.get('rmsprop_jax'))
    if version != _VERSION:
        raise ValueError(
            f'the checkpoint was written by rmsprop_jax {writer} with version {version} of the '
            f'storage formats, and this is rmsprop_jax {_release()}, which reads version '
            f'{_VERSION}.'
        )
    here = describe(state, storage)['leaves']
    paths, kinds, lines = here.keys() | there.keys(), set[str](), list[str]()
    for path in sorted(paths, key=str):
        old, new = _plain_leaf(there.get(path)), _plain_leaf(here.get(path))
        if old != new:
            lines.append(f'  {path}: {_apart(old, new)} in the checkpoint, {_apart(new, old)} here')
            kinds |= _kinds(str(path), old, new, paths)
    if lines:
        raise ValueError('\n'.join([_summary(writer, kinds), *lines]))


def _summary(writer: Any, found: Set[str]) -> str:
    """The message's head: the kinds of differences, and what to do about them."""
    kinds = [kind for kind in ('leaves', 'shapes', 'dtypes', 'formats') if kind in found]
    head = 'the checkpoint does not match the state: '
    if writer != _release():
        head += f'rmsprop_jax {writer} wrote it, and this is rmsprop_jax {_release()}; '
    head += f'they differ in {", ".join(kinds)}.'
    if found <= {'dtypes', 'formats'} and 'formats' in found:
        head += (
            ' Restore it with the storage with which it was written, and then convert it with '
            'storage.convert.'
        )
    return head


def _kinds(path: str, old: Any, new: Any, paths: Set[Any]) -> set[str]:
    """The kinds of differences between two descriptions of a leaf, each of which may be None."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        # A format that rounds adds a unit, and a factored one has two leaves instead of one.
        whole = re.sub(r"(\.|\[')(row|col)('\])?$", '', path)
        is_factored = f'{whole}.row' in paths or f"{whole}['row']" in paths
        is_unit = path.removesuffix('.value').endswith('.unit')
        of_format = is_unit or (whole in paths and is_factored)
        return {'formats' if of_format else 'leaves'}
    names = {'shape': 'shapes', 'dtype': 'dtypes'}
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return {names.get(name, 'formats') for name in differing}


def _apart(leaf: Any, other: Any) -> Any:
    """What the message shows of a leaf's description: the part that differs from the other one."""
    if isinstance(leaf, dict) and isinstance(other, dict):
        return {n: x for n, x in leaf.items() if x != other.get(n)} or 'none of this'
    return 'absent' if leaf is None else leaf


def _plain_leaf(x: Any) -> Any:
    """A leaf's description as `describe` makes it, or None if there is none.

    A checkpoint may contain anything, including arrays and deep nests; these are abbreviated.
    """
    if isinstance(x, Mapping) and all(isinstance(name, str) for name in x):
        return {name: _plain(value) for name, value in x.items()}
    return None if x is None else reprlib.repr(x)


def _plain(x: Any) -> Any:
    """A value of such a description, in a form that can be compared and shown."""
    is_shape = type(x) is list and all(type(item) is int for item in x)
    return x if is_shape or type(x) in (str, int, float) else reprlib.repr(x)


def _release() -> str:
    from rmsprop_jax import __version__

    return __version__


class Leaf(NamedTuple):
    """A stored leaf.

    Attributes:
      name: Its path in the state.
      statistic: The statistic that it is part of.
      path: The path of its parameter.
      stored: The leaf itself.
      format: Its format.
      unit: The unit that its numbers are multiples of, if its format rounds.
    """

    name: str
    statistic: str
    path: KeyPath
    stored: Any
    format: Format
    unit: jax.Array | None

    def decoded(self) -> jax.Array:
        """The leaf's numbers."""
        return self.format.decode(self.stored, self.unit)

    def ends(self) -> tuple[jax.Array, jax.Array]:
        """Two masks: entries at the format's smallest number, and entries at its largest."""
        size = jnp.abs(self.format.decode(self.stored))
        return size == self.format.smallest, size == self.format.largest


def _format_of(
    storage: Storage | None, statistic: str, path: KeyPath, stored: Any, spec: Any
) -> Format | str:
    """The format of a stored leaf whose parameter is not known, or a phrase for what is wrong.

    If the last axis has length two, the leaf may belong to real numbers, or to complex numbers as
    pairs of reals. Up to release 0.1, the shape with the pairs chose the format.
    """
    shape = stored_shape(stored) or ()
    is_complex = not isinstance(stored, Means) and jnp.iscomplexobj(stored)
    faults, fitting = list[str](), list[Format]()
    for of_pairs in (False, True)[: 1 + (shape[-1:] == (2,) and not is_complex)]:
        own = shape[:-1] if of_pairs else shape
        try:
            kept = format_of(storage, statistic, keystr(path), whole_shape(own, spec), is_complex)
        except ValueError:
            # The format cannot keep such an array. That is an error only for real numbers.
            if not of_pairs:
                raise
            continue
        kept = kept.of_pairs() if of_pairs else kept
        fault = kept.fault(stored, shape)
        if fault is None:
            fitting.append(kept)
        else:
            faults.append(fault)
    if not fitting:
        return faults[0]
    if len({str(x.description() | {'seed': 0}) for x in fitting}) > 1:
        return (
            f'may belong to real or to complex numbers, and storage chooses {fitting[0]} for real '
            f'and {fitting[1]} for complex ones'
        )
    return fitting[0]


def stored_leaves(state: Any, storage: Storage | None) -> list[Leaf]:
    """Every leaf of every statistic in an optimizer's state, in the order of the state."""
    found: list[Leaf] = []
    _map_statistics(found.append, state, storage)
    return found


def _map_statistics(
    function: Callable[[Leaf], Any],
    state: Any,
    storage: Storage | None,
    new_unit: Callable[[RmsState], Any] = lambda node: node.unit,
    partition: Partition = types.MappingProxyType({}),
) -> Any:
    """Replaces every stored leaf and every unit of a state; the rest of the state is unchanged."""
    check_storage(storage)

    def node(path: KeyPath, part: Any) -> Any:
        if not isinstance(part, RmsState | TraceState):
            return part
        new = {
            name: tree(name, (*path, GetAttrKey(name)), part)
            for name in STATISTICS
            if name in part._fields
        }
        if isinstance(part, RmsState):
            new['unit'] = new_unit(part)
        return part._replace(**new)

    def tree(statistic: str, prefix: KeyPath, part: Any) -> Any:
        unit = part.unit if statistic in MAGNITUDES else None

        def leaf(path: KeyPath, stored: Any) -> Any:
            name, own = keystr((*prefix, *path)), canonical(path)
            means = as_factors(stored)
            if means is not stored and len(possible_kinds(means)) > 1:
                raise ValueError(
                    f'state{name} holds means that may belong to a real or to a complex parameter: '
                    f'{_REPLACE}.'
                )
            kept = _format_of(storage, statistic, own, means, partition.get(own))
            if isinstance(kept, str):
                raise ValueError(f'state{name} {kept}.')
            return function(Leaf(name, statistic, own, means, kept, unit))

        moments = getattr(part, statistic)

        def is_stored(path: KeyPath, x: Any) -> bool:
            means = as_factors(x)
            if means is not x and canonical(path) != path:
                return True  # A variable of NNX holds one array, so these are its means.
            for kind in possible_kinds(means) if is_mapping_of_factors(x) else ():
                spec = partition.get(canonical(path))
                kept = _format_of(storage, statistic, canonical(path), kind(*means), spec)
                if isinstance(kept, factored):
                    raise ValueError(
                        f"state{keystr((*prefix, *path))} has 'row' and 'col'. They may be two "
                        'parameters, or the means of one parameter in a mapping made by Flax NNX: '
                        f'then {_REPLACE}.'
                    )
            return isinstance(x, Means)

        return tree_map_with_path(leaf, moments, is_leaf=is_stored, is_leaf_takes_path=True)

    return tree_map_with_path(node, state, is_leaf=lambda x: isinstance(x, RmsState | TraceState))
