"""The formats: how one leaf of a statistic is kept in memory between steps."""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from rmsprop_jax._checks import leaf_dtype
from rmsprop_jax._core.moments import Arithmetic, kept_apart
from rmsprop_jax._types import constant, real_dtype
from rmsprop_jax.storage._place import Shape, full_like, manual_axes, without_axis
from rmsprop_jax.storage._rounding import HALF, leaf_key, power_below, random_bits, salt

STATISTICS = ('nu', 'mu', 'var', 'trace')
MAGNITUDES = ('nu', 'var')


class Format(abc.ABC):
    """How one leaf of a statistic is kept in memory.

    The step itself is computed in float32 or wider: a leaf is decoded, updated, used in that
    precision, and encoded. A format is a frozen record of plain values, so that it can be compared,
    hashed and described.

    Attributes:
      holds: The names of the statistics that the format can keep.
      rounds: Whether it keeps fewer digits than float32. If so, averages are stored as multiples of
        a unit that decays as they do; see `RmsState`.
      smallest: The smallest positive number; smaller ones are clamped to it. Zero if there is no
        limit.
      largest: The largest number; larger ones are clamped to it. Infinity if there is no limit.
    """

    holds: ClassVar[tuple[str, ...]] = STATISTICS
    rounds: ClassVar[bool] = False
    smallest: float = 0.0
    largest: float = math.inf
    _why_not: ClassVar[str] = 'keep that in another format.'

    @property
    def name(self) -> str:
        """The format's name in `rmsprop_jax.storage`."""
        return type(self).__name__

    @property
    def arithmetic(self) -> Arithmetic:
        """How a step must compute for this format."""
        return Arithmetic()

    def refusal(
        self, statistic: str, shape: Shape, is_complex: bool, spec: PartitionSpec | None = None
    ) -> str | None:
        """Why this format cannot keep a leaf, or None if it can.

        Args:
          statistic: The statistic that the leaf is part of.
          shape: The shape of the whole array.
          is_complex: Whether the statistic is complex.
          spec: The partition of the array under `jax.shard_map`, if each device keeps a share.
        """
        del shape, is_complex, spec
        if statistic in self.holds:
            return None
        return f'storage.{self.name} cannot hold {statistic}: {self._why_not}'

    @abc.abstractmethod
    def init(self, param: Any, fill: Any, dtype: DTypeLike) -> Any:
        """The stored form of a leaf filled with one number, sharded and placed like its parameter.

        Args:
          param: The parameter, an array or a `jax.ShapeDtypeStruct`.
          fill: The number, possibly traced.
          dtype: The accumulation dtype without compression.
        """

    @abc.abstractmethod
    def encode(self, x: jax.Array, bits: Any = None, unit: Any = None) -> Any:
        """The stored form of `x`.

        Args:
          x: Numbers in float32 or wider.
          bits: The result of `bits`; None rounds to nearest.
          unit: The scalar of which rounded numbers are multiples; None means one.
        """

    def key(self, label: str) -> np.uint32 | None:
        """A number that gives the leaf its own random bits; None if the format does not round."""
        del label
        return None

    def bits(
        self,
        key: ArrayLike | None,
        count: ArrayLike,
        shape: Shape,
        spec: PartitionSpec | None = None,
    ) -> jax.Array | None:
        """32 random bits for each entry of a leaf at a step; None if its key is None.

        Under `jax.shard_map`, `spec` is the partition of the leaf, and `shape` is the shape of one
        device's share.
        """
        return None if key is None else random_bits(shape, salt(key, count), spec)

    def decode(self, stored: Any, unit: Any = None) -> jax.Array:
        """The numbers that `encode` stored with the same unit, in float32 or wider."""
        fault = self.fault(stored, stored_shape(stored) or ())
        if fault is not None:
            raise ValueError(f'stored {fault}.')
        return self._decode(stored, unit)

    @abc.abstractmethod
    def _decode(self, stored: Any, unit: Any = None) -> jax.Array:
        """`decode` without its check for a fault."""

    @abc.abstractmethod
    def fault(self, stored: Any, shape: Shape) -> str | None:
        """Why `stored` is not this format's form of an array of this shape, or None if it is."""

    def of_pairs(self) -> 'Format':
        """The same format for complex numbers as pairs of reals, which add a last axis of two."""
        return self

    def spec(self, spec: PartitionSpec, ndim: int) -> Any:
        """The partition of the stored form, from the partition of a parameter of `ndim` axes."""
        del ndim
        return spec

    @abc.abstractmethod
    def nbytes(self, shape: Shape) -> int:
        """The bytes that a leaf takes for float32 parameters of this shape."""

    def description(self) -> dict[str, Any]:
        """What one must know to decode a leaf, in a form that `json` can save."""
        return {'format': self.name}


