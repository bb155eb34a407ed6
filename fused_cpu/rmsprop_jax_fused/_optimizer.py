"""`rmsprop`: the transformation of `rmsprop_jax`, and `apply`, which takes its step in place."""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_flatten_with_path
from jax.typing import ArrayLike

import rmsprop_jax
from rmsprop_jax._core import moments
from rmsprop_jax._core.leaves import Statistic
from rmsprop_jax._types import (
    Hyperparameter,
    RmsState,
    ScalarOrSchedule,
    TraceState,
    canonical,
    decay_rate,
    is_none_or_zero,
    rounded,
)
from rmsprop_jax.storage import Storage, bfloat16, float32
from rmsprop_jax_fused._either import either
from rmsprop_jax_fused._library import TARGET, available

# Compile time grows with the square of a call's operands, dispatch with the number of calls.
_LEAVES_A_CALL = 32
# Where steps are not queued, a call was found to take XLA about a microsecond longer for each leaf.
# What the kernel saves on a leaf of this size is that.
_WORTH_A_CALL = 2048


class Apply(Protocol):
    """`apply(grads, state, params) -> (params, state)`."""

    def __call__(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]: ...


class FusedTransformation(NamedTuple):
    """An Optax gradient transformation with a third function.

    Attributes:
      init: That of the plain transformation.
      update: That of the plain transformation.
      apply: `update` and `optax.apply_updates` in one.
    """

    init: optax.TransformInitFn
    update: optax.TransformUpdateExtraArgsFn
    apply: Apply


