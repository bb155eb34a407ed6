"""Where Optax and this package differ, as checks that either library passes or fails.

In `tests/`: `python -m upstream` prints the two tables of docs/differences-from-optax.md for the
installed Optax, and `python -m upstream --write` writes them into the page. `make upstream` runs
the first. The command fails if this package fails a check, never because Optax does.

A check takes the library, `optax` or `rmsprop_jax`, and says whether it does the right thing.
"""

import functools
import importlib
import os
import pathlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

# Eight CPU devices, as conftest.py has them.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rmsprop_jax
from rmsprop_jax import dialects

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'differences-from-optax.md'


class Difference(NamedTuple):
    """A row of a table: what it is about, what each library does, and the check."""

    title: str
    optax: str
    here: str
    is_right: Callable[[Any], bool]


def last(tx: optax.GradientTransformation, gradients: Any, params: Any = None) -> Any:
    """The last update, and the state after it."""
    update: Any = None
    state = tx.init(gradients[0] if params is None else params)
    for g in gradients:
        update, state = tx.update(g, state, params)
    return update, state


def scanned(tx: optax.GradientTransformation, gradients: Any, params: Any) -> Any:
    """All updates in one compiled loop, and the state after it."""

    def step(state: Any, g: Any) -> Any:
        update, state = tx.update(g, state)
        return state, update

    state, updates = jax.lax.scan(step, tx.init(params), gradients)
    return updates, state


def centered(library: Any) -> bool:
    """A constant gradient, which must not give NaN, and one of mean 1000 and deviation 1."""
    draws = np.random.default_rng(0).normal(size=(300, 1000)).astype(np.float32)
    around = 1000 + draws[:50, :20]
    for eps_in_sqrt in (True, False):
        tx = library.scale_by_stddev(eps_in_sqrt=eps_in_sqrt)
        constant, _ = scanned(tx, jnp.broadcast_to(draws[0], draws.shape), draws[0])
        update, _ = scanned(tx, around, around[0])
        exact = reference.rmsprop_updates(around, -1.0, centered=True, eps_in_sqrt=eps_in_sqrt)
        if not (np.isfinite(constant).all() and np.allclose(update, exact, rtol=1e-3)):
            return False
    return True


def first_corrected_step(library: Any) -> bool:
    """The variance of one gradient is zero, whatever the gradient is."""
    tx = library.scale_by_stddev(0.9, 1e-8, bias_correction=True)
    gradients = np.float32([0.1, 1.0, 37.3])
    update, _ = last(tx, [jnp.asarray(gradients)])
    return bool(np.allclose(update, gradients / np.sqrt(1e-8), rtol=1e-2))


def changing_decay(library: Any) -> bool:
    """Every weighted mean of a constant's square is that square."""
    tx = library.inject_hyperparams(library.scale_by_rms)(
        decay=lambda count: jnp.where(count < 3, 0.5, 0.99), eps=0.0, bias_correction=True
    )
    return bool(np.isclose(last(tx, 4 * [jnp.ones(())])[0], 1, rtol=1e-5))


def narrow_accumulators(library: Any) -> bool:
    """An average of ones, long enough to reach 0.993."""
    for dtype in (jnp.bfloat16, jnp.float16):
        ones = jnp.ones(5000, dtype)
        _, state = scanned(library.scale_by_rms(0.999), ones, ones[0])
        if not np.isclose(float(optax.tree.get(state, 'nu')), 1 - 0.999**5000, rtol=1e-3):
            return False
    return True


def dtype_of_state(library: Any) -> bool:
    """A loop that `lax.scan` takes, since the state keeps its dtype."""
    try:
        scanned(library.rmsprop(0.1), jnp.ones((2, 2)), jnp.ones(2, jnp.bfloat16))
    except TypeError:
        return False
    return True