class _Elementwise(Format):
    """A format with one number for each entry, in an array of the parameter's own shape."""

    dtype: ClassVar[np.dtype]

    def fault(self, stored: Any, shape: Shape) -> str | None:
        found = getattr(stored, 'shape', type(stored).__name__)
        if found != shape:
            return f'has {found}'
        if not self._is_own(stored.dtype):
            return f'is stored as {stored.dtype}, not in the format storage.{self.name}'
        return None

    def _is_own(self, dtype: np.dtype) -> bool:
        return dtype == self.dtype

    def init(self, param: Any, fill: Any, dtype: DTypeLike) -> jax.Array:
        del dtype
        is_number = isinstance(fill, int | float)
        code = _encoded(self, fill) if is_number else self.encode(jnp.asarray(fill))
        return full_like(param, code, self.dtype)

    def nbytes(self, shape: Shape) -> int:
        return math.prod(shape) * self.dtype.itemsize


@functools.lru_cache(maxsize=256)
def _encoded(kept: _Elementwise, fill: float) -> np.ndarray:
    """One number in its stored form. Zero stays zero in every format, without compilation."""
    if fill == 0:
        return np.zeros((), kept.dtype)
    with jax.ensure_compile_time_eval():
        return np.asarray(jax.jit(kept.encode)(fill))


@dataclasses.dataclass(frozen=True)
class float32(_Elementwise):
    """No compression: float32, or float64 or complex if the parameters are.

    Example:
      >>> from rmsprop_jax import storage
      >>> storage.float32().nbytes((1000, 1000))
      4000000
    """

    dtype = np.dtype(np.float32)

    def init(self, param: Any, fill: Any, dtype: DTypeLike) -> jax.Array:
        return full_like(param, fill, dtype)

    def encode(self, x: jax.Array, bits: Any = None, unit: Any = None) -> jax.Array:
        del bits, unit
        return x

    def _decode(self, stored: jax.Array, unit: Any = None) -> jax.Array:
        del unit
        return stored

    def _is_own(self, dtype: np.dtype) -> bool:
        return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32


@dataclasses.dataclass(frozen=True)
class _Rounded(_Elementwise):
    """An elementwise format that rounds stochastically."""

    rounds = True

    seed: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f'seed must be a Python integer, got {self.seed!r}.')

    @property
    def arithmetic(self) -> Arithmetic:
        # A TPU's compiler would split so long a step if it started from the new mean.
        return Arithmetic(self.largest, from_old_mean=True, keep=_kept_apart)

    def encode(self, x: jax.Array, bits: Any = None, unit: Any = None) -> jax.Array:
        leaf_dtype('x', x)
        multiple = jnp.asarray(x, jnp.float32) * (1.0 if unit is None else 1 / unit)
        return self.rounded(multiple, HALF if bits is None else bits)

    def _decode(self, stored: jax.Array, unit: Any = None) -> jax.Array:
        return self.widened(stored) * (1.0 if unit is None else unit)

    @abc.abstractmethod
    def rounded(self, x: jax.Array, bits: Any) -> jax.Array:
        """The stored form of float32 numbers."""

    @abc.abstractmethod
    def widened(self, stored: jax.Array) -> jax.Array:
        """The float32 numbers of a stored form."""

    def key(self, label: str) -> np.uint32:
        return leaf_key(self.seed, label)

    def description(self) -> dict[str, Any]:
        return {'format': self.name, **dataclasses.asdict(self), 'version': 1}


