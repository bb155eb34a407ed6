# %% [markdown]
# # RMSProp from the formulas
#
# **You will learn** which of two printed updates is RMSProp, what unit each argument has, how
# PyTorch's defaults differ from the formula, and what bias correction changes. **It takes** 10
# minutes to read and 20 seconds to run on two CPU cores.
#
# Two introductory texts on RMSProp print different updates. This notebook runs both. One is
# `rmsprop_jax.rmsprop` with its defaults. The other means to correct the bias of the running
# average, but its printed update has lost the gradient; `bias_correction=True` is what it aims at.
#
# RMSProp divides each coordinate of the gradient $g_t$ by a running root mean square of itself:
#
# $$
# v_t = \beta v_{t-1} + (1 - \beta)\, g_t^2,
# \qquad
# \theta_t = \theta_{t-1} - \alpha \frac{g_t}{\sqrt{v_t + \varepsilon}},
# \qquad v_0 = 0 .
# $$
#
# Every operation is elementwise. With $[g]$ for the unit of the gradient (unit of the loss divided
# by unit of the parameter):
#
# | quantity | argument | unit |
# |---|---|---|
# | running average of squares $v$, and its start $v_0$ | `initial_scale` ($v_0$) | $[g]^2$ |
# | weight of the past $\beta$ | `decay` | none, in $[0, 1)$ |
# | $\varepsilon$ inside the root | `eps` | $[g]^2$ |
# | $\varepsilon$ outside, $g / (\sqrt{v} + \varepsilon)$ | `eps`, `eps_in_sqrt=False` | $[g]$ |
# | direction $g / \sqrt{v + \varepsilon}$ | | none |
# | learning rate $\alpha$ | `learning_rate` | unit of the parameter |
#
# So $\alpha$ is a distance: roughly how far each coordinate moves in one step, whatever the scale
# of the loss, as long as $\varepsilon$ is negligible beside $v$.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import rmsprop_jax
from rmsprop_jax import dialects, interchange

BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#555555'
plt.style.use('data/figures.mplstyle')
plt.rcParams['figure.figsize'] = (6.4, 3.4)

# %% [markdown]
# ## The default: epsilon inside the root
#
# The first text uses the equations above with $\beta = 0.9$ and $\varepsilon = 10^{-8}$: the
# defaults of `rmsprop`. Its worked example is a small regression network (10 inputs, 5 hidden
# rectified linear units, 1 output), trained for 100 epochs on one batch of 100 points with learning
# rate 0.01. Here it is in Flax NNX, with Flax's initial weights.
#
# The text's code does not run the text's formula. It calls `torch.optim.RMSprop` with a learning
# rate only, and PyTorch's other defaults are $\beta = 0.99$ (there called `alpha`) and
# $\varepsilon = 10^{-8}$ *outside* the root. Two things differ, so we train with each change alone
# as well, from the same weights.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(10, 5, rngs=rngs)
        self.output = nnx.Linear(5, 1, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.relu(self.hidden(x)))


@nnx.jit
def train_step(net, optimizer, x, y):
    loss, gradients = nnx.value_and_grad(lambda net: jnp.mean((net(x) - y) ** 2))(net)
    optimizer.update(net, gradients)
    return loss


def train(net, tx, x, y, epochs=100):
    """Trains `net` in place; returns the loss before each epoch's update."""
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    return np.array([train_step(net, optimizer, x, y) for _ in range(epochs)])


# %%
rules = {
    'formula of the text': rmsprop_jax.rmsprop(0.01),
    'with decay 0.99': rmsprop_jax.rmsprop(0.01, decay=0.99),
    'with eps outside the root': rmsprop_jax.rmsprop(0.01, eps_in_sqrt=False),
    'PyTorch defaults': rmsprop_jax.rmsprop(0.01, decay=0.99, eps=1e-8, eps_in_sqrt=False),
}
key_x, key_y, key_data, key_order = jax.random.split(jax.random.key(3), 4)
x, y = jax.random.normal(key_x, (100, 10)), jax.random.normal(key_y, (100, 1))
losses = {name: train(Net(nnx.Rngs(3)), tx, x, y) for name, tx in rules.items()}

