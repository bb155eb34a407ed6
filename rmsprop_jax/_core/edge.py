"""The edge of a public transformation. It prints as the call that made it and checks its gradients
once a trace, and outside of jit its step is one compiled program."""

import functools
import inspect
import reprlib
import typing
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

import jax
import numpy as np
import optax
from jax.core import Tracer

from rmsprop_jax._checks import checked_updates
from rmsprop_jax._types import Number, Schedule, is_normal
from rmsprop_jax.storage._choice import is_plain

P = ParamSpec('P')
Update = Callable[..., tuple[Any, Any]]

_SHORT = reprlib.Repr()
_SHORT.maxother = 80
# JAX raises these when a function reads a traced number, as a schedule may read its step count.
_LOOKED_AT = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)


class Transformation(optax.GradientTransformationExtraArgs):
    """Optax's class for transformations, with a `repr` that is the call that made it.

    Attributes:
      call: The factory with its arguments, or None if `optax` or `jax.tree` rebuilt the tuple.
      inside: The transformation without its edge, or None as for `call`.
    """

    call: functools.partial[Any] | None = None
    inside: optax.GradientTransformationExtraArgs | None = None

    def __repr__(self) -> str:
        """The call, with defaults; arguments that are None by default are left out."""
        if self.call is None:
            return super().__repr__()
        factory = self.call.func
        parameters = inspect.signature(factory).parameters
        shown = [
            f'{name}={_SHORT.repr(value)}'
            for name, value in _arguments(self.call).items()
            if value is not None or parameters[name].default is not None
        ]
        names = [*factory.__module__.split('.'), factory.__name__]
        public = '.'.join(name for name in names if not name.startswith('_'))
        return f'{public}({", ".join(shown)})'


def public(
    factory: Callable[P, optax.GradientTransformationExtraArgs],
) -> Callable[P, optax.GradientTransformationExtraArgs]:
    """Gives the transformations of `factory` an edge: they print as the call that made them, check
    their gradients, and compile their steps outside of jit.

    Arguments are read only when the transformation is printed or takes a step, so that making it
    does not read an array.
    """

    @functools.wraps(factory)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        call = functools.partial(factory, *args, **kwargs)
        tx = member(call())
        step = compiled(_checked(tx.update), functools.partial(_program, tx, call))
        made = Transformation(tx.init, step)
        made.call, made.inside = call, tx
        return made

    return wrapped


def member(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` without its edge, for a chain or a wrapper that has an edge of its own."""
    inside = tx.inside if isinstance(tx, Transformation) else None
    return optax.with_extra_args_support(tx) if inside is None else inside


def _checked(update: Update) -> Update:
    @functools.wraps(update)
    def wrapped(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return update(checked_updates(updates), state, params, **extra_args)

    return wrapped


def compiled(update: Update, program: Callable[[], Update]) -> Update:
    """`update`, run outside of jit as one compiled program instead of many small ones.

    Args:
      update: The update of a transformation.
      program: Returns the compiled update. It is called once, when first needed.
    """
    program = functools.cache(program)

    @functools.wraps(update)
    def wrapped(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if not _are_arrays((updates, state, params, extra_args)):
            return update(updates, state, params, **extra_args)
        try:
            return program()(updates, state, params, extra_args)
        except _LOOKED_AT:
            return update(updates, state, params, **extra_args)

    return wrapped


def compiled_alone(update: Update) -> Update:
    """`update`, with a compiled program that no other transformation shares."""
    return compiled(update, lambda: _own_program(update))


def _own_program(update: Update) -> Update:
    @jax.jit
    def step(updates: Any, state: Any, params: Any, extra_args: Any) -> tuple[Any, Any]:
        return update(updates, state, params, **extra_args)

    return step


def _program(tx: optax.GradientTransformationExtraArgs, call: functools.partial[Any]) -> Update:
    """The program of a transformation, shared by all whose calls differ only in numbers.

    If an argument is a function or a tree, the program is not shared: kept for other
    transformations, it would keep alive everything that the argument refers to.
    """
    given, (of_schedules, of_arrays) = _arguments(call), _takers_of_numbers(call.func)
    arrays = {n: x for n, x in given.items() if n in of_arrays and isinstance(x, jax.Array)}
    numbers = {n: float(x) for n, x in given.items() if n in of_schedules and _is_number(x)}
    rest = {n: x for n, x in given.items() if n not in {*arrays, *numbers}}
    if not all(map(is_plain, rest.values())):
        return _own_program(_checked(tx.update))
    names = tuple((name, is_normal(x)) for name, x in numbers.items())
    # A single array costs a call far less than an array for each number.
    values = np.array([(x, 1 - x) for x in numbers.values()]).reshape(-1, 2)
    return functools.partial(_shared_step, call.func, tuple(rest.items()), names, values, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _shared_step(
    factory: Callable[..., optax.GradientTransformationExtraArgs],
    rest: tuple[tuple[str, Any], ...],
    names: tuple[tuple[str, bool], ...],
    numbers: jax.Array,
    arrays: dict[str, jax.Array],
    updates: Any,
    state: Any,
    params: Any,
    extra_args: Any,
) -> tuple[Any, Any]:
    """A step of the transformation that `factory` returns for all these arguments."""
    pairs = zip(names, numbers, strict=True)
    given = {name: Number(x[0], x[1], known) for (name, known), x in pairs}
    with warnings.catch_warnings():
        # The user was warned when the transformation was made.
        warnings.simplefilter('ignore')
        tx = member(factory(**dict(rest), **given, **arrays))
    return _checked(tx.update)(updates, state, params, **extra_args)


def _arguments(call: functools.partial[Any]) -> dict[str, Any]:
    bound = inspect.signature(call.func).bind(*call.args, **call.keywords)
    bound.apply_defaults()
    return bound.arguments


@functools.cache
def _takers_of_numbers(factory: Callable[..., Any]) -> tuple[frozenset[str], frozenset[str]]:
    """The arguments that may be schedules, which are the numbers that may change, and the arguments
    that may be arrays."""
    parameters = inspect.signature(factory).parameters.items()
    kinds = {name: typing.get_args(x.annotation) for name, x in parameters}
    schedules, arrays = (
        frozenset(name for name, given in kinds.items() if kind in given)
        for kind in (Schedule, jax.Array)
    )
    return schedules, arrays


def _is_number(x: Any) -> bool:
    """Whether `x` is a Python or NumPy number without a special meaning.

    Zero may mean 'none', and a decay of one means 'forget nothing'.
    """
    return isinstance(x, int | float | np.integer | np.floating) and x not in (0, 1)


def _are_arrays(tree: Any) -> bool:
    """Whether all leaves are concrete arrays or numbers. The step itself refuses other leaves."""
    try:
        leaves = jax.tree.leaves(tree)
    except (TypeError, ValueError):
        return False
    kinds = {type(x) for x in leaves}
    if not all(map(_is_array_type, kinds)):
        return False
    # NumPy arrays may hold anything.
    return np.ndarray not in kinds or all(map(_holds_numbers, leaves))


def _holds_numbers(x: Any) -> bool:
    return not isinstance(x, np.ndarray) or x.dtype.kind not in 'OSUmM'


@functools.cache
def _is_array_type(kind: type) -> bool:
    if issubclass(kind, bool | int | float | complex | np.ndarray | np.number | np.bool_):
        return True
    return issubclass(kind, jax.Array) and not issubclass(kind, Tracer)
