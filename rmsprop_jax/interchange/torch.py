"""PyTorch: `optimizer.state_dict()` of `torch.optim.RMSprop` and of the optimizers that copy it.

PyTorch numbers the parameters in the order in which the optimizer was given them, through all
groups. Their names are in the groups if the optimizer was made with `model.named_parameters()`
(PyTorch 2.6 and newer). Otherwise pass `names` in the optimizer's order, which is that of
`model.named_parameters()` only if the optimizer was given `model.parameters()`. With both at hand::

    names = {p: name for name, p in model.named_parameters()}
    names = [names[p] for group in optimizer.param_groups for p in group['params']]

Two sources PyTorch keeps apart must be told apart here too: a group's numbers (`lr`, `alpha`, ...)
belong to the transformation, and arrays and `step` to its state.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from rmsprop_jax._checks import checked_transformation
from rmsprop_jax.interchange._claims import Claims
from rmsprop_jax.interchange._groups import (
    SLOTS,
    checked_groups,
    checked_state,
    misshapen,
    numbered,
    untouched,
)
from rmsprop_jax.interchange._groups import torch_optimizer as torch_optimizer
from rmsprop_jax.interchange._mapping import (
    KERNEL,
    Layout,
    Pair,
    Problems,
    as_count,
    as_number,
    checked_collection,
    checked_count,
    checked_names,
    laid_out,
    layer,
    paired,
)
from rmsprop_jax.interchange._sides import checked_source, settle
from rmsprop_jax.interchange._state import Columns, collect, read
from rmsprop_jax.interchange._write import Writer

__all__ = ['conv', 'from_torch', 'linear', 'norm', 'to_torch', 'torch_optimizer']
__dir__ = __all__.copy

_BIAS = ('.bias', 'bias')


def linear(
    theirs: str, ours: str | tuple[Any, ...], *, bias: bool = True, layout: Layout = KERNEL
) -> tuple[Pair, ...]:
    """The pairs of `torch.nn.Linear` with Flax's `Dense` or `Linear`: kernel transposed.

    Args:
      theirs: The module's name, `'fc'`.
      ours: The path of its dictionary.
      bias: Whether it has one.
      layout: `flattened(channels, height, width)` where it reads a flattened image.

    Example:
      >>> from rmsprop_jax import interchange
      >>> [(pair.theirs, pair.ours) for pair in interchange.torch.linear('fc', ('head', 'fc'))]
      [('fc.weight', 'head/fc/kernel'), ('fc.bias', 'head/fc/bias')]
    """
    return layer(theirs, ours, ('.weight', 'kernel'), _BIAS, bias, layout)


def conv(theirs: str, ours: str | tuple[Any, ...], *, bias: bool = True) -> tuple[Pair, ...]:
    """The pairs of `torch.nn.Conv1d`, `2d` or `3d` with Flax's `Conv`: OIHW to HWIO.

    Transposed convolutions differ by more than their axes, and have no pairs here.
    """
    return linear(theirs, ours, bias=bias)


def norm(theirs: str, ours: str | tuple[Any, ...], *, bias: bool = True) -> tuple[Pair, ...]:
    """The pairs of PyTorch's normalisation layers with Flax's: `weight` is `scale`."""
    return layer(theirs, ours, ('.weight', 'scale'), _BIAS, bias)


def from_torch(
    state_dict: Mapping[str, Any],
    tx: optax.GradientTransformation,
    params: Any,
    mapping: Iterable[Pair],
    *,
    names: Sequence[str] | None = None,
    fresh: Collection[str] = (),
    frozen: Collection[str] = (),
    count: int | None = None,
    lr_in_momentum: bool | None = None,
    dialect: Any = None,
) -> Any:
    """The state of `tx` that goes on where PyTorch's optimizer stopped.

    Args:
      state_dict: What `optimizer.state_dict()` returns, tensors on the host.
      tx: `torch_optimizer(...)`, or any transformation that does the same, such as
        `dialects.torch` with a schedule, inside whatever wrappers. What it does at that step is
        measured and compared with the `lr`, `alpha`, `eps`, `weight_decay`, `momentum` and
        `maximize` of the groups; nothing is compared with an entry that is missing.
      params: Our parameters.
      mapping: The pairs.
      names: The parameters' names in the optimizer's order, through all groups, unless the groups
        have them.
      fresh: Names of parameters that PyTorch keeps no state for, since they had no gradient yet.
        Theirs starts as `tx.init` makes it, as it would there.
      frozen: Names of parameters that `tx` keeps no state for, as for `torch_optimizer`. Their
        entries are left behind.
      count: The step count for schedules, where it is not the parameters' common `step`.
      lr_in_momentum: Whether the buffer holds the learning rate. None means what the groups say, as
        timm's `RMSpropTF` has them say, or else that it does not, as in PyTorch.
      dialect: `dialects.torch` or `dialects.stable_baselines3`, whose settings are the same where
        PyTorch is older than 1.12: needed where the groups do not tell.

    Returns:
      A state like `tx.init(params)`, with its dtypes and shardings. Complex moments become pairs of
      reals, as `dialects.torch` keeps them.

    Raises:
      InterchangeError: Listing every entry that is missing, left over, misshapen, of the wrong kind
        or not finite, every setting that `tx` contradicts, and every velocity that is on the other
        side of a learning rate that changes.

    Warns:
      LossyConversionWarning: Where a centered second moment is smaller than its squared mean.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from rmsprop_jax import dialects, interchange
      >>> params = {'fc': {'kernel': jnp.zeros((2, 3))}}
      >>> square_avg = np.arange(6, dtype='f').reshape(3, 2)
      >>> entry = {'step': np.float32(7), 'square_avg': square_avg}
      >>> theirs = {'state': {0: entry}, 'param_groups': [{'params': [0]}]}
      >>> pairs = interchange.torch.linear('fc', 'fc', bias=False)
      >>> state = interchange.from_torch(
      ...     theirs, dialects.torch(), params, pairs, names=['fc.weight'])
      >>> print(state[0].nu['fc']['kernel'], state[0].count)
      [[0. 2. 4.]
       [1. 3. 5.]] 7

    Source: PyTorch 2.13 to 2.15, torch/optim/rmsprop.py and optimizer.py.
    """
    problems = Problems('the PyTorch state cannot be converted')
    checked_transformation('tx', tx)
    groups = checked_groups(checked_names('state_dict', state_dict).get('param_groups'), problems)
    held = checked_state(state_dict.get('state'), problems)
    claims_of = Claims(groups, lr_in_momentum, dialect, problems)
    count = None if count is None else checked_count(count)
    pairs, leaves = paired(mapping, params, problems)
    by_name = {pair.theirs: pair for pair in pairs.values()}
    columns: Columns = {name: {} for name in (*SLOTS, 'ema')}
    parameters = numbered(groups, names, problems)
    idle = untouched(parameters, held, fresh, frozen, by_name, problems)
    steps: dict[int, list[str]] = {}
    for number, (name, _) in parameters.items():
        if name not in by_name:
            problems.add(f'{name!r} is in no pair')
            continue
        entry, pair = held.get(number), by_name[name]
        wrong = misshapen(entry or {}, pair, leaves.get(str(pair.ours)), problems)
        if entry and name not in idle and name not in fresh:
            _read_entry(entry, pair, columns, problems, wrong)
            steps.setdefault(_step(name, entry, problems), []).append(name)
    if count is None and len(steps) > 1:
        listed = '; '.join(f'{step}: {", ".join(at)}' for step, at in sorted(steps.items()))
        problems.add(f'parameters have taken different numbers of steps ({listed}): pass count')

    def describe(moment: str, path: str) -> str:
        name = pairs[path].theirs if path in pairs else None
        label = f'the parameter of {path!r}' if name is None else repr(name)
        said = ', said to be frozen but with a place in tx,' if name in frozen else ''
        return f'{SLOTS.get(moment, moment)} of {label}{said}'

    started = {str(by_name[name].ours) for name in fresh if name in by_name}
    count = max(steps, default=0) if count is None else count
    start, places = tx.init(params), parameters.values()
    claims = {str(by_name[name].ours): claims_of[i] for name, i in places if name in by_name}
    settle(tx, start, params, count, claims, columns['trace'], problems, to_ours=True)
    return Writer(columns, describe, problems, started).write(start, count)


def _read_entry(
    entry: Mapping[str, Any],
    pair: Pair,
    columns: Columns,
    problems: Problems,
    wrong: Collection[str],
) -> None:
    """One parameter's arrays with our axes, into `columns`; None for the `wrong` ones."""
    for key in sorted(entry.keys() - {*SLOTS.values(), 'step'}, key=str):
        problems.add(f'{key} of {pair.theirs!r} is nothing that RMSProp keeps')
    for moment, slot in SLOTS.items():
        if slot in wrong:
            columns[moment][str(pair.ours)] = None
        elif slot in entry:
            collect(columns, moment, pair, f'{slot} of {pair.theirs!r}', entry[slot], problems)