fig, ax = plt.subplots()
ax.plot(losses['formula of the text'], color=BLUE, label='formula of the text (decay 0.9)')
ax.plot(losses['PyTorch defaults'], '--', color=ORANGE, label='PyTorch defaults (decay 0.99)')
ax.set(xlabel='epoch (one update each)', ylabel='mean squared error', title='Net 10-5-1')
ax.legend()
for name, curve in losses.items():
    print(f'{name:26}{curve[0]:.4f} at first, {curve[10]:.4f} after 10, {curve[99]:.4f} after 99')

# %% [markdown]
# The curves part at the first update. A start at $v_0 = 0$ makes that step
# $\alpha / \sqrt{1 - \beta}$, which is 3.2 learning rates for $\beta = 0.9$ and 10 for
# $\beta = 0.99$. The table tells the two changes apart: in this run nearly all of the difference
# is due to the decay. Epsilon matters where $\sqrt{v}$ comes near $\sqrt{10^{-8}} = 10^{-4}$
# (inside the root) or $10^{-8}$ (outside).
#
# The targets were drawn independently of the inputs, so a falling loss shows memorised noise,
# nothing more.
#
# ## The text's program, line by line
#
# The program sets no seed. `data/worked_example.npz` holds a run of it in PyTorch after
# `torch.manual_seed(0)`: the points, the initial weights, and the loss and the printed line of each
# epoch, in float32 and once more in float64. Flax starts from the same weights. Its optimizer is
# `dialects.torch`, which has PyTorch's arguments and defaults: the program gives a learning rate
# and nothing else, and so do we.

# %%
recorded = np.load('data/worked_example.npz')
LAYERS = (*interchange.torch.linear('fc1', 'hidden'), *interchange.torch.linear('fc2', 'output'))


def train_as_recorded(dtype):
    """The losses of the recorded program, from the recorded weights, in Flax."""
    with jax.enable_x64(dtype == 'float64'):
        net = Net(nnx.Rngs(0))
        blank = jax.tree.map(lambda w: w.astype(dtype), nnx.state(net, nnx.Param))
        weights = {name: recorded[name].astype(dtype) for name in recorded if name[:2] == 'fc'}
        nnx.update(net, interchange.parameters_from(weights, blank, LAYERS))
        points = (jnp.asarray(recorded[name], dtype) for name in ('x', 'y'))
        return train(net, dialects.torch(lr=0.01), *points)


def lines_of(losses):
    return [f'Epoch [{epoch}/100], Loss: {loss:.4f}' for epoch, loss in enumerate(losses, start=1)]


ours = {dtype: train_as_recorded(dtype) for dtype in ('float32', 'float64')}
print('recorded with', recorded['about'])
print(*lines_of(ours['float32']), sep='\n')
for dtype, curve in ours.items():
    difference = np.abs(curve - recorded[f'losses_{dtype}']).max()
    print(f'largest difference to PyTorch in {dtype}: {difference:.1e}')
print('lines that differ:', np.sum(lines_of(ours['float32']) != recorded['lines_float32']))

# %% [markdown]
# All 100 lines are those of PyTorch. In float64 the losses agree to rounding, which shows that the
# two programs compute the same thing; in float32 they differ by a few roundings, in the seventh
# digit.
#
# ## What bias correction changes
#
# After $t$ steps the weights in $v_t$ add up to $1 - \beta^t$, not to one: while $t$ is small,
# $v_t$ is too small. The second text divides by that sum, which is the right thing to do:
#
# $$
# u_t = \frac{v_t}{1 - \beta^t},
# \qquad
# \theta_t = \theta_{t-1} - \eta \frac{g_t}{\sqrt{u_t + \varepsilon}} .
# $$
#
# It presumes $v_0 = 0$. The other common remedy is to start high, at $v_0 = 1$. Below, the gradient
# is constant, so that every step should measure one learning rate.


