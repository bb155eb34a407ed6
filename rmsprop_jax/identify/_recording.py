"""Reads and checks recorded runs, and lays them out as plain float64 arrays."""

import dataclasses
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from rmsprop_jax._checks import leaves_with_path

_COARSE_FIRST = ('bfloat16', 'float16', 'float32', 'float64')
_MOST_ELEMENTS, _MOST_NUMBERS = 128, 4096


@dataclasses.dataclass(frozen=True)
class Trace:
    """A recorded run, from the very first step of its optimizer.

    Attributes:
      params: A tree of arrays of shape (steps + 1, ...): the parameters before the first step and
        after each step.
      gradients: A tree of the same structure, with arrays of shape (steps, ...): the gradients
        that the optimizer got.
      learning_rate: An array of shape (steps,), or one number.
      decay: The weight of the past in the running averages, if known.
      eps: Epsilon, if known.
      momentum: The momentum, if known; zero means none.
      weight_decay: The weight decay, if known.
    """

    params: Any
    gradients: Any
    learning_rate: Any = None
    decay: float | None = None
    eps: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None


@dataclasses.dataclass(frozen=True)
class Steps:
    """A run as float64 arrays of shape (steps, elements), from all leaves together.

    Attributes:
      before: The parameters before each step.
      after: The parameters after each step.
      gradients: The gradients that the optimizer got.
      learning_rate: The learning rate of each step, of shape (steps,).
      rounding: The unit roundoff of each element's parameter, of shape (elements,).
    """

    before: np.ndarray
    after: np.ndarray
    gradients: np.ndarray
    learning_rate: np.ndarray
    rounding: np.ndarray

    def reduced(self) -> 'Steps':
        """At most a few hundred elements, evenly spread over the sizes of their gradients.

        Elements do not influence each other, so a part of them shows the rule as well as all do.
        """
        size = np.abs(self.gradients).max(axis=0)
        order = np.argsort(size, kind='stable')
        order = order[size[order] > 0] if np.any(size > 0) else order
        most = max(16, min(_MOST_ELEMENTS, _MOST_NUMBERS // len(self.gradients)))
        spread = np.linspace(0, len(order) - 1, min(most, len(order)))
        chosen = order[np.round(spread).astype(int)]
        return Steps(
            self.before[:, chosen],
            self.after[:, chosen],
            self.gradients[:, chosen],
            self.learning_rate,
            self.rounding[chosen],
        )


def read_trace(source: Trace | Mapping[str, Any] | str | Path) -> Trace:
    """Makes a `Trace` from any input of `identify_dialect`; it never unpickles anything."""
    if isinstance(source, Trace):
        return source
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f'trace must be a Trace, a mapping or a path, got {source!r}.')
    # Opened here, because numpy does not close the file of a broken archive.
    with open(source, 'rb') as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f'{source} is not an .npz file.')
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        # For a bad file, numpy, zipfile and the decompressors raise about ten kinds of errors,
        # among them MemoryError if a header promises too much.
        except Exception as error:
            raise ValueError(
                f'{source} is damaged, or holds more than plain arrays: {error!r}.'
            ) from None
    return _from_mapping(arrays)


def _from_mapping(arrays: Mapping[str, Any]) -> Trace:
    """Makes trees from entries `params/<name>`; trees under `params` stay as they are."""
    fields: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    names = [field.name for field in dataclasses.fields(Trace)]
    for key, value in arrays.items():
        name, slash, leaf = str(key).partition('/')
        if name not in names or (slash and name not in ('params', 'gradients')):
            raise ValueError(f'a trace has no entry {key!r}; it has {", ".join(names)}.')
        if slash:
            parts.setdefault(name, {})[leaf] = value
        else:
            fields[name] = value
    for name in fields.keys() & parts.keys():
        raise ValueError(f'the trace has {name} twice, as one tree and as {name}/<name> entries.')
    fields |= parts
    for name in ('params', 'gradients'):
        if name not in fields:
            raise ValueError(f'the trace has no {name}.')
    return Trace(**fields)


def lay_out(trace: Trace, learning_rate: Any) -> tuple[Steps, str]:
    """Checks a trace, and returns its arrays and the dtype to which its parameters are rounded."""
    params, gradients = _leaves('params', trace.params), _leaves('gradients', trace.gradients)
    if params.keys() != gradients.keys():
        odd = ', '.join(sorted(params.keys() ^ gradients.keys()))
        raise ValueError(f'params and gradients must have the same leaves; {odd} is in one only.')
    if not any(x.size for x in gradients.values()):
        raise ValueError('the trace has no steps or no elements.')
    count = len(next(iter(gradients.values())))
    for name, g in gradients.items():
        p = params[name]
        if len(g) != count or p.shape != (count + 1, *g.shape[1:]):
            raise ValueError(
                f'gradients{name} has shape {g.shape} and params{name} {p.shape}; with {count} '
                f'steps they must be ({count}, ...) and ({count + 1}, ...).'
            )
    dtypes = [_precision(p) for p in params.values()]
    flat = [_as_rows(p) for p in params.values()]
    p = np.concatenate(flat, axis=1)
    g = np.concatenate([_as_rows(g) for g in gradients.values()], axis=1)
    units = [float(jnp.finfo(dtype).eps) / 2 for dtype in dtypes]
    rounding = np.repeat(units, [x.shape[1] for x in flat])
    steps = Steps(p[:-1], p[1:], g, _rates(learning_rate, count), rounding)
    return steps, ' and '.join(dict.fromkeys(dtypes))


def _rates(learning_rate: Any, count: int) -> np.ndarray:
    if learning_rate is None:
        raise ValueError('the trace has no learning_rate; give one.')
    try:
        rates = np.asarray(learning_rate, float)
    except (OverflowError, TypeError, ValueError):
        raise ValueError('learning_rate must be a number or one per step.') from None
    if rates.shape not in ((), (1,), (count,)):
        raise ValueError(f'learning_rate has shape {rates.shape}, but there are {count} steps.')
    if not np.all(np.isfinite(rates)):
        raise ValueError('learning_rate holds NaN or infinity.')
    return np.broadcast_to(rates, (count,))


def _leaves(name: str, tree: Any) -> dict[str, np.ndarray]:
    return {
        keystr(path): _real(f'{name}{keystr(path)}', leaf)
        for path, leaf in leaves_with_path(name, tree)
    }


def _real(name: str, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f'{name} is complex; record real and imaginary parts as two leaves.')
    if not jnp.issubdtype(array.dtype, jnp.floating) or not array.shape:
        raise ValueError(
            f'{name} must be an array of floats with one row per step, but has dtype '
            f'{array.dtype} and shape {array.shape}.'
        )
    broken = ~np.isfinite(_as_rows(array)).all(axis=1)
    if broken.any():
        row = int(np.argmax(broken))
        raise ValueError(f'{name} holds NaN or infinity at row {row}; keep only the steps before.')
    return array


def _as_rows(array: np.ndarray) -> np.ndarray:
    """The array as float64 of shape (steps, elements)."""
    return np.asarray(array, float).reshape(len(array), math.prod(array.shape[1:]))


def _precision(params: np.ndarray) -> str:
    """The coarsest dtype that holds all parameters; a float32 run may be stored as float64."""
    with np.errstate(over='ignore'):
        return next(
            dtype
            for dtype in (*_COARSE_FIRST, str(params.dtype))
            if np.array_equal(params.astype(jnp.dtype(dtype)).astype(params.dtype), params)
        )
