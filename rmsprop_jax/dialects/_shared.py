"""Argument checks and chain steps that several dialects share."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

from jax.typing import ArrayLike

from rmsprop_jax._core.edge import public
from rmsprop_jax._momentum import trace_step
from rmsprop_jax._optimizer import add_decayed_weights
from rmsprop_jax._transforms import clip_each_norm, clip_global_norm, clip_value
from rmsprop_jax._types import (
    Hyperparameter,
    Optimizer,
    ScalarOrSchedule,
    Step,
    decay_rate,
    is_none_or_zero,
)
from rmsprop_jax.storage._choice import Storage

P = ParamSpec('P')

# Advice about arguments that many frameworks have.
XLA = 'it chooses how the framework runs the update, which XLA decides under jax.jit: leave it out'
NAME = 'it names operations in a graph: leave it out'

# Hyperparameters that `rmsprop` has under other names.
_NUMBERS = {
    **dict.fromkeys(('alpha', 'rho', 'gamma1', 'gamma2'), decay_rate),
    # PyTorch and its followers refuse a negative rate.
    **dict.fromkeys(('lr', 'epsilon', 'wd'), Hyperparameter),
}


def checked(function: Callable[P, Optimizer], refused: Mapping[str, str]) -> Callable[P, Optimizer]:
    """Checks numbers under the framework's names for them, and explains unsupported arguments."""
    positions = list(inspect.signature(function).parameters)
    # Users import the function from the package.
    function.__module__ = 'rmsprop_jax.dialects'

    def number(name: str, value: Any) -> Any:
        if name not in _NUMBERS or value is None:
            return value
        number = _NUMBERS[name](name, value)
        return number.at if callable(value) else number.value

    @public
    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Optimizer:
        for name in kwargs.keys() & refused.keys():
            raise TypeError(f'{function.__name__} has no argument {name!r}: {refused[name]}.')
        # Surplus positional arguments are passed on: the function itself refuses them.
        head = map(number, positions, args)
        named = {name: number(name, value) for name, value in kwargs.items()}
        return function(*head, *args[len(positions) :], **named)  # pyright: ignore[reportCallIssue]

    return wrapped


def momentum_step(
    momentum: ScalarOrSchedule, storage: Storage | None, of_pairs: bool = False
) -> Step | None:
    if is_none_or_zero(momentum):
        return None
    decay = decay_rate('momentum', momentum).value
    return trace_step(decay, storage=storage, of_pairs=of_pairs)


def coupled_decay(
    weight_decay: ScalarOrSchedule, mask: Any, name: str = 'weight_decay'
) -> Step | None:
    if is_none_or_zero(weight_decay):
        return None
    return add_decayed_weights(weight_decay, mask, name)


def clipping_unless_zero(**limits: ArrayLike | None) -> Step | None:
    """`clipping`, for frameworks in which a limit of zero means no clipping."""
    kind = clipping(**limits)
    return None if all(is_none_or_zero(value) for value in limits.values()) else kind


def clipping(**limits: ArrayLike | None) -> Step | None:
    """The clipping step for the one limit that is given, if any."""
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f'give at most one of {", ".join(limits)}; got {", ".join(given)}.')
    clip = {'clipnorm': clip_each_norm, 'global_clipnorm': clip_global_norm}
    steps = [clip.get(name, clip_value)(name, value) for name, value in given.items()]
    return steps[0] if steps else None
