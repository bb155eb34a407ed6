# %% [markdown]
# # Who is speaking? Gradients through time
#
# **You will learn** how to watch gradients vanish and explode through time, what SGD, AdaGrad and
# RMSProp make of them, and what no optimizer can mend. **It takes** 10 minutes to read and a minute
# to run on two CPU cores.
#
# Nine men say the Japanese vowels /ae/, and a recurrent network has to tell who it was. It reads
# an utterance frame by frame and answers after the last one, so that what it should have noticed
# early has to be learned from a gradient that has travelled back through all later frames. On this
# way gradients vanish or explode (Hochreiter 1991; Bengio, Simard and Frasconi 1994), and RMSProp
# in the form of Graves (2013) is one of the answers given to it.
#
# Here we measure instead of telling: how large the gradient is at each frame, and how large the
# steps are that stochastic gradient descent (SGD), AdaGrad and RMSProp make of it.

# %%
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.linear_model import LogisticRegression

from rmsprop_jax import dialects, recipes

BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#555555'
plt.style.use('data/figures.mplstyle')
plt.rcParams['figure.figsize'] = (6.4, 3.6)

# %% [markdown]
# ## The recordings
#
# The data are *Japanese Vowels* by Kudo, Toyama and Shimbo (UCI Machine Learning Repository, CC BY
# 4.0; see `data/japanese_vowels.md`): 640 utterances of 7 to 29 frames. A frame is 25.6 ms of
# sound, 6.4 ms after the one before, summarised by 12 cepstrum coefficients. The authors' training
# set has 30 utterances of each speaker; their test set, 370 others. Of each speaker's 30 we keep
# the last 6 to choose learning rates with.

# %%
SPEAKERS, FRAMES, FRAME_MS = 9, 29, 6.4
file = np.load(Path('data') / 'japanese_vowels.npz')


def utterances(part):
    """Frames of shape (utterance, 29, 12), padded with zeros, lengths, and speakers from 0."""
    lengths = file[f'{part}_lengths']
    padded = np.zeros((len(lengths), FRAMES, 12), np.float32)
    padded[np.arange(FRAMES) < lengths[:, None]] = file[f'{part}_frames']
    return padded, lengths, file[f'{part}_speakers'] - 1


train, test = utterances('train'), utterances('test')
scale = file['train_frames'].mean(axis=0), file['train_frames'].std(axis=0)
held_out = np.arange(270) % 30 >= 24
assert (np.bincount(train[2][held_out]) == 6).all()
fitting, choosing = (tuple(x[rows] for x in train) for rows in (~held_out, held_out))

fig, axes = plt.subplots(1, 3, figsize=(8.6, 3), sharex=True, sharey=True)
for ax, speaker in zip(axes, (0, 3, 6), strict=True):
    for row in np.flatnonzero(train[2] == speaker)[:3]:
        frames = train[0][row, : train[1][row], :2]
        time = FRAME_MS * np.arange(len(frames))
        ax.plot(time, frames[:, 0], color=BLUE, label='coefficient 1')
        ax.plot(time, frames[:, 1], '--', color=ORANGE, label='coefficient 2')
    ax.set(xlabel='time (ms)', title=f'speaker {speaker + 1}')
axes[0].set_ylabel('cepstrum coefficient')
axes[2].legend(*(x[:2] for x in axes[2].get_legend_handles_labels()))
print('Three utterances of three speakers each')

# %% [markdown]
# How much of this needs a memory at all? A linear classifier that sees only each utterance's mean
# frame is the mark to beat.


# %%
def mean_frame(part):
    frames, lengths, _ = part
    return frames.sum(axis=1) / lengths[:, None]


linear = LogisticRegression(C=100, max_iter=5000).fit(mean_frame(train), train[2])
linear_accuracy = linear.score(mean_frame(test), test[2])
print(f'mean frame, logistic regression: {linear_accuracy:.1%} of the test utterances')

# %% [markdown]
# ## The network
#
# A plain recurrent network with 32 units,
# $h_t = \tanh(W x_t + U h_{t-1} + b)$, and a linear layer on the last $h$. After the utterance has
# ended the state is simply kept. $U$ starts as a random orthogonal matrix times a gain: backwards
# through one frame a gradient is multiplied by $U^\top$ and by the slope of tanh, at most 1. So at
# gain 1 or less it can only shrink, and at a larger gain it may grow.
#
# To see the gradient at each frame we add a *probe* to each $h_t$, an array of zeros that changes
# nothing. The derivative of the loss by the probe is $\partial L / \partial h_t$.

# %%
UNITS = 32


