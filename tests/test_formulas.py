"""The notebook on the two texts' formulas, against NumPy loops written from the equations alone."""

import contextlib
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from flax import nnx

import rmsprop_jax

pytestmark = pytest.mark.extended

NOTEBOOKS = Path(__file__).parents[1] / 'notebooks'
NOTEBOOK = NOTEBOOKS / 'sources' / '01_rmsprop_from_the_formulas.py'
RATE, DECAY, EPS = 0.01, 0.9, 1e-8

Direction = Callable[[np.ndarray, np.ndarray], np.ndarray]


@pytest.fixture(scope='module')
def notebook() -> Iterator[dict[str, Any]]:
    """What the notebook's cells define; running them is itself a test for warnings."""
    matplotlib.use('Agg')
    with matplotlib.rc_context():
        # Notebooks are run where they are, and read what lies beside them.
        with contextlib.chdir(NOTEBOOKS):
            defined = runpy.run_path(str(NOTEBOOK))
        yield defined
        plt.close('all')


# --- The network of the first text ---------------------------------------------------------------


def inside_root(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    return g / np.sqrt(v + EPS)


def outside_root(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    return g / (np.sqrt(v) + EPS)


# The notebook's name of a rule, its arguments here, and what the equations say.
NET_RULES: list[tuple[str, dict[str, Any], float, Direction]] = [
    ('formula of the text', {}, 0.9, inside_root),
    ('with decay 0.99', {'decay': 0.99}, 0.99, inside_root),
    ('with eps outside the root', {'eps_in_sqrt': False}, 0.9, outside_root),
    ('PyTorch defaults', {'decay': 0.99, 'eps_in_sqrt': False}, 0.99, outside_root),
]


def net_loss_and_gradients(
    weights: list[np.ndarray], x: np.ndarray, y: np.ndarray
) -> tuple[float, list[np.ndarray]]:
    kernel1, bias1, kernel2, bias2 = weights
    before = x @ kernel1 + bias1
    hidden = np.maximum(before, 0)
    residual = hidden @ kernel2 + bias2 - y
    d_output = 2 * residual / residual.size
    d_before = (d_output @ kernel2.T) * (before > 0)
    gradients = [x.T @ d_before, d_before.sum(0), hidden.T @ d_output, d_output.sum(0)]
    return float(np.mean(residual**2)), gradients


def net_reference(
    weights: list[np.ndarray], x: np.ndarray, y: np.ndarray, decay: float, direction: Direction
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Losses of 100 epochs, and the weights after them."""
    weights = [w.copy() for w in weights]
    averages = [np.zeros_like(w) for w in weights]
    losses = []
    for _ in range(100):
        loss, gradients = net_loss_and_gradients(weights, x, y)
        losses.append(loss)
        for w, v, g in zip(weights, averages, gradients, strict=True):
            v[...] = decay * v + (1 - decay) * g * g
            w[...] = w - RATE * direction(g, v)
    return np.array(losses), weights


def net_weights(net: Any) -> list[np.ndarray]:
    layers = (net.hidden, net.output)
    return [np.asarray(w[...], float) for layer in layers for w in (layer.kernel, layer.bias)]


def as_float64(*arrays: Any) -> list[np.ndarray]:
    return [np.asarray(a, np.float64) for a in arrays]


@pytest.mark.parametrize(('name', 'options', 'decay', 'direction'), NET_RULES)
def test_net_follows_the_formula(notebook, name, options, decay, direction):
    x, y = as_float64(notebook['x'], notebook['y'])
    with jax.enable_x64(True):
        net = notebook['Net'](nnx.Rngs(3))
        nnx.update(net, jax.tree.map(lambda w: w.astype(jnp.float64), nnx.state(net)))
        losses, weights = net_reference(net_weights(net), x, y, decay, direction)
        tx = rmsprop_jax.rmsprop(RATE, **options)
        ours = notebook['train'](net, tx, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(ours, losses, rtol=1e-12)
    for w, expected in zip(net_weights(net), weights, strict=True):
        np.testing.assert_allclose(w, expected, rtol=1e-12, atol=1e-12)
    # The curves of the notebook are float32, whose unit roundoff is 6e-8; a hundred steps add up.
    assert notebook['losses'][name].dtype == np.float32
    np.testing.assert_allclose(notebook['losses'][name], losses, rtol=2e-6)


def test_the_pytorch_defaults_are_another_rule(notebook):
    curves = notebook['losses']
    formula, torch = curves['formula of the text'], curves['PyTorch defaults']
    assert formula[0] == torch[0]
    assert np.all(np.abs(torch - formula)[1:] > 0.02)
    # The decay makes most of the difference in this run, as the notebook says.
    gap = np.abs(torch - formula)[1:]
    assert np.all(np.abs(curves['with decay 0.99'] - torch)[1:] < 0.2 * gap)
    assert np.all(np.abs(curves['with eps outside the root'] - formula)[1:] < 0.2 * gap)


# --- The program of the first text, as PyTorch ran it --------------------------------------------


@pytest.fixture(scope='module')
def recorded() -> dict[str, np.ndarray]:
    """What golden/record_worked_example.py wrote."""
    with np.load(NOTEBOOKS / 'data' / 'worked_example.npz') as file:
        return dict(file)


def test_the_recorded_run_follows_the_equations(recorded):
    arrays = as_float64(*(recorded[f'fc{n}.{kind}'] for n in (1, 2) for kind in ('weight', 'bias')))
    x, y = as_float64(recorded['x'], recorded['y'])
    losses, _ = net_reference([w.T for w in arrays], x, y, 0.99, outside_root)
    np.testing.assert_allclose(recorded['losses_float64'], losses, rtol=0, atol=1e-12)
    required = (Path(__file__).parent / 'golden' / 'requirements' / 'torch.txt').read_text()
    version = str(recorded['about']).split('+')[0].removeprefix('PyTorch ')
    assert f'torch=={version}\n' in required


@pytest.mark.parametrize(('dtype', 'atol'), [('float32', 1e-6), ('float64', 1e-12)])
def test_flax_prints_the_lines_of_pytorch(notebook, recorded, dtype, atol):
    losses, lines = notebook['ours'][dtype], recorded[f'lines_{dtype}']
    assert losses.dtype == dtype
    np.testing.assert_allclose(losses, recorded[f'losses_{dtype}'], rtol=0, atol=atol)
    assert notebook['lines_of'](losses) == lines.tolist()
    assert len(lines) == 100
    assert (lines[0], lines[99]) == (
        'Epoch [1/100], Loss: 0.9970',
        'Epoch [100/100], Loss: 0.2636',
    )


# --- Bias correction -----------------------------------------------------------------------------


@pytest.mark.parametrize('gradient', [0.1, 10.0])
@pytest.mark.parametrize('start', [0.0, 1.0])
@pytest.mark.parametrize('corrected', [False, True])
def test_step_sizes_have_their_closed_form(notebook, gradient, start, corrected):
    past = DECAY ** np.arange(1, 51)
    moment = past * start + (1 - past) * gradient**2
    expected = gradient / np.sqrt(moment / (1 - past if corrected else 1) + EPS)
    sizes = notebook['step_sizes'](gradient, initial_scale=start, bias_correction=corrected)
    np.testing.assert_allclose(sizes, expected, rtol=1e-5)


# --- Linear regression, the example of the second text -------------------------------------------


def corrected(g: np.ndarray, u: np.ndarray) -> np.ndarray:
    return g / np.sqrt(u + EPS)


def printed(g: np.ndarray, u: np.ndarray) -> np.ndarray:
    del g  # the point of it
    return u / np.sqrt(u**2 + EPS)


def problem(truth: list[float], rows: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    X = random.normal(size=(rows, len(truth)))
    return X, X @ np.array(truth) + noise * random.normal(size=rows)


def minibatches(key: jax.Array, rows: int, size: int, epochs: int) -> list[np.ndarray]:
    """Row numbers of each minibatch, in the order in which the notebook draws them."""
    shuffle = jax.vmap(lambda key: jax.random.permutation(key, rows))
    orders = np.asarray(shuffle(jax.random.split(key, epochs)))
    return [
        order[i : i + size]
        for order in orders
        for i in range(0, rows, size)
        if i + size <= rows or size > rows
    ]


def linear_reference(
    batches: list[np.ndarray], X: np.ndarray, y: np.ndarray, direction: Direction
) -> np.ndarray:
    """The weights after each step."""
    theta, v, path = np.zeros(X.shape[1]), np.zeros(X.shape[1]), []
    for t, rows in enumerate(batches, start=1):
        g = 2 * X[rows].T @ (X[rows] @ theta - y[rows]) / len(rows)
        v = DECAY * v + (1 - DECAY) * g**2
        u = v / (1 - DECAY**t)
        theta = theta - RATE * direction(g, u)
        path.append(theta)
    return np.array(path)


def distances(path: np.ndarray, X: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.norm(path - np.linalg.lstsq(X, y)[0], axis=-1)


@pytest.mark.parametrize(
    ('rows', 'size', 'direction', 'dtype', 'rtol'),
    [
        (64, 16, corrected, np.float64, 1e-12),
        (50, 16, corrected, np.float64, 1e-12),  # two rows are left over
        (10, 32, corrected, np.float64, 1e-12),  # less than a minibatch
        (64, 16, printed, np.float64, 1e-12),
        # Each of the additions rounds by up to 6e-8 of the largest weight.
        (64, 16, corrected, np.float32, 5e-6),
        (64, 16, printed, np.float32, 5e-6),
    ],
)
def test_linear_regression_follows_the_equations(notebook, rows, size, direction, dtype, rtol):
    X, y = problem([1.0, -2.0, 3.0], rows, noise=0.5)
    rule = {'rule': notebook['printed_update']} if direction is printed else {}
    with jax.enable_x64(dtype == np.float64):
        key = jax.random.key(1)
        path = notebook['linear_regression'](
            key,
            jnp.asarray(X, dtype),
            jnp.asarray(y, dtype),
            learning_rate=RATE,
            decay=DECAY,
            eps=EPS,
            epochs=100,
            batch_size=size,
            **rule,
        )
        assert path.dtype == dtype
        batches = minibatches(key, rows, size, epochs=100)
    reference = linear_reference(batches, X, y, direction)
    np.testing.assert_allclose(path, reference, rtol=0, atol=rtol * np.abs(reference).max())


def test_columns_do_not_broadcast(notebook):
    X, y = problem([1.0, -2.0, 3.0], 64, noise=0.5)
    fit, key = notebook['linear_regression'], jax.random.key(0)
    flat = fit(key, jnp.asarray(X), jnp.asarray(y), epochs=2)
    column = fit(key, jnp.asarray(X), jnp.asarray(y)[:, None], epochs=2)
    assert column.shape == (4, 3, 1)
    np.testing.assert_allclose(column[..., 0], flat, rtol=1e-6)


@pytest.mark.parametrize(
    ('noise', 'bound'),
    [
        # Minibatches of exact data agree on the solution; noisy ones pull the weights about.
        (0.0, 1e-12),
        (0.5, 2e-3),
    ],
)
def test_corrected_update_converges_to_least_squares(notebook, noise, bound):
    X, y = problem([1.0, 2.0, 3.0], 256, noise)
    with jax.enable_x64(True):
        path = notebook['linear_regression'](
            jax.random.key(0),
            jnp.asarray(X),
            jnp.asarray(y),
            learning_rate=optax.cosine_decay_schedule(RATE, 1600),
        )
    assert distances(np.asarray(path[-1]), X, y) < bound


# --- What the second text prints -----------------------------------------------------------------


@pytest.mark.parametrize('sign', [-1, 1])
def test_printed_update_takes_one_learning_rate_off_every_coordinate(notebook, sign):
    random = np.random.default_rng(0)
    sizes = 10 ** random.uniform(-0.5, 4, size=(200, 5))
    gradients = sign * sizes * random.choice([-1, 1], size=sizes.shape)
    with jax.enable_x64(True):
        tx = notebook['printed_update'](RATE, DECAY, EPS)
        _, updates = jax.lax.scan(
            lambda state, g: tx.update(g, state)[::-1],
            tx.init(jnp.zeros(5)),
            jnp.asarray(gradients),
        )
    shortfall = RATE + np.asarray(updates)
    # u is at least the smallest squared gradient, and 1 - u / sqrt(u^2 + eps) <= eps / (2 u^2).
    assert np.all(shortfall > -1e-16)
    assert np.all(shortfall <= RATE * EPS / (2 * sizes.min() ** 4) + 1e-16)


def test_printed_update_shrinks_for_tiny_gradients_only(notebook):
    tx = notebook['printed_update'](RATE, DECAY, EPS)
    gradients = jnp.array([0.0, 1e-4, 1e-3, 1e-2, 1e-1])
    update, _ = tx.update(gradients, tx.init(gradients))
    expected = [0.0, 1e-4, 1e-2, np.sqrt(0.5), 1.0]
    np.testing.assert_allclose(-update / RATE, expected, rtol=1e-4)


def test_printed_update_leaves_a_positive_solution(notebook):
    X, y = problem([1.0, 2.0, 3.0], 256, noise=0.5)
    batches = minibatches(jax.random.key(0), 256, 32, epochs=200)
    path = linear_reference(batches, X, y, printed)
    distance = distances(path, X, y)
    assert np.all(np.diff(distance) > 0)
    np.testing.assert_allclose(path[-1], -RATE * len(batches), rtol=1e-6)
    # The same in the figure, and the corrected update there, which starts at a distance of 3.7.
    shown = {name: np.asarray(p) for name, p in notebook['paths'].items()}
    np.testing.assert_allclose(shown['as printed'][-1], -16, rtol=1e-4)
    solution = np.asarray(notebook['solution'])
    for name in ('corrected, constant rate', 'corrected, rate falling to 0'):
        gap = np.linalg.norm(shown[name][-100:] - solution, axis=1)
        assert gap.max() < np.linalg.norm(solution - np.asarray(notebook['truth']))


def test_printed_update_passes_through_a_negative_solution():
    X, y = problem([-1.0, -2.0, -3.0], 256, noise=0.5)
    path = linear_reference(minibatches(jax.random.key(0), 256, 32, 200), X, y, printed)
    assert np.all(np.diff(path, axis=0) < 0)
    np.testing.assert_allclose(path[-1], -16, rtol=0.01)


def test_what_the_listing_computes():
    def gradient(theta: np.ndarray, X: np.ndarray, y: np.ndarray) -> np.ndarray:
        return 2 * np.mean(X * (y - X @ theta), axis=0)

    def steps(theta: np.ndarray, X: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
        total = np.zeros_like(theta)
        for _ in range(50):
            total = total + gradient(theta, X, y)
            theta = theta - RATE * total / np.sqrt(total**2 + EPS)
            yield theta

    X, y = problem([1.0, 2.0, 3.0], 256, noise=0.0)
    y, theta = y[:, None], np.full((3, 1), 0.5)
    nudges = theta + 1e-6 * np.eye(3)[:, :, None] * np.array([-1, 1])[:, None, None, None]
    low, high = np.mean((X @ nudges - y) ** 2, axis=(-2, -1))
    np.testing.assert_allclose(gradient(theta, X, y), -(high - low) / 2e-6, rtol=1e-6)
    assert {theta.shape for theta in steps(theta, X, y)} == {(3, 3)}
    # With one weight the shapes agree, and the weight leaves its solution by one rate per step.
    away = [1.0 - float(theta[0, 0]) for theta in steps(np.zeros((1, 1)), X[:, :1], X[:, :1])]
    np.testing.assert_allclose(away, 1 + RATE * np.arange(1, 51), rtol=1e-8)
