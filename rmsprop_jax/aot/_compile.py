"""Compiles a step for a target and reports on the program."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from rmsprop_jax._checks import checked_leaves, checked_transformation
from rmsprop_jax.aot._program import Collective, Program
from rmsprop_jax.aot._targets import devices


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled step. All amounts are per device.

    Attributes:
      target: The target that it was compiled for.
      devices: The number of devices that the program runs on.
      leaves: The number of parameter arrays; None if `params` was not given.
      parameters: The number of parameters on one device; None if `params` was not given.
      kernels: The number of instructions that run by themselves, except those on scalars alone.
      copies: The number of kernels that only copy.
      bytes_moved: The bytes that kernels read and write: the sum of their operands and results.
      bytes_minimum: The bytes needed to read the used arguments once and write the results once.
      bytes_estimated: The compiler's own count, if it has one. On TPU it counts an array twice if
        the array is prefetched into fast memory.
      temporary_bytes: The peak memory in addition to arguments and results.
      argument_bytes: The memory of the arguments.
      output_bytes: The memory of the results, including donated memory.
      donated_bytes: The memory that results take over from arguments.
      seconds: The compiler's own estimate of the time of a step, if it has one.
      collectives: The communication, by kind.
      custom_calls: The external functions that the program calls.
      host_transfers: The ways in which the program talks to the host while it runs.
      dtypes: The dtypes in the program, as XLA writes them.
    """

    target: str
    devices: int
    leaves: int | None
    parameters: int | None
    kernels: int
    copies: int
    bytes_moved: int
    bytes_minimum: int
    bytes_estimated: float | None
    temporary_bytes: int
    argument_bytes: int
    output_bytes: int
    donated_bytes: int
    seconds: float | None
    collectives: tuple[Collective, ...]
    custom_calls: frozenset[str]
    host_transfers: frozenset[str]
    dtypes: frozenset[str]
    _text: str = dataclasses.field(repr=False, compare=False)

    @property
    def kernels_per_leaf(self) -> float | None:
        """Kernels per parameter array."""
        return self.kernels / self.leaves if self.leaves else None

    @property
    def bytes_per_parameter(self) -> float | None:
        """Bytes moved per parameter."""
        return self.bytes_moved / self.parameters if self.parameters else None

    @property
    def minimum_per_parameter(self) -> float | None:
        """The fewest bytes per parameter that a step can move."""
        return self.bytes_minimum / self.parameters if self.parameters else None

    def text(self) -> str:
        """The program as the compiler printed it (HLO)."""
        return self._text

    def __str__(self) -> str:
        return table([self])


def compile_step(
    fn: Callable[..., Any],
    *args: Any,
    target: str = 'cpu',
    topology: str | int | None = None,
    donate: Sequence[int] = (),
    params: Any = None,
) -> Report:
    """Compiles `fn(*args)` for `target`, from shapes alone, and reports on the program.

    Args:
      fn: The step. If the function is already jitted, it keeps its own settings and `donate` is
        ignored.
      *args: The arguments of `fn`: trees of arrays or `jax.ShapeDtypeStruct`s. Values are not used.
        A `NamedSharding` over a mesh of `devices(target, topology)` is kept. Leaves without a
        `NamedSharding` are replicated over the mesh of the other leaves. If no leaf has one, they
        are replicated over all devices of `topology`, or put on one device if that is None.
      target: One of `targets()`.
      topology: The number of devices and their connection, as for `devices`.
      donate: Positions of the arguments whose memory the results may reuse. JAX assigns this memory
        in the order of arguments and results, so both should begin with the parameters and continue
        with the state. Otherwise a GPU program copies arrays that are in the wrong place.
      params: The parameters in `args`, or a tree like them, for counting leaves and elements.

    Raises:
      ValueError: If the target is unknown, it cannot have this topology, or `donate` holds
        anything but positions of arguments.
      TypeError: If `fn` is not a function, or a leaf is not an array.
      MissingPluginError: If the compiler for the target is not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rmsprop_jax import aot
      >>> x = jax.ShapeDtypeStruct((256, 128), jnp.float32)
      >>> report = aot.compile_step(lambda x: 2 * x + 1, x, target='cpu', params=x)
      >>> report.kernels, report.bytes_per_parameter
      (1, 8.0)
    """
    if not callable(fn):
        raise TypeError(f'fn must be a function, got {fn!r}.')
    for name, leaves in (('args', args), ('params', params)):
        checked_leaves(name, leaves)
    if not all(isinstance(x, int) and 0 <= x < len(args) for x in donate):
        raise ValueError(f'donate must hold positions among {len(args)} arguments, got {donate!r}.')
    placed = _place(args, target, topology)
    jitted: Any = fn if hasattr(fn, 'lower') else jax.jit(fn, donate_argnums=tuple(donate))
    compiled = jitted.lower(*placed).compile()
    return _report(compiled, target, _place(params, target, topology))


