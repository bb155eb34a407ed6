# %% [markdown]
# # What a wrong dialect costs
#
# **You will learn** what happens when EfficientNet's numbers run in another framework's RMSProp,
# which of the three hidden differences matters, and how large the loss is. **It takes** 10 minutes
# to read and 90 seconds to run on two CPU cores.
#
# EfficientNet was trained with TensorFlow's RMSProp. Who takes its numbers to another framework
# keeps the learning rate, the decay, the momentum and $\varepsilon$, and may still run another
# optimizer, because three things are not in the numbers:
#
# | | in the source | easily becomes |
# |---|---|---|
# | epsilon | inside, $g / \sqrt{v + \varepsilon}$ | outside, $g / (\sqrt{v} + \varepsilon)$ |
# | second moment | starts at $v_0 = 1$ | starts at $v_0 = 0$ |
# | velocity | contains the rate, $b \leftarrow \mu b + \alpha u$ | is multiplied by it |
#
# PyTorch's `RMSprop` differs in all three. Here a small convolutional network learns handwritten
# digits in the recipe, in each of the three mistakes alone, and in all of them together.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.ticker import MaxNLocator
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rmsprop_jax
from rmsprop_jax import dialects, recipes
from rmsprop_jax.plots import COLOURS, DASHES

plt.style.use('data/figures.mplstyle')
plt.rcParams['figure.figsize'] = (9.2, 4.2)

# %% [markdown]
# ## The recipe, for 1437 images in the place of 1.3 million
#
# `recipes.efficientnet` is the whole optimizer as the published code builds it. It asks for the
# batch size, to which its learning rate is proportional (0.016 per 256 images, so 0.004 for our
# 64), and for the number of steps in an epoch, in which its schedule is written: five epochs of
# warm-up, and 3% off the rate every 2.4 epochs. Two things cannot be scaled down: we train for 12
# epochs and not for hundreds, and an epoch has 22 steps and not 626, so that everything the
# optimizer does *by the step*, such as forgetting its start, takes a larger part of the training
# than it did. Dropout, label smoothing and augmentation are left out, and batch normalisation keeps
# its running statistics with a decay of 0.9 in the place of Flax's 0.99, which would lag behind by
# several of our short epochs.

# %%
BATCH, EPOCHS, SEEDS = 64, 12, 8
pixels, labels = load_digits(return_X_y=True)
images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
split = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
train_images, test_images, train_labels, test_labels = map(jnp.asarray, split)
PER_EPOCH = len(train_images) // BATCH
WARM_UP = 5 * PER_EPOCH
PEAK = 0.016 * BATCH / 256

recipe = recipes.efficientnet(steps_per_epoch=PER_EPOCH, batch_size=BATCH)
print(f'{PER_EPOCH} steps in an epoch, {WARM_UP} of warm-up, peak rate {PEAK:g}')

# %% [markdown]
# For the mis-ported versions we write the schedule and the weight decay out and put another dialect
# in the middle. `dialects.keras` is TensorFlow's rule with a start at zero;
# `dialects.stable_baselines3` has the root and the start of TensorFlow and the momentum of PyTorch.
# The last one is a port that knows about epsilon: torchvision's training script has PyTorch's rule
# with $\varepsilon = 0.0316$, the root of TensorFlow's 0.001.


