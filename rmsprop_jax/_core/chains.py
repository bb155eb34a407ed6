"""Chains of our transformations, whose members trust that gradients have been checked."""

from typing import Any

import optax

from rmsprop_jax._checks import checked_state
from rmsprop_jax._core.edge import member
from rmsprop_jax._core.leaves import cast_like, widen
from rmsprop_jax._types import Optimizer


def chain(*steps: optax.GradientTransformation | None) -> Optimizer:
    """`optax.chain` of the steps that are not None, with a check of the state's length."""
    inner = optax.chain(*[member(step) for step in steps if step is not None])
    length = sum(step is not None for step in steps)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if len(checked_state(state, tuple)) != length:
            raise TypeError(
                f'state must be the tuple of {length} that init returned, got a '
                f'{type(state).__name__} of {len(state)}.'
            )
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def in_accumulator_precision(
    inner: optax.GradientTransformation, with_params: bool = False
) -> Optimizer:
    """Runs `inner` in float32 or wider and rounds once, at its end, to the gradients' dtype.

    Our steps widen the parameters that they read. `with_params` widens them for other steps.
    """
    inner_ = member(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        wide_params = widen(params) if with_params else params
        wide, state = inner_.update(widen(updates), state, wide_params, **extra_args)
        return cast_like(wide, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def precise_chain(*steps: optax.GradientTransformation | None) -> Optimizer:
    """`chain`, run `in_accumulator_precision`."""
    return in_accumulator_precision(chain(*steps))


def for_state(inner: optax.GradientTransformation, kind: type) -> Optimizer:
    """`inner` with a check that the state is a `kind`."""
    inner_ = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return inner_.update(updates, checked_state(state, kind), params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)
