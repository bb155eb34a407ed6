"""Every case in every way and every home gives the numbers of each leaf by itself.

The table, with its dimensions, its exceptions and what fails today, is `crossing.py`.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from crossing import (
    ALL,
    CELLS,
    COMPLEX,
    EXCEPTIONS,
    FAULTS,
    HOMES,
    JUMPS,
    MASKED,
    ONCE_BROKEN,
    PAIRS,
    REFUSABLE,
    SAMPLE,
    WAYS,
    Cell,
    Leaves,
    leaves_of,
    only_matrices,
)
from flax import linen, nnx
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rmsprop_jax import sharding

pytestmark = pytest.mark.extended

# Unoptimized, programs compile in three quarters of the time.
compiled = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
STEPS = 3
# A complex array whose entries have this phase behaves as the real array of their magnitudes does,
# wherever squares are |g|^2.
PHASE = 0.6 + 0.8j


# Of the cells outside of the sample, every so many are run.
EVERY = int(os.environ.get('CROSSING_EVERY', '1'))


def each(kind: str) -> Any:
    """The cells of a kind: those outside of the sample are slow, and those with a fault fail."""
    params = []
    for number, cell in enumerate(CELLS[kind]):
        if cell not in SAMPLE and number % EVERY:
            continue
        marks = [] if cell in SAMPLE else [pytest.mark.slow]
        marks += [pytest.mark.xfail(reason=row.reason) for row in FAULTS if row.holds(cell)]
        params.append(pytest.param(cell, id=cell.name, marks=marks))
    return pytest.mark.parametrize('cell', params)


# Gradients: odd functions of each entry by itself, whose rows of zeros stay so


def _sine(p: jax.Array) -> jax.Array:
    if p.dtype == jnp.bfloat16:
        p = p.astype(jnp.float32)  # Compiled or not, a narrow sine differs in its last place.
    # The entry that skip_nonfinite is to skip is far off.
    return jnp.where(jnp.abs(p) > 10, jnp.nan, jnp.sin(2 * p))


def _sine_of_parts(p: jax.Array) -> jax.Array:
    return jax.lax.complex(_sine(p.real), _sine(p.imag)) if jnp.iscomplexobj(p) else _sine(p)


def _sine_of_magnitude(p: jax.Array) -> jax.Array:
    size = jnp.abs(p)
    return p / jnp.where(size == 0, 1, size) * _sine(size) if jnp.iscomplexobj(p) else _sine(p)


def gradient(cell: Cell, params: Any) -> Any:
    """Gradients in the structure of the parameters, which may be that of any home."""
    leaf = _sine_of_parts if cell.case in PAIRS else _sine_of_magnitude
    return jax.tree.map(leaf, params)


# Homes


class Home(NamedTuple):
    """Where parameters and state live.

    Attributes:
      hold: Puts leaves, or their partitions, in the home.
      start: From a transformation and the parameters in their home to both with the state.
      step: From a transformation, a function to gradients, and both to both, with extra arguments
        for `update`.
      leaves: From parameters in their home to a dictionary.
      read: From both to the parameters in their home and the state.
      specs: From a run, parameters in their home and the partitions of leaves to those of the
        parameters, those of both, and the argument of `update`.
      mask: From parameters in their home to a tree of booleans: which of them have two axes.
    """

    hold: Callable[[Leaves], Any]
    leaves: Callable[[Any], Leaves]
    start: Callable[[Any, Any], Any]
    step: Callable[..., Any]
    read: Callable[[Any], tuple[Any, Any]]
    specs: Callable[['Run', Any, Leaves], tuple[Any, Any, Any]]
    mask: Callable[[Any], Any] = only_matrices


def _start(tx: Any, params: Any) -> Any:
    return params, tx.init(params)


def _step(tx: Any, gradient: Any, both: Any, **extra: Any) -> Any:
    params, state = both
    updates, state = optax.with_extra_args_support(tx).update(
        gradient(params), state, params, **extra
    )
    return optax.apply_updates(params, updates), state


class Net(eqx.Module):
    """An Equinox module that can be called, as most can."""

    bias: Any
    cube: Any
    head: Any
    kernel: Any
    scale: Any

    def __call__(self, x: Any) -> Any:
        raise AssertionError('nobody asked the model for its output')


def _called(**_: Any) -> Any:
    raise AssertionError('nobody asked the function for its output')


class LinenNet(linen.Module):
    """Parameters that start with given leaves."""

    given: Any

    @linen.compact
    def __call__(self) -> Any:
        return {name: self.param(name, lambda _, x=x: x) for name, x in self.given.items()}


def _linen_start(tx: Any, params: Any) -> Any:
    return train_state.TrainState.create(apply_fn=_called, params=params, tx=tx)


def _linen_step(tx: Any, gradient: Any, state: Any) -> Any:
    del tx
    return state.apply_gradients(grads=gradient(state.params))


class NnxNet(nnx.Module):
    def __init__(self, leaves: Leaves):
        for name, x in leaves.items():
            setattr(self, name, nnx.Param(x))


def _nnx_start(tx: Any, model: Any) -> Any:
    net = nnx.merge(*model)
    return nnx.split((net, nnx.Optimizer(net, tx, wrt=nnx.Param)))


def _nnx_step(tx: Any, gradient: Any, both: Any, **extra: Any) -> Any:
    del tx
    net, optimizer = nnx.merge(*both)
    optimizer.update(net, gradient(nnx.state(net, nnx.Param)), **extra)
    return nnx.split((net, optimizer))


def _nnx_read(both: Any) -> Any:
    net, optimizer = nnx.merge(*both)
    return nnx.split(net), nnx.as_pure(optimizer.opt_state)


def _hold_specs(run: 'Run', params: Any, specs: Leaves) -> tuple[Any, Any, Any]:
    held = run.home.hold(specs)
    return held, (held, sharding.state_shardings(run.tx, params, held)), held


def _nnx_specs(run: 'Run', params: Any, specs: Leaves) -> tuple[Any, Any, Any]:
    """By name, since the state of a module and its optimizer holds more than parameters."""

    def leaf(path: Any, _: Any) -> Any:
        names = [name for name in specs if f"['{name}']" in jax.tree_util.keystr(path)]
        return specs[names[0]] if names else P()

    def named(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(leaf, tree)

    return named(params), named(jax.eval_shape(run.start, params)), specs


_dictionary = Home(
    lambda leaves: leaves, lambda params: params, _start, _step, lambda both: both, _hold_specs
)
HOME = {
    'plain': _dictionary,
    'complex': _dictionary,
    'equinox': _dictionary._replace(
        hold=lambda leaves: Net(**{'head': None, **leaves}),
        leaves=lambda net: {k: v for k, v in vars(net).items() if v is not None},
    ),
    'partial': _dictionary._replace(
        hold=lambda leaves: jax.tree_util.Partial(_called, **leaves),
        leaves=lambda partial: partial.keywords,
    ),
    'linen': _dictionary._replace(
        hold=lambda leaves: LinenNet(leaves).init(jax.random.key(0))['params'],
        start=_linen_start,
        step=_linen_step,
        read=lambda state: (state.params, state.opt_state),
    ),
    'nnx': Home(
        hold=lambda leaves: nnx.split(NnxNet(leaves)),
        leaves=lambda model: nnx.to_pure_dict(model[1]),
        start=_nnx_start,
        step=_nnx_step,
        read=_nnx_read,
        specs=_nnx_specs,
        mask=lambda model: only_matrices(nnx.as_pure(model[1])),
    ),
}


# Ways


@dataclasses.dataclass(frozen=True)
class Run:
    """A cell, made ready to run: one transformation in one home."""

    cell: Cell
    tx: Any
    home: Home

    @property
    def steps(self) -> int:
        return STEPS if self.cell.kind == 'mask' else STEPS * self.cell.of.every

    def start(self, params: Any) -> Any:
        return self.home.start(self.tx, params)

    def step(self, both: Any, **extra: Any) -> Any:
        return self.home.step(self.tx, functools.partial(gradient, self.cell), both, **extra)

    def loop(self, both: Any, step: Any) -> Any:
        for _ in range(self.steps):
            both = step(both)
        return both


def eager(run: Run, leaves: Leaves) -> Any:
    return run.loop(run.start(run.home.hold(leaves)), run.step)


def jitted(run: Run, leaves: Leaves) -> Any:
    return run.loop(compiled(run.start)(run.home.hold(leaves)), compiled(run.step))


def scanned(run: Run, leaves: Leaves) -> Any:
    def train(params: Any) -> Any:
        step = lambda both, _: (run.step(both), None)  # noqa: E731
        return jax.lax.scan(step, run.start(params), None, length=run.steps)[0]

    return compiled(train)(run.home.hold(leaves))


def vmapped(run: Run, leaves: Leaves) -> Any:
    """The second entry of a batch, whose first one starts at half of it."""
    many = run.home.hold(jax.tree.map(lambda x: jnp.stack([x / 2, x]), leaves))
    both = run.loop(compiled(jax.vmap(run.start))(many), compiled(jax.vmap(run.step)))
    return jax.tree.map(lambda x: x[1], both)


def donated(run: Run, leaves: Leaves) -> Any:
    """Both parameters and state are given up at every step, the ones from `init` too."""
    both = run.start(run.home.hold(jax.tree.map(jnp.copy, leaves)))
    return run.loop(both, compiled(run.step, donate_argnums=0))


def specs_of(leaves: Leaves, axis: int) -> Leaves:
    """Every leaf that has the axis is split along it."""
    split = P(*[None] * axis, 'data')
    return {name: split if jnp.ndim(x) > axis else P() for name, x in leaves.items()}


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ('data',), axis_types=(kind,))


def on_mesh(run: Run, leaves: Leaves, kind: AxisType, axis: int) -> Any:
    mesh = mesh_of(kind)
    places = {name: NamedSharding(mesh, spec) for name, spec in specs_of(leaves, axis).items()}
    return jitted(run, jax.device_put(leaves, places))


def mapped(run: Run, leaves: Leaves, axis: int, check_vma: bool, inside: bool = False) -> Any:
    """Under `jax.shard_map`, with a state that is made outside or inside."""
    params = run.home.hold(leaves)
    specs, both_specs, partition_specs = run.home.specs(run, params, specs_of(leaves, axis))
    over = functools.partial(
        jax.shard_map, mesh=mesh_of(AxisType.Auto), out_specs=both_specs, check_vma=check_vma
    )
    start = compiled(over(run.start, in_specs=(specs,))) if inside else run.start
    step = functools.partial(run.step, partition_specs=partition_specs)
    return run.loop(start(params), compiled(over(step, in_specs=(both_specs,))))


WAY = {
    'eager': eager,
    'jit': jitted,
    'scan': scanned,
    'vmap': vmapped,
    'donated': donated,
    'inside-0': functools.partial(mapped, axis=0, check_vma=True, inside=True),
}
for _axis in range(3):
    WAY[f'auto-{_axis}'] = functools.partial(on_mesh, kind=AxisType.Auto, axis=_axis)
    WAY[f'explicit-{_axis}'] = functools.partial(on_mesh, kind=AxisType.Explicit, axis=_axis)
    WAY[f'mapped-{_axis}'] = functools.partial(mapped, axis=_axis, check_vma=True)
    WAY[f'unchecked-{_axis}'] = functools.partial(mapped, axis=_axis, check_vma=False)


# Far below every epsilon.
STEP = 1e-13

# What the results must be


def moments(state: Any) -> dict[str, Any]:
    found = {name: optax.tree.get(state, name) for name in ('nu', 'mu', 'var', 'trace')}
    return {name: moment for name, moment in found.items() if moment is not None}


# Leaves are coupled by a norm of all, or by a count of what has been skipped in any.
COUPLED = ('torch_clip_grad_norm', 'skip_nonfinite-coordinate', 'skip_nonfinite-leaf-uint8')
Result = tuple[Leaves, Any, Leaves]


@functools.cache
def alone(cell: Cell, scale: float = 1.0) -> Result:
    """Each leaf by itself in a plain dictionary: how far it came, its state, and its start.

    Where leaves are coupled, they are all together.
    """
    leaves = leaves_of(cell.case, scale)
    groups = [leaves] if cell.case in COUPLED else [{name: x} for name, x in leaves.items()]

    def of_group(group: Leaves) -> Run:
        mask = {name: x.ndim > 1 for name, x in group.items()}
        tx = MASKED[cell.case](mask) if cell.kind == 'mask' else cell.of.tx
        return Run(cell, tx, _dictionary)

    runs = list(map(of_group, groups))

    # All in one program: eagerly each leaf compiles one.
    @compiled
    def step(many: Any) -> Any:
        return [run.step(both) for run, both in zip(runs, many, strict=True)]

    many = runs[0].loop([run.start(group) for run, group in zip(runs, groups, strict=True)], step)
    params = {name: x for group, _ in many for name, x in group.items()}
    return moved(params, leaves), _merged([state for _, state in many], set(leaves)), leaves


def _merged(states: list[Any], names: set[str]) -> Any:
    """One state, of the states of single leaves."""

    def of_leaf(node: Any) -> bool:
        return isinstance(node, dict) and bool(node) and set(node) <= names

    def merge(*parts: Any) -> Any:
        if not of_leaf(parts[0]):
            return parts[0]
        return dict(sorted(item for part in parts for item in part.items()))

    return jax.tree.map(merge, *states, is_leaf=of_leaf)


def moved(params: Leaves, start: Leaves) -> Leaves:
    return {name: np.asarray(params[name]) - np.asarray(start[name]) for name in sorted(start)}


def is_complex(cell: Cell, name: str) -> bool:
    return cell.home == 'complex' and name in COMPLEX


def joined(cell: Cell, name: str, whole: Any, real: Any, imag: Any) -> Any:
    """What a real leaf, or a complex one, is by what real ones are."""
    if not is_complex(cell, name):
        return whole
    if cell.case in PAIRS:
        return np.asarray(real) + 1j * np.asarray(imag)
    return np.complex64(PHASE) * np.asarray(whole)


def parts(cell: Cell) -> tuple[Result, Result, Result]:
    """The results for the leaves, and for the real and the imaginary part of complex ones."""
    is_pairs = cell.home == 'complex' and cell.case in PAIRS
    cell = cell._replace(way='jit', home='plain')
    whole, *others = (alone(cell, scale) for scale in (1.0, *(PHASE.real, PHASE.imag) * is_pairs))
    real, imag = others or (whole, whole)
    return whole, real, imag


def start_of(cell: Cell) -> Leaves:
    whole, real, imag = (result[2] for result in parts(cell))
    return {k: jnp.asarray(joined(cell, k, whole[k], real[k], imag[k])) for k in whole}


# Different fusions round differently, and a small variance amplifies that, as in test_contract.py.
NEAR = {'rtol': 1e-4, 'atol': 1e-5}


def assert_near(cell: Cell, got: Any, expected: Any) -> None:
    """Equal but for rounding.

    Where statistics or parameters are rounded at random, a bit in the last place of a float32 may
    round a few of them to the other side; another path of a leaf, and another place in it as a part
    of a complex number has, have other random bits.
    """
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    if not (cell.of.compact or cell.of.rounds_params):
        np.testing.assert_allclose(got, expected, **NEAR)
        return
    got, expected = got.astype(np.complex64), expected.astype(np.complex64)
    off = ~np.isclose(got, expected, **NEAR)
    has_own_bits = cell.home in ('equinox', 'partial', 'complex' if cell.case in PAIRS else '')
    assert off.mean() <= (1.0 if has_own_bits else 0.005)
    unit = 2**-2 if cell.has_bytes or cell.of.rounds_params else 2**-6
    np.testing.assert_allclose(got, expected, rtol=unit, atol=unit * np.abs(expected).max())


def _real_dtypes(stored: Any) -> set[Any]:
    return {np.empty(0, x.dtype).real.dtype for x in jax.tree.leaves(stored)}


def _leaves(cell: Cell, state: Any) -> list[Any]:
    """In one order: NNX makes mappings of named tuples, which come in the order of their keys."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    if cell.home == 'nnx':
        leaves.sort(key=lambda item: re.findall(r'\w+', jax.tree_util.keystr(item[0])))
    return [leaf for _, leaf in leaves]