def dtype_of_trace(library: Any) -> bool:
    """Momentum of bfloat16 parameters in float32."""
    tx = library.rmsprop(0.1, momentum=0.9)
    return optax.tree.get(tx.init(jnp.ones(2, jnp.bfloat16)), 'trace').dtype == jnp.float32


def scheduled_momentum(library: Any) -> bool:
    """A schedule in the place of the number."""
    try:
        last(library.rmsprop(0.1, momentum=lambda count: 0.9), [jnp.ones(2)])
    except TypeError:
        return False
    return True


def no_epsilon(library: Any) -> bool:
    """A zero gradient moves nothing."""
    options = ({}, {'eps_in_sqrt': False}, {'centered': True})
    zero = [jnp.zeros(())]
    return all(last(library.rmsprop(0.1, eps=0.0, **kw), zero)[0] == 0 for kw in options)


def side_of_the_rate(library: Any) -> bool:
    """PyTorch stops where the rate becomes zero, and so does what is said to match it."""

    def rate(count: Any) -> Any:
        return jnp.where(count == 0, 1.0, 0.0)

    if library is optax:
        tx = optax.rmsprop(rate, 0.99, eps_in_sqrt=False, momentum=0.5)
        said = 'in optax will match PyTorch' in (optax.rmsprop.__doc__ or '')
    else:
        tx, said = dialects.torch(rate, momentum=0.5), True
    return not said or bool(last(tx, 2 * [jnp.ones(())], jnp.ones(()))[0] == 0)


def eager_steps(library: Any) -> bool:
    """The same bits in and outside of jit."""
    draws = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32)
    tx = library.rmsprop(0.1, momentum=0.9)
    update, state = last(tx, draws)
    jitted, compiled = last(tx._replace(update=jax.jit(tx.update)), draws)
    same = jax.tree.map(np.array_equal, (update, state), (jitted, compiled))
    return all(jax.tree.leaves(same))


def sharded_init(library: Any) -> bool:
    """State where the parameters are, on meshes with automatic and with explicit axes."""
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ('x',), axis_types=(kind,))
        params = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P('x')))
        try:
            nu = optax.tree.get(jax.jit(library.rmsprop(0.1).init)(params), 'nu')
        except ValueError:
            return False
        if not nu.sharding.is_equivalent_to(params.sharding, 2):
            return False
    return True


def injected_numbers(library: Any) -> bool:
    """A decay of 0.999 that does not become 1 because the parameters are narrow."""
    params = jnp.ones(2, jnp.bfloat16)
    try:
        state = library.inject_hyperparams(library.trace)(0.999).init(params)
    except TypeError:
        return False
    return bool(np.isclose(float(state.hyperparams['decay']), 0.999, rtol=1e-6))


DIFFERENCES = (
    Difference(
        'Centered, and gradients that hardly change',
        '`nu - mu^2` cancels in float32, turns negative, then NaN',
        'carries the variance itself, as a sum of non-negative terms',
        centered,
    ),
    Difference(
        'The first centered, bias-corrected step',
        'cancellation noise or NaN',
        'variance 0: `g / sqrt(eps)`, or `g / eps`',
        first_corrected_step,
    ),
    Difference(
        'Bias correction while the decay changes',
        'divides by `1 - decay^t` of the current decay',
        'divides by the sum of the weights given',
        changing_decay,
    ),
    Difference(
        'Accumulators of bfloat16 and float16 parameters',
        'in that dtype; at decay 0.999 they stall at 0.5 where 0.993 is right',
        'in float32',
        narrow_accumulators,
    ),
    Difference(
        'Float32 gradients of bfloat16 parameters',
        'the state changes dtype after a step, and `lax.scan` fails',
        'dtypes never change',
        dtype_of_state,
    ),
    Difference(
        'Momentum of bfloat16 and float16 parameters',
        "`trace` in the parameters' dtype",
        'float32 at least',
        dtype_of_trace,
    ),
    Difference(
        'Momentum that changes',
        'a number; a schedule only under `inject_hyperparams`',
        'a number or a schedule',
        scheduled_momentum,
    ),
    Difference(
        'No epsilon and a zero gradient',
        'NaN',
        'zero',
        no_epsilon,
    ),
    Difference(
        'The side of the learning rate',
        'before momentum, and the docstring says that `eps_in_sqrt=False` matches PyTorch, '
        'which has it after',
        'before momentum in `rmsprop`, after it in `dialects.torch`',
        side_of_the_rate,
    ),
    Difference(
        'A step outside of jit',
        'some twenty small programs, rounded otherwise than under jit',
        'one compiled program, that of jit bit for bit; a schedule that looks at its count runs '
        'uncompiled',
        eager_steps,
    ),
    Difference(
        'Init under jit with sharded parameters',
        'the whole state on one device or on each; on explicit axes an error or one device, '
        'unless under `jax.set_mesh`',
        'sharded and placed like the parameters',
        sharded_init,
    ),
    Difference(
        'Injected numbers and bfloat16 parameters',
        '`inject_hyperparams` rounds a decay of 0.999 to 1',
        'numbers stay in float32',
        injected_numbers,
    ),
)


