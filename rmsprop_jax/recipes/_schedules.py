"""The learning rates of the recipes, as Optax schedules of the 0-based step count."""

import fractions
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax._checks import checked_steps
from rmsprop_jax._types import Hyperparameter
from rmsprop_jax.recipes._records import Recipe, Staircase


def positive(name: str, value: Any) -> float:
    """`value` as a float. It shapes a schedule, so it cannot be an array."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f'{name} must be a Python number, got {value!r}.')
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f'{name} must be positive and finite, got {value!r}.')
    return float(value)


def or_else(given: Any, published: Callable[[Any], Any]) -> Any:
    """The caller's learning rate if there is one, else the published schedule."""
    return published if given is None else checked_rate(given)


def checked_rate(given: Any) -> Any:
    """The caller's learning rate, checked under its name in the recipes."""
    rate = Hyperparameter('learning_rate', given)
    return rate.at if callable(given) else rate.value


def staircase_of(recipe: Recipe) -> Staircase:
    """The staircase of a recipe that has one."""
    assert isinstance(recipe.schedule, Staircase)
    return recipe.schedule


def scaled_rate(recipe: Recipe, batch_size: Any) -> float:
    """The learning rate of a recipe, in proportion to the batch size."""
    assert recipe.per_batch is not None
    return recipe.learning_rate * positive('batch_size', batch_size) / recipe.per_batch


def staircase(peak: float, stairs: Staircase, steps_per_epoch: Any) -> Callable[[Any], Any]:
    """A rate that falls by a factor every so many steps from step 0, also during its warm-up."""
    epoch = positive('steps_per_epoch', steps_per_epoch)
    between = stairs.epochs * epoch
    between = int(between) if stairs.truncated else between
    if between < 1:
        raise ValueError(
            f'steps_per_epoch must be at least {1 / stairs.epochs:.2g}, got {steps_per_epoch}: the '
            'learning rate would fall at every step.'
        )
    floor = peak * stairs.floor if stairs.floor else None
    decay = optax.exponential_decay(peak, between, stairs.factor, staircase=True, end_value=floor)  # pyright: ignore[reportArgumentType]
    warm = int((stairs.warm_up or 0) * epoch)

    def schedule(count: Any) -> Any:
        taken = _real(count)
        # optax.linear_schedule subtracts from one, which costs the first steps of a long warm-up
        # half of their digits; optax.join_schedules would count the decay from the warm-up's end.
        return jnp.where(count < warm, peak * (taken / max(warm, 1)), decay(taken))

    return schedule


def staircase_by_epoch(
    peak: float, stairs: Staircase, steps_per_epoch: Any, warmup_epochs: Any
) -> Callable[[Any], Any]:
    """Like `staircase`, but the rate changes only between epochs."""
    epoch = checked_steps('steps_per_epoch', steps_per_epoch, least=1)
    warm = checked_steps('warmup_epochs', warmup_epochs, least=0)
    # The number of drops is epochs / 2.4, rounded down. As an integer division, epochs * 5 // 12,
    # this is exact. In floating point, the compiler decides whether 36 / 2.4 comes out below 15,
    # which delays the drop by an epoch.
    between = fractions.Fraction(stairs.epochs).limit_denominator(1000)
    decay = optax.exponential_decay(peak, 1, stairs.factor)
    start = stairs.warm_up_from

    def schedule(count: Any) -> Any:
        passed = count // epoch
        rate = decay(_real(passed * between.denominator // between.numerator))
        if not warm:
            return rate
        return jnp.where(passed < warm, start + _real(passed) * ((peak - start) / warm), rate)

    return schedule


def linear_to_zero(
    peak: float, total: tuple[str, Any], per_update: tuple[str, Any], last_of_share: bool = False
) -> Callable[[Any], Any]:
    """A rate that falls linearly to zero while each update uses up `per_update` of `total`.

    Args:
      peak: The first rate.
      total: Name and value of the argument for the total, such as the frames of a training.
      per_update: The same for an update's share of the total.
      last_of_share: Whether an update takes the rate at the last unit of its share, not at the
        first.
    """
    share, all_of_it = positive(*per_update), positive(*total)
    if all_of_it < share:
        raise ValueError(
            f'{total[0]} must be at least {per_update[0]}, got {all_of_it:g} and {share:g}.'
        )
    # Steps, not frames, are counted: frames do not fit into an int32.
    line = optax.linear_schedule(peak, 0.0, all_of_it / share)  # pyright: ignore[reportArgumentType]
    lead = (share - 1.0) / share if last_of_share else 0.0
    return lambda count: line(_real(count) + lead)


def _real(count: Any) -> Any:
    """A step count in JAX's default float: Optax would divide it in float32 even with x64."""
    return jnp.asarray(count, float)