def assert_state_is(cell: Cell, got: Any, expected: Any) -> None:
    if cell.home == 'complex':
        # How complex statistics are laid out is each dialect's own.
        got, expected = moments(got), moments(expected)
        assert set(got) == set(expected)
        for name, leaves in expected.items():
            for leaf in leaves:
                assert _real_dtypes(got[name][leaf]) == _real_dtypes(leaves[leaf]), (name, leaf)
        return
    got, expected = (_leaves(cell, state) for state in (got, expected))
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected]
    for x, y in zip(got, expected, strict=True):
        assert_near(cell, x, y)


def assert_results(cell: Cell, params: Leaves, state: Any) -> None:
    """Every leaf came as far as it does by itself, and its state is what it is then."""
    results = parts(cell)
    for name, distance in moved(params, start_of(cell)).items():
        assert_near(cell, distance, joined(cell, name, *(came[name] for came, _, _ in results)))
    assert_state_is(cell, state, results[0][1])


@each('run')
def test_run(cell):
    start = start_of(cell)
    run = Run(cell, cell.of.tx, HOME[cell.home])
    try:
        params, state = run.home.read(WAY[cell.way](run, start))
    except ValueError as refusal:
        if REFUSABLE.holds(cell) and any(f"['{name}']" in str(refusal) for name in start):
            return
        raise
    assert_results(cell, run.home.leaves(params), state)


