# %% [markdown]
# # Scale out
#
# Three things that need more than one device, or only its compiler: 64 training runs in one
# program, optimizer state divided among devices, and the step of a model of a billion parameters on
# slices of TPU pods. JAX's own sharding does the work. Here the devices are eight simulated ones on
# the CPU, so that times mean nothing and memory and communication do.

# %%
import math
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import rmsprop_jax

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