def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    weight_decay: ScalarOrSchedule | None = 0.0,
    mask: Any = None,
    storage: Storage | None = None,
) -> FusedTransformation:
    """`rmsprop_jax.rmsprop` with a function that takes the whole step in place.

    `apply(grads, state, params)` is

    ::

        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)

    in one pass over memory: on a CPU, for leaves whose gradient and parameter are float32 and whose
    statistics are kept in `storage.float32` or `storage.bfloat16`. Other leaves, other platforms,
    batches (`vmap`), programs that are partitioned over several devices, `weight_decay`, centered
    forms with bias correction and a missing compiled library take the plain path, with the same
    results. Inside a `shard_map` each shard is updated in place.

    It saves nothing unless `params` and `state` are donated, in the order in which they are
    returned, as in the example: buffers are handed on in that order, and a moment that must move to
    a parameter's place is copied.

    `apply` cannot be differentiated, nor exported; `update` can.

    Args:
      learning_rate: As are all arguments, that of `rmsprop_jax.rmsprop`.
      decay: See there.
      eps: See there.
      initial_scale: See there.
      eps_in_sqrt: See there.
      centered: See there.
      momentum: See there.
      nesterov: See there.
      bias_correction: See there.
      weight_decay: See there.
      mask: See there.
      storage: See there.

    Returns:
      A `FusedTransformation`. Its state is that of `rmsprop_jax.rmsprop` with the same arguments.

    Raises:
      ValueError: As `rmsprop_jax.rmsprop` and its `update` do.
      TypeError: As `rmsprop_jax.rmsprop` and its `update` do.

    Example:
      >>> import functools, jax, jax.numpy as jnp, rmsprop_jax_fused
      >>> optimizer = rmsprop_jax_fused.rmsprop(0.1, momentum=0.5)
      >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
      ... def train_step(params, state):
      ...     grads = jax.grad(lambda x: jnp.sum(x**2))(params)
      ...     return optimizer.apply(grads, state, params)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(40):
      ...     params, state = train_step(params, state)
      >>> bool(jnp.sum(params**2) < 0.01)
      True
    """
    transformation = rmsprop_jax.rmsprop(
        learning_rate,
        decay,
        eps,
        initial_scale,
        eps_in_sqrt,
        centered,
        momentum,
        nesterov,
        bias_correction,
        weight_decay=weight_decay,
        mask=mask,
        storage=storage,
    )

    def plain(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # What XLA makes of the corrected weights in a variance depends on how it cuts its kernels.
    unfused = (
        learning_rate is None or not is_none_or_zero(weight_decay) or (centered and bias_correction)
    )
    if unfused or not available():
        apply = plain
    else:
        moment = Statistic('var' if centered else 'nu', True, storage)
        kernel = _Kernel(
            rate=Hyperparameter('learning_rate', learning_rate, lower=-math.inf),
            decay=decay_rate('decay', decay),
            eps=Hyperparameter('eps', eps),
            momentum=None if momentum is None else decay_rate('momentum', momentum),
            eps_in_sqrt=bool(eps_in_sqrt),
            nesterov=bool(nesterov),
            corrected=bool(bias_correction),
            statistics=(
                moment,
                *[Statistic('mu', storage=storage)] * centered,
                *[Statistic('trace', storage=storage)] * (momentum is not None),
            ),
        )

        def apply(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            chosen = kernel.fusible(grads, state, params)
            if not any(chosen):
                return plain(grads, state, params)

            def fused(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
                return kernel.apply(plain, chosen, grads, state, params)

            return either(plain, fused, grads, state, params)

    return FusedTransformation(
        transformation.init, transformation.update, jax.jit(apply, inline=True)
    )


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel's half of a step: its scalars, and the leaves it takes."""

    rate: Hyperparameter
    decay: Hyperparameter
    eps: Hyperparameter
    momentum: Hyperparameter | None
    eps_in_sqrt: bool
    nesterov: bool
    corrected: bool
    statistics: tuple[Statistic, ...]

    def fusible(self, grads: Any, state: Any, params: Any) -> list[bool]:
        """Which leaves the kernel takes: none where trees do not match, or have many small ones."""
        treedef = jax.tree.structure(grads)
        try:
            columns = [treedef.flatten_up_to(tree) for tree in (params, *self._trees(state))]
        except (ValueError, TypeError, AttributeError, IndexError):
            # The plain path says what is wrong.
            return []
        leaves = zip(tree_flatten_with_path(grads)[0], *columns, strict=True)
        chosen = [self._takes(path, g, p, stored) for (path, g), p, *stored in leaves]
        sizes = [jnp.size(p) for p, taken in zip(columns[0], chosen, strict=True) if taken]
        # Where one call is enough it is cheaper than the plain path's three kernels a leaf.
        many = len(sizes) > _LEAVES_A_CALL
        return [] if many and sum(sizes) < _WORTH_A_CALL * len(sizes) else chosen

    def apply(
        self, plain: Apply, chosen: list[bool], grads: Any, state: Any, params: Any
    ) -> tuple[Any, Any]:
        """One step: the kernel's for the leaves that are chosen, and `plain` for all else."""
        paths, treedef = tree_flatten_with_path(grads)
        trees = (params, *self._trees(state))
        columns = [treedef.flatten_up_to(tree) for tree in trees]
        rest = [
            treedef.unflatten(None if c else x for c, x in zip(chosen, column, strict=True))
            for column in ([g for _, g in paths], *columns)
        ]
        # Without leaves it still moves counts, weight and unit.
        rest_params, rest_state = plain(rest[0], self._with_trees(state, rest[2:]), rest[1])
        taken = [i for i, c in enumerate(chosen) if c]
        operands = [[paths[i][1], *(column[i] for column in columns)] for i in taken]
        keys = [self._keys(paths[i][0], paths[i][1]) for i in taken]
        head = self._scalars(state, rest_state), self._counts(state)
        new = []
        for start in range(0, len(taken), _LEAVES_A_CALL):
            group = slice(start, start + _LEAVES_A_CALL)
            new += self._call(head, operands[group], keys[group])
        rest_trees = (rest_params, *self._trees(rest_state))
        results = [treedef.flatten_up_to(tree) for tree in rest_trees]
        for i, leaf in zip(taken, new, strict=True):
            for column, x in zip(results, leaf, strict=True):
                column[i] = x
        new_params, *new_trees = (treedef.unflatten(column) for column in results)
        return new_params, self._with_trees(rest_state, new_trees)

    def _call(
        self, head: tuple[jax.Array, ...], leaves: list[list[Any]], keys: list[list[int]]
    ) -> list[list[Any]]:
        operands, results, aliases = list(head), [], {}
        for grad, *rest in leaves:
            operands.append(grad)
            for x in rest:
                aliases[len(operands)] = len(results)
                operands.append(x)
                results.append(_like(x))
        out = jax.ffi.ffi_call(TARGET, results, input_output_aliases=aliases)(
            *operands,
            centered=self._centered,
            corrected=self.corrected,
            momentum=np.int32(0 if self.momentum is None else 2 if self.nesterov else 1),
            keys=np.array(keys, np.int64).reshape(-1),
        )
        width = len(results) // len(leaves)
        return [list(out[i : i + width]) for i in range(0, len(out), width)]

    def _scalars(self, state: Any, after: Any) -> jax.Array:
        """The kernel's `Scalars`, from the states before and after the step."""
        rms = state[0]
        d, r = (rounded(x, jnp.float32) for x in self.decay.with_complement_at(rms.count))
        eps = self.eps.at(rms.count)
        momentum = 0.0 if self.momentum is None else self.momentum.at(state[2].count)
        values = [
            -1.0 * self.rate.at(getattr(state[1], 'count', 0)),
            d,
            r,
            eps if self.eps_in_sqrt else 0.0,
            0.0 if self.eps_in_sqrt else eps,
            momentum,
            # The plain path computes the new weight, and what follows from it, for each leaf.
            rms.weight if self.corrected else 1.0,
            d * r,
            r * moments.reciprocal_or_zero(d),
            1.0 if rms.unit is None else rms.unit,
            1.0 if rms.unit is None else 1 / after[0].unit,
        ]
        return jnp.stack([jnp.asarray(x, jnp.float32) for x in values])

    def _counts(self, state: Any) -> jax.Array:
        counts = state[0].count, state[0].count if self.momentum is None else state[2].count
        return jnp.stack([jnp.asarray(x, jnp.uint32) for x in counts])

    @property
    def _centered(self) -> bool:
        return self.statistics[0].name == 'var'

    def _trees(self, state: Any) -> list[Any]:
        """The tree of each statistic."""
        if not isinstance(state[0], RmsState):
            raise TypeError
        return [
            state[2].trace if x.name == 'trace' else getattr(state[0], x.name)
            for x in self.statistics
        ]

    def _with_trees(self, state: Any, trees: list[Any]) -> Any:
        named = dict(zip([x.name for x in self.statistics], trees, strict=True))
        trace = named.pop('trace', None)
        tail = () if self.momentum is None else (TraceState(state[2].count, trace),)
        return (state[0]._replace(**named), state[1], *tail)

    def _takes(self, path: Any, g: Any, p: Any, stored: list[Any]) -> bool:
        alike = all(jnp.shape(x) == jnp.shape(g) for x in (p, *stored))
        if not alike or any(jnp.result_type(x) != jnp.float32 for x in (g, p)):
            return False
        axes = jax.typeof(g).manual_axis_type
        if any(jax.typeof(x).manual_axis_type != axes for x in (p, *stored)):
            return False
        formats = [x.format(path, jnp.shape(g), g) for x in self.statistics]
        return all(
            isinstance(kept, float32 | bfloat16)
            and x.dtype == (jnp.bfloat16 if isinstance(kept, bfloat16) else jnp.float32)
            for kept, x in zip(formats, stored, strict=True)
        )

    def _keys(self, path: Any, g: Any) -> list[int]:
        """What tells apart the random bits of each statistic of a leaf; 0 where none are used."""
        formats = [(x, x.format(path, jnp.shape(g), g)) for x in self.statistics]
        return [int(kept.key(f'{x.name}{keystr(canonical(path))}') or 0) for x, kept in formats]


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The result that takes an operand's place, which in a `shard_map` varies as that does."""
    kind = jax.typeof(x)
    if kind.sharding.mesh.empty:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    axes = kind.manual_axis_type
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kind.sharding, manual_axis_type=axes)
