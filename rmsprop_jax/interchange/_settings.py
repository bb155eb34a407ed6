"""Reads a PyTorch parameter group: the library that wrote it, its rate and its settings."""

import dataclasses
import itertools
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import optax

from rmsprop_jax import dialects
from rmsprop_jax._checks import checked_flag
from rmsprop_jax._types import Hyperparameter
from rmsprop_jax.interchange._counterpart import Counterpart
from rmsprop_jax.interchange._groups import SLOTS, Group, Member
from rmsprop_jax.interchange._mapping import Conversion, EntryError, as_number


@dataclasses.dataclass(frozen=True)
class Library:
    """An optimizer with parameter groups like PyTorch's.

    Attributes:
      dialect: Our function for it.
      optimizer: Its name.
      counterpart: What it does unless its groups say otherwise.
      flags: The settings that are flags.
      marks: Keys of groups that identify it.
    """

    dialect: Callable[..., optax.GradientTransformation]
    optimizer: str
    counterpart: Counterpart
    flags: frozenset[str]
    marks: frozenset[str] = frozenset()


_PEAK = 'max_lr_snapshot'
_TIMM_FLAGS = frozenset({'decoupled_decay', 'corrected_weight_decay', 'lr_in_momentum', 'caution'})
_PYTORCH = Library(
    dialects.torch,
    'torch.optim.RMSprop',
    Counterpart('PyTorch', inside=False, eps_in_sqrt=False),
    frozenset({'centered', 'maximize'}),
    # PyTorch has written foreach since 1.12, and the others since later releases.
    frozenset({'foreach', 'maximize', 'differentiable', 'capturable'}),
)
_TIMM = Library(
    dialects.timm,
    "timm's RMSpropTF",
    dataclasses.replace(_PYTORCH.counterpart, framework='timm', eps_in_sqrt=True),
    frozenset({'centered'}) | _TIMM_FLAGS,
    _TIMM_FLAGS | {_PEAK},
)
_STABLE_BASELINES3 = Library(
    dialects.stable_baselines3,
    "Stable-Baselines3's RMSpropTFLike",
    dataclasses.replace(_PYTORCH.counterpart, framework='Stable-Baselines3', eps_in_sqrt=True),
    frozenset({'centered'}),
)
# PyTorch before 1.12 and Stable-Baselines3 write the same groups.
_UNTOLD = dataclasses.replace(
    _PYTORCH,
    counterpart=dataclasses.replace(_PYTORCH.counterpart, eps_in_sqrt=None),
    marks=frozenset(),
)
# New releases of timm write foreach too, so timm's own marks are checked first.
_LIBRARIES = (_TIMM, _PYTORCH, _STABLE_BASELINES3)
_NUMBERS = frozenset({'lr', 'alpha', 'eps', 'weight_decay', 'momentum'})
# Settings that the first releases of an optimizer did not write; they are then off.
_LATER = frozenset({'maximize', 'corrected_weight_decay', 'caution'})
# Keys with no effect on the update: names, execution options, and the memory of schedulers.
_CYCLED = ('base_momentum', 'max_momentum')
_IMMATERIAL = frozenset(
    {
        *('params', 'param_names', 'name', 'foreach', 'capturable', 'differentiable', _PEAK),
        *('initial_lr', 'lr_scale', 'max_lr', 'min_lr', 'swa_lr', *_CYCLED),
    }
)


def _library_of(
    groups: Sequence[Group], dialect: Any, needed: bool, conversion: Conversion
) -> Library:
    """The optimizer that wrote the groups, found by their keys or given by the caller.

    Args:
      groups: The parameter groups.
      dialect: The optimizer's dialect, for groups that do not identify it.
      needed: Whether the answer matters.
      conversion: Collects contradictions.

    Raises:
      TypeError: If `dialect` is not the dialect of an optimizer with such groups.
    """
    named = next((library for library in _LIBRARIES if library.dialect is dialect), None)
    if dialect is not None and named is None:
        raise TypeError(
            'dialect must be dialects.torch, dialects.timm or dialects.stable_baselines3, got '
            f'{dialect!r}.'
        )
    keys = frozenset(itertools.chain(*groups))
    found = next((library for library in _LIBRARIES if library.marks & keys), named or _UNTOLD)
    if named is not None and named is not found:
        marks = ', '.join(map(repr, sorted(found.marks & keys)))
        conversion.add(
            f'dialect is for {named.optimizer}, but the groups have {marks}, which it does not '
            f'write and {found.optimizer} does'
        )
    if found is _UNTOLD and needed:
        conversion.add(
            'the groups do not show which optimizer wrote them: PyTorch before 1.12 and '
            f'{_STABLE_BASELINES3.optimizer}, whose second moment starts at one and whose epsilon '
            'is inside the root, write the same settings. Pass dialect=dialects.torch or '
            'dialect=dialects.stable_baselines3'
        )
    return found


def counterparts_of(
    groups: Sequence[Group],
    members: Sequence[Member],
    lr_in_momentum: bool | None,
    dialect: Any,
    conversion: Conversion,
) -> dict[str, Counterpart]:
    """What the groups say about the optimizer of each of our parameters.

    Args:
      groups: The parameter groups.
      members: The parameters in them.
      lr_in_momentum: The caller's setting; None means the setting in the groups.
      dialect: The optimizer's dialect, for groups that do not identify it.
      conversion: Collects contradictions.

    Raises:
      TypeError: If `lr_in_momentum` is not a flag, or `dialect` is not one of three functions.
    """
    if lr_in_momentum is not None:
        lr_in_momentum = checked_flag('lr_in_momentum', lr_in_momentum)
    # Which optimizer wrote a group matters only if the group has an epsilon.
    needed = not lr_in_momentum and any('eps' in group for group in groups)
    library = _library_of(groups, dialect, needed, conversion)
    usual = (_TIMM if library is _UNTOLD and lr_in_momentum else library).counterpart
    return {
        member.path: _counterpart(member, groups[member.group], lr_in_momentum, usual, conversion)
        for member in members
    }