# %%
def rate(step):
    warming = step / WARM_UP
    return PEAK * jnp.where(step < WARM_UP, warming, 0.97 ** (step // (2.4 * PER_EPOCH)))


def with_decay(dialect):
    decay = optax.add_decayed_weights(1e-5, recipes.tensorflow_decay_mask)
    return optax.chain(decay, dialect)


eps_outside = rmsprop_jax.rmsprop(
    rate, decay=0.9, eps=1e-3, initial_scale=1.0, eps_in_sqrt=False, momentum=0.9
)
rules = {
    'recipe': recipe,
    'start at zero': with_decay(dialects.keras(rate, 0.9, 0.9, 1e-3)),
    'rate outside momentum': with_decay(dialects.stable_baselines3(rate, 0.9, 1e-3, momentum=0.9)),
    'epsilon outside': with_decay(eps_outside),
    'all three (PyTorch)': with_decay(dialects.torch(rate, 0.9, 1e-3, momentum=0.9)),
    'PyTorch, root of epsilon': with_decay(dialects.torch(rate, 0.9, 1e-3**0.5, momentum=0.9)),
}
STYLES = {
    name: {'color': COLOURS[i], 'ls': DASHES[j], 'linewidth': 1.8}
    for name, i, j in zip(rules, (0, 1, 2, 3, 4, 5), (0, 1, 2, 6, 5, 0), strict=True)
}

# %% [markdown]
# Before we compare anything, a check that nothing else differs: the recipe's parts, put together by
# hand, give the recipe's updates.

# %%
by_hand = with_decay(dialects.tensorflow(rate, 0.9, 0.9, 1e-3))
states, params = [tx.init(jnp.ones(3)) for tx in (recipe, by_hand)], jnp.ones(3)
for step in range(3 * WARM_UP):
    g = jnp.sin(step * jnp.array([0.3, 1.0, 5.0]))
    (ours, states[0]), (parts, states[1]) = (
        tx.update(g, state, params) for tx, state in zip((recipe, by_hand), states, strict=True)
    )
    np.testing.assert_allclose(ours, parts, rtol=1e-4, atol=1e-9)

# %% [markdown]
# ## The network
#
# Two 3x3 convolutions with batch normalisation and the SiLU (swish) of EfficientNet, each followed
# by averaging 2x2 squares, and a dense layer. With many small networks at once, a convolution
# written as one matrix product is several times faster on a CPU than the built-in one.


# %%
def convolve(images, kernel, *_, **__):
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(windows, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def halve(x):
    count, height, width, channels = x.shape
    return x.reshape(count, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class Net(nnx.Module):
    def __init__(self, rngs):
        kind = functools.partial(nnx.Conv, use_bias=False, conv_general_dilated=convolve, rngs=rngs)
        self.conv1 = kind(1, 8, (3, 3))
        self.bn1 = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.conv2 = kind(8, 16, (3, 3))
        self.bn2 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(2 * 2 * 16, 10, rngs=rngs)

    def __call__(self, x):
        x = halve(nnx.silu(self.bn1(self.conv1(x))))
        x = halve(nnx.silu(self.bn2(self.conv2(x))))
        return self.out(x.reshape(len(x), -1))


graph = nnx.graphdef(Net(nnx.Rngs(0)))


def cross_entropy(params, stats, images, labels, train):
    net = nnx.merge(graph, params, stats, copy=True)
    net.set_attributes(use_running_average=not train)
    scores = net(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return losses.mean(), (nnx.state(net, nnx.BatchStat), (scores.argmax(-1) == labels).mean())


# %% [markdown]
# ## Every seed and every learning rate at once
#
# Eight seeds decide the initial weights and the order of the images, the same for all rules. As the
# recipe's rate was tuned for another task, every rule is trained with three multiples of it. (A
# constant factor on the rate is a factor on the update, wherever the rate stands.) So 24 networks
# are trained at a time, under two `vmap`s. The source evaluates a running average of weights and
# batch statistics, so we keep one, and the last weights of each epoch beside it.

# %%
FACTORS = np.array([1 / 4, 1.0, 4.0])
AS_PUBLISHED = list(FACTORS).index(1.0)


def root_mean_square(tree):
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(sum(jnp.sum(x**2) for x in leaves) / sum(x.size for x in leaves))


def train(tx, start, batches, factor):
    """Returns losses and update sizes of all steps, and the weights after each epoch."""

    def step(carry, rows):
        (params, stats), state, average, count = carry
        grad = jax.value_and_grad(cross_entropy, has_aux=True)
        (loss, (stats, _)), g = grad(params, stats, train_images[rows], train_labels[rows], True)
        updates, state = tx.update(g, state, params)
        updates = jax.tree.map(lambda u: factor * u, updates)
        weights = optax.apply_updates(params, updates), stats
        average = recipes.ema_update(average, weights, count + 1, 0.9999)
        return (weights, state, average, count + 1), (loss, root_mean_square(updates))

    def epoch(carry, batches):
        carry, measured = jax.lax.scan(step, carry, batches)
        return carry, (measured, carry[0], carry[2])

    carry = start, tx.init(start[0]), recipes.ema_init(start), 0
    (losses, sizes), weights, averages = jax.lax.scan(epoch, carry, batches)[1]
    return losses.reshape(-1), sizes.reshape(-1), weights, averages


@jax.jit
@jax.vmap
def beginnings(key):
    """The initial weights, and the images of each batch: epoch x batch x row."""
    net = Net(nnx.Rngs(key))
    orders = [
        jax.random.permutation(jax.random.fold_in(key, epoch), len(train_images))
        for epoch in range(EPOCHS)
    ]
    batches = jnp.stack(orders)[:, : PER_EPOCH * BATCH].reshape(EPOCHS, PER_EPOCH, BATCH)
    return (nnx.state(net, nnx.Param), nnx.state(net, nnx.BatchStat)), batches


@jax.jit
def test(weights):
    """Loss and accuracy on the test images, for factors x seeds x epochs of networks."""

    def one(weights):
        loss, (_, accuracy) = cross_entropy(*weights, test_images, test_labels, False)
        return loss, accuracy

    return jax.lax.map(jax.vmap(jax.vmap(one)), weights)


# %%
start, batches = beginnings(jax.random.split(jax.random.key(0), SEEDS))
results = {}
for name, tx in rules.items():
    over_seeds = jax.vmap(functools.partial(train, tx), (0, 0, None))
    run = jax.jit(jax.vmap(over_seeds, (None, None, 0)))
    losses, sizes, weights, averages = run(start, batches, jnp.asarray(FACTORS, jnp.float32))
    measured = losses, sizes, *test(weights), *test(averages)
    keys = ('loss', 'size', 'test', 'accuracy', 'average_test', 'average_accuracy')
    results[name] = dict(zip(keys, map(np.asarray, measured), strict=True))

# %% [markdown]
# ## The size of the steps
#
# How far a weight moves in a step (root mean square over all weights), in units of the peak rate,
# and the training loss, both with the rate as published. Lines are means over the eight seeds,
# bands go from the smallest to the largest of the eight.


# %%
def draw(ax, x, values, name):
    """The mean over the first axis, and the band from its smallest to its largest value."""
    ax.plot(x, values.mean(0), label=name, **STYLES[name])
    color = STYLES[name]['color']
    ax.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def smooth(values, width=11):
    """The mean of `width` steps about each step."""
    return np.apply_along_axis(np.convolve, -1, values, np.ones(width) / width, 'valid')


fig, axes = plt.subplots(1, 2)
steps = np.arange(1, EPOCHS * PER_EPOCH + 1)
for name, result in results.items():
    # The first update of the recipe is zero, and so are those that start with its warm-up.
    draw(axes[0], steps[1:], result['size'][AS_PUBLISHED][:, 1:] / PEAK, name)
    draw(axes[1], steps[5:-5], smooth(result['loss'][AS_PUBLISHED]), name)
for ax in axes:
    ax.axvline(WARM_UP, color='0.4', linewidth=0.8)
    ax.set(xlabel='step', yscale='log')
axes[0].annotate('end of warm-up', (WARM_UP, 0.004), (4, 0), textcoords='offset points')
axes[0].set(ylabel='update size (peak learning rates)', ylim=(0.002, 5))
axes[1].set(ylabel='training cross-entropy, mean of 11 steps')
fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
for name, result in results.items():
    sizes = result['size'][AS_PUBLISHED].mean(0) / PEAK
    print(
        f'{name:26}update at step 10 {sizes[9]:.3f}, at 100 {sizes[99]:.2f}, '
        f'over the last epoch {sizes[-PER_EPOCH:].mean():.3f} peak rates'
    )

over_last = {name: r['size'][AS_PUBLISHED, :, -PER_EPOCH:].mean() for name, r in results.items()}
at_10 = {name: r['size'][AS_PUBLISHED, :, 9].mean() for name, r in results.items()}
assert min(over_last['epsilon outside'], over_last['all three (PyTorch)']) > 3 * over_last['recipe']
assert at_10['all three (PyTorch)'] > 30 * at_10['recipe']

# %% [markdown]
# Two things part the curves, at different times.
#
# - **The start**, in the beginning. At $v_0 = 1$, far above the square of any gradient here, the
#   root stays large until $0.9^t$ has made it small. That is a second warm-up, of some 60 steps:
#   three of our epochs, a tenth of an epoch in the source. At step 10 PyTorch's rule is more than
#   30 times as fast as the recipe. The schedule's warm-up still keeps it from doing harm.
# - **Epsilon**, from then on, and for good. Inside, the root is never less than
#   $\sqrt{0.001} \approx 0.03$, and once gradients are smaller than that, steps shrink with them.
#   Outside, the floor is 0.001, thirty times lower, and steps stay as long as they were.
#
# The learning rate's place makes hardly a difference. It can do so only where the rate changes
# within the memory of the velocity, ten steps or so: here at the first steps of the warm-up.
#
# ## What it costs
#
# Loss on the 360 test images after each epoch: of the weights as they are (left), and of their
# running average (right).

# %%
fig, axes = plt.subplots(1, 2, sharey=True)
for ax, key in zip(axes, ('test', 'average_test'), strict=True):
    for name, result in results.items():
        draw(ax, np.arange(1, EPOCHS + 1), result[key][AS_PUBLISHED], name)
    ax.set(xlabel='epoch', yscale='log')
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
axes[0].set(ylabel='test cross-entropy', title='weights')
axes[1].set(title='average of the weights')
fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)

# %% [markdown]
# The same in numbers, as means of the last four epochs. A rule and the recipe share their seeds, so
# we compare them seed by seed: by what factor is the loss higher? The interval is a 95% confidence
# interval for the mean factor (geometric mean, Student's t with 7 degrees of freedom).


# %%
LAST = 4


def times_the_recipe(name, key):
    """The factor by which a loss is above the recipe's: its mean and its confidence interval."""
    logs = [np.log(results[rule][key][AS_PUBLISHED, :, -LAST:]) for rule in (name, 'recipe')]
    ratio = (logs[0] - logs[1]).mean(axis=1)
    half = stats.t.ppf(0.975, SEEDS - 1) * ratio.std(ddof=1) / SEEDS**0.5
    return np.exp([ratio.mean(), ratio.mean() - half, ratio.mean() + half])


factors = {}
for name, result in results.items():
    print(name)
    for key, weights in (('', 'weights'), ('average_', 'average')):
        loss = result[f'{key}test'][AS_PUBLISHED, :, -LAST:]
        accuracy = result[f'{key}accuracy'][AS_PUBLISHED, :, -LAST:].mean(1)
        words = f'loss {loss.mean():.3f}, accuracy {accuracy.mean():.1%} '
        words += f'(from {accuracy.min():.1%} to {accuracy.max():.1%})'
        if name != 'recipe':
            factors[name, weights] = mean, low, high = times_the_recipe(name, f'{key}test')
            words += f'; loss times {mean:.2f} ({low:.2f} to {high:.2f})'
        print(f'    {weights:8}{words}')

for name in ('epsilon outside', 'all three (PyTorch)'):
    assert 1.2 < factors[name, 'weights'][0] < 2
    assert factors[name, 'average'][0] < 0.9
for name in ('start at zero', 'rate outside momentum', 'PyTorch, root of epsilon'):
    assert abs(factors[name, 'weights'][0] - 1) < 0.15
    assert abs(factors[name, 'average'][0] - 1) < 0.15

# %% [markdown]
# This is not quite what one is told about wrong dialects.
#
# - Start and order cost nothing in the end. With the start at zero the average is even slightly
#   better.
# - Epsilon outside makes the *last weights* worse: their loss is higher by about a half, with
#   PyTorch's other two differences or without. But it makes their *average* better, which is what
#   the source evaluates. Long steps about a minimum do no harm to a mean over them.
# - PyTorch's rule with the root of epsilon does what the recipe does. It still starts faster.
#
# ## Is it only the learning rate?
#
# The test loss, mean of the last four epochs, for each multiple of the recipe's rate.

# %%
fig, axes = plt.subplots(1, 2, sharey=True)
for ax, key in zip(axes, ('test', 'average_test'), strict=True):
    for name, result in results.items():
        draw(ax, FACTORS, result[key][:, :, -LAST:].mean(2).T, name)
    ax.axvline(1, color='0.4', linewidth=0.8)
    ax.set(xlabel="learning rate (multiples of the recipe's)", xscale='log', yscale='log')
    ax.set_xticks(FACTORS, ['1/4', '1', '4'])
    ax.set_yticks([0.03, 0.05, 0.1, 0.2, 0.5, 1], ['0.03', '0.05', '0.1', '0.2', '0.5', '1'])
    ax.minorticks_off()
axes[0].set(ylabel='test cross-entropy, last four epochs', title='weights')
axes[1].set(title='average of the weights')
fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
finals = {}
for name, result in results.items():
    finals[name] = [result[k][:, :, -LAST:].mean((1, 2)) for k in ('test', 'average_test')]
    words = [', '.join(f'{loss:.3f}' for loss in losses) for losses in finals[name]]
    print(f'{name:26}weights {words[0]}; average {words[1]}')

# %%
weights, averages = zip(*(finals[name] for name in ('recipe', 'epsilon outside')), strict=True)
assert weights[0][0] > weights[0][1]
assert weights[1][0] < weights[1][1] < weights[1][2]
assert abs(np.log(averages[1][1] / averages[0][2])) < np.log(1.4)

# %% [markdown]
# On this task, nearly. With epsilon outside, the curves are roughly those of the recipe, moved to
# the left by a factor of four: what the recipe's average reaches at four times its rate, they reach
# at the published one, and their last weights are best at a quarter of it. So the published rate is
# not the best for a small network on digits in 12 epochs, and the wrong dialect happened to correct
# it. A search over learning rates would have hidden the mistake; copying the numbers, which is the
# point of a recipe, does not.
#
# How large the factor is depends on how epsilon compares with the squared gradients, so nothing
# here says what it is on ImageNet. What to do is the same everywhere: take the dialect along with
# the numbers, and where that is impossible, the root of epsilon.