def refuses(library: Any, *cases: dict[str, Any]) -> bool:
    """Whether each of these settings is refused at the latest by the first step."""
    for options in cases:
        try:
            last(library.rmsprop(0.1, **options), [jnp.ones(2)])
        except (ValueError, TypeError):
            continue
        return False
    return True


def meaningless_numbers(library: Any) -> bool:
    """Numbers outside of their range."""
    names = ('decay', 'eps', 'initial_scale', 'momentum')
    cases = [{'decay': 1.5}, {'momentum': 1.5}, {'decay': 1.0, 'bias_correction': True}]
    cases += [{name: value} for name in names for value in (-0.1, np.nan, np.inf)]
    return refuses(library, *cases)


def narrow_numbers(library: Any) -> bool:
    """Decay and momentum in narrow dtypes."""
    narrow = (jnp.bfloat16(0.9), jnp.float16(0.9))
    return refuses(library, *({name: x} for name in ('decay', 'momentum') for x in narrow))


def arrays_of_numbers(library: Any) -> bool:
    """One number for each entry of a parameter."""
    return refuses(library, {'decay': jnp.array([0.9, 0.8])}, {'eps': jnp.array([1e-8, 1e-6])})


def flags(library: Any) -> bool:
    """A number in the place of a flag."""
    names = ('eps_in_sqrt', 'centered', 'nesterov', 'bias_correction')
    return refuses(library, *({name: 0.9} for name in names))


def whole_numbers(library: Any) -> bool:
    """Parameters that are integers, which `optax.apply_updates` would truncate to."""
    params = jnp.array([5])
    try:
        update, _ = last(library.rmsprop(0.1), [jnp.ones(1)], params)
    except (ValueError, TypeError):
        return True
    return bool(optax.apply_updates(params, update) == 5 + update)


def missing_gradients(library: Any) -> bool:
    """None in the place of a gradient: refused at once, or a state that the next step can use."""
    tx, params = library.rmsprop(0.1), {'a': jnp.ones(2), 'b': jnp.ones(2)}
    try:
        _, state = tx.update({**params, 'b': None}, tx.init(params))
    except (ValueError, TypeError):
        return True
    return optax.tree.get(state, 'nu')['b'] is not None


def foreign_state(library: Any) -> bool:
    """The state of the centered form, given to the plain one."""
    params = jnp.ones(2)
    other = library.rmsprop(0.1, centered=True).init(params)
    try:
        library.rmsprop(0.1).update(params, other)
    except (ValueError, TypeError, AttributeError):
        return True
    return False