@dataclasses.dataclass(frozen=True)
class bfloat16(_Rounded):
    """Two bytes per entry, for every statistic: bfloat16, rounded stochastically.

    Positive magnitudes below 2^-118 are stored as 2^-118, and finite ones above bfloat16's largest
    number as that number. Zero, infinity and NaN do not change. The relative error of one rounding
    is below 2^-7, and zero on average.

    Derivatives pass through the rounding unchanged.

    Attributes:
      seed: The seed of the rounding. The random bits depend on the seed, the step, the name of the
        statistic, the path of the leaf and the index of the entry. They do not depend on devices,
        meshes or other leaves.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import storage
      >>> tx = rmsprop_jax.rmsprop(1e-3, momentum=0.9, storage=storage.bfloat16())
      >>> state = tx.init({'kernel': jnp.zeros((64, 64)), 'bias': jnp.zeros(64)})
      >>> state[0].nu['kernel'].dtype, state[2].trace['kernel'].dtype, state[0].nu['bias'].dtype
      (dtype(bfloat16), dtype(bfloat16), dtype('float32'))
    """

    dtype = np.dtype(jnp.bfloat16)
    smallest = 2.0**-118
    largest = float(jnp.finfo(jnp.bfloat16).max)

    def refusal(
        self, statistic: str, shape: Shape, is_complex: bool, spec: PartitionSpec | None = None
    ) -> str | None:
        if is_complex and statistic in ('mu', 'trace'):
            return f'storage.bfloat16 cannot hold {statistic}: it is complex. Keep it in float32.'
        return super().refusal(statistic, shape, is_complex, spec)

    def rounded(self, x: jax.Array, bits: Any) -> jax.Array:
        return _to_bfloat16(x, bits)

    def widened(self, stored: jax.Array) -> jax.Array:
        return stored.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class uint8(_Rounded):
    """One byte per entry, for `nu` and `var`: an unsigned float, rounded stochastically.

    ::

        value = scale 2^(e - 80)                for byte 1 + e             below 41
        value = scale (1 + m / 4) 2^(e - 40)    for byte 41 + 4 e + m      below 201
        value = scale 2^e                       for byte 201 + e

    Byte 0 is exactly 0, and no positive number is stored as 0. The window holds the squares of
    gradients from 1e-12 to 1e8. It has four numbers per octave of the squares for usual gradients,
    from 1e-6 to 1, and one per octave outside. Positive numbers beyond the window are stored as its
    ends; infinity and NaN are stored as its upper end. `storage.saturation` counts entries at the
    ends.

    The average is right, but its root is slightly too small on average, as roots of noisy numbers
    are: expect steps to be 2 to 3 % longer.

    A byte has no derivative: differentiating through a step raises an error.

    Attributes:
      scale: A power of two, in the squared unit of the gradient, that moves the window. If the
        square of a typical gradient, times about 2^20, is far from one, choose a `scale` near that.
        A loss summed over many entries has larger gradients than one averaged over them.
      seed: The seed of the rounding, as for `bfloat16`.

    Example:
      >>> from rmsprop_jax import storage
      >>> bytes = storage.uint8()
      >>> print(bytes.encode(1e-9), bytes.decode(bytes.encode(1e-9)), bytes.encode(0.0))
      81 9.313226e-10 0
    """

    scale: float = 1.0

    dtype = np.dtype(np.uint8)
    holds = MAGNITUDES
    _why_not = (
        'it has no sign. Give storage.per_statistic(nu=storage.uint8(), '
        'var=storage.uint8()), and bfloat16 or float32 for the others.'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.scale, jax.Array):
            raise TypeError('scale must be a Python number: it decides how bytes are read.')
        object.__setattr__(self, 'scale', constant('scale', self.scale))
        fraction, exponent = math.frexp(self.scale)
        # At the smallest scale, the smallest byte is the smallest normal number.
        if fraction != 0.5 or not -46 < exponent <= 61:
            raise ValueError(f'scale must be a power of two in [2^-46, 2^60], got {self.scale}.')
        object.__setattr__(self, 'smallest', self.scale * 2.0**-80)
        object.__setattr__(self, 'largest', self.scale * 2.0**54)

    def rounded(self, x: jax.Array, bits: Any) -> jax.Array:
        return _to_uint8(x, bits, self)

    def widened(self, stored: jax.Array) -> jax.Array:
        code = stored.astype(jnp.uint32)
        fine, coarse = (code + _FINE) << 21, (code + jnp.where(code < 41, _LOW, _HIGH)) << 23
        leading = jnp.where((code >= 41) & (code < 201), fine, coarse)
        value = lax.bitcast_convert_type(leading, jnp.float32) * self.scale
        return jnp.where(code == 0, 0.0, value)


