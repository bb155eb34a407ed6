"""PyTorch's parameter groups: who is in them, and the transformation they describe."""

import itertools
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from rmsprop_jax import dialects
from rmsprop_jax.interchange._mapping import (
    Pair,
    Problems,
    as_number,
    checked_names,
    paired,
    path_name,
)

_NUMBERS = ('lr', 'alpha', 'eps', 'weight_decay', 'momentum')
_FLAGS = ('centered', 'maximize')
# How PyTorch runs the update, what its schedules remember, and names.
_IMMATERIAL = frozenset(
    {'params', 'param_names', 'initial_lr', 'foreach', 'capturable', 'differentiable', 'name'}
)
_FROZEN = 'frozen'


def torch_optimizer(
    state_dict: Mapping[str, Any],
    params: Any,
    mapping: Iterable[Pair],
    *,
    names: Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that does what the parameter groups of `torch.optim.RMSprop` say.

    Every group becomes a `dialects.torch` with its own `lr`, `alpha`, `eps`, `weight_decay`,
    `momentum`, `centered` and `maximize`, and `optax.partition` deals out the parameters. Those
    that PyTorch's optimizer does not have do not move.

    A state dictionary holds today's learning rate and no schedule. To go on with one, put an Optax
    schedule (of the step count) in its place: `state_dict['param_groups'][0]['lr'] = schedule`.

    Args:
      state_dict: What `optimizer.state_dict()` returns.
      params: Our parameters.
      mapping: The pairs.
      names: The parameters' names in the optimizer's order, unless the groups have them.

    Raises:
      InterchangeError: Listing every group that is not of `torch.optim.RMSprop` and every parameter
        that cannot be told.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interchange
      >>> group = {'params': [0], 'lr': 0.1, 'alpha': 0.99, 'eps': 1e-8, 'weight_decay': 0,
      ...          'momentum': 0.9, 'centered': False}
      >>> params = {'w': jnp.zeros(2)}
      >>> tx = interchange.torch_optimizer(
      ...     {'state': {}, 'param_groups': [group]}, params, [interchange.Pair('w', 'w')],
      ...     names=['w'])
      >>> update, _ = tx.update({'w': jnp.ones(2)}, tx.init(params), params)
      >>> print(update['w'].round(3))
      [-1. -1.]
    """
    problems = Problems('the parameter groups cannot be converted')
    groups = checked_groups(checked_names('state_dict', state_dict).get('param_groups'), problems)
    pairs, leaves = paired(mapping, params, problems)
    by_name = {pair.theirs: path for path, pair in pairs.items()}
    labels = dict.fromkeys(leaves, _FROZEN)
    for name, group in numbered(groups, names, problems).values():
        if name in by_name:
            labels[by_name[name]] = f'group {group}'
        else:
            problems.add(f'{name!r} is in no pair')
    transforms = {
        f'group {i}': _dialect(f'group {i}', group, problems) for i, group in enumerate(groups)
    }
    problems.raise_if_any()
    tree = jax.tree_util.tree_map_with_path(lambda path, _: labels[path_name(path)], params)
    return optax.partition({**transforms, _FROZEN: optax.set_to_zero()}, lambda _: tree)


def _dialect(
    label: str, group: Mapping[str, Any], problems: Problems
) -> optax.GradientTransformation:
    known = {*_NUMBERS, *_FLAGS}
    for key in sorted(group.keys() - known - _IMMATERIAL, key=str):
        problems.add(f'{label}: {key!r} is no setting of torch.optim.RMSprop')
    # `maximize` is missing from state dictionaries of PyTorch before 1.12.
    for key in sorted(known - group.keys() - {'maximize'}):
        problems.add(f'{label}: {key!r} is missing')
    settings = {key: group[key] for key in known & group.keys()}
    for key in settings:
        if callable(settings[key]):
            continue
        number = as_number(settings[key])
        if number is None:
            problems.add(f'{label}: {key} is {reprlib.repr(settings[key])}, which is no number')
            return optax.identity()
        settings[key] = bool(number) if key in _FLAGS else number
    try:
        return dialects.torch(**settings)
    except (TypeError, ValueError) as error:
        problems.add(f'{label}: {error}')
        return optax.identity()


def checked_groups(groups: Any, problems: Problems) -> Sequence[Mapping[str, Any]]:
    """The parameter groups of a state dictionary.

    Raises:
      InterchangeError: Listing those that are none.
    """
    if not isinstance(groups, Sequence):
        problems.add("'param_groups' is missing or no list")
        groups = ()
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping):
            problems.add(f'group {i} is a {type(group).__name__}, not a dictionary')
            continue
        numbers, names = group.get('params'), group.get('param_names', ())
        if not _is_list_of(int | str | np.integer, numbers):
            problems.add(f"group {i}: 'params' is missing or no list of numbers")
        if not _is_list_of(str, names):
            problems.add(f"group {i}: 'param_names' is no list of names")
    problems.raise_if_any()
    return groups


def _is_list_of(kind: Any, value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(x, kind) for x in value)
    )


def numbered(
    groups: Sequence[Mapping[str, Any]], names: Sequence[str] | None, problems: Problems
) -> dict[Any, tuple[str, int]]:
    """The name and the place in `groups` of every parameter, by its number."""
    if names is not None and not _is_list_of(str, names):
        raise TypeError(f'names must be a list of names, got {names!r}.')
    numbers = [number for group in groups for number in group['params']]
    if names is None:
        lists = [group.get('param_names', [None] * len(group['params'])) for group in groups]
        names = [name for name in itertools.chain(*lists) if name is not None]
        if len(names) < len(numbers):
            problems.add("the groups have no param_names: pass names, in the optimizer's order")
            return {}
    if len(names) != len(numbers):
        problems.add(f'{len(numbers)} parameters are in the groups, but {len(names)} in names')
        return {}
    for name in sorted({name for name in names if list(names).count(name) > 1}):
        problems.add(f'{name!r} is in names more than once')
    places = [i for i, group in enumerate(groups) for _ in group['params']]
    return dict(zip(numbers, zip(names, places, strict=True), strict=True))
