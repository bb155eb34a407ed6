"""A choice between two forms of one function that is made when a program is lowered.

`jax.lax.platform_dependent` chooses by platform alone. The kernel must not meet a partitioner
either, which would gather all shards for it, nor a batch; and nobody can tell while tracing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
from jax.extend import core
from jax.interpreters import batching, mlir

_either_p = core.Primitive('rmsprop_jax_fused')
_either_p.multiple_results = True


def either(plain: Callable[..., Any], local: Callable[..., Any], *args: Any) -> Any:
    """`plain(*args)`, or `local(*args)` where a CPU runs it on arrays that it holds entirely.

    Both are traced, and may close over traced arrays; one is lowered. A batch takes `plain`.
    """
    flat, treedef = jax.tree.flatten(args)
    traced = [_traced(function, treedef, flat) for function in (plain, local)]
    (plain_jaxpr, out), (local_jaxpr, _) = traced
    out_flat = _either_p.bind(
        *flat,
        *plain_jaxpr.consts,
        *local_jaxpr.consts,
        # As functions of what they close over, too, because that may be traced.
        plain=plain_jaxpr.jaxpr,
        local=local_jaxpr.jaxpr,
    )
    return jax.tree.unflatten(out, out_flat)


def _traced(function: Callable[..., Any], treedef: Any, flat: Sequence[Any]) -> tuple[Any, Any]:
    closed, shapes = jax.make_jaxpr(
        lambda *flat: function(*jax.tree.unflatten(treedef, flat)), return_shape=True
    )(*flat)
    return closed, jax.tree.structure(shapes)


def _plain(*args: Any, plain: Any, local: Any) -> list[Any]:
    args, n = args[: len(args) - len(local.constvars)], len(plain.invars)
    return jax.core.eval_jaxpr(plain, args[n:], *args[:n])


def _local(*args: Any, plain: Any, local: Any) -> list[Any]:
    n = len(local.invars)
    return jax.core.eval_jaxpr(local, args[n + len(plain.constvars) :], *args[:n])


def _holds_all(context: Any) -> bool:
    """Whether a program is not partitioned, or stands inside a `shard_map` over all axes."""
    if hasattr(context, 'num_devices'):
        return context.num_devices == 1
    return set(context.mesh.axis_names) <= set(context.manual_axes)


def _lower_on_cpu(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
    form = _local if _holds_all(ctx.module_context.axis_context) else _plain
    return mlir.lower_fun(form)(ctx, *args, **params)


def _batch(args: Sequence[Any], axes: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    plain = params['plain']
    own = args[: len(plain.invars) + len(plain.constvars)]
    batched = {
        id(variable)
        for variable, axis in zip([*plain.invars, *plain.constvars], axes, strict=False)
        if axis is not None
    }
    # What depends on nothing that is batched, such as a count, stays one for all.
    for equation in plain.eqns:
        if any(id(variable) in batched for variable in equation.invars):
            batched.update(id(variable) for variable in equation.outvars)
    out_axes = [0 if id(variable) in batched else None for variable in plain.outvars]
    n = len(plain.invars)

    def run(*own: Any) -> list[Any]:
        return jax.core.eval_jaxpr(plain, own[n:], *own[:n])

    return jax.vmap(run, tuple(axes[: len(own)]), out_axes)(*own), out_axes


_either_p.def_impl(_plain)
_either_p.def_abstract_eval(
    lambda *args, plain, local: [variable.aval for variable in plain.outvars]
)
mlir.register_lowering(_either_p, mlir.lower_fun(_plain))
mlir.register_lowering(_either_p, _lower_on_cpu, platform='cpu')
batching.primitive_batchers[_either_p] = _batch
