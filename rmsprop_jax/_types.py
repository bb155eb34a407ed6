"""Aliases and the small frozen records that the rest of the package passes around."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path
from jax.typing import ArrayLike, DTypeLike

Scalar = float | jax.Array
KeyPath = tuple[Any, ...]


Schedule = Callable[[ArrayLike], ArrayLike]


Optimizer = optax.GradientTransformationExtraArgs
Step = optax.GradientTransformation
ScalarOrSchedule = ArrayLike | Schedule


_SMALLEST_NORMAL = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Number:
    """A number that is passed to a compiled step; a Python number would be a constant in it.

    Attributes:
      value: The number, of shape ().
      complement: One minus the number, formed in double precision if a Python number is known.
      is_normal: Whether the number is known to be positive and not a subnormal float32.
    """

    value: jax.Array
    complement: jax.Array
    is_normal: bool = False

    @classmethod
    def injected(cls, value: jax.Array, given: float) -> 'Number':
        """A number in the state of `inject_hyperparams` that was given as a Python number.

        Until it is changed in the state, its complement is the Python number's complement.
        """
        unchanged = value == jnp.asarray(given, value.dtype)
        exact = jnp.asarray(1 - given, value.dtype)
        return cls(value, jnp.where(unchanged, exact, 1 - value))


def is_normal(value: Any) -> bool:
    """Whether a number is known to be positive and not a subnormal float32."""
    if isinstance(value, Number):
        return value.is_normal
    return isinstance(value, float) and value >= _SMALLEST_NORMAL


def is_none_or_zero(value: Any) -> bool:
    """Whether a hyperparameter is None or a Python or NumPy zero, which both mean 'none'.

    A JAX array is never read: it may be traced, or be on another process.
    """
    if value is None:
        return True
    if callable(value) or isinstance(value, jax.Array | Number | str | bytes):
        return False
    number = np.asarray(value)
    return not number.shape and bool(number == 0)


def canonical(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A leaf's path without the `.value` of a Flax NNX variable.

    `nnx.Optimizer` gives `init` trees of variables, and `update` trees of arrays.
    """
    return path[:-1] if len(path) > 1 and path[-1] == GetAttrKey('value') else path


def path_name(path: KeyPath) -> str:
    """A leaf's canonical path as a name with slashes, such as `dense/kernel`."""
    return keystr(canonical(path), simple=True, separator='/')


