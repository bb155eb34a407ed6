"""Ports a PyTorch run from its file, and writes and restores the port with Orbax."""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import dialects
from rmsprop_jax._checks import checked_flag, checked_leaves, leaf_dtype
from rmsprop_jax._command import install
from rmsprop_jax._core.wrapped import as_pure
from rmsprop_jax._types import ScalarOrSchedule, canonical
from rmsprop_jax.interchange._files import (
    Checkpoint,
    checked_path,
    json_object,
    read_checkpoint,
    shown,
)
from rmsprop_jax.interchange._mapping import (
    InterchangeError,
    Pair,
    as_number,
    named_leaves,
    parameters_from,
)
from rmsprop_jax.interchange._propose import Proposal, propose_names, propose_pairs
from rmsprop_jax.interchange.torch import from_torch, torch_optimizer

_RECORD, _ARRAYS = 'port.json', 'arrays'
DIALECTS = {
    'torch': dialects.torch,
    'timm': dialects.timm,
    'stable_baselines3': dialects.stable_baselines3,
}


@dataclasses.dataclass(frozen=True)
class Port:
    """A PyTorch run, ported to JAX.

    Attributes:
      params: The parameters, in a tree like the given one.
      buffers: The buffers, likewise.
      tx: The transformation that the groups describe, or None if there is no optimizer.
      state: Its state, or None.
    """

    params: Any
    buffers: Any = None
    tx: optax.GradientTransformationExtraArgs | None = None
    state: Any = None

    @property
    def resumed(self) -> optax.GradientTransformationExtraArgs:
        """`tx` with an `init` that returns `state`, for classes that call `init` themselves.

        `nnx.Optimizer(model, port.resumed, wrt=nnx.Param)` continues where PyTorch stopped, and so
        does Linen's `TrainState.create(..., tx=port.resumed)`.

        Raises:
          ValueError: If there is no optimizer.
        """
        if self.tx is None:
            raise ValueError('resumed needs an optimizer, and the checkpoint has none.')
        return self.tx._replace(init=lambda _: self.state)


