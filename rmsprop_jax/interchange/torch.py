"""PyTorch: `optimizer.state_dict()` of `torch.optim.RMSprop` and of the optimizers that copy it.

PyTorch numbers the parameters in the order in which the optimizer was given them, through all
groups. Their names are in the groups if the optimizer was made with `model.named_parameters()`
(PyTorch 2.6 and newer). Otherwise pass `names` in the optimizer's order, which is that of
`model.named_parameters()` only if the optimizer was given `model.parameters()`. With both at hand::

    names = {p: name for name, p in model.named_parameters()}
    names = [names[p] for group in optimizer.param_groups for p in group['params']]

The numbers of a group (`lr`, `alpha`, ...) belong to the transformation. Arrays and `step` belong
to its state.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from rmsprop_jax._checks import checked_transformation
from rmsprop_jax._types import ScalarOrSchedule, path_name
from rmsprop_jax.interchange._counterpart import Exchange
from rmsprop_jax.interchange._groups import (
    SLOTS,
    Group,
    Member,
    check_shape,
    checked_groups,
    checked_run,
    members_of,
)
from rmsprop_jax.interchange._mapping import (
    KERNEL,
    Conversion,
    EntryError,
    Layout,
    Pair,
    as_count,
    as_number,
    checked_collection,
    checked_count,
    checked_names,
    joined,
    layer,
    layers_of,
)
from rmsprop_jax.interchange._measure import Trial
from rmsprop_jax.interchange._settings import counterparts_of, transforms_of
from rmsprop_jax.interchange._state import Moments, described

__all__ = [
    'batch_stats',
    'conv',
    'from_torch',
    'linear',
    'norm',
    'recurrent',
    'to_torch',
    'torch_optimizer',
]
__dir__ = __all__.copy

_BIAS = ('.bias', 'bias')
_FROZEN = 'frozen'


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


def batch_stats(theirs: str, ours: str | tuple[Any, ...]) -> tuple[Pair, ...]:
    """The pairs of the buffers of PyTorch's `BatchNorm` with the statistics of Flax's.

    `running_mean` is `mean` and `running_var` is `var`. `num_batches_tracked` has no counterpart.
    They are not parameters, so give them to `parameters_from` and `parameters_to` only, with a tree
    that has statistics: `nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))`. `norm` makes the
    pairs of the parameters.

    PyTorch's `momentum` is one minus Flax's. PyTorch averages the unbiased variance of each batch
    and Flax the biased one, so from the next update on Flax's `var` moves towards a value that is
    `(n - 1) / n` of PyTorch's, for n numbers per channel in a batch.

    Args:
      theirs: The module's name, `'bn'`.
      ours: The path of its statistics.

    Example:
      >>> from rmsprop_jax import interchange
      >>> [(pair.theirs, pair.ours) for pair in interchange.torch.batch_stats('bn', 'bn')]
      [('bn.running_mean', 'bn/mean'), ('bn.running_var', 'bn/var')]

    Source: PyTorch 2.13, torch/nn/modules/batchnorm.py; Flax 0.12.8, flax/nnx/nn/normalization.py.
    """
    return layer(theirs, ours, ('.running_mean', 'mean'), ('.running_var', 'var'), True)


def recurrent(
    theirs: str,
    ours: str | tuple[Any, ...],
    cell: str,
    *,
    suffix: str = '',
    biases: Sequence[str] = ('ih', 'hh'),
) -> tuple[Pair, ...]:
    """The pairs of PyTorch's `LSTMCell`, `GRUCell`, `LSTM` or `GRU` with a cell of Flax.

    PyTorch has the gates of a cell in one array. `nnx.LSTMCell` and the cells of Linen have an
    array for each gate, so several pairs have the same `theirs`, and each has a part of it.
    Statistics are split and joined like the arrays. Scaling or clipping by the norm of each array
    cannot be matched, since the norm of one array is not that of its parts. It differs in
    `clipnorm` of `dialects.keras`, `optax.clip_by_block_rms`, `optax.scale_by_trust_ratio`,
    `optax.adaptive_grad_clip` (biases only) and clipping by parameter. The conversions of states
    warn of it. Clip the parts together, with `optax.clip_by_global_norm` in `optax.partition`.

    **The two biases.** PyTorch trains two biases, `bias_ih` and `bias_hh`, and adds them. Their
    sum moves twice as far as one bias would, which is what most gates of Flax's cells have. To take
    PyTorch's steps, have both biases in every gate. In NNX, replace the layers without a bias:
    `cell.dense_h = nnx.Linear(hidden, 3 * hidden, rngs=rngs)` in `nnx.GRUCell`, and likewise `ii`,
    `if_`, `ig` and `io`, or `dense_i`, in the LSTM cells. In Linen, train a tree with both and give
    the cell their sum in the loss, as `own_biases` on the page 'Porting a run' does. If only the
    output of an LSTM counts, add `bias_ih` to `bias_hh`, drop it, and pass `biases=['hh']`.

    Args:
      theirs: The module's name, `'lstm'`.
      ours: The path of the cell.
      cell: `'nnx.LSTMCell'`, `'nnx.OptimizedLSTMCell'`, `'nnx.GRUCell'`, `'linen.LSTMCell'`, which
        also fits Linen's `OptimizedLSTMCell`, or `'linen.GRUCell'`.
      suffix: What names of `LSTM` and `GRU` end with: `'_l0'` for the first layer.
      biases: Which of PyTorch's biases have a pair.

    Raises:
      ValueError: If `cell` or one of `biases` is none of these.

    Example:
      >>> from rmsprop_jax import interchange
      >>> pairs = interchange.torch.recurrent('rnn', 'cell', 'nnx.LSTMCell')
      >>> [(p.ours, p.layout.part) for p in pairs if p.theirs == 'rnn.bias_ih'][:2]
      [('cell/ii/bias', (0, 4, 0)), ('cell/if_/bias', (1, 4, 0))]

    Source: PyTorch 2.13, torch/nn/modules/rnn.py; Flax 0.12.8, flax/nnx/nn/recurrent.py and
    flax/linen/recurrent.py.
    """
    layers = layers_of(cell)
    for name, value in (('theirs', theirs), ('suffix', suffix)):
        if not isinstance(value, str):
            raise TypeError(f'{name} must be a name, got {value!r}.')
    for bias in checked_collection('biases', biases):
        if bias not in ('ih', 'hh'):
            raise ValueError(f"biases must be among 'ih' and 'hh', got {bias!r}.")
    pairs: list[Pair] = []
    for half, gates in zip(('ih', 'hh'), layers, strict=True):
        for i, gate in enumerate(gates):
            part = (i, len(gates), 0)
            names = [(f'.weight_{half}{suffix}', 'kernel'), (f'.bias_{half}{suffix}', 'bias')]
            layouts = Layout(KERNEL.axes, part=part), Layout(part=part)
            pairs += [
                Pair(theirs + name, f'{joined(ours)}/{gate}/{key}', layout)
                for (name, key), layout in zip(names, layouts, strict=True)
                if key == 'kernel' or half in biases
            ]
    return tuple(pairs)


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
    """The transformation that the parameter groups of a PyTorch optimizer describe.

    Every group becomes a `dialects.torch` with its own `lr`, `alpha`, `eps`, `weight_decay`,
    `momentum`, `centered` and `maximize`; `optax.partition` gives each parameter that of its group.
    timm's `RMSpropTF` is recognised by its settings and becomes `dialects.timm`. The settings of
    Stable-Baselines3's `RMSpropTFLike` are those of PyTorch before 1.12: pass `dialect`.

    **The learning rate.** A state dictionary holds the current rate and no schedule. `initial_lr`
    in a group shows that a scheduler set the rate; then `learning_rate` is required. A rate that
    was set by hand, as Stable-Baselines3 does, leaves no trace: it stays as it is unless
    `learning_rate` is given. A group may also hold a schedule:
    `state_dict['param_groups'][0]['lr'] = schedule`.

    **Parameters that PyTorch would not touch.** PyTorch skips a parameter whose gradient is None,
    weight decay included. Here a gradient of zero would let it decay. So these parameters get no
    update: those that the optimizer does not have, those in `frozen`, and those without an entry
    in a state that has others, since they have never had a gradient. `fresh` names those of the
    last kind that are trained from now on.

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
      dialect: `dialects.torch`, `dialects.timm` or `dialects.stable_baselines3`, if the groups do
        not show which optimizer wrote them.

    Raises:
      InterchangeError: Listing every group whose optimizer or learning rate is unknown, every
        parameter whose name is unknown, and every array with another shape than its parameter.
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
    conversion = Conversion('the parameter groups cannot be converted', params, mapping)
    state_dict = {'state': {}, **checked_names('state_dict', state_dict)}
    groups, members = checked_run(state_dict, names, fresh, frozen, conversion)
    labels = {
        member.path: f'group {member.group}'
        for member in members
        if member.name not in frozen
        and (member.entry or member.name in fresh or not state_dict['state'])
    }
    transforms = transforms_of(groups, learning_rate, dialect, conversion)
    conversion.raise_if_any()
    labels = {path: labels.get(path, _FROZEN) for path in conversion.leaves}

    # By path, since an nnx.Optimizer gives `init` variables and `update` plain arrays.
    def label(path: tuple[Any, ...], _: Any) -> str:
        name = path_name(path)
        if name not in labels:
            raise ValueError(f'{name!r} is not in the params that torch_optimizer was given.')
        return labels[name]

    return optax.partition(
        {**transforms, _FROZEN: optax.set_to_zero()},
        lambda tree: jax.tree_util.tree_map_with_path(label, tree),
    )


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
    """The state with which `tx` continues where PyTorch's optimizer stopped.

    Args:
      state_dict: What `optimizer.state_dict()` returns, with tensors on the host.
      tx: `torch_optimizer(...)`, or any transformation that does the same, such as
        `dialects.torch` with a schedule, inside any wrappers. What it does at that step is measured
        and compared with the `lr`, `alpha`, `eps`, `weight_decay`, `momentum` and `maximize` of the
        groups. Missing settings are not compared.
      params: Our parameters.
      mapping: The pairs.
      names: The parameters' names in the optimizer's order, through all groups, unless the groups
        have them.
      fresh: Names of parameters without state in PyTorch, since they have had no gradient. Their
        state starts as `tx.init` makes it, as in PyTorch.
      frozen: Names of parameters for which `tx` keeps no state, as for `torch_optimizer`. Their
        entries are left out.
      count: The step count for schedules, if the parameters have no common `step`.
      lr_in_momentum: Whether the momentum buffer includes the learning rate. None means what the
        groups say, as those of timm's `RMSpropTF` do, and otherwise no, as in PyTorch.
      dialect: `dialects.torch` or `dialects.stable_baselines3`, if the groups may be from either:
        those of PyTorch before 1.12 have the same settings.

    Returns:
      A state like `tx.init(params)`, with its dtypes and shardings. Complex moments become pairs of
      reals, as `dialects.torch` keeps them.

    Raises:
      InterchangeError: Listing every entry that is missing, left over, misshapen, of the wrong kind
        or not finite, every setting that `tx` contradicts, and every velocity on the other side of
        a learning rate that changes.

    Warns:
      LossyConversionWarning: If a centered second moment is smaller than its squared mean.
      UserWarning: If `tx` scales or clips parts of one of their arrays each by its own norm.

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
    exchange = Exchange('the PyTorch state cannot be converted', params, mapping)
    checked_transformation('tx', tx)
    checked_names('state_dict', state_dict)
    groups, members = checked_run(state_dict, names, fresh, frozen, exchange)
    exchange.counterparts = counterparts_of(groups, members, lr_in_momentum, dialect, exchange)
    count = None if count is None else checked_count(count)
    left_out = {*fresh, *frozen}
    moved = [m for m in members if m.entry and m.name not in left_out]
    steps: dict[int, list[str]] = {}
    for member in moved:
        steps.setdefault(_step(member, exchange), []).append(member.name)
    if count is None and len(steps) > 1:
        listed = '; '.join(
            f'{step}: {", ".join(dict.fromkeys(at))}' for step, at in sorted(steps.items())
        )
        exchange.add(f'parameters have taken different numbers of steps ({listed}): pass count')
    arrays = {name: value for member in moved for name, value in member.arrays().items()}
    counts = steps if count is None else [count]
    label, check = lambda name: described(*name), functools.partial(check_shape, exchange)
    theirs = exchange.collected(arrays, counts, label, check)

    def describe(moment: str, path: str) -> str:
        slot = SLOTS.get(moment, moment)
        if path not in exchange.by_path:
            return f'{slot} of the parameter of {path!r}'
        name = exchange.by_path[path].theirs
        said = ', said to be frozen but with a place in tx,' if name in frozen else ''
        return described(slot, name) + said

    started = {member.path for member in members if member.name in fresh}
    return exchange.adopted(theirs, Trial(tx, tx.init(params), params), describe, started)


def _step(member: Member, exchange: Exchange) -> int:
    """The step count of an entry, which may hold only moments besides."""
    for key in sorted(member.entry.keys() - {*SLOTS.values(), 'step'}, key=str):
        exchange.add(f'{described(key, member.name)} is not part of the state of RMSProp')
    step = as_count(member.entry.get('step'), 'iuf')
    if step is None:
        exchange.add(f'step of {member.name!r} is missing or not a step count')
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
    """A dictionary for `optimizer.load_state_dict` of `torch.optim.RMSprop`.

    Args:
      state: The state of our transformation.
      params: Our parameters.
      mapping: The pairs.
      param_groups: `optimizer.state_dict()['param_groups']` of the optimizer that will continue.
        They show how it numbers its parameters, and are returned unchanged. They must be its own:
        `load_state_dict` does not compare names or shapes.
      names: The parameters' names in the optimizer's order, through all groups, unless the groups
        have them.
      fresh: Names of parameters in the groups that are written without state, such as those that
        are frozen here.
      tx: The transformation whose state it is, required if the state has a velocity. What it does
        is compared with the groups, as in `from_torch`.
      lr_in_momentum: As for `from_torch`.
      dialect: As for `from_torch`.
      as_tensor: Applied to every array: `torch.from_numpy` for a dictionary to load.

    Returns:
      `{'state': {number: {'step', 'square_avg', ...}}, 'param_groups': [...]}`.

    Raises:
      InterchangeError: Listing every parameter without moments, every moment without a parameter,
        and every group whose settings contradict our moments or `tx`.

    Warns:
      UserWarning: As for `from_torch`, if `tx` is given.
    """
    exchange = Exchange('the state cannot be written for PyTorch', params, mapping)
    checked_groups(param_groups, exchange)
    checked_collection('fresh', fresh)
    if not callable(as_tensor):
        raise TypeError(f'as_tensor must be a function of an array, got {as_tensor!r}.')
    members = members_of(param_groups, {}, names, exchange)
    exchange.counterparts = counterparts_of(
        param_groups, members, lr_in_momentum, dialect, exchange
    )
    moments, trial = exchange.our_moments('PyTorch', tx, state)
    written = [member for member in members if member.name not in fresh]
    for path in exchange.counterparts.keys() - {member.path for member in written}:
        for column in moments.columns.values():
            column.pop(path, None)

    def adapt(moment: str, path: str, array: np.ndarray) -> np.ndarray:
        label = described(moment, path)
        if path not in exchange.counterparts:
            raise EntryError(f'{label} belongs to no parameter of the groups')
        if moment not in SLOTS:
            raise EntryError(f'PyTorch keeps no {moment}')
        return _as_complex(label, array, exchange.leaves.get(path))

    arrays = exchange.released(moments, trial, adapt)
    for member in written:
        _check_group(member, param_groups[member.group], moments, exchange)
    exchange.raise_if_any()
    entries = {m.name: {'step': as_tensor(np.array(moments.count, np.float32))} for m in written}
    for (slot, name), array in arrays.items():
        entries[name][slot] = as_tensor(array)
    groups = [dict(group) for group in param_groups]
    return {'state': {m.number: entries[m.name] for m in written}, 'param_groups': groups}


def _check_group(member: Member, group: Group, moments: Moments, exchange: Exchange) -> None:
    """Notes settings that do not fit the moments in the state."""
    name, columns = member.name, moments.columns
    if member.path not in columns['nu']:
        exchange.add(f'the state has no second moment for {name!r}')
        return
    for moment, key in (('trace', 'momentum'), ('mu', 'centered')):
        wanted, held = as_number(group.get(key, 0)), member.path in columns[moment]
        if key in group and wanted is None:
            exchange.add(f'{name!r} has {key}={group[key]!r} in its group, which is not a number')
        elif key in group and bool(wanted) != held:
            has = 'has' if held else 'has no'
            exchange.add(
                f'{name!r} has {key}={group[key]} in its group, but the state {has} {moment}'
            )


def _as_complex(label: str, array: np.ndarray, param: Any) -> np.ndarray:
    """A moment of a complex parameter, which we may hold as pairs of reals."""
    if not np.iscomplexobj(param) or np.iscomplexobj(array):
        return array
    if array.shape != (*param.shape, 2):
        raise EntryError(
            f'{label} is shared by real and imaginary parts, and PyTorch has one for each'
        )
    return array[..., 0] + 1j * array[..., 1]