# %%
def step_sizes(gradient, steps=50, **options):
    """The size of each step for a constant gradient, in learning rates."""
    tx = rmsprop_jax.scale_by_rms(**options)
    g = jnp.float32(gradient)

    def step(state, _):
        update, state = tx.update(g, state)
        return state, jnp.abs(update)

    return jax.lax.scan(step, tx.init(g), length=steps)[1]


first_steps = []
fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.6), sharey=True)
for ax, gradient in zip(axes, (0.1, 10.0), strict=True):
    for corrected, color in ((False, BLUE), (True, ORANGE)):
        for start, line in ((0.0, '-'), (1.0, '--')):
            sizes = step_sizes(gradient, initial_scale=start, bias_correction=corrected)
            label = f'{"corrected" if corrected else "not corrected"}, start at {start:g}'
            ax.plot(np.arange(1, 51), sizes, line, color=color, label=label)
            first_steps.append(f'gradient {gradient:4}, {label}: first step {sizes[0]:.3f}')
    ax.set(xlabel='step', title=f'constant gradient of {gradient:g}', yscale='log')
    ax.set_yticks([0.03, 0.1, 0.3, 1, 3], ['0.03', '0.1', '0.3', '1', '3'])
    ax.minorticks_off()
axes[0].set_ylabel('step size (learning rates)')
fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=2)
print(*first_steps, sep='\n')

# %% [markdown]
# - From 0, correction is exact: each step is one learning rate from the first step on. Without it
#   the first is $1 / \sqrt{1 - 0.9} \approx 3.16$, and the excess fades within some 20 steps.
# - A start at 1 is a squared gradient of 1, in the unit of the problem. It holds back small
#   gradients (left) and does next to nothing about large ones (right, where the dashed lines lie
#   on the solid ones).
# - Correction on top of a start at 1 magnifies that start: its share of $u_t$ is
#   $\beta^t / (1 - \beta^t)$, 9 at the first step. Use one or the other.
#
# ## An update without a gradient
#
# What the second text prints as its update is this, with $u_t$ where $g_t$ should be:
#
# $$
# \theta_{t+1} = \theta_t - \eta \frac{u_t}{\sqrt{u_t^2 + \varepsilon}} .
# $$
#
# As $u_t \ge 0$, no coordinate can ever increase. The fraction is just below 1 while $u_t$ is well
# above $\sqrt{\varepsilon}$, that is, for gradients well above $\varepsilon^{1/4} = 0.01$
# ($\varepsilon$ has the unit $[g]^4$ here): each coordinate then falls by $\eta$ per step, whatever
# the sign and size of its gradient. For gradients far below 0.01 the steps shrink towards 0.
#
# The accompanying code follows neither formula and does not parse: its last line passes positional
# arguments after keyword arguments (and names a variable that does not exist, for an argument that
# is never used). With that repaired, three errors remain:
#
# - It steps along the normalised sum of all gradients so far. The running average is computed but
#   never used, so that the decay has no effect, and there is no bias correction.
# - Its gradient is $2\,\mathrm{mean}(x (y - x \theta))$, the *negative* of the gradient of the mean
#   squared error, and it is subtracted: the loss goes up.
# - That gradient has shape $(n,)$ and $\theta$ has shape $(n, 1)$. Broadcasting makes $\theta$ an
#   $n \times n$ matrix at the first update, without an error message.
#
# Here is a loop that works. `jax.grad` of the loss has the right sign and the shape of the weights,
# and the loop takes any update rule, so that it can also run the one printed.

# %%
OPTIONS = ('learning_rate', 'decay', 'eps', 'epochs', 'batch_size', 'rule')
corrected_rmsprop = functools.partial(rmsprop_jax.rmsprop, bias_correction=True)


