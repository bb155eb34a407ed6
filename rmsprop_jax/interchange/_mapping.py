"""Pairs of their arrays and ours, and how the axes of the two differ."""

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten_with_path

from rmsprop_jax._checks import checked_flag, checked_steps
from rmsprop_jax._types import path_name


class InterchangeError(ValueError):
    """A conversion failed. The message lists every faulty entry.

    Attributes:
      problems: One line for each faulty entry.
    """

    def __init__(self, task: str, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__('\n  '.join([f'{task}:', *self.problems]))


class EntryError(ValueError):
    """A fault of one entry: a line of the `InterchangeError`."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the axes of their array become the axes of ours.

    Attributes:
      axes: Our axes in terms of theirs, as for `np.transpose`. An Ellipsis stands for all axes that
        are not listed, in their order, so that one layout serves every rank. Without it, an axis
        that is left out must have length one, such as a part may have: `(1,)` makes a vector of a
        row.
      split: The lengths that their second axis is split into before the axes are transposed. The
        parts are then merged again, in our order.
      part: Which part of theirs is ours, of how many equal parts, along which of their axes. The
        other parts need pairs of their own.
      blocks: Our last axis in equal blocks of theirs: `(1, 0, 2)` swaps the first two of three.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax.interchange import KERNEL
      >>> KERNEL.to_ours(np.zeros((8, 3, 5, 5))).shape  # PyTorch's OIHW to Flax's HWIO
      (5, 5, 3, 8)
    """

    axes: tuple[int | EllipsisType, ...] = (...,)
    split: tuple[int, ...] = ()
    part: tuple[int, int, int] = (0, 1, 0)
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        kinds = {'axes': int | EllipsisType, 'split': int, 'part': int, 'blocks': int}
        for name, allowed in kinds.items():
            value = getattr(self, name)
            if not (isinstance(value, tuple) and all(isinstance(x, allowed) for x in value)):
                raise TypeError(f'{name} must be a tuple of integers, got {value!r}.')
        if len(self.part) != 3 or not 0 <= self.part[0] < self.part[1] or self.part[2] < 0:
            raise ValueError(f'part must be (which, of how many, axis), got {self.part!r}.')
        if sorted(self.blocks) != list(range(len(self.blocks))):
            raise ValueError(f'blocks must be each of 0, 1, ... once, got {self.blocks!r}.')

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Their array, or our part of it, with our axes.

        Raises:
          ValueError: If the array does not have the axes of the layout.
        """
        which, number, axis = self.part
        array = _equal_parts(np.asarray(array), number, axis)[which]
        if self.split:
            outputs, features = self._matrix(array, 0, 1)
            order = self._order(1 + len(self.split))
            array = array.reshape(outputs, *self.split).transpose(order).reshape(features, outputs)
        else:
            array = array.transpose(self._order(array.ndim))
            shape = array.shape[: array.ndim - len(self._left_out)]
            if array.shape[len(shape) :].count(1) < len(self._left_out):
                raise ValueError(f'its axes {self._left_out} are not of length one')
            array = array.reshape(shape)
        return self._in_blocks(array, self.blocks)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array with their axes: the inverse of `to_ours`, up to other parts.

        Raises:
          ValueError: As `to_ours`.
        """
        array = self._in_blocks(np.asarray(array), np.argsort(self.blocks))
        if not self.split:
            array = array.reshape(*array.shape, *(1 for _ in self._left_out))
            return array.transpose(np.argsort(self._order(array.ndim)))
        outputs, features = self._matrix(array, 1, 0)
        order = self._order(1 + len(self.split))
        whole = (outputs, *self.split)
        ours = array.reshape([whole[axis] for axis in order])
        return ours.transpose(np.argsort(order)).reshape(outputs, features)

    def _in_blocks(self, array: np.ndarray, order: Sequence[int] | np.ndarray) -> np.ndarray:
        if not self.blocks:
            return array
        parts = _equal_parts(array, len(self.blocks), array.ndim - 1)
        return np.concatenate([parts[block] for block in order], -1)

    @property
    def _left_out(self) -> list[int]:
        """Their axes that ours lack."""
        named = [axis for axis in self.axes if not isinstance(axis, EllipsisType)]
        if len(named) < len(self.axes):
            return []
        return [axis for axis in range(max(named, default=-1)) if axis not in named]

    def _order(self, rank: int) -> list[int]:
        """Their axes in the order of ours, and last those that are left out."""
        named = [axis for axis in self.axes if not isinstance(axis, EllipsisType)]
        rest = [axis for axis in range(rank) if axis not in named]
        order: list[int] = []
        for axis in self.axes:
            order += rest if isinstance(axis, EllipsisType) else [axis]
        order += self._left_out
        if sorted(order) != list(range(rank)):
            raise ValueError(f'its {rank} axes cannot be laid out as {self.axes}')
        return order

    def _matrix(self, array: np.ndarray, outputs: int, features: int) -> tuple[int, int]:
        wanted = math.prod(self.split)
        if array.ndim != 2 or array.shape[features] != wanted:
            raise ValueError(
                f'shape {array.shape} is not a matrix of {wanted} features ({self.split})'
            )
        return array.shape[outputs], wanted


def _equal_parts(array: np.ndarray, number: int, axis: int) -> list[np.ndarray]:
    if number == 1:
        return [array]
    if not 0 <= axis < array.ndim or array.shape[axis] % number:
        raise ValueError(f'its shape {array.shape} has not {number} equal parts on axis {axis}')
    return np.split(array, number, axis)


def shape_here(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of their array with our axes.

    Raises:
      ValueError: If an array of this shape does not have the axes of the layout.
    """
    return layout.to_ours(np.broadcast_to(np.int8(0), shape)).shape


AS_IS = Layout()
KERNEL = Layout((..., 1, 0))


def flattened(channels: int, *window: int) -> Layout:
    """The layout of a linear kernel that reads a flattened image.

    PyTorch flattens an image channels first, Flax and Keras channels last. So the order of the
    features differs, not only the order of the axes.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax.interchange import flattened
      >>> flattened(2, 3).to_ours(np.arange(6).reshape(1, 6)).ravel()
      array([0, 3, 1, 4, 2, 5])
    """
    split = (channels, *window)
    return Layout((..., 1, 0), split=tuple(checked_steps('channels, window', n, 1) for n in split))


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two names of one array.

    Attributes:
      theirs: Its name in the other framework, such as PyTorch's `'fc.weight'` or Keras's
        `'dense/kernel'`.
      ours: Its path in the tree of parameters, `('fc', 'kernel')` or `'fc/kernel'`; stored as the
        latter.
      layout: How the axes differ.

    Example:
      >>> from rmsprop_jax.interchange import KERNEL, Pair
      >>> Pair('fc.weight', ('fc', 'kernel'), KERNEL).ours
      'fc/kernel'
    """

    theirs: str
    ours: str | tuple[Any, ...]
    layout: Layout = AS_IS

    def __post_init__(self) -> None:
        if not isinstance(self.theirs, str):
            raise TypeError(f'theirs must be a name, got {self.theirs!r}.')
        if not isinstance(self.layout, Layout):
            raise TypeError(f'layout must be a Layout, got {self.layout!r}.')
        object.__setattr__(self, 'ours', joined(self.ours))


def layer(
    theirs: str,
    ours: str | tuple[Any, ...],
    weights: tuple[str, str],
    biases: tuple[str, str],
    bias: bool,
    layout: Layout = AS_IS,
) -> tuple[Pair, ...]:
    """The pairs of a layer: one for its weights and, if it has a bias, one for the bias."""
    if not isinstance(theirs, str):
        raise TypeError(f'theirs must be a name, got {theirs!r}.')
    names = [(*weights, layout), (*biases, AS_IS)][: 1 + checked_flag('bias', bias)]
    return tuple(Pair(theirs + name, f'{joined(ours)}/{key}', lay) for name, key, lay in names)


# The layers of Flax's cells that read the input and the hidden state, in the order of the gates.
CELLS = {
    'nnx.LSTMCell': ('ii if_ ig io', 'hi hf hg ho'),
    'nnx.OptimizedLSTMCell': ('dense_i', 'dense_h'),
    'nnx.GRUCell': ('dense_i', 'dense_h'),
    'linen.LSTMCell': ('ii if ig io', 'hi hf hg ho'),
    'linen.GRUCell': ('ir iz in', 'hr hz hn'),
}


def layers_of(cell: str, known: Collection[str] = CELLS) -> list[list[str]]:
    """The layers of a cell of Flax: those that read the input, and those that read the state."""
    if cell not in known:
        raise ValueError(f'cell must be one of {", ".join(known)}, got {cell!r}.')
    return [layers.split() for layers in CELLS[cell]]


def joined(path: str | Sequence[Any]) -> str:
    """A path as one string."""
    if not isinstance(path, str | Sequence):
        raise TypeError(f'ours must be a path, a string or a sequence of keys, got {path!r}.')
    return path if isinstance(path, str) else '/'.join(map(str, path))


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by joined path, without the `.value` of Flax NNX variables."""
    return {path_name(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


Found = TypeVar('Found', Pair, list[Pair])


class Conversion:
    """The pairs of a conversion and a list of its problems, so that one error names them all.

    Attributes:
      params: Our parameters.
      leaves: Our parameters by path.
      by_path: The pairs by our path.
      by_name: The pairs by their name: one, or one for each part of theirs, in the parts' order.
    """

    def __init__(self, task: str, params: Any, mapping: Iterable[Pair] = ()):
        self._task = task
        # A dictionary as an ordered set: two moments of one array often have the same problem.
        self._lines: dict[str, None] = {}
        self.params, self.leaves = params, named_leaves(params)
        pairs = list(mapping) if isinstance(mapping, Iterable) else [mapping]
        for pair in pairs:
            if not isinstance(pair, Pair):
                raise TypeError(f'mapping must hold pairs (interchange.Pair), got {pair!r}.')
        self.by_path = {str(pair.ours): pair for pair in pairs}
        self.by_name: dict[str, list[Pair]] = {}
        for pair in sorted(pairs, key=lambda pair: pair.layout.part):
            self.by_name.setdefault(pair.theirs, []).append(pair)
        paths = [pair.ours for pair in pairs]
        for path in {path for path in paths if paths.count(path) > 1}:
            self.add(f'{path!r} is the `ours` of more than one pair')
        for name, shared in self.by_name.items():
            self._check_parts(name, [pair.layout.part for pair in shared])
        for pair in pairs:
            if pair.ours not in self.leaves:
                self.add(f'{pair.ours!r}, paired with {pair.theirs!r}, is not in params')

    def _check_parts(self, name: str, parts: Sequence[tuple[int, int, int]]) -> None:
        _, number, axis = parts[0]
        if len({*parts}) < len(parts) or {part[1:] for part in parts} != {(number, axis)}:
            self.add(f'{name!r} is the `theirs` of more than one pair')
            return
        for which in sorted({*range(number)} - {part[0] for part in parts}):
            self.add(f'part {which} of {number} of {name!r} is not in any pair')

    def add(self, line: str) -> None:
        """Notes a problem."""
        self._lines[line] = None

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes an `EntryError` raised inside, and lets the caller continue."""
        try:
            yield
        except EntryError as error:
            self.add(str(error))

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raises at the end if a problem was noted inside, since the caller could not continue."""
        before = len(self._lines)
        yield
        if len(self._lines) > before:
            self.raise_if_any()

    def has_problems(self) -> bool:
        """Whether a problem was noted."""
        return bool(self._lines)

    def raise_if_any(self) -> None:
        """Raises an `InterchangeError` if a problem was noted."""
        if self._lines:
            raise InterchangeError(self._task, list(self._lines))


def pair_of(key: str, pairs: Mapping[str, Found], said: str = '') -> Found:
    """The pair of a path, or the pairs of a name.

    Raises:
      EntryError: If there is no such pair. The line includes `said`, a remark about the key.
    """
    if key not in pairs:
        raise EntryError(f'{key!r}{said} is not in any pair')
    return pairs[key]


def checked_names(name: str, value: Any) -> Mapping[str, Any]:
    """Returns `value`, which must be a mapping with names as keys."""
    if not isinstance(value, Mapping):
        raise TypeError(f'{name} must be a mapping from names, got {type(value).__name__}.')
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f'the keys of {name} must be names, got {key!r}.')
    return value


def checked_collection(name: str, value: Any) -> Collection[str]:
    """Returns `value`, which must be a collection of names."""
    if isinstance(value, str) or not isinstance(value, Collection):
        raise TypeError(f'{name} must be a collection of names, got {value!r}.')
    return value


def checked_count(count: Any) -> int:
    """A step count given by the caller, as an int."""
    try:
        number = operator.index(count)
    except TypeError:
        raise TypeError(f'count must be an integer, got {count!r}.') from None
    if number < 0:
        raise ValueError(f'count must not be negative, got {number}.')
    return number


def as_number(value: Any) -> float | None:
    """A real number or flag from a checkpoint, also as a PyTorch tensor; None for other values."""
    number = _as_scalar(value, 'biuf')
    return None if number is None else float(number)


def as_count(value: Any, dtype_kinds: str = 'iu') -> int | None:
    """A step count from a checkpoint; None for other values."""
    number = _as_scalar(value, dtype_kinds)
    if number is None or not 0 <= number < np.inf or number % 1:
        return None
    return int(number)


def _as_scalar(value: Any, dtype_kinds: str) -> np.ndarray | None:
    try:
        number = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return None if number.shape or number.dtype.kind not in dtype_kinds else number


def as_array(label: str, value: Any) -> np.ndarray:
    """`value` as a finite array of floating or complex numbers.

    Raises:
      EntryError: If `value` is not such an array.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        # PyTorch says this for dtypes that NumPy does not have, such as bfloat16.
        unknown = 'unsupported ScalarType' in str(error)
        advice = '. Pass tensor.float(), which loses nothing' if unknown else ''
        raise EntryError(f'{label} cannot be read as an array: {error}{advice}') from None
    if not np.isfinite(as_inexact(label, array)).all():
        raise EntryError(f'{label} is not finite')
    return array


def as_inexact(label: str, array: np.ndarray) -> np.ndarray:
    """Returns `array`.

    Raises:
      EntryError: If its numbers are not floating or complex.
    """
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise EntryError(f'{label} has dtype {array.dtype}, not a floating or complex one')
    return array


def in_our_axes(label: str, pair: Pair, value: Any) -> np.ndarray:
    """Their array with our axes.

    Raises:
      EntryError: If it is not an array of finite numbers with the axes of the pair's layout.
    """
    return _laid_out(label, pair.layout.to_ours, as_array(label, value))


def in_their_axes(label: str, pair: Pair, array: np.ndarray) -> np.ndarray:
    """A copy of our array, which may be a part of theirs, with their axes.

    Raises:
      EntryError: If it does not have the axes of the pair's layout.
    """
    return np.array(_laid_out(label, pair.layout.to_theirs, array), order='C')


def whole(label: str, pairs: Sequence[Pair], parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Their array, from its parts by our path.

    Raises:
      EntryError: If a part is missing, or has another shape than the others.
    """
    missing = [str(pair.ours) for pair in pairs if pair.ours not in parts]
    if missing:
        listed = ', '.join(map(repr, missing))
        raise EntryError(f'{label} is one array there, and there is nothing for {listed}')
    arrays = [parts[str(pair.ours)] for pair in pairs]
    if len(arrays) == 1:
        return arrays[0]
    if len({array.shape for array in arrays}) > 1:
        listed = ', '.join(f'{pair.ours!r}' for pair in pairs)
        raise EntryError(f'{label} is one array there, and the shapes of {listed} differ')
    return np.concatenate(arrays, pairs[0].layout.part[2])


def _laid_out(label: str, turn: Callable[[Any], np.ndarray], array: np.ndarray) -> np.ndarray:
    try:
        return turn(array)
    except ValueError as error:
        raise EntryError(f'{label}: {error}') from None


def parameters_from(
    theirs: Mapping[str, Any],
    like: Any,
    mapping: Iterable[Pair],
    *,
    optimizer: str = 'RMSProp',
) -> Any:
    """Their parameters as a tree like ours.

    Args:
      theirs: Arrays by name: `{k: v.detach() for k, v in model.named_parameters()}` in PyTorch,
        `{v.path: v.numpy() for v in model.trainable_variables}` in Keras, or a whole checkpoint of
        TensorFlow 1. PyTorch's `num_batches_tracked` is passed over where its `running_mean` is in
        a pair, and so are TensorFlow's `global_step` and the slots of variables that are there.
      like: A tree of arrays (or `jax.ShapeDtypeStruct`s) with our structure, shapes and dtypes.
      mapping: The pairs.
      optimizer: The name of TensorFlow's optimizer, which is in the names of its slots.

    Raises:
      InterchangeError: Listing every parameter without a pair or an entry, every entry without a
        pair, and every array that does not fit.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from rmsprop_jax import interchange
      >>> theirs = {'fc.weight': np.ones((3, 2), 'f'), 'fc.bias': np.zeros(3, 'f')}
      >>> like = {'fc': {'kernel': jnp.zeros((2, 3)), 'bias': jnp.zeros(3)}}
      >>> pairs = interchange.torch.linear('fc', 'fc')
      >>> interchange.parameters_from(theirs, like, pairs)['fc']['kernel'].shape
      (2, 3)
    """
    conversion = Conversion('parameters cannot be converted', like, mapping)
    # PyTorch counts batches for a momentum of None only, and Flax has no such momentum.
    means = [name for name in conversion.by_name if name.endswith('.running_mean')]
    passed = {name.removesuffix('running_mean') + 'num_batches_tracked' for name in means}
    if not isinstance(optimizer, str):
        raise TypeError(f"optimizer must be the optimizer's name, got {optimizer!r}.")
    slots = [f'/{optimizer}{number}' for number in ('', '_1', '_2')]
    passed |= {name + slot for name in checked_names('theirs', theirs) for slot in slots}
    for name in sorted(theirs.keys() - passed - {'global_step'}):
        with conversion.noted():
            pair_of(name, conversion.by_name)
    converted: list[Any] = []
    for path, ours in conversion.leaves.items():
        with conversion.noted():
            pair = pair_of(path, conversion.by_path)
            if pair.theirs not in theirs:
                raise EntryError(f'{pair.theirs!r}, paired with {path!r}, is missing')
            array = in_our_axes(repr(pair.theirs), pair, theirs[pair.theirs])
            converted.append(as_leaf_like(ours, repr(pair.theirs), array))
    conversion.raise_if_any()
    return jax.tree.unflatten(jax.tree.structure(like), converted)


def parameters_to(params: Any, mapping: Iterable[Pair]) -> dict[str, np.ndarray]:
    """Our parameters under their names and with their axes, in the order of the pairs.

    The inverse of `parameters_from`.

    Raises:
      InterchangeError: As `parameters_from`.
    """
    conversion = Conversion('parameters cannot be converted', params, mapping)
    parts: dict[str, np.ndarray] = {}
    for path, leaf in conversion.leaves.items():
        with conversion.noted():
            pair = pair_of(path, conversion.by_path)
            parts[path] = in_their_axes(repr(path), pair, as_array(repr(path), leaf))
    conversion.raise_if_any()
    converted: dict[str, np.ndarray] = {}
    for name, pairs in conversion.by_name.items():
        with conversion.noted():
            converted[name] = whole(repr(name), pairs, parts)
    conversion.raise_if_any()
    # In the order of the pairs, which parts have left.
    return {pair.theirs: converted[pair.theirs] for pair in conversion.by_path.values()}


def as_leaf_like(like: Any, label: str, array: np.ndarray) -> Any:
    """`array` with the dtype, sharding and memory of `like`.

    Raises:
      EntryError: If it cannot replace `like`.
    """
    if not (hasattr(like, 'shape') and hasattr(like, 'dtype')):
        raise EntryError(f'{label} has no place: ours is a {type(like).__name__}, not an array')
    if array.shape != like.shape:
        raise EntryError(f'{label} has shape {array.shape} where ours is {like.shape}')
    if np.iscomplexobj(array) and not jnp.issubdtype(like.dtype, jnp.complexfloating):
        raise EntryError(f'{label} has dtype {array.dtype} where ours is {like.dtype}')
    with np.errstate(over='ignore'):
        narrow = array.astype(like.dtype)
    if not np.isfinite(narrow).all():
        raise EntryError(f'{label} does not fit into {like.dtype}')
    return jax.device_put(narrow, sharding_of(like))


def sharding_of(like: Any) -> Any:
    """The sharding of an array; None if it is not committed to devices, as a count may be."""
    free = isinstance(like, jax.Array) and not like.committed
    return None if free else getattr(like, 'sharding', None)