# Offsets between a float32's high bits and the byte, for each range.
_LOW, _FINE, _HIGH = (np.uint32(x % 2**32) for x in (46, 307, -74))


class Factors(NamedTuple):
    """The stored form of `factored`: `row` is the mean over the last axis, `col` the mean over the
    axis before."""

    row: Any
    col: Any


class FactorsOfPairs(NamedTuple):
    """Factors for complex numbers as pairs of reals; the last axis of both factors is the pair."""

    row: Any
    col: Any


Means = Factors | FactorsOfPairs


def possible_kinds(means: Any) -> list[type[Means]]:
    """The kinds of factors that a row and a column can be by their shapes: none, one or both."""
    row, col = (getattr(x, 'shape', ()) for x in means)
    plain = len(row) > 0 and len(col) > 0 and row[:-1] == col[:-1]
    pairs = len(row) > 1 and row[-1:] == col[-1:] == (2,) and row[:-2] == col[:-2]
    return [Factors] * plain + [FactorsOfPairs] * pairs


def as_factors(stored: Any, kind: type[Means] | None = None) -> Any:
    """`stored`, with factors that Flax NNX has turned into a mapping turned back.

    Without a `kind`, their shapes tell it. If they fit both kinds, they become `Factors`.

    Up to release 0.1, the factors of pairs were plain factors, means over the last two axes.
    Restored into a state of today, they arrive as `FactorsOfPairs`.
    """
    if is_mapping_of_factors(stored):
        means = Factors(**stored)
        stored = (kind or next(iter(possible_kinds(means)), Factors))(*means)
    if isinstance(stored, FactorsOfPairs) and FactorsOfPairs not in possible_kinds(stored):
        return Factors(*stored)
    return stored


def is_mapping_of_factors(stored: Any) -> bool:
    """Whether `stored` has the form in which Flax NNX keeps factors."""
    return isinstance(stored, Mapping) and set(stored) == set(Factors._fields)


def stored_shape(stored: Any) -> Shape | None:
    """The shape of the statistic that `stored` holds, or None if it is not an array."""
    stored = as_factors(stored)
    if not isinstance(stored, Means):
        return getattr(stored, 'shape', None)
    row, col = stored.row.shape, stored.col.shape
    return (*row[:-1], *col[-2:]) if isinstance(stored, FactorsOfPairs) else row + col[-1:]


def held_as(new: Any, old: Any) -> Any:
    """`new`, as a mapping if it is factors and `old` is a mapping."""
    if isinstance(new, Means) and isinstance(old, Mapping):
        return type(old)(new._asdict())  # pyright: ignore[reportCallIssue]
    return new