def _counterpart(
    member: Member,
    group: Group,
    lr_in_momentum: bool | None,
    usual: Counterpart,
    conversion: Conversion,
) -> Counterpart:
    label = f'group {member.group}'
    numbers = {key: as_number(value) for key, value in group.items()}
    written = numbers.get('lr_in_momentum')
    if None not in (written, lr_in_momentum) and bool(written) != lr_in_momentum:
        conversion.add(f'{label}: lr_in_momentum is {bool(written)} there, not {lr_in_momentum}')
    rate, decay = numbers.get('lr'), numbers.get('weight_decay')
    if rate is not None and numbers.get('maximize'):
        rate = -rate
    said = {
        'decay': ('alpha', numbers.get('alpha')),
        'eps': ('eps', numbers.get('eps')),
        'momentum': ('momentum', numbers.get('momentum')),
        'rate': ('lr', rate),
    }
    if not numbers.get('decoupled_decay'):
        said['coupled'] = ('weight_decay', decay)
    elif rate is not None and decay is not None and not numbers.get('corrected_weight_decay'):
        said['decoupled'] = ('lr times weight_decay', rate * decay)
    if 'caution' in group and numbers.get('momentum'):
        said['cautious'] = ('caution', numbers['caution'])
    return dataclasses.replace(
        usual,
        names={moment: (slot, member.name) for moment, slot in SLOTS.items()},
        inside=bool(written) if lr_in_momentum is None else lr_in_momentum,
        said=said,
        climbs=bool(numbers.get('maximize')),
        undo=f'change one of the two, or delete the entry from {label} to leave it uncompared',
    )


def transforms_of(
    groups: Sequence[Group], learning_rate: Any, dialect: Any, conversion: Conversion
) -> dict[str, optax.GradientTransformation]:
    """The transformation that each group describes, by the name of the group.

    Raises:
      TypeError: If `dialect` is not the dialect of an optimizer with such groups, or
        `learning_rate` not a number, a schedule or a list of these.
    """
    library = _library_of(groups, dialect, bool(groups), conversion)
    return {
        f'group {i}': _optimizer_of(f'group {i}', group, library, conversion)
        for i, group in enumerate(_with_rates(groups, learning_rate, conversion))
    }


def _with_rates(
    groups: Sequence[Group], learning_rate: Any, conversion: Conversion
) -> Sequence[Group]:
    """The groups with the caller's learning rates, which are required for scheduled runs."""
    if learning_rate is None:
        for i, group in enumerate(groups):
            if 'initial_lr' in group and not callable(group.get('lr')):
                conversion.add(
                    f'group {i}: initial_lr shows that a scheduler changes lr, which is '
                    f'{reprlib.repr(group.get("lr"))} now: pass learning_rate, a schedule of the '
                    'step count, or a number for a constant rate'
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
            conversion.add(
                'learning_rate is a single rate, but the groups have different ones: give a list '
                'with one for each'
            )
    if len(rates) != len(groups):
        conversion.add(f'learning_rate has {len(rates)} entries for {len(groups)} groups')
        return groups
    return [{**group, 'lr': rate} for group, rate in zip(groups, rates, strict=True)]


def _rates_of(group: Group) -> tuple[str, ...]:
    """The current and the first learning rate of a group, in a form that can be compared."""
    rates = (group.get('lr'), group.get('initial_lr'))
    return tuple(repr(rate if callable(rate) else as_number(rate)) for rate in rates)


def _optimizer_of(
    label: str, group: Group, library: Library, conversion: Conversion
) -> optax.GradientTransformation:
    """The transformation that a group describes."""
    setting_names = _NUMBERS | library.flags
    for key in sorted(group.keys() - setting_names - _IMMATERIAL, key=str):
        conversion.add(f'{label}: {key!r} is not a setting of {library.optimizer}')
    for key in sorted(setting_names - group.keys() - _LATER):
        conversion.add(f'{label}: {key!r} is missing')
    cycled = [key for key in _CYCLED if key in group]
    if cycled and not callable(group.get('momentum')):
        conversion.add(
            f'{label}: {cycled[0]} shows that a scheduler changes momentum: put a schedule of the '
            "step count in the group's 'momentum'"
        )
    settings: dict[str, Any] = {}
    for key in sorted(group.keys() & setting_names):
        with conversion.noted():
            settings[key] = _setting(f'{label}: {key}', group[key], key in library.flags)
    if settings.get('decoupled_decay') and settings.get('corrected_weight_decay'):
        settings['max_lr'] = as_number(group.get(_PEAK))
        if settings['max_lr'] is None:
            conversion.add(
                f'{label}: {_PEAK!r}, the rate that the optimizer was made with, is missing'
            )
    try:
        return library.dialect(**settings)
    except (TypeError, ValueError) as error:
        conversion.add(f'{label}: {error}')
        return optax.identity()


def _setting(label: str, value: Any, is_flag: bool) -> Any:
    """A setting as a Python number or flag; a schedule is returned unchanged."""
    if callable(value):
        return value
    number = as_number(value)
    if number is None:
        raise EntryError(f'{label} is {reprlib.repr(value)}, which is not a number')
    return bool(number) if is_flag else number
