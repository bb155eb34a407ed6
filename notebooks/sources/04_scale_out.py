# %% [markdown]
# # Scale out
#
# **You will learn** how to train many runs in one program, how to divide optimizer state among
# devices, and how to compile a step for a TPU pod that you do not have. **It takes** 7 minutes to
# read and 20 seconds to run on two CPU cores.
#
# Three things that need more than one device, or only its compiler: 64 training runs in one
# program, optimizer state divided among devices, and the step of a model of a billion parameters on
# slices of TPU pods. JAX's own sharding does the work. Here the devices are eight simulated ones on
# the CPU, so that times mean nothing and memory and communication do.

# %%
import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import rmsprop_jax
from rmsprop_jax import aot, sharding, storage

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
plt.rcParams.update({'figure.constrained_layout.use': True})

# %% [markdown]
# ## 64 runs in one program
#
# Hyperparameters may be traced numbers. A function that trains with them and returns its final loss
# can then be mapped over a grid, and the grid spread over devices. Below, a network with one hidden
# layer learns handwritten digits in 300 steps, for 8 learning rates, 2 decays and 4 values of
# epsilon, each from the same weights and with the same minibatches.

# %%
pixels, digits = load_digits(return_X_y=True)
images, labels = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(digits)


def loss(params, images, labels):
    logits = jax.nn.relu(images @ params['hidden']) @ params['output']
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def final_loss(learning_rate, decay, eps):
    """Trains for 300 steps; returns the loss over all images."""
    tx = rmsprop_jax.rmsprop(learning_rate, decay, eps, bias_correction=True)
    hidden_key, output_key, order_key = jax.random.split(jax.random.key(0), 3)
    params = {
        'hidden': jax.random.normal(hidden_key, (64, 32)) / 8,
        'output': jax.random.normal(output_key, (32, 10)) / math.sqrt(32),
    }

    def step(carry, rows):
        params, state = carry
        gradients = jax.grad(loss)(params, images[rows], labels[rows])
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    batches = jax.random.randint(order_key, (300, 64), 0, len(labels))
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
    return loss(params, images, labels)


# %% [markdown]
# The sweep is a grid, its place on the devices, and one compiled program:

# %%
rates, decays, epsilons = np.logspace(-3, 0.5, 8), [0.9, 0.99], [1e-8, 1e-5, 1e-2, 1.0]
grid = [np.float32(x.ravel()) for x in np.meshgrid(rates, decays, epsilons, indexing='ij')]
settings = jax.device_put(grid, NamedSharding(Mesh(jax.devices(), 'runs'), P('runs')))
sweep = jax.jit(jax.vmap(final_loss)).lower(*settings).compile()
losses = sweep(*settings)

# %% [markdown]
# No run needs to know of another, and the program has no instruction that sends anything between
# devices. Nor do runs depend on their company: alone, a setting ends with the same loss, to the
# rounding of a few hundred steps in float32.

# %%
COMMUNICATION = r'\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)\b'
assert len(losses.sharding.device_set) == 8
assert not re.findall(COMMUNICATION, sweep.as_text())
print(f'{losses.size} runs on {len(losses.sharding.device_set)} devices, nothing sent between them')

alone = jax.jit(final_loss)
for run in (0, 20, 41):
    single = alone(*(values[run] for values in grid))
    print(f'run {run}: {losses[run]:.6f} in the sweep, {single:.6f} alone')
    np.testing.assert_allclose(losses[run], single, rtol=1e-3)

# %%
surfaces = np.asarray(losses).reshape(8, 2, 4).transpose(1, 2, 0)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for ax, decay, surface in zip(axes, decays, surfaces, strict=True):
    image = ax.imshow(np.log10(surface), cmap='viridis_r', vmin=-1.5, vmax=0.4, aspect='auto')
    for (row, column), value in np.ndenumerate(surface):
        lowest = value == surface[row].min()
        ax.text(
            column,
            row,
            f'{value:.2f}' if value >= 0.1 else f'{value:.3f}',
            color='white' if value > 0.5 else 'black',
            weight='bold' if lowest else 'normal',
            ha='center',
            va='center',
            size=8,
        )
    ax.set_xticks(range(8), [f'{rate:.1g}' for rate in rates])
    ax.set_yticks(range(4), [f'{eps:g}' for eps in epsilons])
    ax.set(xlabel='learning rate', title=f'decay {decay}')
axes[0].set_ylabel('epsilon, inside the root')
bar = fig.colorbar(image, ax=axes, label='loss after 300 steps')
bar.set_ticks([-1, 0], labels=['0.1', '1'])