@dataclasses.dataclass(frozen=True)
class factored(Format):
    """Means of `nu` over its last two axes, in place of `nu`; earlier axes are a batch.

    ::

        nu = row col / mean(row)                                       decoded
        row, col = mean(nu, axis=-1), mean(nu, axis=-2)                encoded

    This is Adafactor's estimate with one difference: a step divides by the root of `decay nu +
    (1 - decay) g^2` with the entry's own gradient, which bounds the step by `1 / sqrt(1 - decay)`.

    For `nu` only. A variance can be a small difference of two large numbers, which means lose; the
    mean and the trace have signs.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import storage
      >>> means = storage.factored().encode(jnp.array([[1.0, 3.0], [2.0, 6.0]]))
      >>> print(means.row, means.col)
      [2. 4.] [1.5 4.5]
      >>> print(storage.factored().decode(means))
      [[1. 3.]
       [2. 6.]]

    Source: Shazeer and Stern, Adafactor, arXiv:1804.04235, section 3.
    """

    holds = ('nu',)
    _why_not = (
        'means over rows and columns keep neither a sign nor a small difference. Give '
        'storage.per_statistic(nu=storage.factored()), and bfloat16 or float32 for the others.'
    )
    _kind: ClassVar[type[Means]] = Factors
    # `row` is a mean over this axis, `col` a mean over the axis before.
    _columns: ClassVar[int] = -1

    def refusal(
        self, statistic: str, shape: Shape, is_complex: bool, spec: PartitionSpec | None = None
    ) -> str | None:
        if len(shape) < 2 and statistic in self.holds:
            return f'storage.factored needs two axes, not an array of shape {shape}.'
        if any(manual_axes(spec, axis) for axis in (len(shape) - 2, len(shape) - 1)):
            return (
                f'storage.factored takes means over axes that {spec} splits under jax.shard_map. '
                'Update it outside of shard_map, where the compiler takes means over all devices.'
            )
        return super().refusal(statistic, shape, is_complex, spec)

    def of_pairs(self) -> Format:
        return _FactoredPairs()

    def init(self, param: Any, fill: Any, dtype: DTypeLike) -> Means:
        dtype = real_dtype(dtype)
        return self._kind(
            row=full_like(param, fill, dtype, without=self._columns),
            col=full_like(param, fill, dtype, without=self._columns - 1),
        )

    def encode(self, x: jax.Array, bits: Any = None, unit: Any = None) -> Means:
        del bits, unit
        columns = self._columns
        return self._kind(row=jnp.mean(x, axis=columns), col=jnp.mean(x, axis=columns - 1))

    def _decode(self, stored: Any, unit: Any = None) -> jax.Array:
        del unit
        stored, columns = as_factors(stored), self._columns
        total = jnp.mean(stored.row, axis=columns, keepdims=True)
        vanishes = total < float(jnp.finfo(total.dtype).tiny)
        share = jnp.where(vanishes, 0, stored.row / jnp.where(vanishes, 1, total))
        return jnp.expand_dims(share, columns) * jnp.expand_dims(stored.col, columns - 1)

    def fault(self, stored: Any, shape: Shape) -> str | None:
        stored, columns = as_factors(stored, self._kind), self._columns
        if type(stored) is not self._kind:
            return 'is not stored in the format storage.factored'
        wanted = tuple(shape[:i] + shape[len(shape) + i + 1 :] for i in (columns, columns - 1))
        if (jnp.shape(stored.row), jnp.shape(stored.col)) != wanted:
            return f'has factors of shapes {jnp.shape(stored.row)} and {jnp.shape(stored.col)}'
        return None

    def spec(self, spec: PartitionSpec, ndim: int) -> Factors:
        return Factors(row=without_axis(spec, -1, ndim), col=without_axis(spec, -2, ndim))

    def nbytes(self, shape: Shape) -> int:
        return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])

    def description(self) -> dict[str, Any]:
        return {'format': self.name, 'version': 1}


@dataclasses.dataclass(frozen=True)
class _FactoredPairs(factored):
    """`factored` for pairs of reals: real and imaginary parts have separate means."""

    _kind = FactorsOfPairs
    _columns = -2

    @property
    def name(self) -> str:
        return 'factored'

    def description(self) -> dict[str, Any]:
        return {**super().description(), 'of': 'pairs'}


def _kept_apart(root: jax.Array) -> jax.Array:
    """`kept_apart`, except on TPUs, whose compiler would split a long step there."""
    return lax.platform_dependent(root, tpu=lambda root: root, default=kept_apart)


