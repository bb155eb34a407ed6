"""PyTorch's parameter groups: who is in them, and the transformation they describe."""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from rmsprop_jax._types import ScalarOrSchedule
from rmsprop_jax.interchange._mapping import (
    Pair,
    Problems,
    checked_collection,
    checked_names,
    paired,
    path_name,
)
from rmsprop_jax.interchange._settings import optimizer_of, source, with_rates

_FROZEN = 'frozen'
SLOTS = {'nu': 'square_avg', 'mu': 'grad_avg', 'trace': 'momentum_buffer'}
Numbered = Mapping[Any, tuple[str, int]]
State = Mapping[Any, Mapping[str, Any]]


def torch_optimizer(
    state_dict: Mapping[str, Any],
    params: Any,
    mapping: Iterable[Pair],
    *,
    names: Sequence[str] | None = None,
    fresh: Collection[str] = (),
    frozen: Collection[str] = (),
    learning_rate: ScalarOrSchedule | Sequence[ScalarOrSchedule] | None = None,
    dialect: Callable[..., optax.GradientTransformation] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that does what the parameter groups of a PyTorch optimizer say.

    Every group becomes a `dialects.torch` with its own `lr`, `alpha`, `eps`, `weight_decay`,
    `momentum`, `centered` and `maximize`, and `optax.partition` deals out the parameters. timm's
    `RMSpropTF` is recognised by its settings and becomes `dialects.timm`. The settings of
    Stable-Baselines3's `RMSpropTFLike` are those of PyTorch before 1.12: pass `dialect`.

    **The learning rate.** A state dictionary holds today's rate and no schedule. `initial_lr` in a
    group tells that a scheduler set the rate; then `learning_rate` is required. A rate that was set
    by hand, as Stable-Baselines3 does, leaves no trace and stays what it is unless
    `learning_rate` is given. A schedule may also stand in a group itself:
    `state_dict['param_groups'][0]['lr'] = schedule`.

    **Parameters that PyTorch would not touch.** PyTorch skips a parameter whose gradient is None,
    weight decay included, while a gradient of zero here would let it decay. These parameters do
    not move: those that the optimizer does not have, those that are in `frozen`, and those that
    have no entry in a state that is not empty, since they have never had a gradient. `fresh` names
    those of the last kind that are trained from now on.

    Args:
      state_dict: What `optimizer.state_dict()` returns.
      params: Our parameters.
      mapping: The pairs.
      names: The parameters' names in the optimizer's order, through all groups, unless the groups
        have them. It need not be the order of `model.named_parameters()`.
      fresh: Names of parameters without state that are trained from now on.
      frozen: Names of parameters that get no update, whether they have state or not.
      learning_rate: Replaces the groups' rates: a number or a schedule of the step count, or a list
        with one of them for each group.
      dialect: `dialects.torch`, `dialects.timm` or `dialects.stable_baselines3`: whose optimizer it
        was, where the groups do not tell.

    Raises:
      InterchangeError: Listing every group whose optimizer or learning rate cannot be told, every
        parameter that cannot be told, and every array of another shape than its parameter.
      TypeError: If `dialect` is none of the three.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interchange
      >>> group = {'params': [0], 'lr': 0.1, 'alpha': 0.99, 'eps': 1e-8, 'weight_decay': 0,
      ...          'momentum': 0.9, 'centered': False, 'maximize': False}
      >>> params = {'w': jnp.zeros(2)}
      >>> tx = interchange.torch_optimizer(
      ...     {'state': {}, 'param_groups': [group]}, params, [interchange.Pair('w', 'w')],
      ...     names=['w'])
      >>> update, _ = tx.update({'w': jnp.ones(2)}, tx.init(params), params)
      >>> print(update['w'].round(3))
      [-1. -1.]

    Source: the optimizers of PyTorch 1.10 to 2.15, timm 1.0.31 and Stable-Baselines3 2.9.
    """
    problems = Problems('the parameter groups cannot be converted')
    groups = checked_groups(checked_names('state_dict', state_dict).get('param_groups'), problems)
    state = checked_state(state_dict.get('state', {}), problems)
    pairs, leaves = paired(mapping, params, problems)
    by_name = {pair.theirs: pair for pair in pairs.values()}
    parameters = numbered(groups, names, problems)
    idle = untouched(parameters, state, fresh, frozen, by_name, problems)
    labels = dict.fromkeys(leaves, _FROZEN)
    for number, (name, group) in parameters.items():
        if name not in by_name:
            problems.add(f'{name!r} is in no pair')
            continue
        path = str(by_name[name].ours)
        misshapen(state.get(number, {}), by_name[name], leaves.get(path), problems)
        if name not in idle:
            labels[path] = f'group {group}'
    factory = source(groups, dialect, problems)
    transforms = {
        f'group {i}': optimizer_of(f'group {i}', group, factory, problems)
        for i, group in enumerate(with_rates(groups, learning_rate, problems))
    }
    problems.raise_if_any()
    tree = jax.tree_util.tree_map_with_path(lambda path, _: labels[path_name(path)], params)
    return optax.partition({**transforms, _FROZEN: optax.set_to_zero()}, lambda _: tree)


def checked_state(state: Any, problems: Problems) -> State:
    """What a state dictionary holds for each parameter.

    Raises:
      InterchangeError: Listing what is not a dictionary.
    """
    if not isinstance(state, Mapping):
        problems.add("'state' is missing or no dictionary")
        state = {}
    for number, entry in state.items():
        if not isinstance(entry, Mapping):
            problems.add(f'state {number!r} is a {type(entry).__name__}, not a dictionary')
    problems.raise_if_any()
    return state


def untouched(
    parameters: Numbered,
    state: State,
    fresh: Collection[str],
    frozen: Collection[str],
    by_name: Mapping[str, Pair],
    problems: Problems,
) -> frozenset[str]:
    """The names of the parameters that get no update, with contradictions noted."""
    for label, chosen in (('fresh', fresh), ('frozen', frozen)):
        for name in sorted(set(checked_collection(label, chosen)) - by_name.keys(), key=str):
            problems.add(f'{name!r}, said to be {label}, is in no pair')
    for name in sorted(set(fresh) & set(frozen), key=str):
        problems.add(f'{name!r} is said to be fresh and to be frozen')
    # Without names there are no parameters, which has been noted.
    strays = state.keys() - parameters.keys() if parameters else ()
    for number in sorted(strays, key=str):
        problems.add(f'state {number!r} belongs to no parameter of the groups')
    for number, (name, _) in parameters.items():
        if name in fresh and state.get(number):
            problems.add(f'{name!r}, said to be fresh, has an entry in the state')
    without = {name for number, (name, _) in parameters.items() if not state.get(number)}
    return frozenset(frozen) | (frozenset(without - set(fresh)) if state else frozenset())


def misshapen(entry: Mapping[str, Any], pair: Pair, param: Any, problems: Problems) -> set[str]:
    """The arrays of an entry whose shape, with our axes, is not that of the parameter."""
    found: set[str] = set()
    for key, value in entry.items():
        try:
            shape = np.shape(value)
        except (TypeError, ValueError, RuntimeError):
            shape = None  # Reading it will say why.
        if key not in SLOTS.values() or param is None or shape is None:
            continue
        label = f'{key} of {pair.theirs!r}'
        try:
            ours = pair.layout.to_ours(np.broadcast_to(np.int8(0), shape)).shape
            fault = '' if ours == np.shape(param) else f'{label} has shape {ours} with our axes'
        except ValueError as error:
            fault = f'{label}: {error}'
        if fault:
            found.add(key)
            problems.add(
                f'{fault} where {pair.ours!r} has {np.shape(param)}: are the names in the '
                "optimizer's order?"
            )
    return found


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
    carried = [name for group in groups for name in group.get('param_names', ())]
    if list(names) != carried and sorted(names) == sorted(carried):
        problems.add('names has the names of the groups in another order: leave it out')
    if len(names) != len(numbers):
        problems.add(f'{len(numbers)} parameters are in the groups, but {len(names)} in names')
        return {}
    for name in sorted({name for name in names if list(names).count(name) > 1}):
        problems.add(f'{name!r} is in names more than once')
    places = [i for i, group in enumerate(groups) for _ in group['params']]
    return dict(zip(numbers, zip(names, places, strict=True), strict=True))