class Recurrent(nnx.Module):
    def __init__(self, gain, rngs):
        self.read = nnx.Linear(12, UNITS, rngs=rngs)
        orthogonal = nnx.initializers.orthogonal(gain)
        self.recur = nnx.Linear(UNITS, UNITS, use_bias=False, kernel_init=orthogonal, rngs=rngs)
        self.name = nnx.Linear(UNITS, SPEAKERS, rngs=rngs)

    def __call__(self, frames, lengths, probe):
        inputs = self.read((frames - scale[0]) / scale[1]).swapaxes(0, 1)
        recur = self.recur.kernel[...]

        def step(h, now):
            t, x, probe = now
            new = jnp.tanh(x + h @ recur) + probe
            return jnp.where((t < lengths)[:, None], new, h), None

        start = jnp.zeros((len(frames), UNITS))
        last, _ = jax.lax.scan(step, start, (jnp.arange(FRAMES), inputs, probe))
        return self.name(last)


GRAPH = nnx.graphdef(Recurrent(1.0, nnx.Rngs(0)))


def initial(gain, seed):
    return nnx.state(Recurrent(gain, nnx.Rngs(jax.random.key(seed))), nnx.Param)


def losses(params, part, probe):
    """The cross-entropy of each utterance, and whether the right speaker was named."""
    frames, lengths, speakers = part
    scores = nnx.merge(GRAPH, params)(frames, lengths, probe)
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, speakers)
    return loss, scores.argmax(axis=-1) == speakers


def no_probe(part):
    return jnp.zeros((FRAMES, len(part[1]), UNITS))


# %% [markdown]
# ## How the gradient fares on its way back
#
# For each test utterance, the norm of $\partial L / \partial h_t$, $k$ frames before the last,
# divided by that of the last frame. The lines are geometric means over the utterances that are long
# enough (of 15 frames at least), the bands reach from the lowest to the highest of five seeds. All
# networks are untrained.


# %%
BACK = np.arange(15)
LONG = tuple(x[test[1] >= len(BACK)] for x in test)


@jax.jit
def fade(params):
    """The gradient's norm k frames before the last, in units of the last: a geometric mean."""

    def total(probe):
        return losses(params, LONG, probe)[0].sum()

    norms = jnp.linalg.norm(jax.grad(total)(no_probe(LONG)), axis=-1)
    back = norms[LONG[1] - 1 - BACK[:, None], np.arange(len(LONG[1]))]
    return jnp.exp(jnp.log(back / back[0]).mean(axis=1))


def band(ax, x, curves, color, line, label):
    """The median of the curves, and a band from the lowest to the highest."""
    curves = np.maximum(curves, 1e-30)  # A gradient that is exactly zero has no logarithm.
    ax.plot(x, np.median(curves, axis=0), line, color=color, label=label)
    ax.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.2, linewidth=0)


SEEDS = np.arange(5)
fig, ax = plt.subplots()
for gain, color, line in ((1.0, BLUE, '-'), (2.0, GREEN, '-.'), (4.0, ORANGE, '--')):
    untrained = np.array([fade(initial(gain, seed)) for seed in SEEDS])
    band(ax, BACK, untrained, color, line, f'gain {gain:g}')
    per_frame = untrained[:, -1] ** (1 / BACK[-1])
    print(f'gain {gain:g}: times {np.median(per_frame):.2f} per frame, {len(LONG[1])} utterances')
ax.set(xlabel='frames before the last (6.4 ms each)', ylabel='gradient / that of the last frame')
ax.legend()
ax.set_yscale('log')
ax.invert_xaxis()

# %% [markdown]
# A straight line in this figure is an exponential. At gain 1 the slopes of tanh alone make the
# gradient vanish; at gain 4 it explodes; in between, near gain 2, it keeps its size.
#
# ## Three ways to make a step of it
#
# We train at gain 1 and at gain 4, with
#
# - SGD, $b \leftarrow 0.9\, b + g$, step $-\alpha b$;
# - AdaGrad, step $-\alpha g / \sqrt{0.1 + \sum g^2}$, with the sum over all steps so far (0.1 is
#   Optax's start);
# - RMSProp as in `recipes.graves`: the gradient's mean $m$ and mean square $n$, both with decay
#   0.95, and $b \leftarrow 0.9\, b - \alpha g / \sqrt{n - m^2 + 10^{-4}}$.
#
# Graves had $\alpha = 10^{-4}$ for large networks trained for long. Each rule gets five learning
# rates, Graves's among them, and we take the one with the lowest loss on the utterances kept for
# choosing. One program per rule trains the 50 networks of 2 gains, 5 rates and 5 seeds, on
# minibatches of 24, for 50 epochs.

