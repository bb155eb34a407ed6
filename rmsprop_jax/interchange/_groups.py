"""PyTorch's parameter groups: which parameters they contain, and the state of each parameter."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rmsprop_jax.interchange._mapping import (
    Conversion,
    EntryError,
    Pair,
    checked_collection,
    pair_of,
)
from rmsprop_jax.interchange._state import described

SLOTS = {'nu': 'square_avg', 'mu': 'grad_avg', 'trace': 'momentum_buffer'}
Group = Mapping[str, Any]


class Member(NamedTuple):
    """A parameter of a PyTorch optimizer, or the part of one that is a parameter of ours.

    Attributes:
      number: Its number in the optimizer.
      name: Its name in PyTorch.
      path: Our path.
      group: The index of its group.
      entry: Its entry in the state; empty if it has none.
    """

    number: Any
    name: str
    path: str
    group: int
    entry: Mapping[str, Any]

    def arrays(self) -> dict[tuple[str, str], Any]:
        """The moments in the entry, by the names that a `Counterpart` gives them."""
        slots = [slot for slot in SLOTS.values() if slot in self.entry]
        return {(slot, self.name): self.entry[slot] for slot in slots}


def checked_run(
    state_dict: Any,
    names: Sequence[str] | None,
    fresh: Collection[str],
    frozen: Collection[str],
    conversion: Conversion,
) -> tuple[Sequence[Group], list[Member]]:
    """The groups and the members of a state dictionary. Notes everything that does not fit.

    Raises:
      InterchangeError: If the groups or the entries are missing or malformed.
    """
    groups = checked_groups(state_dict.get('param_groups'), conversion)
    state = _checked_state(state_dict.get('state'), conversion)
    members = members_of(groups, state, names, conversion)
    for label, chosen in (('fresh', fresh), ('frozen', frozen)):
        for name in sorted(checked_collection(label, chosen), key=str):
            with conversion.noted():
                pair_of(name, conversion.by_name, f', said to be {label},')
    for name in sorted(set(fresh) & set(frozen), key=str):
        conversion.add(f'{name!r} is said to be both fresh and frozen')
    numbers = {number for group in groups for number in group['params']}
    for number in sorted(state.keys() - numbers, key=str):
        conversion.add(f'state {number!r} does not belong to any parameter of the groups')
    for member in members:
        if member.name in fresh and member.entry:
            conversion.add(f'{member.name!r}, said to be fresh, has an entry in the state')
        for (slot, name), value in member.arrays().items():
            with conversion.noted():
                check_shape(
                    conversion, described(slot, name), conversion.by_path[member.path], value
                )
    return groups, members


def _checked_state(state: Any, conversion: Conversion) -> Mapping[Any, Mapping[str, Any]]:
    """The entry of each parameter in a state dictionary.

    Raises:
      InterchangeError: Listing everything that is not a dictionary.
    """
    with conversion.at_once():
        if not isinstance(state, Mapping):
            conversion.add("'state' is missing or not a dictionary")
            state = {}
        for number, entry in state.items():
            if not isinstance(entry, Mapping):
                conversion.add(f'state {number!r} is a {type(entry).__name__}, not a dictionary')
    return state


def check_shape(conversion: Conversion, label: str, pair: Pair, value: Any) -> None:
    """Raises an `EntryError` if an array, with our axes, differs in shape from its parameter."""
    try:
        shape = np.shape(value)
    except (TypeError, ValueError, RuntimeError):
        return  # Reading the array will report why.
    if pair.ours not in conversion.leaves:
        return
    wanted = np.shape(conversion.leaves[str(pair.ours)])
    try:
        ours = pair.layout.to_ours(np.broadcast_to(np.int8(0), shape)).shape
        fault = '' if ours == wanted else f'{label} has shape {ours} with our axes'
    except ValueError as error:
        fault = f'{label}: {error}'
    if fault:
        raise EntryError(
            f"{fault} where {pair.ours!r} has {wanted}: are the names in the optimizer's order?"
        )


def members_of(
    groups: Sequence[Group],
    state: Mapping[Any, Mapping[str, Any]],
    names: Sequence[str] | None,
    conversion: Conversion,
) -> list[Member]:
    """The parameters of the groups that have a pair."""
    members: list[Member] = []
    for number, (name, group) in _numbered(groups, names, conversion).items():
        with conversion.noted():
            for pair in pair_of(name, conversion.by_name):
                entry = state.get(number) or {}
                members.append(Member(number, name, str(pair.ours), group, entry))
    return members


def checked_groups(groups: Any, conversion: Conversion) -> Sequence[Group]:
    """The parameter groups of a state dictionary.

    Raises:
      InterchangeError: Listing everything that is not a valid group.
    """
    with conversion.at_once():
        if not isinstance(groups, Sequence):
            conversion.add("'param_groups' is missing or not a list")
            groups = ()
        for i, group in enumerate(groups):
            if not isinstance(group, Mapping):
                conversion.add(f'group {i} is a {type(group).__name__}, not a dictionary')
                continue
            if not _is_list_of(int | str | np.integer, group.get('params')):
                conversion.add(f"group {i}: 'params' is missing or not a list of numbers")
            if not _is_list_of(str, group.get('param_names', ())):
                conversion.add(f"group {i}: 'param_names' is not a list of names")
    return groups


def _is_list_of(kind: Any, value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(x, kind) for x in value)
    )


def _numbered(
    groups: Sequence[Group], names: Sequence[str] | None, conversion: Conversion
) -> dict[Any, tuple[str, int]]:
    """The name of every parameter and the index of its group, by its number."""
    if names is not None and not _is_list_of(str, names):
        raise TypeError(f'names must be a list of names, got {names!r}.')
    numbers = [number for group in groups for number in group['params']]
    group_names = [name for group in groups for name in group.get('param_names', ())]
    if names is None:
        names = group_names
        if len(names) < len(numbers):
            conversion.add("the groups have no param_names: pass names, in the optimizer's order")
            return {}
    if list(names) != group_names and sorted(names) == sorted(group_names):
        conversion.add("names has the groups' own names in another order: leave it out")
    if len(names) != len(numbers):
        conversion.add(f'{len(numbers)} parameters are in the groups, but {len(names)} in names')
        return {}
    for name in sorted({name for name in names if list(names).count(name) > 1}):
        conversion.add(f'{name!r} is in names more than once')
    places = [i for i, group in enumerate(groups) for _ in group['params']]
    return dict(zip(numbers, zip(names, places, strict=True), strict=True))