# %% [markdown]
# The best rate of each row is in bold. Where epsilon is far below the squared gradients (the upper
# rows) it hardly matters. Where it is far above them (the last row) the root is a constant: the
# decay makes no difference, and what is left is gradient descent with the rate
# $\alpha / \sqrt\varepsilon$. From 0.01 to 1 the best rate grows tenfold, as that root does. A loss
# of $\ln 10 \approx 2.30$ is that of a network which no longer looks at the image.

# %% [markdown]
# ## The state, divided
#
# RMSProp with momentum keeps two numbers for each parameter. When every device has all parameters
# and its own part of the batch, none of them needs more than its share of that state (ZeRO, stage
# 1): `sharding.zero1` has each device step the share it keeps, and gathers the updates. Storage
# formats divide the rest once more.
#
# The model is a transformer with a billion parameters. It is never made: what a device would hold
# follows from shapes and shardings.

# %%
VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 50304, 2048, 18, 16, 2048
# The shape of each parameter, and which axis tensor parallelism would split.
MODEL = {
    'tokens': ((VOCABULARY, WIDTH), P('model')),
    'norm': ((WIDTH,), P()),
    'layers': {
        'attention_norm': ((LAYERS, WIDTH), P()),
        'attention_in': ((LAYERS, WIDTH, 3, HEADS, WIDTH // HEADS), P(None, None, None, 'model')),
        'attention_out': ((LAYERS, HEADS, WIDTH // HEADS, WIDTH), P(None, 'model')),
        'mlp_norm': ((LAYERS, WIDTH), P()),
        'mlp_in': ((LAYERS, WIDTH, 4 * WIDTH), P(None, None, 'model')),
        'mlp_out': ((LAYERS, 4 * WIDTH, WIDTH), P(None, 'model')),
    },
}


def parameters(mesh):
    """The abstract parameters on a mesh of the axes `data` and `model`."""

    def leaf(shape_and_spec):
        shape, spec = shape_and_spec
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, MODEL, is_leaf=lambda x: isinstance(x, tuple))


def gigabytes(tree):
    """What a tree of abstract arrays takes on each device."""
    shards = [(math.prod(x.sharding.shard_shape(x.shape)), x.dtype) for x in jax.tree.leaves(tree)]
    return sum(size * dtype.itemsize for size, dtype in shards) / 1e9


formats = {
    'float32': storage.float32(),
    'bfloat16': storage.bfloat16(),
    'uint8, trace in bfloat16': storage.per_statistic(nu=storage.uint8(), trace=storage.bfloat16()),
}
counts = (1, 8, 64, 256)
print(f'{"GB of state on each of":28}' + ''.join(f'{count:>8}' for count in counts) + '  devices')
for name, kept in formats.items():
    tx = rmsprop_jax.rmsprop(1e-3, momentum=0.9, storage=kept)
    row = []
    for count in counts:
        params = parameters(AbstractMesh((count, 1), ('data', 'model')))
        split = sharding.zero1_shardings(params)
        row.append(gigabytes(sharding.abstract_state(tx, params, split)))
    print(f'{name:28}' + ''.join(f'{amount:8.3f}' for amount in row))
sizes = [math.prod(x.shape) for x in jax.tree.leaves(params)]
print(f'parameters: {sum(sizes) / 1e9:.3f} billion, {gigabytes(params):.3f} GB on each')

# %% [markdown]
# The column of one device is the whole state, which each device has without `zero1`. That the
# numbers of a run stay the same, to rounding, can be tried out: the small network from above,
# data-parallel on the eight devices for 100 steps, with the state whole and divided.

# %%
data = Mesh(jax.devices(), 'data')
rows = NamedSharding(data, P('data'))
batch = jax.device_put((images[:1024], labels[:1024]), rows)


def trained(divided):
    keys = jax.random.split(jax.random.key(1))
    params = {
        'hidden': jax.random.normal(keys[0], (64, 32)) / 8,
        'output': jax.random.normal(keys[1], (32, 10)) / math.sqrt(32),
    }
    params = jax.device_put(params, NamedSharding(data, P()))
    tx = rmsprop_jax.rmsprop(0.01, momentum=0.9)
    tx = sharding.zero1(tx, params) if divided else tx

    def step(carry, _):
        params, state = carry
        gradients = jax.grad(loss)(params, *batch)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    state = jax.jit(tx.init)(params)
    return jax.jit(lambda *start: jax.lax.scan(step, start, length=100)[0])(params, state)


(params_whole, whole), (params_divided, divided) = trained(False), trained(True)
difference = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), params_whole, params_divided)
print(f'largest difference of a weight: {max(jax.tree.leaves(difference))}')
for name, state in {'whole': whole, 'divided': divided}.items():
    print(f'{name}: {gigabytes(state) * 1e6:.1f} kB of state on each device')

# %% [markdown]
# ## A pod slice, from shapes alone
#
# The same model's whole step, forward, backward and update, for slices of TPU pods: on v5e 256
# chips, with tensors split over 8 of them and the batch over 32; on v5p 64 chips, over 4 and 16.
# The TPU's own compiler makes the program from shapes, without a TPU, and says what memory each
# chip needs and what it sends. Compiled is not executed: see [Backends](../docs/backends.md).
#
# The compiler comes with `pip install '.[notebooks,aot-tpu]'` in a checkout, best in an environment
# of its own, where `python notebooks/sources/04_scale_out.py` runs this notebook. Without it, the
# table is the one recorded there.


# %%
def normed(x, scale):
    square = jnp.mean(jnp.square(x.astype('float32')), -1, keepdims=True)
    return (x * jax.lax.rsqrt(square + 1e-6)).astype('bfloat16') * scale


def layer(x, weights):
    w = jax.tree.map(lambda w: w.astype('bfloat16'), weights)
    split = jnp.einsum('bld,dkhe->kblhe', normed(x, w['attention_norm']), w['attention_in'])
    attended = jax.nn.dot_product_attention(*split, is_causal=True)
    x = x + jnp.einsum('blhe,hed->bld', attended, w['attention_out'])
    return x + jax.nn.gelu(normed(x, w['mlp_norm']) @ w['mlp_in']) @ w['mlp_out'], None


def language_loss(params, tokens):
    table = params['tokens'].astype('bfloat16')
    x, _ = jax.lax.scan(jax.checkpoint(layer), table[tokens], params['layers'])
    logits = (normed(x, params['norm'].astype('bfloat16')) @ table.T).astype('float32')
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean()


def compiled(target, topology, tensor_parallel, divided):
    """What the compiler says of a step, with one sequence for each part of the batch."""
    chips = np.reshape(aot.devices(target, topology), (-1, tensor_parallel))
    mesh = Mesh(chips, ('data', 'model'))
    params = parameters(mesh)
    tx = rmsprop_jax.rmsprop(1e-3, momentum=0.9)
    split = sharding.zero1_shardings(params) if divided else None
    state = sharding.abstract_state(tx, params, split)
    tx = sharding.zero1(tx, params) if divided else tx

    places = jax.tree.map(lambda x: x.sharding, (params, state))

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=places)
    def step(params, state, tokens):
        gradients = jax.grad(language_loss)(params, tokens)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    rows = NamedSharding(mesh, P('data'))
    tokens = jax.ShapeDtypeStruct((len(chips), LENGTH), jnp.int32, sharding=rows)
    return aot.compile_step(step, params, state, tokens, target=target, topology=topology)