@functools.partial(jax.jit, static_argnames=OPTIONS)
def linear_regression(
    key,
    X,
    y,
    *,
    learning_rate=0.01,
    decay=0.9,
    eps=1e-8,
    epochs=200,
    batch_size=32,
    rule=corrected_rmsprop,
):
    """Fits `X @ theta` to `y` by least squares on shuffled minibatches, from zero.

    Rows that do not fill a minibatch wait for another epoch. Returns the weights after each step,
    stacked.
    """
    tx = rule(learning_rate, decay=decay, eps=eps)
    batches = max(1, len(X) // batch_size)
    used = min(batches * batch_size, len(X))

    def mean_squared_error(theta, rows):
        return jnp.mean((X[rows] @ theta - y[rows]) ** 2)

    def step(carry, rows):
        theta, state = carry
        gradient = jax.grad(mean_squared_error)(theta, rows)
        updates, state = tx.update(gradient, state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), theta

    def epoch(carry, key):
        order = jax.random.permutation(key, len(X))[:used]
        return jax.lax.scan(step, carry, order.reshape(batches, -1))

    # A column of targets gets a column of weights, so that nothing broadcasts.
    theta = jnp.zeros(X.shape[1:] + y.shape[1:], X.dtype)
    _, path = jax.lax.scan(epoch, (theta, tx.init(theta)), jax.random.split(key, epochs))
    return path.reshape(-1, *theta.shape)


def printed_update(learning_rate, decay, eps):
    """The update as printed, on top of the library's running average."""
    average = rmsprop_jax.scale_by_rms(decay, bias_correction=True)

    def update(gradients, state, params=None):
        _, state = average.update(gradients, state, params)
        u = jax.tree.map(lambda v: v / state.weight, state.nu)
        return jax.tree.map(lambda u: -learning_rate * u / jnp.sqrt(u**2 + eps), u), state

    return optax.GradientTransformation(average.init, update)


# %% [markdown]
# We draw 256 points from $y = x\theta^\ast + \text{noise}$ with positive weights
# $\theta^\ast = (1, 2, 3)$ and measure the distance to the exact least-squares solution. The dotted
# line is the distance between that solution and $\theta^\ast$, which is due to the noise: the data
# do not warrant a closer fit.

# %%
key_inputs, key_noise = jax.random.split(key_data)
truth = jnp.array([1.0, 2.0, 3.0])
X = jax.random.normal(key_inputs, (256, 3))
targets = X @ truth + 0.5 * jax.random.normal(key_noise, (256,))
solution = jnp.linalg.lstsq(X, targets)[0]
fit = functools.partial(linear_regression, key_order, X, targets, epochs=200, batch_size=32)
paths = {
    'as printed': fit(rule=printed_update),
    'corrected, constant rate': fit(),
    'corrected, rate falling to 0': fit(learning_rate=optax.cosine_decay_schedule(0.01, 1600)),
}

fig, ax = plt.subplots(figsize=(6.4, 3.8))
for (name, path), color in zip(paths.items(), (ORANGE, BLUE, GREEN), strict=True):
    distance = jnp.linalg.norm(path - solution, axis=1)
    ax.plot(distance, linewidth=1, color=color, label=name)
    weights = np.array2string(np.asarray(path[-1]), precision=3, floatmode='fixed')
    print(f'{name:29}{weights}, mean distance in the last 100 steps {distance[-100:].mean():.1e}')
ax.axhline(jnp.linalg.norm(solution - truth), color=GREY, linestyle=':', label='noise in the data')
ax.set(
    xlabel='step (minibatch of 32)',
    ylabel='distance to least squares',
    title='Linear regression, learning rate 0.01 at the start',
    yscale='log',
)
ax.legend(loc='upper right', bbox_to_anchor=(1, 0.83))
print(f'{"least squares":29}{np.array2string(solution, precision=3, floatmode="fixed")}')

# %% [markdown]
# The printed update takes every weight down by 0.01 per step, to $-16$ after 1600 steps, and the
# distance only grows. With the gradient in its place the same loop finds the solution. RMSProp
# normalises its steps, so at a constant rate they do not shrink near the solution and the weights
# hover about it, here within the noise of the data; a rate that falls to zero lets them settle.
