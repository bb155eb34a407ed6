"""What a PyTorch parameter group says: whose optimizer it belongs to, its rate and its settings."""

import itertools
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import optax

from rmsprop_jax import dialects
from rmsprop_jax._types import Hyperparameter
from rmsprop_jax.interchange._mapping import Problems, as_number

Group = Mapping[str, Any]
Factory = Callable[..., optax.GradientTransformation]

_NUMBERS = frozenset({'lr', 'alpha', 'eps', 'weight_decay', 'momentum'})
_TIMM_FLAGS = frozenset({'decoupled_decay', 'corrected_weight_decay', 'lr_in_momentum', 'caution'})
_PEAK = 'max_lr_snapshot'
# PyTorch has written foreach since 1.12, and the others since later releases; Stable-Baselines3
# writes none of them. New releases of timm write foreach too.
_TORCH_MARKS = frozenset({'foreach', 'maximize', 'differentiable', 'capturable'})
_TIMM_MARKS = _TIMM_FLAGS | {_PEAK}
NAMES = {
    dialects.torch: 'torch.optim.RMSprop',
    dialects.timm: "timm's RMSpropTF",
    dialects.stable_baselines3: "Stable-Baselines3's RMSpropTFLike",
}
_FLAGS = {
    dialects.torch: frozenset({'centered', 'maximize'}),
    dialects.timm: frozenset({'centered'}) | _TIMM_FLAGS,
    dialects.stable_baselines3: frozenset({'centered'}),
}
UNTOLD = (
    'the groups do not tell whose they are: PyTorch before 1.12 and '
    f'{NAMES[dialects.stable_baselines3]}, whose second moment starts at one and whose epsilon is '
    'inside the root, write the same settings. Pass dialect=dialects.torch or '
    'dialect=dialects.stable_baselines3'
)
# What the first releases of an optimizer did not write, and what it then is.
_LATER = frozenset({'maximize', 'corrected_weight_decay', 'caution'})
# Names, how the framework runs the update, and what schedulers remember.
_CYCLED = ('base_momentum', 'max_momentum')
_IMMATERIAL = frozenset(
    {
        *('params', 'param_names', 'name', 'foreach', 'capturable', 'differentiable', _PEAK),
        *('initial_lr', 'lr_scale', 'max_lr', 'min_lr', 'swa_lr', *_CYCLED),
    }
)


def source(groups: Sequence[Group], dialect: Any, problems: Problems) -> Factory:
    """The dialect of the optimizer that wrote the groups, which the caller may have to name.

    Raises:
      TypeError: If `dialect` is not the dialect of an optimizer with such groups.
    """
    found = recognised(groups, dialect, problems)
    if found is None and groups:
        problems.add(UNTOLD)
    return found or dialects.torch


def recognised(groups: Sequence[Group], dialect: Any, problems: Problems) -> Factory | None:
    """The dialect that the keys of the groups tell or the caller names, or None.

    Raises:
      TypeError: If `dialect` is not the dialect of an optimizer with such groups.
    """
    if dialect is not None and not any(dialect is known for known in NAMES):
        raise TypeError(
            'dialect must be dialects.torch, dialects.timm or dialects.stable_baselines3, got '
            f'{dialect!r}.'
        )
    keys = frozenset(itertools.chain(*groups))
    timm, torch = keys & _TIMM_MARKS, keys & _TORCH_MARKS
    found = dialects.timm if timm else dialects.torch if torch else None
    if found is not None and dialect is not None and found is not dialect:
        marks = ', '.join(map(repr, sorted(timm or torch)))
        problems.add(
            f'dialect is that of {NAMES[dialect]}, but the groups have {marks}, which it does not '
            f'write and {NAMES[found]} does'
        )
    return found or dialect


def with_rates(groups: Sequence[Group], learning_rate: Any, problems: Problems) -> Sequence[Group]:
    """The groups with the caller's learning rates, which scheduled runs must have.

    Raises:
      TypeError: If the caller's rate is not a number, a schedule or a list of these.
    """
    if learning_rate is None:
        for i, group in enumerate(groups):
            if 'initial_lr' in group and not callable(group.get('lr')):
                problems.add(
                    f'group {i}: initial_lr tells that a scheduler changes lr, which is '
                    f'{reprlib.repr(group.get("lr"))} now: pass learning_rate, a schedule of the '
                    'step count, or a number for a rate that stays'
                )
        return groups
    if isinstance(learning_rate, list | tuple):
        rates = list(learning_rate)
        for i, rate in enumerate(rates):
            Hyperparameter(f'learning_rate[{i}]', rate)
    else:
        Hyperparameter('learning_rate', learning_rate)
        rates = [learning_rate] * len(groups)
        theirs = {_rates_of(group) for group in groups}
        if len(theirs) > 1:
            problems.add(
                'learning_rate is one for all groups, whose own differ: give a list with one for '
                'each'
            )
    if len(rates) != len(groups):
        problems.add(f'learning_rate has {len(rates)} entries for {len(groups)} groups')
        return groups
    return [{**group, 'lr': rate} for group, rate in zip(groups, rates, strict=True)]


def _rates_of(group: Group) -> tuple[str, ...]:
    """Today's and the first learning rate of a group, as something that can be compared."""
    rates = (group.get('lr'), group.get('initial_lr'))
    return tuple(repr(rate if callable(rate) else as_number(rate)) for rate in rates)


def optimizer_of(
    label: str, group: Group, factory: Factory, problems: Problems
) -> optax.GradientTransformation:
    """The transformation that a group describes."""
    flags = _FLAGS[factory]
    known = _NUMBERS | flags
    for key in sorted(group.keys() - known - _IMMATERIAL, key=str):
        problems.add(f'{label}: {key!r} is no setting of {NAMES[factory]}')
    for key in sorted(known - group.keys() - _LATER):
        problems.add(f'{label}: {key!r} is missing')
    cycled = [key for key in _CYCLED if key in group]
    if cycled and not callable(group.get('momentum')):
        problems.add(
            f'{label}: {cycled[0]} tells that a scheduler changes momentum: put a schedule of the '
            "step count in the group's 'momentum'"
        )
    settings = _settings(label, group, known, flags, problems)
    if settings.get('decoupled_decay') and settings.get('corrected_weight_decay'):
        peak = as_number(group.get(_PEAK))
        if peak is None:
            problems.add(
                f'{label}: {_PEAK!r}, the rate that the optimizer was made with, is missing'
            )
        settings['max_lr'] = peak
    try:
        return factory(**settings)
    except (TypeError, ValueError) as error:
        problems.add(f'{label}: {error}')
        return optax.identity()


def _settings(
    label: str, group: Group, known: Collection[str], flags: Collection[str], problems: Problems
) -> dict[str, Any]:
    """The settings as Python numbers and flags; schedules as they are."""
    settings: dict[str, Any] = {}
    for key in sorted(group.keys() & known):
        value = group[key]
        number = None if callable(value) else as_number(value)
        if number is None and not callable(value):
            problems.add(f'{label}: {key} is {reprlib.repr(value)}, which is no number')
        elif number is None:
            settings[key] = value
        else:
            settings[key] = bool(number) if key in flags else number
    return settings
