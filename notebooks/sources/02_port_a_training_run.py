# %% [markdown]
# # Moving a training run from PyTorch to JAX
#
# **You will learn** how to move a half-trained network with its optimizer state from PyTorch to JAX
# and back, how to see that everything came over, and how to start one layer again. **It takes** 6
# minutes to read and 40 seconds to run on two CPU cores.
#
# A convolutional network learns handwritten digits in PyTorch. Halfway we take its checkpoint,
# parameters and optimizer state, to JAX, and train on there while PyTorch trains on as well. If
# everything came over, the two losses are the same from the first step to the last.
#
# Two things commonly go wrong in such a move without an error: the optimizer starts with empty
# statistics, or "RMSProp" means something else on the other side. We make both mistakes as well, to
# see what they do.

# %%
import copy
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from flax import nnx
from sklearn.datasets import load_digits

import rmsprop_jax
from rmsprop_jax import interchange

BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#555555'
plt.style.use('data/figures.mplstyle')
plt.rcParams['figure.figsize'] = (6.4, 3.6)
torch.set_num_threads(2)

# %% [markdown]
# ## The run in PyTorch
#
# 1797 images of 8 by 8 pixels, of which the first 1500 are for training. The optimizer has two
# groups: kernels with weight decay and momentum, and everything else without weight decay and with
# a smaller learning rate. Minibatches are the same on both sides: step `t` takes row `t` of
# `batches`.

# %%
STEPS, HANDOVER, BATCH = 300, 150, 64
images, labels = load_digits(return_X_y=True)
images = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
batches = np.random.default_rng(0).integers(0, 1500, (STEPS, BATCH))

torch.manual_seed(0)
net = torch.nn.Sequential()
net.add_module('conv', torch.nn.Conv2d(1, 8, 3, padding=1))
net.add_module('relu1', torch.nn.ReLU())
net.add_module('pool', torch.nn.MaxPool2d(2))
net.add_module('flatten', torch.nn.Flatten())
net.add_module('hidden', torch.nn.Linear(8 * 4 * 4, 32))
net.add_module('norm', torch.nn.LayerNorm(32))
net.add_module('relu2', torch.nn.ReLU())
net.add_module('out', torch.nn.Linear(32, 10))

named = dict(net.named_parameters())
kernels = [(name, p) for name, p in named.items() if p.ndim > 1]
others = [(name, p) for name, p in named.items() if p.ndim == 1]
optimizer = torch.optim.RMSprop(
    [
        {'params': kernels, 'lr': 2e-4, 'momentum': 0.9, 'weight_decay': 1e-4},
        {'params': others, 'lr': 1e-4, 'momentum': 0.9},
    ],
    alpha=0.95,
)


def torch_steps(net, optimizer, start, stop):
    """Trains `net` in place; returns the loss before each step."""
    losses = []
    for rows in batches[start:stop]:
        scores = net(torch.from_numpy(images[rows]))
        loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


first_half = torch_steps(net, optimizer, 0, HANDOVER)
checkpoint = copy.deepcopy({'net': net.state_dict(), 'optimizer': optimizer.state_dict()})
second_half = torch_steps(net, optimizer, HANDOVER, STEPS)
print(f'PyTorch: loss {first_half[0]:.3f} at first, {first_half[-20:].mean():.4f} before the move')

# %% [markdown]
# ## The same network in Flax
#
# Flax keeps images channels-last and kernels as (in, out). Each layer gets its pair of names; the
# helpers know the layouts. One layer needs more than that: `hidden` reads a flattened image, which
# PyTorch flattens in the order channel, row, column, and Flax in the order row, column, channel.
# `flattened(8, 4, 4)` puts its inputs into the other order.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(8 * 4 * 4, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, epsilon=1e-5, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), (2, 2)).reshape(len(x), -1)
        return self.out(nnx.relu(self.norm(self.hidden(x))))


pairs = (
    *interchange.torch.conv('conv', 'conv'),
    *interchange.torch.linear('hidden', 'hidden', layout=interchange.flattened(8, 4, 4)),
    *interchange.torch.norm('norm', 'norm'),
    *interchange.torch.linear('out', 'out'),
)
graph, blank = nnx.split(Net(nnx.Rngs(0)))
params = interchange.parameters_from(checkpoint['net'], blank, pairs)

test_images, test_labels = images[1500:], labels[1500:]
old = copy.deepcopy(net)
old.load_state_dict(checkpoint['net'])
with torch.no_grad():
    theirs = old(torch.from_numpy(test_images)).numpy()
ours = np.asarray(nnx.merge(graph, params)(test_images.transpose(0, 2, 3, 1)))
print(f'scores of up to {abs(theirs).max():.1f} differ by {abs(theirs - ours).max():.1e} at most')

# %% [markdown]
# ## The optimizer
#
# `torch_optimizer` reads the parameter groups and returns one `dialects.torch` for each, dealt out
# by `optax.partition`. `from_torch` fills its state: second moments, momentum and step count, each
# kernel's statistics in the layout of the kernel. Had anything been missing, left over or of
# another shape, one error would have listed it all.
#
# PyTorch numbers parameters in the order in which the optimizer got them. This optimizer was given
# names, so that the checkpoint knows them; for others there is `names=`.

# %%
tx = interchange.torch_optimizer(checkpoint['optimizer'], params, pairs)
state = interchange.from_torch(checkpoint['optimizer'], tx, params, pairs)
print('counts:', {int(count) for _, count in optax.tree.get_all_with_path(state, 'count')})


