"""Values inside a traced step: marked where they are used, found, and computed without the rest."""

import contextlib
import contextvars
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import eval_jaxpr
from jax.tree_util import keystr, tree_flatten_with_path

from rmsprop_jax._types import canonical

_PREFIX = 'rmsprop_jax:'
# An argument of `update` would not do: `optax.MultiSteps` drops what it does not know.
_marking = contextvars.ContextVar('marking', default=False)


def marked(value: Any, tree: Any) -> Any:
    """`value`, which `marked_values` finds under the paths of the leaves of `tree`.

    Elsewhere it is `value` itself: programs that nobody looks into hold no mark.
    """
    if not _marking.get():
        return value
    paths = [keystr(canonical(path)) for path, _ in tree_flatten_with_path(tree)[0]]
    # The name holds all there is to know, since JAX may keep the program for later.
    return checkpoint_name(jnp.asarray(value), f'{_PREFIX}{json.dumps(paths)}')


def marked_values(function: Callable[..., Any], *args: Any) -> list[tuple[str, Any]]:
    """The values that `function` marks, with the path of each leaf that they are marked for.

    The function is traced, and no more of it is run than these values need.
    """
    with _marks():
        program = jax.make_jaxpr(function)(*args)
    found = _named_values(program, jax.tree.leaves(args))
    return [(path, value) for name, value in found for path in json.loads(name)]


@contextlib.contextmanager
def _marks() -> Iterator[None]:
    token = _marking.set(True)
    try:
        yield
    finally:
        _marking.reset(token)


def _named_values(program: Any, values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The values that have a name of ours in a closed jaxpr that is applied to `values`.

    A branch of `lax.cond` is looked into whether it would be taken or not.
    """
    for eqn in program.eqns:
        name = str(eqn.params.get('name', ''))
        if eqn.primitive.name == 'name' and name.startswith(_PREFIX):
            yield name.removeprefix(_PREFIX), *_computed(program, values, eqn.invars)
        # The first operand of a condition chooses the branch.
        operands = eqn.invars[1:] if eqn.primitive.name == 'cond' else eqn.invars
        for inner in _programs(eqn.params):
            if _PREFIX in str(inner) and len(inner.jaxpr.invars) == len(operands):
                yield from _named_values(inner, _computed(program, values, operands))


def _programs(params: dict[str, Any]) -> Iterator[Any]:
    # It loads Pallas, which takes as long as a quarter of this package.
    from jax.extend.core import ClosedJaxpr

    for value in params.values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item


def _computed(program: Any, values: Sequence[Any], wanted: Sequence[Any]) -> list[Any]:
    """Those variables of a program, for which no more of it is run than they need."""
    needed, equations = {*map(id, wanted)}, []
    for eqn in reversed(program.eqns):
        if needed & {*map(id, eqn.outvars)}:
            needed |= {*map(id, eqn.invars)}
            equations.insert(0, eqn)
    part = program.jaxpr.replace(eqns=equations, outvars=[*wanted])
    return eval_jaxpr(part, program.consts, *values)