REFUSALS = (
    Difference(
        'decay or momentum outside [0, 1], a decay of 1 with bias correction, a negative epsilon, '
        'weight decay or start value, NaN and infinity, where given as Python or NumPy numbers',
        '',
        'these values are meaningless; arrays are not inspected',
        meaningless_numbers,
    ),
    Difference(
        'decay or momentum in bfloat16 or float16',
        '',
        '0.999 would become 1; use float32, under `inject_hyperparams` with `hyperparam_dtype`',
        narrow_numbers,
    ),
    Difference(
        'hyperparameter arrays that are not scalars',
        '',
        'a per-parameter value is a job for `optax.partition`',
        arrays_of_numbers,
    ),
    Difference(
        'flags that are not booleans',
        '',
        'catches `rmsprop(1e-3, 0.9, 1e-8, 0.0, 0.9)`, a momentum in the place of `eps_in_sqrt`',
        flags,
    ),
    Difference(
        'integer and boolean parameters',
        '',
        '`optax.apply_updates` truncates their sums to integers; leave them out with '
        '`optax.masked` or `optax.partition`',
        whole_numbers,
    ),
    Difference(
        'None in the place of a gradient that the state has a moment for',
        '',
        'Optax drops the moment, and the next step fails',
        missing_gradients,
    ),
    Difference(
        'a state of another class or configuration',
        '',
        'it would be read with the wrong meaning',
        foreign_state,
    ),
)


@functools.cache
def verdict(difference: Difference, library: ModuleType) -> str:
    """'right', 'wrong', or what kept the check from being tried on Optax."""
    try:
        return 'right' if difference.is_right(library) else 'wrong'
    except Exception as error:
        if library is rmsprop_jax:
            raise
        return f'cannot be tried: {type(error).__name__}'


def anchor(title: str) -> str:
    """The anchor of the note with this title."""
    return title.lower().replace(',', '').replace(' ', '-')


def tables() -> dict[str, str]:
    """The two tables for the installed Optax, by the names that the page has for them."""
    version = optax.__version__
    stands = {'wrong': 'stands', 'right': 'mended'}
    differ = [f'| | Optax {version} | here | now |', '|---|---|---|---|']
    for row in DIFFERENCES:
        now = verdict(row, optax)
        title = f'[{row.title}](#{anchor(row.title)})'
        differ.append(f'| {title} | {row.optax} | {row.here} | {stands.get(now, now)} |')
    taken = {'wrong': 'accepts', 'right': 'refuses too'}
    refused = [f'| | why | Optax {version} |', '|---|---|---|']
    for row in REFUSALS:
        now = verdict(row, optax)
        refused.append(f'| {row.title} | {row.here} | {taken.get(now, now)} |')
    return {'differences': '\n'.join(differ), 'refusals': '\n'.join(refused)}


def bounds(name: str) -> tuple[str, str]:
    """The comments that the page has around a table."""
    return f'<!-- made by make upstream: {name} -->\n', f'\n<!-- end of {name} -->'


def table_on(page: str, name: str) -> str:
    """A table as the page has it."""
    start, end = bounds(name)
    return page.split(start)[1].split(end)[0].strip()


def write() -> None:
    """Puts the tables into the page."""
    page = PAGE.read_text()
    for name, table in tables().items():
        start, end = bounds(name)
        before, rest = page.split(start)
        page = f'{before}{start}\n{table}\n{end}{rest.split(end)[1]}'
    PAGE.write_text(page)


def main(arguments: list[str]) -> int:
    """Prints the tables, or writes them; 1 if this package fails a check."""
    wrong = [x.title for x in (*DIFFERENCES, *REFUSALS) if verdict(x, rmsprop_jax) != 'right']
    if arguments == ['--write']:
        write()
    else:
        print('\n\n'.join(tables().values()))
    for title in wrong:
        print(f'rmsprop_jax fails its own check: {title}')
    return int(bool(wrong))


if __name__ == '__main__':
    sys.exit(importlib.import_module('upstream').main(sys.argv[1:]))