def loss_of(params, rows):
    scores = nnx.merge(graph, params)(jnp.asarray(images.transpose(0, 2, 3, 1))[rows])
    chosen = jnp.asarray(labels)[rows]
    return optax.softmax_cross_entropy_with_integer_labels(scores, chosen).mean()


@functools.partial(jax.jit, static_argnums=0)
def jax_steps(tx, params, state, batches):
    """Returns the parameters and the state after the steps, and the loss before each."""

    def step(carry, rows):
        params, state = carry
        loss, gradients = jax.value_and_grad(loss_of)(params, rows)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), batches)
    return params, state, losses


moved_params, moved_state, moved = jax_steps(tx, params, state, batches[HANDOVER:])
_, _, empty = jax_steps(tx, params, tx.init(params), batches[HANDOVER:])
other_rule = optax.rmsprop(2e-4, decay=0.95, momentum=0.9)
_, _, other = jax_steps(other_rule, params, other_rule.init(params), batches[HANDOVER:])

# %%
steps = np.arange(STEPS)


def smooth(losses, width=10):
    """The mean of `width` losses up to each step."""
    return np.convolve(losses, np.ones(width) / width, mode='valid')


fig, ax = plt.subplots(figsize=(7.2, 3.8))
whole = np.concatenate([first_half, second_half])
ax.plot(steps[9:], smooth(whole), color=ORANGE, linewidth=4, alpha=0.5, label='PyTorch throughout')
for losses, line, color, label in (
    (moved, '-', BLUE, 'moved to JAX'),
    (empty, ':', GREY, 'moved without the optimizer state'),
):
    joint = smooth(np.concatenate([first_half, losses]))[HANDOVER - 9 :]
    ax.plot(steps[HANDOVER:], joint, line, color=color, linewidth=1.3, label=label)
ax.axvline(HANDOVER, color=GREY, linewidth=0.8)
ax.annotate(
    'checkpoint moved', (HANDOVER, 1), (4, -2), ax.get_xaxis_transform(), 'offset points', va='top'
)
ax.set(xlabel='step', ylabel='cross-entropy, mean of 10 steps', yscale='log')
ax.yaxis.set_major_formatter('{x:g}')
ax.set_title('One training run in two frameworks')
ax.legend(loc='lower left')
for name, losses in (
    ('moved', moved),
    ('moved, empty state', empty),
    ('moved, optax.rmsprop from empty', other),
):
    apart = abs(np.asarray(losses) - second_half)
    print(
        f'{name:32}loss {losses[:20].mean():.4f}, then {losses[-100:].mean():.5f}; '
        f'from PyTorch {apart.max():.1e} at most'
    )
print(f'{"PyTorch":32}loss {second_half[:20].mean():.4f}, then {second_half[-100:].mean():.5f}')
print('(means of the first 20 steps after the move, and of the last 100)')

# %% [markdown]
# The blue line lies on the wide one: each of its losses is PyTorch's to within float32 rounding.
# Without the optimizer state the run departs at the first step. It is not worse for it in the end,
# here even a little lower, but it is another run, and whatever one wants to know about the move (a
# wrong layout, a wrong weight decay) drowns in the difference. So it does with `optax.rmsprop` in
# PyTorch's place, which has epsilon inside the root, no weight decay and one learning rate.
#
# The way back is `to_torch`, with the groups of the optimizer that is to go on. It holds what the
# one that never moved holds by now.

# %%
groups = optimizer.state_dict()['param_groups']
back = interchange.to_torch(
    moved_state, moved_params, pairs, groups, tx=tx, as_tensor=torch.from_numpy
)
stayed = optimizer.state_dict()['state']
apart = [
    float((array - stayed[number][key]).abs().max() / stayed[number][key].abs().max())
    for number, entry in back['state'].items()
    for key, array in entry.items()
]
optimizer.load_state_dict(back)
print(f'{len(apart)} arrays, relative difference at most {max(apart):.1e}')

# %% [markdown]
# ## Starting one layer again
#
# Suppose the output layer is to be initialised anew while the rest trains on. Its second moments
# are those of a trained layer, whose gradients had become small. `reset` gives that layer, and no
# other, the statistics of a first step, so that no entry moves by more than
# $1 / \sqrt{1 - 0.95} = 4.5$ learning rates (and a little weight decay).

# %%
fresh = nnx.state(Net(nnx.Rngs(1)), nnx.Param)
mask = jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == 'out', fresh)
restarted = jax.tree.map(lambda m, new, old: new if m else old, mask, fresh, moved_params)
states = {
    'statistics kept': moved_state,
    'statistics reset': rmsprop_jax.reset(tx, moved_state, restarted, mask),
}
for name, start in states.items():
    gradients = jax.grad(loss_of)(restarted, batches[0])
    update = tx.update(gradients, start, restarted)[0]['out']['kernel'][...]
    _, _, losses = jax_steps(tx, restarted, start, batches[:HANDOVER])
    sizes = jnp.abs(update) / 2e-4
    print(
        f'{name:17} first step {sizes.mean():4.1f} rates, {sizes.max():4.1f} at most; '
        f'loss {losses[0]:.2f}, after 10 steps {losses[10]:.2f}, last {losses[-20:].mean():.3f}'
    )

# %% [markdown]
# With the statistics kept, some entries move by 13 learning rates at once. This layer learns again
# about equally fast either way; where a large first step does harm, `reset` bounds it.