def by_path(tree: Any) -> dict[tuple[Any, ...], Any]:
    """The leaves of a tree by their canonical paths."""
    return {canonical(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


class RmsState(NamedTuple):
    """State of `scale_by_rms`. Trees mirror the parameters; fields that a configuration does not
    need are None.

    Statistics are arrays of the parameters' shapes in float32 or wider, unless they are stored in
    another format of `rmsprop_jax.storage`. `storage.read` decodes them.

    Attributes:
      count: Steps taken so far, int32 of shape (). It stays at its largest value instead of
        wrapping around.
      nu: The raw second moment, real, in the squared unit of the gradient. None when centered.
      mu: The mean gradient, in the unit of the gradient. None unless centered.
      var: The variance times `weight`, real, in the squared unit of the gradient. None unless
        centered.
      weight: The sum of the weights of all gradients in the averages, of shape (). Bias correction
        divides the averages by it. None unless bias-corrected.
      unit: Stored entries of `nu` or `var` are multiples of this unit if their format rounds. Of
        shape (), in [1, 2). None if no format rounds.
    """

    count: ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    nu: Any
    mu: Any
    var: Any
    weight: jax.Array | None
    unit: jax.Array | None = None


class TraceState(NamedTuple):
    """State of `trace`.

    Attributes:
      count: Steps taken so far, int32 of shape (). It stays at its largest value instead of
        wrapping around.
      trace: The decaying sum of updates, a tree like the parameters, in float32 or wider.
    """

    count: ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    trace: Any


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """A number that an optimizer reads at every step, validated without ever reading an array.

    Attributes:
      name: The argument's name, for error messages.
      value: A Python or NumPy scalar, a JAX scalar (possibly traced), a `Number`, or a schedule,
        which maps the 0-based step count to one of these.
      lower: The smallest value allowed.
      upper: The largest value allowed.
      exact: Whether dtypes narrower than float32 are refused: bfloat16 turns a decay of 0.999 into
        1.
    """

    name: str
    value: Any
    lower: float = 0.0
    upper: float = math.inf
    exact: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.value, Number):
            self._checked(self.value.value)
        elif not callable(self.value):
            object.__setattr__(self, 'value', self._checked(self.value))

    def at(self, count: ArrayLike) -> Scalar:
        """The value at step `count`: a float if it is known during tracing, else a scalar array."""
        if callable(self.value):
            return self._checked(self.value(count))
        return self.value.value if isinstance(self.value, Number) else self.value

    def with_complement_at(self, count: ArrayLike) -> tuple[Scalar, Scalar]:
        """The value at step `count`, and one minus the value.

        The complement of a Python number is formed in double precision. A float32 decay of 0.999
        has a rounding error of up to 3e-8, so `1 - decay` is right only to 3e-5.
        """
        value = self.at(count)
        return value, self.value.complement if isinstance(self.value, Number) else 1 - value

    def _checked(self, value: Any) -> Scalar:
        if isinstance(value, jax.Array):
            self._check_dtype(value.dtype)
            if value.shape:
                raise ValueError(
                    f'{self.name} must be a scalar, got an array of shape {value.shape}.'
                )
            return value
        number = np.asarray(value)
        if number.shape or number.dtype == bool or number.dtype.kind not in 'fiuV':
            raise TypeError(f'{self.name} must be a real scalar, got {value!r}.')
        if hasattr(value, 'dtype'):
            self._check_dtype(number.dtype)
        self._check_range(float(number))
        return float(number)

    def _check_dtype(self, dtype: DTypeLike) -> None:
        if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(f'{self.name} must be real, got an array of dtype {np.dtype(dtype)}.')
        if self.exact and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            raise TypeError(
                f'{self.name} has dtype {np.dtype(dtype)}, which cannot hold values such as 0.999. '
                'Pass a float or a float32 array; under inject_hyperparams(...) add '
                'hyperparam_dtype=jnp.float32.'
            )

    def _check_range(self, number: float) -> None:
        if not math.isfinite(number):
            raise ValueError(f'{self.name} must be finite, got {number}.')
        if not self.lower <= number <= self.upper:
            allowed = f'[{self.lower:g}, {self.upper:g}' + (')' if self.upper == math.inf else ']')
            raise ValueError(f'{self.name} must be in {allowed}, got {number}.')


def decay_rate(name: str, value: Any) -> Hyperparameter:
    """A hyperparameter in [0, 1] that must be held in float32 or wider."""
    return Hyperparameter(name, value, upper=1.0, exact=True)


def constant(name: str, value: Any, lower: float = 0.0) -> Scalar:
    """A number that may not be a schedule, with the checks of a hyperparameter."""
    if callable(value):
        raise TypeError(f'{name} cannot be a schedule.')
    return Hyperparameter(name, value, lower).at(0)


def cast(value: Scalar, dtype: DTypeLike) -> Scalar:
    """Gives an array the dtype of the arithmetic; a Python number adapts by itself."""
    return lax.convert_element_type(value, dtype) if isinstance(value, jax.Array) else value


def rounded(value: Scalar, dtype: DTypeLike) -> Any:
    """A scalar in the dtype of the arithmetic, also for a Python number.

    Products of such scalars are the same whether a program gets numbers or arrays.
    """
    if isinstance(value, jax.Array):
        return cast(value, dtype)
    with np.errstate(over='ignore'):
        return np.dtype(dtype).type(value)


def wide_dtype(dtype: DTypeLike) -> np.dtype:
    """The accumulation dtype of arrays of `dtype`: at least float32, or complex64."""
    return np.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else np.dtype(dtype)


def real_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of the magnitude of an array of `dtype`."""
    return np.dtype(jnp.finfo(dtype).dtype)