@each('mask')
def test_mask(cell):
    """Only the leaves of two axes are decayed, or have rows that are left alone."""
    start, home = start_of(cell), HOME[cell.home]
    params = home.hold(start)
    mask = only_matrices if cell.way == 'function' else home.mask(params)
    run = Run(cell, MASKED[cell.case](mask), home)
    params, state = home.read(jitted(run, start))
    assert_results(cell, home.leaves(params), state)


@each('derivative')
def test_derivative(cell):
    """Finite where gradients, or some of them, are zero; at zero it is that of differences."""
    case = cell.of
    with jax.enable_x64(True):
        params = {
            k: x.astype('complex128' if is_complex(cell, k) else 'float64')
            for k, x in leaves_of(cell.case).items()
        }
        tx = case.tx
        state = tx.init(params)

        def last(grads: Any) -> Any:
            updates, after = None, state
            for _ in range(case.every):
                updates, after = tx.update(grads, after, params)
            return updates

        ones = jax.tree.map(jnp.ones_like, params)

        @compiled
        def derivative(grads: Any) -> Any:
            if cell.way == 'forward':
                return jax.jvp(last, (grads,), (ones,))[1]
            return jax.vjp(last, grads)[1](ones)[0]

        zero = jax.tree.map(jnp.zeros_like, params)
        some = jax.tree.map(jnp.sin, params)
        at_zero = derivative(zero)
        for leaf in jax.tree.leaves((at_zero, derivative(some))):
            assert jnp.isfinite(leaf).all()
        if case.compact or case.name in JUMPS:
            return
        differences = compiled(last)
        up, down = (differences(jax.tree.map(lambda x, h=h: h * x, ones)) for h in (STEP, -STEP))
        got, expected = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
            for tree in (at_zero, jax.tree.map(lambda x, y: (x - y) / (2 * STEP), up, down))
        )
        if cell.way == 'reverse':
            got, expected = got.real.sum(), expected.real.sum()
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_the_table_is_whole():
    """Every case meets every way, every home and every mode, unless an exception says why not."""
    assert (set(WAY), set(HOME)) == (set(WAYS), set(HOMES))
    for kind, cells in ALL.items():
        left_out = {cell for cell in cells if any(row.holds(cell) for row in EXCEPTIONS)}
        for x, y in (('case', 'way'), ('case', 'home'), ('way', 'home')):
            wanted, met = (
                {(getattr(cell, x), getattr(cell, y)) for cell in part}
                for part in (set(cells) - left_out, CELLS[kind])
            )
            assert met == wanted, (kind, x, y)


def test_the_sample_has_every_value():
    assert set(ONCE_BROKEN) <= SAMPLE
    for kind, cells in CELLS.items():
        for field in ('way', 'home') if kind == 'derivative' else ('case', 'way', 'home'):
            wanted, got = (
                {getattr(c, field) for c in part} for part in (cells, SAMPLE & set(cells))
            )
            assert got == wanted, (kind, field)


@pytest.mark.parametrize('row', [*EXCEPTIONS, *FAULTS, REFUSABLE], ids=lambda row: row.reason)
def test_no_row_is_idle(row):
    cells = CELLS if row in (*FAULTS, REFUSABLE) else ALL
    assert any(row.holds(cell) for kind in cells for cell in cells[kind])
