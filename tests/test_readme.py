"""The README's Python runs as it stands, top to bottom, and its table says the truth."""

import contextlib
import io
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import rmsprop, scale_by_rms, trace

README = pathlib.Path(__file__).parent.parent / 'README.md'


def test_python_blocks_run():
    blocks = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec('\n'.join(blocks), {'__name__': 'readme'})
    assert 'learning_rate' in README.read_text()
    assert printed.getvalue().count('0.01') == 2


def torch_like(g, rates, alpha, eps, momentum, start, eps_in_sqrt):
    """The updates of PyTorch's rule, and of Stable-Baselines3's variant, from their equations."""
    v, buffer, out = start, 0.0, []
    for x, rate in zip(g, rates, strict=True):
        v = alpha * v + (1 - alpha) * x * x
        root = np.sqrt(v + eps) if eps_in_sqrt else np.sqrt(v) + eps
        buffer = momentum * buffer + x / root
        out.append(-rate * buffer)
    return np.array(out)


def tensorflow_like(g, rates, rho, eps, momentum, start):
    """The updates of TensorFlow 1's rule, and of Keras's, from their equations."""
    v, buffer, out = start, 0.0, []
    for x, rate in zip(g, rates, strict=True):
        v = v + (1 - rho) * (x * x - v)
        buffer = momentum * buffer + rate * x / np.sqrt(v + eps)
        out.append(-buffer)
    return np.array(out)


RATE = optax.exponential_decay(0.1, 10, 0.5)


@pytest.mark.parametrize(
    ('ours', 'theirs'),
    [
        (
            rmsprop(RATE, decay=0.99, eps_in_sqrt=False),
            lambda g, rates: torch_like(g, rates, 0.99, 1e-8, 0, 0, False),
        ),
        (
            optax.chain(
                scale_by_rms(0.99, eps_in_sqrt=False),
                trace(0.9),
                optax.scale_by_learning_rate(RATE),
            ),
            lambda g, rates: torch_like(g, rates, 0.99, 1e-8, 0.9, 0, False),
        ),
        (
            rmsprop(RATE, eps=1e-7, momentum=0.9),
            lambda g, rates: tensorflow_like(g, rates, 0.9, 1e-7, 0.9, 0),
        ),
        (
            rmsprop(RATE, eps=1e-10, initial_scale=1.0, momentum=0.9),
            lambda g, rates: tensorflow_like(g, rates, 0.9, 1e-10, 0.9, 1),
        ),
        (
            rmsprop(RATE, decay=0.99, eps=1e-5, eps_in_sqrt=False),
            lambda g, rates: torch_like(g, rates, 0.99, 1e-5, 0, 0, False),
        ),
        (
            rmsprop(RATE, decay=0.99, eps=1e-5, initial_scale=1.0),
            lambda g, rates: torch_like(g, rates, 0.99, 1e-5, 0, 1, True),
        ),
    ],
    ids=['torch', 'torch-momentum', 'keras', 'tensorflow', 'sb3', 'sb3-tf-like'],
)
def test_table(ours, theirs):
    g = np.random.default_rng(0).normal(size=50).astype(np.float32)
    state, got = ours.init(jnp.float32(0)), []
    for x in g:
        update, state = ours.update(jnp.asarray(x), state)
        got.append(float(update))
    rates = [float(RATE(t)) for t in range(50)]
    np.testing.assert_allclose(got, theirs(g.astype(float), rates), rtol=2e-5, atol=1e-7)