# %%
BATCH, EPOCHS, GAINS = 24, 50, np.array([1.0, 4.0])
RULES = {
    'SGD': (lambda rate: optax.sgd(rate, momentum=0.9), [0.001, 0.003, 0.01, 0.03, 0.1]),
    'AdaGrad': (optax.adagrad, [0.01, 0.03, 0.1, 0.3, 1.0]),
    'RMSProp (Graves)': (dialects.graves, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
}
STYLES = dict(zip(RULES, ((GREY, ':'), (ORANGE, '--'), (BLUE, '-')), strict=True))

g = jax.random.normal(jax.random.key(0), (100,))
ours, theirs = (tx.update(g, tx.init(g))[0] for tx in (dialects.graves(1e-4), recipes.graves()))
np.testing.assert_array_equal(ours, theirs)


def train(rule, gain, rate, seed):
    """The weights after training, and for each step the loss and the norms."""
    key = jax.random.key(seed)
    params, tx = initial(gain, seed), rule(rate)
    order = functools.partial(jax.random.permutation, x=len(fitting[1]))
    batches = jax.vmap(order)(jax.random.split(key, EPOCHS)).reshape(-1, BATCH)

    def step(carry, rows):
        params, state = carry
        batch = tuple(jnp.asarray(x)[rows] for x in fitting)

        def objective(params):
            return losses(params, batch, no_probe(batch))[0].mean()

        loss, gradients = jax.value_and_grad(objective)(params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (loss, optax.tree.norm(gradients), optax.tree.norm(updates))

    (params, _), measured = jax.lax.scan(step, (params, tx.init(params)), batches)
    return params, measured


def over(axis, function):
    """`function(gain, rate, seed)`, for all values along one of these arguments."""
    return jax.vmap(function, tuple(0 if place == axis else None for place in range(3)))


def train_all(rule, rates):
    every = over(0, over(1, over(2, functools.partial(train, rule))))
    return jax.device_get(jax.jit(every)(GAINS, np.array(rates), SEEDS))


results = {name: train_all(*choice) for name, choice in RULES.items()}


@jax.jit
@jax.vmap
@jax.vmap
@jax.vmap
def judge(params):
    """Loss on the utterances for choosing, accuracy on the test set, and the gradient's fading."""
    loss = losses(params, choosing, no_probe(choosing))[0].mean()
    return loss, losses(params, test, no_probe(test))[1].mean(), fade(params)


# The rate of the lowest loss, for each rule and gain; a run that has diverged counts as infinite.
judged = {name: jax.device_get(judge(params)) for name, (params, _) in results.items()}
best, accuracy, faded, measured = {}, {}, {}, {}
for row, gain in enumerate(GAINS):
    print(f'gain {gain:g}')
    for name, (_, rates) in RULES.items():
        run = name, row
        loss = np.nan_to_num(judged[name][0][row].mean(axis=1), nan=np.inf)
        best[run] = loss.argmin()
        accuracy[run], faded[run] = (x[row, best[run]] for x in judged[name][1:])
        measured[run] = [x[row, best[run]] for x in results[name][1]]
        final = measured[run][0][:, -9:].mean()
        print(
            f'  {name:17} rate {rates[best[run]]:<6g} final training loss {final:.4f}, test '
            f'accuracy {accuracy[run].mean():.1%} ({accuracy[run].min():.1%} to '
            f'{accuracy[run].max():.1%})\n    at all rates: '
            + ' '.join(f'{x:.1%}' for x in judged[name][1][row].mean(axis=1))
        )

# %% [markdown]
# At gain 1 the three do equally well, and no better than the linear classifier on the mean frame
# (which was given all 270 utterances): this task needs little memory. Graves's own rate was chosen
# for his rule. At gain 4 none of them comes near. The means put RMSProp first, but the ranges of
# the five seeds overlap. (Training at gain 4 is chaotic: another processor has other numbers.)
#
# ## Gradients and steps
#
# The first row below is the training loss; the other two are what this notebook is about: the norm
# of the gradient of all weights, and the norm of the step that the rule makes of it. Means over the
# 9 steps of an epoch; medians over the seeds, and bands from the lowest to the highest.

# %%
epochs = 1 + np.arange(EPOCHS)


def per_epoch(curves):
    return curves.reshape(len(SEEDS), EPOCHS, -1).mean(axis=-1)


LABELS = 'training loss', 'norm of the gradient', 'norm of the step'
fig, axes = plt.subplots(3, 2, figsize=(8.6, 8), sharex=True, sharey='row')
for (name, gain), curves in measured.items():
    for ax, label, curve in zip(axes[:, gain], LABELS, curves, strict=True):
        band(ax, epochs, per_epoch(curve), *STYLES[name], name)
        ax.set(yscale='log', ylabel='' if gain else label)
for ax, gain in zip(axes[0], GAINS, strict=True):
    ax.set_title(f'gain {gain:g}')
for ax in axes[-1]:
    ax.set_xlabel('epoch (9 steps)')
axes[0, 1].legend()
weights = optax.tree.norm(initial(4.0, 0))
print(f'norm of all weights before training, at gain 4: {weights:.0f}')


# %%
def swing(curves):
    """How much larger a quantity is at its largest than at its median, over the seeds' steps."""
    return np.median(curves.max(axis=1) / np.median(curves, axis=1))


def elasticity(gradient, step):
    """By how many percent the step grows with one percent of gradient: a slope of logarithms."""
    return np.median([np.polyfit(*np.log(pair), 1)[0] for pair in zip(gradient, step, strict=True)])


swings = {run: (swing(gradient), swing(step)) for run, (_, gradient, step) in measured.items()}
for (name, row), (_, gradient, step) in measured.items():
    peaks = '{:6.1f}, step {:5.1f}'.format(*swings[name, row])
    power = elasticity(gradient, step)
    print(
        f'gain {GAINS[row]:g}, {name:17} largest / median: gradient {peaks}; '
        f'step ~ gradient^{power:.2f}'
    )

ratio = {name: swings[name, 1][1] / swings[name, 1][0] for name in RULES}
assert min(ratio, key=ratio.get) == 'RMSProp (Graves)'

# %% [markdown]
# - **Gain 1.** Everything is tame. Gradients fall as the loss does, and the steps of all three
#   rules with them; those of SGD and AdaGrad about in proportion. SGD is the fastest here and
#   RMSProp, at Graves's small rate, the slowest.
# - **Gain 4, SGD.** Exploding gradients make exploding steps. In the first epoch the mean step is
#   6 in the median and above 30 in one seed, where all weights together have a norm of 24. Such
#   steps do not correct the initial weights, they replace them. (Momentum spreads a spike over
#   ten steps or so, which lowers the power.)
# - **AdaGrad** has large steps at first as well: wherever the gradient is large, its first step is
#   the learning rate. Each spike stays in the sum of squares for good, and all later steps are the
#   shorter for it.
# - **RMSProp** meets peaks of hundreds of times the median too, and its largest step is a few times
#   its median step. A spike raises $n$ at once, and is forgotten within some
#   20 steps ($1 / (1 - 0.95)$).
#
# So the step's length is what RMSProp takes care of. The network of gain 4 learns badly all the
# same: a step of a sensible length is not yet one in a useful direction.
#
# ## Through time, after training
#
# The gradient on its way back once more, now in the trained networks. A line that leaves the figure
# at the bottom means a gradient of exactly zero for some utterance: tanh has saturated, and its
# slope is zero in float32.

# %%
fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.6), sharex=True, sharey=True)
for row, (ax, gain) in enumerate(zip(axes, GAINS, strict=True)):
    untrained = np.array([fade(initial(gain, seed)) for seed in SEEDS])
    band(ax, BACK, untrained, GREEN, '-.', 'untrained')
    for name in RULES:
        band(ax, BACK, faded[name, row], *STYLES[name], name)
    ax.set(xlabel='frames before the last (6.4 ms each)', title=f'gain {gain:g}', yscale='log')
axes[0].invert_xaxis()
axes[0].set_ylim(1e-8, 1e3)
axes[0].set_ylabel('gradient / that of the last frame')
axes[0].legend()

for (name, row), curves in faded.items():
    first = np.median(curves[:, -1])
    print(f'gain {GAINS[row]:g}, {name:17} {BACK[-1]} frames before the last: {first:.2g}')
    assert row == 0 or curves[:, -1].max() < untrained[:, -1].min()

# %% [markdown]
# At gain 1 the gradient vanishes after training as it did before, whatever the rule. None of the
# rules acts on it: an optimizer sees one gradient for each weight, in which all frames have been
# summed. It can scale that sum, but no scaling gives the early frames the share in it that they
# have lost.
#
# At gain 4 the typical gradient no longer explodes, under any of the rules, though single ones
# still do: see the peaks above. But training did not bring it to the even keel of gain 2. With SGD
# units have saturated, and the explosion has turned into its opposite.
#
# What to take home: RMSProp keeps the length of its steps in hand, whatever the gradient does, and
# forgets a spike. It does not mend the flow of gradients through time. That takes the architecture
# and its initial weights: here the gain; in Graves's paper an LSTM, whose derivatives he clips
# inside the network besides.