def line(target, topology, tensor_parallel, divided):
    report = compiled(target, topology, tensor_parallel, divided)
    sent = [f'{x.count} {x.kind} {x.bytes / 1e9:.2f} GB' for x in report.collectives]
    return (
        f'{target} {topology:6} {"divided" if divided else "whole":8}'
        f'{report.argument_bytes / 1e9:9.2f}{report.temporary_bytes / 1e9:11.2f}  '
        + f'\n{46 * " "}'.join(sent)
    )


HEADING = 'target  chips  state    arguments  temporary  sent by each chip; a loop counts once'
RECORDED = (
    'tpu-v5e 16x16  whole        1.51       1.06  12 all-reduce 0.12 GB\n'
    'tpu-v5e 16x16  divided      0.54       0.51  31 all-gather 0.51 GB\n'
    '                                              13 all-reduce 0.07 GB\n'
    '                                              1 all-to-all 0.01 GB\n'
    '                                              26 collective-permute 0.01 GB\n'
    'tpu-v5p 4x4x4  whole        3.03       2.05  12 all-reduce 0.19 GB\n'
    'tpu-v5p 4x4x4  divided      1.14       1.07  10 all-gather 1.01 GB\n'
    '                                              11 all-reduce 0.06 GB\n'
    '                                              1 all-to-all 0.01 GB\n'
    '                                              26 collective-permute 0.02 GB\n'
)
print(HEADING)
if importlib.util.find_spec('libtpu'):
    for target, topology, tensor_parallel in (('tpu-v5e', '16x16', 8), ('tpu-v5p', '4x4x4', 4)):
        for divided in (False, True):
            print(line(target, topology, tensor_parallel, divided))
else:
    print(RECORDED, end='')
    print('recorded on 2026-11-22 with JAX 0.10.2 and libtpu 0.0.42.1, not compiled here')

# %% [markdown]
# Memory is in GB on each chip. With its state divided, a v5e chip holds 0.50 GB of parameters and a
# 32nd of the 1.01 GB that belong to them, and needs half as much memory beside. On both targets the
# compiler then gathers as many bytes as a chip has parameters. What a loop over layers sends is
# counted for one layer, so that the sums of gradients, which are in that loop, look smaller than
# they are. They are all-reduces still: [Scaling](../docs/scaling.md#tpu) says when a TPU's compiler
# scatters them.