# Each encoder has two forms that give the same numbers. One uses float arithmetic, since a bitcast
# of floats to integers, or a select between narrow arrays, makes a TPU run the update as two
# kernels. The other works on bits, since a CPU is slow at the first form and has no narrow
# arithmetic. The noise has so few bits that all sums inside `floor` are exact.


@jax.custom_jvp
def _to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    ends = bfloat16()

    def on_bits(x: jax.Array, bits: jax.Array) -> jax.Array:
        whole = lax.bitcast_convert_type(x, jnp.uint32)
        sign = whole & np.uint32(2**31)
        magnitude = whole ^ sign
        low, high = (np.float32(end).view(np.uint32) for end in (ends.smallest, ends.largest))
        rounded = jnp.clip(magnitude, low, high) + (bits >> 16)
        plain = (magnitude != 0) & (magnitude < np.float32(np.inf).view(np.uint32))
        kept = jnp.where(plain, rounded, magnitude) | sign
        return lax.bitcast_convert_type((kept >> 16).astype(jnp.uint16), jnp.bfloat16)

    def in_floats(x: jax.Array, bits: jax.Array) -> jax.Array:
        magnitude = jnp.abs(x)
        clipped = jnp.clip(magnitude, ends.smallest, ends.largest)
        # Halved, so that the rounding to a power of two cannot overflow.
        power = power_below(clipped * 0.5)
        whole = jnp.floor(clipped / power * 64 + (bits >> 16).astype(jnp.float32) * 2.0**-16)
        plain = (magnitude != 0) & (magnitude < jnp.inf)
        return jnp.where(plain, jnp.copysign(whole * (power * 2.0**-6), x), x).astype(jnp.bfloat16)

    return lax.platform_dependent(x, bits, cpu=on_bits, default=in_floats)


@_to_bfloat16.defjvp
def _through_bfloat16(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _to_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def _encode_uint8(x: jax.Array, bits: jax.Array, window: uint8) -> jax.Array:
    low, high = window.smallest / window.scale, window.largest / window.scale
    # Written so that NaN becomes the upper end.
    inside = jnp.where(x < window.largest, jnp.maximum(x * (1 / window.scale), low), high)
    below, above = inside < 2.0**-40, inside >= 1
    noise = bits >> 11

    def on_bits(inside: jax.Array, noise: jax.Array) -> jax.Array:
        whole = lax.bitcast_convert_type(inside, jnp.uint32)
        coarse = ((whole + (noise << 2)) >> 23) - jnp.where(below, _LOW, _HIGH)
        code = jnp.where(below | above, coarse, ((whole + noise) >> 21) - _FINE)
        return jnp.where(x == 0, 0, code).astype(jnp.uint8)

    def in_floats(inside: jax.Array, noise: jax.Array) -> jax.Array:
        power = power_below(inside)
        parts = jnp.where(below | above, 1.0, 4.0)
        whole = jnp.floor(inside / power * parts + noise.astype(jnp.float32) * 2.0**-21)
        # A power of two has an integer logarithm, whatever the accuracy of the function.
        exponent = jnp.round(jnp.log2(power))
        # The leading bit of `whole` counts as `parts`.
        first = jnp.where(below, 80.0, jnp.where(above, 200.0, 197.0))
        return jnp.where(x == 0, 0.0, parts * exponent + whole + first).astype(jnp.uint8)

    return lax.platform_dependent(inside, noise, cpu=on_bits, default=in_floats)


_to_uint8 = jax.custom_jvp(_encode_uint8, nondiff_argnums=(2,))


def _refuse_derivative(window: uint8, primals: Any, tangents: Any) -> Any:
    # JAX does not ask for the derivative of what does not depend on the variable.
    raise TypeError(
        'storage.uint8 cannot be differentiated through: a byte has no derivative. Use '
        'storage.float32() or storage.bfloat16() to differentiate through training.'
    )


_to_uint8.defjvp(_refuse_derivative)