def compile_update(
    tx: optax.GradientTransformation,
    params: Any,
    *,
    gradients: Any = None,
    state: Any = None,
    target: str = 'cpu',
    topology: str | int | None = None,
) -> Report:
    """Compiles one step of an optimizer: the update and its addition to the parameters.

    Parameters and state are donated.

    Args:
      tx: Any gradient transformation.
      params: A tree of arrays or `jax.ShapeDtypeStruct`s, with or without shardings.
      gradients: A tree of the same kind for the gradients, if they differ from the parameters.
      state: A tree of the same kind for the state. By default, if the parameters have shardings,
        the state has the shardings that the compiled `tx.init` gives it.
      target: One of `targets()`.
      topology: As for `compile_step`.

    Raises:
      ValueError: If the target is unknown or cannot have this topology.
      MissingPluginError: If the compiler for the target is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import aot
      >>> params = {'w': jax.ShapeDtypeStruct((256, 128), jnp.float32)}
      >>> report = aot.compile_update(rmsprop_jax.rmsprop(1e-3), params, target='cpu')
      >>> report.minimum_per_parameter  # reads g, nu and p, writes nu and p
      20.0
    """
    checked_transformation('tx', tx)
    for name, tree in (('params', params), ('gradients', gradients), ('state', state)):
        checked_leaves(name, tree)
    placed = _place(params, target, topology)
    if state is None:
        state = _initial_state(tx, placed)
    return compile_step(
        update_and_apply(tx),
        placed,
        state,
        placed if gradients is None else gradients,
        target=target,
        topology=topology,
        donate=(0, 1),
        params=placed,
    )


def update_and_apply(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], Any]:
    """The last part of a training step, `(params, state, gradients) -> (params, state)`."""

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def table(reports: Iterable[Report], names: Iterable[str] | None = None) -> str:
    """A text table of reports, with one line per report; `names` label the lines.

    Raises:
      TypeError: If an entry of `reports` is not a `Report`, or an entry of `names` is not a string.
      ValueError: If the numbers of names and reports differ.
    """
    found = _listed('reports', reports, Report)
    labels = [''] * len(found) if names is None else _listed('names', names, str)
    if len(labels) != len(found):
        raise ValueError(f'names has {len(labels)} entries for {len(found)} reports.')
    rows = [['step', *_COLUMNS]]
    for label, report in zip(labels, found, strict=True):
        rows.append([label, *(cell(report) for cell in _COLUMNS.values())])
    if not any(labels):
        rows = [row[1:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _listed(name: str, values: Any, kind: type) -> list[Any]:
    found = list(values) if isinstance(values, Iterable) else [values]
    for value in found:
        if not isinstance(value, kind):
            raise TypeError(f'{name} must hold {kind.__name__}s, got {value!r}.')
    return found


# The cell of each column of `table`, by its heading.
_COLUMNS: dict[str, Callable[[Report], str]] = {
    'target': lambda r: r.target,
    'devices': lambda r: str(r.devices),
    'leaves': lambda r: _number(r.leaves),
    'kernels/leaf': lambda r: _number(r.kernels_per_leaf),
    'copies': lambda r: str(r.copies),
    'B/param': lambda r: _number(r.bytes_per_parameter),
    'minimum': lambda r: _number(r.minimum_per_parameter),
    'temporary': lambda r: _megabytes(r.temporary_bytes),
    'arguments': lambda r: _megabytes(r.argument_bytes),
    "compiler's time": lambda r: '-' if r.seconds is None else f'{r.seconds * 1e6:.0f} us',
    'collectives': lambda r: ', '.join(map(_in_words, r.collectives)) or '-',
}


def _in_words(collective: Collective) -> str:
    return f'{collective.count} {collective.kind} {_megabytes(collective.bytes)}'


def _number(value: float | None) -> str:
    return '-' if value is None else f'{value:.2f}'.rstrip('0').rstrip('.')


def _megabytes(amount: int) -> str:
    return f'{amount / 1e6:.1f} MB' if amount >= 1e5 else f'{amount} B'


def _place(tree: Any, target: str, topology: str | int | None) -> Any:
    """Makes leaves abstract, and shards leaves without a sharding over the target's devices."""
    given = [x.sharding for x in jax.tree.leaves(tree) if _is_placed(x)]
    if given:
        mesh = given[0].mesh
        default: Sharding = NamedSharding(mesh, PartitionSpec())
    else:
        found = devices(target, topology)
        default = SingleDeviceSharding(found[0])
        if topology is not None and len(found) > 1:
            default = NamedSharding(Mesh(np.array(found), ('data',)), PartitionSpec())

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if _is_placed(x) else default
        weak = getattr(x, 'weak_type', False)
        return jax.ShapeDtypeStruct(
            jnp.shape(x), jax.dtypes.result_type(x), sharding=sharding, weak_type=weak
        )

    return jax.tree.map(leaf, tree)


def _is_placed(x: Any) -> bool:
    return isinstance(getattr(x, 'sharding', None), NamedSharding)


def _initial_state(tx: optax.GradientTransformation, params: Any) -> Any:
    state = jax.eval_shape(tx.init, params)
    if not any(_is_placed(x) for x in jax.tree.leaves(params)):
        return state
    shardings = jax.jit(tx.init).lower(params).compile().output_shardings
    return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, shardings)


def _report(compiled: Any, target: str, params: Any) -> Report:
    text = compiled.as_text()
    program = Program(text)
    traffic = program.traffic()
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    seconds = cost.get('optimal_seconds')
    leaves = jax.tree.leaves(params)
    shards = [math.prod(x.sharding.shard_shape(x.shape)) for x in leaves]
    return Report(
        target=target,
        devices=_device_count(compiled),
        leaves=len(leaves) or None,
        parameters=sum(shards) or None,
        kernels=traffic.kernels,
        copies=traffic.copies,
        bytes_moved=traffic.bytes,
        bytes_minimum=program.minimum(),
        bytes_estimated=cost.get('bytes accessed'),
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        donated_bytes=memory.alias_size_in_bytes,
        # Some programs get a negative estimate.
        seconds=seconds if seconds and seconds > 0 else None,
        collectives=program.collectives(),
        custom_calls=program.custom_calls(),
        host_transfers=program.host_transfers(),
        dtypes=program.dtypes(),
        _text=text,
    )


def _device_count(compiled: Any) -> int:
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    return max((len(s.device_set) for s in shardings), default=1)