def from_checkpoint(
    checkpoint: Checkpoint | str | os.PathLike[str],
    params: Any,
    buffers: Any = None,
    *,
    known: Iterable[Pair] = (),
    ignore: Collection[str] = (),
    accept_guesses: bool = False,
    names: Sequence[str] | None = None,
    fresh: Collection[str] = (),
    frozen: Collection[str] = (),
    learning_rate: ScalarOrSchedule | Sequence[ScalarOrSchedule] | None = None,
    dialect: Callable[..., optax.GradientTransformation] | None = None,
) -> Port:
    """Parameters, a transformation and its state from a PyTorch checkpoint.

    This is `read_checkpoint`, `propose_pairs`, `parameters_from`, `torch_optimizer` and
    `from_torch` in one call. Call them one by one if you need their other options.

    Args:
      checkpoint: The file, or what `read_checkpoint` returned.
      params: Our parameters, or a tree of `jax.ShapeDtypeStruct`s like them. Flax NNX:
        `nnx.state(model, nnx.Param)`.
      buffers: The same for arrays that are not parameters: `nnx.state(model, nnx.BatchStat)`.
      known: Pairs that you know, as for `propose_pairs`.
      ignore: Their names that are left out.
      accept_guesses: Whether to accept guesses. Read them first: the error lists them, and so does
        `print(propose_pairs(...))`.
      names: The parameters' names in the optimizer's order, where its groups do not have them.
      fresh: As for `torch_optimizer`. Without it, parameters that have no state in the file get no
        update.
      frozen: As for `torch_optimizer`.
      learning_rate: As for `torch_optimizer`.
      dialect: As for `torch_optimizer`.

    Raises:
      InterchangeError: Listing every path without a pair, array that is left over, and guess that
        is not accepted; or as the functions above do.

    Source: PyTorch 2.13.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from rmsprop_jax import interchange
      >>> group = {'params': [0], 'param_names': ['fc.weight'], 'lr': 0.1, 'alpha': 0.99,
      ...          'eps': 1e-8, 'weight_decay': 0, 'momentum': 0, 'centered': False,
      ...          'maximize': False}
      >>> entry = {'step': 7, 'square_avg': np.ones((3, 2), 'f')}
      >>> run = interchange.Checkpoint(
      ...     {'fc.weight': np.ones((3, 2), 'f')}, {'state': {0: entry}, 'param_groups': [group]})
      >>> port = interchange.from_checkpoint(run, {'fc': {'kernel': jnp.zeros((2, 3))}})
      >>> gradients = {'fc': {'kernel': jnp.ones((2, 3))}}
      >>> updates, state = port.tx.update(gradients, port.state, port.params)
      >>> print(updates['fc']['kernel'][0, 0])
      -0.1
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    checked_flag('accept_guesses', accept_guesses)
    params, buffers = as_pure(params), as_pure(buffers)
    proposal = propose_pairs(checkpoint.arrays, params, buffers, known=known, ignore=ignore)
    names, _, problems = settled(checkpoint, proposal, names, ignore, accept_guesses)
    if problems:
        raise InterchangeError(
            'the checkpoint cannot be converted (pass what you know as known, ignore or names, '
            'and accept_guesses if all guesses are right)',
            problems,
        )
    whose = {'names': names, 'fresh': fresh, 'frozen': frozen, 'dialect': dialect}
    return ported(checkpoint, params, buffers, proposal, learning_rate, whose)[0]


def settled(
    checkpoint: Checkpoint,
    proposal: Proposal,
    names: Sequence[str] | None,
    ignore: Collection[str],
    accept_guesses: bool,
) -> tuple[Sequence[str] | None, str | None, list[str]]:
    """The names in the optimizer's order, a doubt about them, and all that prevents a port.

    Args:
      names: The caller's names, or None to propose them. They are None again if that fails.
    """
    doubt = None
    if checkpoint.optimizer is not None and names is None:
        names, doubt = propose_names(checkpoint, proposal)
    problems = faults(proposal, ignore, accept_guesses)
    if doubt is not None:
        kind = 'missing' if names is None else 'guessed'
        if names is None or not accept_guesses:
            problems.append(f'{kind}: {doubt}')
        doubt = f'{kind:9} names of the optimizer: {doubt}'
    return names, doubt, problems


def ported(
    checkpoint: Checkpoint,
    params: Any,
    buffers: Any,
    proposal: Proposal,
    learning_rate: Any,
    whose: dict[str, Any],
) -> tuple[Port, dict[str, Any]]:
    """The port of a settled proposal, and what `restore_port` needs to make `tx` again.

    Args:
      whose: The arguments that `torch_optimizer` and `from_torch` share.
    """
    new = _arranged(checkpoint, params, proposal.pairs)
    stats = None if buffers is None else _arranged(checkpoint, buffers, proposal.buffers)
    if checkpoint.optimizer is None:
        return Port(new, stats), {}
    tx = torch_optimizer(
        checkpoint.optimizer, new, proposal.pairs, learning_rate=learning_rate, **whose
    )
    state = from_torch(checkpoint.optimizer, tx, new, proposal.pairs, **whose)
    return Port(new, stats, tx, state), {
        'pairs': [[pair.theirs, pair.ours] for pair in proposal.pairs],
        **{key: [*whose[key]] for key in ('names', 'fresh', 'frozen')},
        'with_state': [n for n, entry in checkpoint.optimizer['state'].items() if entry],
        'param_groups': [
            # A learning rate may be a tensor.
            {k: x.item() if isinstance(x, np.ndarray) and not x.ndim else x for k, x in g.items()}
            for g in checkpoint.optimizer['param_groups']
        ],
    }


def faults(proposal: Proposal, ignore: Collection[str], accept_guesses: bool) -> list[str]:
    """All that prevents a port of a proposal, one line each."""
    lines = [f'missing: {path!r}: {reason}' for path, reason in proposal.missing.items()]
    for name, reason in proposal.unused.items():
        if name not in ignore and not name.endswith('num_batches_tracked'):
            lines.append(f'left over: {shown(name)!r}: {reason} (ignore it, or pair it)')
    if not accept_guesses:
        theirs = {str(p.ours): shown(p.theirs) for p in (*proposal.pairs, *proposal.buffers)}
        lines += [
            f'guessed: {theirs[path]!r} for {path!r}: {reason}'
            for path, reason in proposal.guesses.items()
        ]
    return lines


def _arranged(checkpoint: Checkpoint, like: Any, pairs: Sequence[Pair]) -> Any:
    wanted = {pair.theirs: checkpoint.arrays[pair.theirs] for pair in pairs}
    return parameters_from(wanted, like, pairs)


def save_template(path: str | os.PathLike[str], params: Any, buffers: Any = None) -> None:
    """Writes the paths, shapes and dtypes of a model as JSON, for the command's `--like`.

    Args:
      path: The file to write.
      params: The parameters, or shapes: `nnx.state(model, nnx.Param)`, `variables['params']`.
      buffers: The same for arrays that are not parameters.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interchange
      >>> path = pathlib.Path(tempfile.mkdtemp(), 'like.json')
      >>> interchange.save_template(path, {'fc': {'bias': jnp.zeros(3)}})
      >>> print(path.read_text())
      {"params": [
        {"path": ["fc", "bias"], "shape": [3], "dtype": "float32"}
      ], "buffers": []}
    """
    written = []
    for name, tree in (('params', params), ('buffers', buffers)):
        entries = []
        for keys, leaf in checked_leaves(name, tree):
            names = [getattr(key, 'key', getattr(key, 'idx', None)) for key in canonical(keys)]
            if not all(isinstance(key, str | int) for key in names):
                raise TypeError(f'{name} must be dictionaries, got the path {keys!r}.')
            entries.append(
                {
                    'path': names,
                    'shape': [*np.shape(leaf)],
                    'dtype': leaf_dtype(name, leaf).name,
                }
            )
        listed = ',\n  '.join(map(json.dumps, entries))
        written.append(f'"{name}": [' + (f'\n  {listed}\n' if entries else '') + ']')
    checked_path('path', path).write_text('{' + ', '.join(written) + '}')


def read_template(path: Path) -> tuple[Any, Any]:
    """The shapes of parameters and of buffers (None without any) that `save_template` wrote.

    Raises:
      InterchangeError: If the file is not a template.
    """
    trees: dict[str, dict[Any, Any]] = {'params': {}, 'buffers': {}}
    try:
        found = json_object(path.read_bytes())
        for name, tree in trees.items():
            for entry in found[name]:
                *parents, leaf = entry['path']
                at = tree
                for key in parents:
                    at = at.setdefault(key, {})
                shape, dtype = tuple(entry['shape']), jnp.dtype(entry['dtype'])
                if leaf in at or not all(type(n) is int and n >= 0 for n in shape):
                    raise ValueError(f'{entry["path"]!r} is there twice, or has no shape')
                at[leaf] = jax.ShapeDtypeStruct(shape, dtype)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InterchangeError(
            f'{path} is not a template (write one with interchange.save_template)', [repr(error)]
        ) from None
    return trees['params'], trees['buffers'] or None


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ImportError(
            'Writing and restoring need Orbax: pip install orbax-checkpoint, or '
            f'{install("files")}.'
        ) from None
    return ocp


def write_port(folder: Path, port: Port, told: dict[str, Any], dialect: str | None) -> None:
    """Writes a port to a new folder. The record comes last, so that a partial port has none."""
    ocp = _orbax()
    optimizer = {**told, 'dialect': dialect} if told else None
    try:
        record = json.dumps({'shapes': _shapes(port), 'optimizer': optimizer}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InterchangeError('the parameter groups cannot be written', [str(error)]) from None
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(f'{folder} exists already.') from None
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / _ARRAYS).absolute(), _saved(port))
    (folder / _RECORD).write_text(record)


def _shapes(port: Port) -> dict[str, list[int]]:
    """The shapes of parameters and buffers by path."""
    leaves = named_leaves({'params': port.params, 'buffers': port.buffers})
    return {path: [*leaf.shape] for path, leaf in leaves.items()}


def _saved(port: Port) -> dict[str, Any]:
    found = {'params': port.params, 'buffers': port.buffers, 'opt_state': port.state}
    return {name: tree for name, tree in found.items() if tree is not None}


def as_schedules(rates: Any) -> Any:
    """Constant rates as schedules, so that the state fits any schedule. Other values are kept."""
    if isinstance(rates, list | tuple):
        return [as_schedules(rate) for rate in rates]
    return rates if as_number(rates) is None else optax.constant_schedule(rates)


def rates_of(groups: Sequence[Any]) -> list[Any] | None:
    """The rates of parameter groups, or None if one has none."""
    return [g['lr'] for g in groups] if groups and all('lr' in g for g in groups) else None


def restore_port(
    folder: str | os.PathLike[str],
    params: Any,
    buffers: Any = None,
    *,
    learning_rate: ScalarOrSchedule | Sequence[ScalarOrSchedule] | None = None,
) -> Port:
    """Restores what `python -m rmsprop_jax.interchange --out` wrote.

    Args:
      folder: The folder.
      params: Our parameters or their shapes, as in the template. Restored arrays have their
        shardings.
      buffers: The same for arrays that are not parameters.
      learning_rate: A schedule of the number of updates, or a number; or a list with one of them
        for each group. Required if the groups show that a scheduler changed the rates; otherwise
        the rates stay as they are.

    Raises:
      InterchangeError: If the folder is not a complete port, or the trees differ from the template;
        or as `torch_optimizer` does.
      ImportError: If Orbax is missing.
    """
    ocp = _orbax()
    path = checked_path('folder', folder)
    for name, tree in (('params', params), ('buffers', buffers)):
        checked_leaves(name, tree)
    theirs, told = _read_record(path)
    port = Port(*jax.tree.map(_array, (as_pure(params), as_pure(buffers))))
    ours = _shapes(port)
    if ours != theirs:
        raise InterchangeError(
            f'{path} has other shapes than params and buffers',
            [
                f'{at!r} is {theirs.get(at, "missing")} there, and {ours.get(at, "missing")} here'
                for at in sorted(ours.keys() | theirs.keys())
                if ours.get(at) != theirs.get(at)
            ],
        )
    if told is not None:
        port = _with_optimizer(port, told, learning_rate)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore((path / _ARRAYS).absolute(), _saved(port))
    return dataclasses.replace(
        port, params=found['params'], buffers=found.get('buffers'), state=found.get('opt_state')
    )


def _read_record(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The shapes of a port, and the arguments of its `torch_optimizer`.

    Raises:
      InterchangeError: If the record is missing or malformed.
    """
    try:
        record = json_object((folder / _RECORD).read_bytes())
        shapes, told = dict(record['shapes']), record['optimizer']
        if told is None:
            return shapes, None
        return shapes, {
            'state_dict': {
                'state': {number: {'step': 0} for number in told['with_state']},
                'param_groups': [dict(group) for group in told['param_groups']],
            },
            'mapping': [Pair(*names) for names in told['pairs']],
            'dialect': DIALECTS.get(told['dialect']),
            **{key: told[key] for key in ('names', 'fresh', 'frozen')},
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InterchangeError(f'{folder} is not a complete port', [repr(error)]) from None


def _with_optimizer(port: Port, told: dict[str, Any], learning_rate: Any) -> Port:
    groups = told['state_dict']['param_groups']
    if learning_rate is None and not any('initial_lr' in group for group in groups):
        learning_rate = rates_of(groups)
    tx = torch_optimizer(params=port.params, learning_rate=as_schedules(learning_rate), **told)
    return dataclasses.replace(port, tx=tx, state=tx.init(port.params))


def _array(leaf: Any) -> jax.Array:
    """An array with the shape, dtype and sharding in which Orbax restores."""
    return leaf if isinstance(leaf, jax.Array) else jnp.zeros(np.shape(leaf), leaf_dtype('', leaf))