def _step(name: str, entry: Mapping[str, Any], problems: Problems) -> int:
    step = as_count(entry.get('step'), 'iuf')
    if step is None:
        problems.add(f'step of {name!r} is missing or no step count')
    return step or 0


def to_torch(
    state: Any,
    params: Any,
    mapping: Iterable[Pair],
    param_groups: Sequence[Mapping[str, Any]],
    *,
    names: Sequence[str] | None = None,
    fresh: Collection[str] = (),
    tx: optax.GradientTransformation | None = None,
    lr_in_momentum: bool | None = None,
    dialect: Any = None,
    as_tensor: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """A dictionary that `optimizer.load_state_dict` of `torch.optim.RMSprop` takes.

    Args:
      state: The state of our transformation.
      params: Our parameters.
      mapping: The pairs.
      param_groups: `optimizer.state_dict()['param_groups']` of the optimizer that is to go on. They
        say how it numbers its parameters, and are passed on as they are. They must be its own:
        `load_state_dict` does not look at names or shapes.
      names: The parameters' names in the optimizer's order, through all groups, unless the groups
        have them.
      fresh: Names of parameters in the groups that are written without state, such as those that
        are frozen here.
      tx: The transformation whose state it is; needed where that has a velocity. What it does is
        compared with the groups as by `from_torch`.
      lr_in_momentum: As for `from_torch`.
      dialect: As for `from_torch`.
      as_tensor: Applied to every array: `torch.from_numpy` for a dictionary to load.

    Returns:
      `{'state': {number: {'step', 'square_avg', ...}}, 'param_groups': [...]}`.

    Raises:
      InterchangeError: Listing every parameter without moments, moment without a parameter, and
        group whose settings do not go with our moments or with `tx`.
    """
    problems = Problems('the state cannot be written for PyTorch')
    checked_groups(param_groups, problems)
    checked_collection('fresh', fresh)
    claims_of = Claims(param_groups, lr_in_momentum, dialect, problems)
    if not callable(as_tensor):
        raise TypeError(f'as_tensor must be a function of an array, got {as_tensor!r}.')
    pairs, leaves = paired(mapping, params, problems)
    by_name = {pair.theirs: path for path, pair in pairs.items()}
    moments = read(state, problems)
    parameters = numbered(param_groups, names, problems)
    if len(moments.counts) != 1:
        problems.add(f'the state has step counts {sorted(moments.counts)}, and PyTorch has one')
    for path in sorted(moments.weights):
        problems.add(f'{path!r} is bias-corrected, which PyTorch has not')
    for moment, column in moments.columns.items():
        paths = {by_name.get(name) for name, _ in parameters.values()}
        for path in sorted(column.keys() - paths - {None}):
            problems.add(f'{moment} of {path!r} belongs to no parameter of the groups')
        if moment not in SLOTS and column:
            problems.add(f'PyTorch keeps no {moment}')
    count = max(moments.counts, default=0)
    velocities = moments.columns['trace']
    places = parameters.values()
    claims = {by_name[name]: claims_of[place] for name, place in places if name in by_name}
    tx = checked_source('tx', tx, velocities, problems)
    if tx is not None:
        settle(tx, state, params, count, claims, velocities, problems, to_ours=False)
    entries: dict[Any, dict[str, Any]] = {}
    step = np.float32(count)
    for number, (name, place) in parameters.items():
        if name not in by_name:
            problems.add(f'{name!r} is in no pair')
        elif name not in fresh:
            pair, path = pairs[by_name[name]], by_name[name]
            held = {m: column[path] for m, column in moments.columns.items() if path in column}
            _check_group(name, param_groups[place], held, problems)
            arrays = _entry(pair, leaves.get(path), held, problems)
            entries[number] = {
                key: as_tensor(array) for key, array in ({'step': np.array(step)} | arrays).items()
            }
    problems.raise_if_any()
    return {'state': entries, 'param_groups': [dict(group) for group in param_groups]}


def _check_group(
    name: str, group: Mapping[str, Any], held: Mapping[str, Any], problems: Problems
) -> None:
    if 'nu' not in held:
        problems.add(f'the state has no second moment for {name!r}')
        return
    for moment, key in (('trace', 'momentum'), ('mu', 'centered')):
        wanted = as_number(group.get(key, 0))
        if key in group and wanted is None:
            problems.add(f'{name!r} has {key}={group[key]!r} in its group, which is no number')
        elif key in group and bool(wanted) != (moment in held):
            has = 'has' if moment in held else 'has no'
            problems.add(
                f'{name!r} has {key}={group[key]} in its group, but the state {has} {moment}'
            )


def _entry(
    pair: Pair, param: Any, held: Mapping[str, np.ndarray], problems: Problems
) -> dict[str, np.ndarray]:
    """One parameter's arrays under PyTorch's names, with its axes."""
    entry: dict[str, np.ndarray] = {}
    for moment, slot in SLOTS.items():
        if moment not in held or param is None:
            continue
        array, label = held[moment], f'{moment} of {pair.ours!r}'
        if np.iscomplexobj(param) and not np.iscomplexobj(array):
            if array.shape != (*param.shape, 2):
                problems.add(f'{label} is one for real and imaginary parts, PyTorch has two')
                continue
            array = array[..., 0] + 1j * array[..., 1]
        turned = laid_out(label, pair.layout.to_theirs, array, problems)
        if turned is not None:
            entry[slot] = np.array(turned, order='C')
    return entry
