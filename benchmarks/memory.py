"""The memory of a training step as its compiler states it, in float32 and in 3 bytes a parameter.

Prints the tables of docs/storage.md; nothing is executed, and no accelerator is needed::

    JAX_PLATFORMS=cpu .venv/aot-python3/bin/python -m benchmarks.memory
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import rmsprop_jax
from rmsprop_jax import aot, sharding, storage

Tree = Any
LAYERS, NARROW, WIDE, ROWS = 24, 1024, 4096, 256


def float32() -> optax.GradientTransformation:
    return rmsprop_jax.rmsprop(1e-3)


def three_bytes(
    *before: optax.GradientTransformation,
) -> optax.GradientTransformation:
    step = rmsprop_jax.rmsprop(1e-3, storage=storage.uint8())
    return rmsprop_jax.round_parameters(optax.chain(*before, step))


# --- 24 layers, unrolled, in a scan, with clipping, with accumulation -----------------------------


def step_of(
    loss: Callable[..., jax.Array], tx: optax.GradientTransformation, places: Tree = None
) -> Any:
    def step(params: Tree, state: Tree, *batch: jax.Array) -> tuple[Tree, Tree]:
        gradients = jax.grad(loss)(params, *batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=places)


def layer(x: jax.Array, weights: Tree) -> tuple[jax.Array, None]:
    return x + jax.nn.relu(x @ weights['in']) @ weights['out'], None


def unrolled(params: Tree, x: jax.Array) -> jax.Array:
    for weights in params:
        x, _ = layer(x, weights)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def scanned(params: Tree, x: jax.Array) -> jax.Array:
    x, _ = jax.lax.scan(layer, x, params)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


SHAPES = {'in': (NARROW, WIDE), 'out': (WIDE, NARROW)}
MANY = [{k: jax.ShapeDtypeStruct(s, jnp.bfloat16) for k, s in SHAPES.items()}] * LAYERS
STACKED = {k: jax.ShapeDtypeStruct((LAYERS, *s), jnp.bfloat16) for k, s in SHAPES.items()}
FORMS = {
    'layers unrolled': (unrolled, MANY, three_bytes()),
    'unrolled, clipped by global norm': (
        unrolled,
        MANY,
        three_bytes(optax.clip_by_global_norm(1.0)),
    ),
    'layers in lax.scan': (scanned, STACKED, three_bytes()),
    # Its two branches take a TPU's compiler minutes for 24 layers.
    '4 layers unrolled, optax.MultiSteps': (
        unrolled,
        MANY[:4],
        optax.MultiSteps(three_bytes(), 4),
    ),
}


def layers_bytes(form: str, target: str) -> tuple[float, float]:
    """Bytes a parameter of one of `FORMS`: arguments and temporaries."""
    loss, params, tx = FORMS[form]
    state = jax.eval_shape(tx.init, params)
    x = jax.ShapeDtypeStruct((ROWS, NARROW), jnp.bfloat16)
    report = aot.compile_step(step_of(loss, tx), params, state, x, target=target)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return report.argument_bytes / size, report.temporary_bytes / size


def layers_table() -> None:
    print(f'\n{LAYERS} layers: bytes a parameter, arguments + temporaries')
    print('| training step | TPU v5e | H100 |\n| --- | --- | --- |')
    for form in FORMS:
        found = [layers_bytes(form, target) for target in ('tpu-v5e', 'cuda-h100')]
        print(f'| {form} | ' + ' | '.join(f'{a:.2f} + {t:.2f}' for a, t in found) + ' |')


# --- A transformer of a billion parameters --------------------------------------------------------

VOCABULARY, WIDTH, DEPTH, HEADS, LENGTH = 50304, 2048, 18, 16, 2048
# The shape of each parameter, and which axis tensor parallelism splits.
MODEL = {
    'tokens': ((VOCABULARY, WIDTH), P('model')),
    'norm': ((WIDTH,), P()),
    'layers': {
        'attention_norm': ((DEPTH, WIDTH), P()),
        'attention_in': ((DEPTH, WIDTH, 3, HEADS, WIDTH // HEADS), P(None, None, None, 'model')),
        'attention_out': ((DEPTH, HEADS, WIDTH // HEADS, WIDTH), P(None, 'model')),
        'mlp_norm': ((DEPTH, WIDTH), P()),
        'mlp_in': ((DEPTH, WIDTH, 4 * WIDTH), P(None, None, 'model')),
        'mlp_out': ((DEPTH, 4 * WIDTH, WIDTH), P(None, 'model')),
    },
}


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    square = jnp.mean(jnp.square(x.astype('float32')), -1, keepdims=True)
    return (x * jax.lax.rsqrt(square + 1e-6)).astype('bfloat16') * scale


def block(x: jax.Array, weights: Tree) -> tuple[jax.Array, None]:
    w = jax.tree.map(lambda w: w.astype('bfloat16'), weights)
    split = jnp.einsum('bld,dkhe->kblhe', normed(x, w['attention_norm']), w['attention_in'])
    attended = jax.nn.dot_product_attention(*split, is_causal=True)
    x = x + jnp.einsum('blhe,hed->bld', attended, w['attention_out'])
    return x + jax.nn.gelu(normed(x, w['mlp_norm']) @ w['mlp_in']) @ w['mlp_out'], None


def language_loss(params: Tree, tokens: jax.Array) -> jax.Array:
    table = params['tokens'].astype('bfloat16')
    x, _ = jax.lax.scan(jax.checkpoint(block), table[tokens], params['layers'])
    logits = (normed(x, params['norm'].astype('bfloat16')) @ table.T).astype('float32')
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean()


def transformer(
    target: str,
    topology: str | None,
    tensor_parallel: int,
    dtype: Any,
    tx: optax.GradientTransformation,
    divided: bool,
) -> aot.Report:
    """The report on a step with one sequence for each part of the batch."""
    chips = np.reshape(aot.devices(target, topology), (-1, tensor_parallel))
    mesh = Mesh(chips, ('data', 'model'))
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf[0], dtype, sharding=NamedSharding(mesh, leaf[1])),
        MODEL,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    split = sharding.zero1_shardings(params) if divided else None
    state = sharding.abstract_state(tx, params, split)
    tx = sharding.zero1(tx, params) if divided else tx
    places = jax.tree.map(lambda x: x.sharding, (params, state))
    rows = NamedSharding(mesh, P('data'))
    tokens = jax.ShapeDtypeStruct((len(chips), LENGTH), jnp.int32, sharding=rows)
    step = step_of(language_loss, tx, places)
    return aot.compile_step(step, params, state, tokens, target=target, topology=topology)


def billion_table() -> None:
    print('\nA billion parameters: GB on each chip')
    print('| chips | parameters and state | arguments | temporaries |\n| --- | --- | --- | --- |')
    for target, topology, tensor, divisions in (
        ('tpu-v5e', '16x16', 8, (False, True)),
        ('cuda-h100', None, 1, (False,)),
    ):
        for name, dtype, tx in (
            ('float32', jnp.float32, float32()),
            ('bfloat16 and uint8', jnp.bfloat16, three_bytes()),
        ):
            for divided in divisions:
                report = transformer(target, topology, tensor, dtype, tx, divided)
                print(
                    f'| {target} {topology or ""} | {name}{", zero1" * divided} '
                    f'| {report.argument_bytes / 1e9:.3f} | {report.temporary_bytes / 1e9:.3f} |',
                    flush=True,
                )


if __name__ == '__main__':
    layers_table()
    billion_table()
