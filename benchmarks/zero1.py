"""What compilers make of a training step whose state is split over the data axis, by ZeRO-1.

Prints the tables of docs/scaling.md; nothing is executed, and no accelerator is needed::

    JAX_PLATFORMS=cpu .venv/aot-python3/bin/python -m benchmarks.zero1
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import rmsprop_jax
from rmsprop_jax import aot, sharding
from rmsprop_jax.aot._compile import update_and_apply

TX = rmsprop_jax.rmsprop(1e-3, momentum=0.9)
FLAGS = {
    'xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter': True,
    'xla_tpu_enable_sparse_core_collective_offload_reduce_scatter': True,
}


def mesh_of(
    target: str,
    topology: Any,
    shape: tuple[int, ...],
    names: tuple[str, ...],
    kind: AxisType = AxisType.Auto,
) -> Mesh:
    devices = np.array(aot.devices(target, topology)).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def loss(params: Any, x: jax.Array) -> jax.Array:
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def compiled(
    mesh: Mesh,
    target: str,
    form: str,
    *,
    width: int,
    layers: int,
    axis: Any = 'data',
    spec: Any = None,
    flags: dict[str, Any] | None = None,
) -> aot.Report:
    """The report on a training step of dense layers, momentum included.

    Args:
      mesh: The devices.
      target: Which they are.
      form: 'replicated' has state like the parameters, 'zero1' splits it by constraints,
        'reduce_scatter' sums gradients by `sharding.reduce_scatter` besides, and 'shard_map' takes
        the whole step under `jax.shard_map`.
      width: Of the layers.
      layers: How many there are.
      axis: The data axis, or axes.
      spec: How parameters are sharded over others, if they are.
      flags: Of the compiler.
    """
    place = NamedSharding(mesh, spec or P())
    params = [jax.ShapeDtypeStruct((width, width), jnp.float32, sharding=place)] * layers
    batch = jax.ShapeDtypeStruct((4096, width), jnp.float32, sharding=NamedSharding(mesh, P(axis)))
    tx, split = TX, [place] * layers
    if form != 'replicated':
        tx = sharding.zero1(TX, params, axis=axis)
        split = sharding.zero1_shardings(params, axis=axis)
    state = sharding.abstract_state(TX, params, split)
    specs = [x.spec for x in split]
    gradients = jax.grad(loss)

    def scattered(params: Any, x: jax.Array) -> Any:
        return sharding.reduce_scatter(jax.grad(loss)(params, x), specs, axis)

    def under_shard_map(params: Any, state: Any, x: jax.Array) -> Any:
        updates, state = TX.update(scattered(params, x), state)
        whole = [gathered(u, spec) for u, spec in zip(updates, specs, strict=True)]
        return jax.tree.map(jnp.add, params, whole), state

    def gathered(update: jax.Array, spec: Any) -> jax.Array:
        dimension, names = next((i, names) for i, names in enumerate(spec) if names)
        for name in reversed(names if isinstance(names, tuple) else (names,)):
            update = jax.lax.all_gather(update, name, axis=dimension, tiled=True)
        return update

    if form == 'reduce_scatter':
        gradients = jax.shard_map(
            scattered, mesh=mesh, in_specs=(P(), P(axis)), out_specs=specs, check_vma=False
        )

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        return update_and_apply(tx)(params, state, gradients(params, x))

    if form == 'shard_map':
        of_state = jax.tree.map(lambda x: x.sharding.spec, state)
        step = jax.shard_map(
            under_shard_map,
            mesh=mesh,
            in_specs=(P(), of_state, P(axis)),
            out_specs=(P(), of_state),
            check_vma=False,
        )
    kept = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=kept, compiler_options=flags)
    return aot.compile_step(jitted, params, state, batch, target=target, params=params)


def main() -> None:
    gpu = mesh_of('cuda-h100', 8, (8,), ('data',))
    forms = ('replicated', 'zero1')
    reports = [compiled(gpu, 'cuda-h100', form, width=2048, layers=4) for form in forms]
    print('Four layers of 2048 x 2048, 8 x H100\n')
    print(aot.table(reports, forms))
    for target in ('tpu-v5e', 'tpu-v6e'):
        tpu = mesh_of(target, '4x4', (4, 4), ('x', 'y'))
        rows = {
            'replicated': ('replicated', None),
            'zero1': ('zero1', None),
            'zero1, flags': ('zero1', FLAGS),
            'reduce_scatter over 4, then 4': ('reduce_scatter', None),
            'all of it under shard_map': ('shard_map', None),
        }
        reports = [
            compiled(tpu, target, form, width=4096, layers=4, axis=('x', 'y'), flags=flags)
            for form, flags in rows.values()
        ]
        print(f'\nFour layers of 4096 x 4096, {target} 4 x 4\n')
        print(aot.table(reports, list(rows)))


if __name__ == '__main__':
    main()
