"""Whether an accelerator computes what the CPU does, and what the frameworks have recorded."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import Case
from crossing import CROSSED, EXCEPTIONS, Cell
from drifting import OPTIONS, drift, rounded_drift
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from replaying import CONFIGURATIONS, golden_error

from benchmarks.accelerator.apart import BOUND, Apart, apart
from benchmarks.accelerator.rows import NOT_RUN, Measured, NotRunError, Row, row
from rmsprop_jax import sharding, storage

SHAPES = {'bias': (96,), 'cube': (2, 48, 96), 'kernel': (64, 96), 'scale': ()}
CALLS = 4


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is compared, and how much.

    Attributes:
      device: The accelerator's first device.
      cpu: The one whose results are taken to be right.
      quick: Whether only the script is tried.
    """

    device: Any
    cpu: Any
    quick: bool


def taken_on(device: Any, compiled: Callable[..., Any], *arguments: Any) -> Any:
    """The results of a compiled function on a device, in NumPy."""
    return jax.device_get(compiled(*jax.device_put(arguments, device)))


def compiled_for(setup: Setup, function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit`; where the accelerator is another CPU, without optimization.

    Two programs of one CPU then round differently, as those of two devices do.
    """
    on_cpu = setup.device.platform == 'cpu'
    return jax.jit(
        function, compiler_options={'xla_backend_optimization_level': 0} if on_cpu else None
    )


def left_out(section: str, what: str, bound: str, count: int) -> Iterator[Row]:
    """The row of what `--quick` leaves out, if it does."""
    if count:
        yield Row(section, f'{count} other {what}', bound, NOT_RUN, why='--quick takes a few')


# Encoders

FORMATS = {
    'bfloat16': storage.bfloat16(),
    'uint8': storage.uint8(),
    'uint8, scale 2^-20, seed 7': storage.uint8(scale=2.0**-20, seed=7),
}


def every_magnitude(size: int, signed: bool) -> np.ndarray:
    """Random bits as float32: all magnitudes alike, subnormal numbers, infinities and NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32 if signed else 2**31, size, np.uint32)
    ends = np.array([0, np.inf, np.nan, 3.4e38, 1e-37], np.float32)
    return np.concatenate([bits.view(np.float32), ends, -ends if signed else ends])


def encode(setup: Setup) -> Iterator[Row]:
    """Codes of identical numbers and bits, numbers of all codes, and the bits of rounding."""
    size = 2**16 if setup.quick else 2**22

    def alike(function: Callable[..., Any], *arguments: Any) -> tuple[Measured, bool]:
        expected = taken_on(setup.cpu, jax.jit(function), *arguments)
        got = taken_on(setup.device, compiled_for(setup, function), *arguments)
        with np.errstate(invalid='ignore'):
            both_nan = np.isnan(got.astype(float)) & np.isnan(expected.astype(float))
        unsigned = f'u{expected.dtype.itemsize}'
        different = int(np.sum((got.view(unsigned) != expected.view(unsigned)) & ~both_nan))
        return {'entries': expected.size, 'different': different}, different == 0

    for name, kept in FORMATS.items():
        x = every_magnitude(size, signed='bfloat16' in name)
        bits = np.random.default_rng(1).integers(0, 2**32, x.shape, np.uint32)
        small = (x != 0) & (np.abs(x) < 2.0**-126)
        codes = np.arange(256, dtype=np.uint8)
        if 'bfloat16' in name:
            codes = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
        checks = {
            'encode': (kept.encode, x[~small], bits[~small]),
            'encode subnormal numbers': (kept.encode, x[small], bits[small]),
            'decode': (kept.decode, codes),
            'bits': (lambda count, kept=kept: kept.bits(kept.key('nu'), count, (64, 96)), 5),
        }
        for what, (function, *arguments) in checks.items():
            yield row(
                'encode', f'{what}, {name}', 'exact', functools.partial(alike, function, *arguments)
            )


# Steps


def drawn(seed: int, case: Case) -> dict[str, np.ndarray]:
    """Normal numbers, in the dtype of the parameters."""
    generator = np.random.default_rng(seed)
    dtype = jnp.bfloat16 if case.rounds_params else np.float32
    return {n: np.asarray(generator.standard_normal(s), dtype) for n, s in SHAPES.items()}


def start(case: Case) -> dict[str, np.ndarray]:
    """Parameters of either sign, that stay between two and four: their last place is the same."""
    return {
        n: np.copysign(2.5 + np.abs(x) % 1, x).astype(x.dtype) for n, x in drawn(0, case).items()
    }


def gradients(call: int, case: Case) -> dict[str, np.ndarray]:
    """Of another size at every call, with a row of zeros, and a NaN where that is to be skipped.

    None is so small that it could cancel with a term of weight decay.
    """
    size = (1, 4, 8, 2)[call]
    found = {
        n: np.copysign(size * (0.5 + np.abs(x)), x).astype(x.dtype)
        for n, x in drawn(1 + call, case).items()
    }
    found['kernel'][1] = 0.0
    if 'skip_nonfinite' in case.name:
        found['kernel'][2, 3] = np.nan
    return found


def transformation(case: Case) -> optax.GradientTransformationExtraArgs:
    """The case's; directions are multiplied with a rate, so that they too make a step."""
    tx = case.tx if case.descends else optax.chain(case.tx, optax.scale(-0.01))
    return optax.with_extra_args_support(tx)


def update_and_apply(
    tx: optax.GradientTransformationExtraArgs, both: Any, gradients: Any, **extra: Any
) -> Any:
    params, state = both
    updates, state = tx.update(gradients, state, params, **extra)
    return optax.apply_updates(params, updates), state


Step = Callable[[Any, Any], Any]


def followed(case: Case, state: Any, here: Step, there: Step) -> Apart:
    """A few steps here, and from each of their states the same step there."""
    found, before = Apart(), (start(case), state)
    for call in range(CALLS):
        given = gradients(call, case)
        after = here(before, given)
        found |= apart(before, there(before, given), after)
        before = after
    return found


def step(setup: Setup) -> Iterator[Row]:
    """Each case from identical parameters, states and gradients."""

    def compare(case: Case) -> tuple[Measured, bool]:
        tx = transformation(case)
        run = functools.partial(update_and_apply, tx)
        state = taken_on(setup.cpu, jax.jit(tx.init), start(case))
        there = taken_on(setup.device, compiled_for(setup, tx.init), start(case))
        found = apart(state, there, state) | followed(
            case,
            state,
            functools.partial(taken_on, setup.cpu, jax.jit(run)),
            functools.partial(taken_on, setup.device, compiled_for(setup, run)),
        )
        return found.measured, found.within

    cases = CROSSED[::3] if setup.quick else CROSSED
    for case in cases:
        yield row('step', case.name, BOUND, functools.partial(compare, case))
    yield row(
        'step', 'rmsprop-momentum in nnx.Optimizer', BOUND, functools.partial(_in_flax, setup)
    )
    yield from left_out('step', 'cases', BOUND, len(CROSSED) - len(cases))


def _in_flax(setup: Setup) -> tuple[Measured, bool]:
    try:
        from flax import nnx
    except ImportError:
        raise NotRunError('Flax is not installed') from None
    case = next(case for case in CROSSED if case.name == 'rmsprop-momentum')
    tx = transformation(case)

    class Net(nnx.Module):
        def __init__(self, leaves: Any) -> None:
            for name, x in leaves.items():
                setattr(self, name, nnx.Param(x))

    def train(leaves: Any, given: Any) -> Any:
        net = Net(leaves)
        optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
        for gradient in given:
            optimizer.update(net, nnx.State({n: nnx.Param(g) for n, g in gradient.items()}))
        return {name: getattr(net, name)[...] for name in leaves}

    def plainly(leaves: Any, given: Any) -> Any:
        both = leaves, tx.init(leaves)
        for gradient in given:
            both = update_and_apply(tx, both, gradient)
        return both[0]

    arguments = start(case), [gradients(0, case)]
    expected = taken_on(setup.cpu, jax.jit(plainly), *arguments)
    got = taken_on(setup.device, compiled_for(setup, train), *arguments)
    found = apart((arguments[0],), (got,), (expected,))
    return found.measured, found.within


# Traces and long runs


def golden(setup: Setup) -> Iterator[Row]:
    """What the frameworks recorded, a row for each dialect and precision."""
    # A TPU has no complex128.
    absent = [n for n, c in CONFIGURATIONS.items() if c['problem'] == 'complex']
    absent = absent if setup.device.platform == 'tpu' else []
    groups: dict[str, list[str]] = {}
    for name, configuration in CONFIGURATIONS.items():
        if name not in absent:
            group = f'{configuration["framework"]}, {configuration["dtype"]}'
            groups.setdefault(group, []).append(name)
    if setup.quick:
        groups = {g: names[:1] + names[1:][-1:] for g, names in list(groups.items())[::4]}
    bound = 'as near as the test of traces asks'

    def compare(names: list[str]) -> tuple[Measured, bool]:
        with jax.default_device(setup.device):
            shares = {name: float(np.divide(*golden_error(name))) for name in names}
        beyond = [name for name, share in shares.items() if not share <= 1]
        measured: Measured = {'traces': len(names), 'error / limit': max(shares.values())}
        return measured | ({'beyond': ', '.join(beyond)} if beyond else {}), not beyond

    for group, names in groups.items():
        yield row('golden', group, bound, functools.partial(compare, names))
    taken = sum(map(len, groups.values()))
    yield from left_out('golden', 'traces', bound, len(CONFIGURATIONS) - taken - len(absent))
    for name in absent:
        yield Row('golden', name, bound, NOT_RUN, why='a TPU has no complex128')


def long_runs(setup: Setup) -> Iterator[Row]:
    """Averages that neither drift nor stall."""
    steps = 20_000 if setup.quick else 200_000

    def narrow(name: str) -> tuple[Measured, bool]:
        with jax.default_device(setup.device):
            error, limit = drift(name, steps)
        return {'steps': steps, 'error': error, 'limit': limit}, error < limit

    def rounded(kept: storage.Format) -> tuple[Measured, bool]:
        with jax.default_device(setup.device):
            found = rounded_drift(kept, steps)
        return {'steps': steps, **dataclasses.asdict(found)}, found.within

    for name in OPTIONS:
        bound = 'float32 within a few ulps of float64, however long'
        yield row('long', name, bound, functools.partial(narrow, name))
    for kept in (storage.bfloat16(), storage.uint8()):
        bound = 'the mean of float32, to five standard errors'
        yield row('long', f'storage.{kept.name}', bound, functools.partial(rounded, kept))


# Sharding

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
WAYS = ('auto', 'explicit', 'shard_map', 'zero1')
IN_QUICK = ('rmsprop-everything', 'inject_hyperparams-uint8')


def sharded(setup: Setup) -> Iterator[Row]:
    """The same steps on all devices as on the first one, a row for each way to split them."""
    devices = [d for d in jax.devices() if d.process_index == setup.device.process_index]
    # Axes can be divided by powers of two.
    count = min(2 ** (len(devices).bit_length() - 1), 32)
    bound = f'as on one device: {BOUND}'

    def compare(way: str) -> tuple[Measured, bool]:
        if count < 2:
            raise NotRunError('there is one device')
        found = {}
        for case in CROSSED:
            cell = Cell('run', case.name, 'mapped-0' if way == 'shard_map' else 'jit', 'plain')
            is_exception = any(exception.holds(cell) for exception in EXCEPTIONS)
            if not is_exception and (not setup.quick or case.name in IN_QUICK):
                try:
                    found[case.name] = _on_mesh(case, way, devices[:count])
                except Exception as error:
                    raise RuntimeError(f'{case.name}: {error}') from error
        total = functools.reduce(Apart.__or__, found.values())
        beyond = [name for name, one in found.items() if not one.within]
        measured = {'devices': count, 'cases': len(found), **total.measured}
        return measured | ({'beyond': ', '.join(beyond)} if beyond else {}), not beyond

    for way in WAYS:
        yield row('sharding', way, bound, functools.partial(compare, way))


def _on_mesh(case: Case, way: str, devices: list[Any]) -> Apart:
    kind = EXPLICIT if way == 'explicit' else AUTO
    mesh = jax.make_mesh((len(devices),), ('data',), axis_types=(kind,), devices=devices)
    tx = transformation(case)
    split = {n: P(*[None] * (len(s) - 1), 'data') if s else P() for n, s in SHAPES.items()}
    specs = dict.fromkeys(SHAPES, P()) if way == 'zero1' else split
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.device_put(start(case), places)
    on_mesh = optax.with_extra_args_support(sharding.zero1(tx, params)) if way == 'zero1' else tx
    derived = sharding.state_shardings(on_mesh, params)
    for leaf, wanted in zip(
        jax.tree.leaves(jax.jit(on_mesh.init)(params)), jax.tree.leaves(derived), strict=True
    ):
        if leaf.ndim and not leaf.sharding.is_equivalent_to(wanted, leaf.ndim):
            raise AssertionError(f'init gives {leaf.sharding}, not {wanted}')
    train = functools.partial(update_and_apply, on_mesh)
    if way == 'shard_map':
        of_both = specs, sharding.state_shardings(tx, params, specs)
        train = jax.shard_map(
            functools.partial(train, partition_specs=specs),
            mesh=mesh,
            in_specs=(of_both, specs),
            out_specs=of_both,
        )
    run = jax.jit(train)

    def there(both: Any, gradient: Any) -> Any:
        return jax.device_get(run(*jax.device_put((both, gradient), ((places, derived), places))))

    state = taken_on(devices[0], jax.jit(tx.init), start(case))
    here = functools.partial(taken_on, devices[0], jax.jit(functools.partial(update_and_apply, tx)))
    return followed(case, state, here, there)


SECTIONS = {
    'encode': encode,
    'step': step,
    'golden': golden,
    'long': long_runs,
    'sharding': sharded,
}
