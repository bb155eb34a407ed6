"""Chains that check updates and states at their start, so that their members need not."""

from typing import Any

import optax

from rmsprop_jax._checks import checked_params, checked_state, checked_updates


def with_checks(
    inner: optax.GradientTransformation, kind: type, user: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """`inner` with checks: updates must be floating or complex arrays, and the state a `kind`. If
    `user` is given, it needs params, which must be like the updates."""
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
    """`inner` with a check that the state is a `kind`."""
    inner_ = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return inner_.update(updates, checked_state(state, kind), params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def chain(
    *steps: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` of the steps that are not None, with a check of the state's length."""
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
