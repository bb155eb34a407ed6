"""Trains small models under each storage format.

::

    python -m benchmarks.storage.training build/storage-study
"""

import dataclasses
import json
import pydoc_data.topics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from benchmarks.storage.metrics import paired
from rmsprop_jax import rmsprop, storage

SEEDS = 10
# Another order of the data for the same initial parameters: what any change at all costs.
OTHER_ORDER = 1000
# Rounding that is right in the mean of nu makes the mean of 1 / sqrt(nu) too large, and steps with
# it: those of uint8 by so much.
FASTER = 1.025
Params = dict[str, jax.Array]
Batch = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with its data.

    Attributes:
      init: Parameters from a key.
      loss: Mean cross-entropy, in nats, of a batch.
      batch: Draws a batch of training data by a key.
      held_out: The batch whose loss is reported.
      decay: Of the second moment.
    """

    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch], jax.Array]
    batch: Callable[[jax.Array], Batch]
    held_out: Batch
    steps: int
    learning_rate: float
    decay: float

    def optimizer(self, **options: Any) -> optax.GradientTransformationExtraArgs:
        """RMSProp with a learning rate that ends at zero, so that the last loss is a quiet one, and
        with epsilon outside the root and small, so that it hides no error of the root."""
        # A velocity is a sum of so many steps.
        peak = self.learning_rate * (1 - options.get('momentum', 0.0))
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, self.steps // 20, self.steps)
        options = {'decay': self.decay, 'eps': 1e-8, 'eps_in_sqrt': False} | options
        return rmsprop(rate, bias_correction=True, **options)


def dense(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
    return jax.random.normal(key, (inputs, outputs)) / inputs**0.5


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def digits() -> Task:
    """Two convolutions and two dense layers on scikit-learn's 8x8 handwritten digits."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = jnp.asarray(data.images[order, :, :, None] / 16, jnp.float32)
    labels = jnp.asarray(data.target[order])
    test = 360

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 4)
        return {
            'conv1': dense(keys[0], 9, 16).reshape(3, 3, 1, 16),
            'conv2': dense(keys[1], 144, 32).reshape(3, 3, 16, 32),
            'hidden': dense(keys[2], 512, 64),
            'hidden_bias': jnp.zeros(64),
            'logits': dense(keys[3], 64, 10),
        }

    def loss(params: Params, batch: Batch) -> jax.Array:
        x, y = batch
        # XLA's convolution is several times slower inside a loop on a CPU than these products are.
        for name, stride in (('conv1', 1), ('conv2', 2)):
            padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            offsets = [(i, j) for i in range(3) for j in range(3)]
            size = x.shape[1]
            patches = [padded[:, i : i + size : stride, j : j + size : stride] for i, j in offsets]
            kernel = params[name]
            x = jax.nn.relu(jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1]))
        x = jax.nn.relu(x.reshape(len(x), -1) @ params['hidden'] + params['hidden_bias'])
        return cross_entropy(x @ params['logits'], y)

    def batch(key: jax.Array) -> Batch:
        chosen = jax.random.randint(key, (64,), test, len(labels))
        return images[chosen], labels[chosen]

    return Task(
        init, loss, batch, (images[:test], labels[:test]), steps=400, learning_rate=3e-3, decay=0.99
    )


def characters() -> tuple[jax.Array, int, int]:
    """Python's reference manual as numbers, how many characters there are, and where the held-out
    part begins."""
    text = ''.join(pydoc_data.topics.topics.values())
    alphabet, tokens = np.unique(list(text), return_inverse=True)
    return jnp.asarray(tokens, jnp.int32), len(alphabet), int(0.95 * len(tokens))


def window_language() -> Task:
    """A perceptron that predicts a character of that manual from the 16 before it."""
    width, hidden, context = 24, 128, 16
    tokens, alphabet, train = characters()

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 4)
        return {
            'embedding': jax.random.normal(keys[0], (alphabet, width)),
            'first': dense(keys[1], context * width, hidden),
            'second': dense(keys[2], hidden, hidden),
            'logits': dense(keys[3], hidden, alphabet),
        }

    def loss(params: Params, batch: Batch) -> jax.Array:
        inputs, targets = batch
        x = params['embedding'][inputs].reshape(len(inputs), -1)
        for name in ('first', 'second'):
            x = jax.nn.relu(x @ params[name])
        return cross_entropy(x @ params['logits'], targets)

    def windows(starts: jax.Array) -> Batch:
        pieces = tokens[starts[:, None] + jnp.arange(context + 1)]
        return pieces[:, :-1], pieces[:, -1]

    def batch(key: jax.Array) -> Batch:
        return windows(jax.random.randint(key, (128,), 0, train - context))

    held_out = windows(jnp.arange(train, len(tokens) - context))
    return Task(init, loss, batch, held_out, steps=1000, learning_rate=3e-3, decay=0.999)


def language() -> Task:
    """A transformer of two layers that predicts the characters of Python's reference manual."""
    width, heads, context = 64, 4, 64
    tokens, alphabet, train = characters()

    def init(key: jax.Array) -> Params:
        keys = iter(jax.random.split(key, 11))
        params = {
            'embedding': jax.random.normal(next(keys), (alphabet, width)),
            'position': jax.random.normal(next(keys), (context, width)),
            'logits': dense(next(keys), width, alphabet),
        }
        for layer in '01':
            params[f'attend{layer}'] = dense(next(keys), width, 3 * width)
            params[f'project{layer}'] = dense(next(keys), width, width)
            params[f'expand{layer}'] = dense(next(keys), width, 4 * width)
            params[f'contract{layer}'] = dense(next(keys), 4 * width, width)
        return params

    def normalised(x: jax.Array) -> jax.Array:
        return jax.nn.standardize(x, axis=-1)

    def loss(params: Params, batch: Batch) -> jax.Array:
        inputs, targets = batch
        x = params['embedding'][inputs] + params['position']
        for layer in '01':
            qkv = (normalised(x) @ params[f'attend{layer}']).reshape(*x.shape[:2], 3, heads, -1)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            seen = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + seen.reshape(x.shape) @ params[f'project{layer}']
            hidden = jax.nn.relu(normalised(x) @ params[f'expand{layer}'])
            x = x + hidden @ params[f'contract{layer}']
        return cross_entropy(normalised(x) @ params['logits'], targets)

    def windows(starts: jax.Array) -> Batch:
        pieces = tokens[starts[:, None] + jnp.arange(context + 1)]
        return pieces[:, :-1], pieces[:, 1:]

    def batch(key: jax.Array) -> Batch:
        return windows(jax.random.randint(key, (8,), 0, train - context))

    held_out = windows(jnp.arange(train, len(tokens) - context - 1, context))
    return Task(init, loss, batch, held_out, steps=400, learning_rate=3e-3, decay=0.999)


def trainer(
    task: Task, tx: optax.GradientTransformationExtraArgs, record: tuple[str, ...] = ()
) -> Callable[..., tuple[jax.Array, Params]]:
    """A compiled run: from the seeds of parameters and of the data's order to the held-out loss,
    and to the gradients at every step of the parameters in `record`."""

    def step(carry: Any, key: jax.Array) -> tuple[Any, Params]:
        params, state = carry
        gradients = jax.grad(task.loss)(params, task.batch(key))
        updates, state = tx.update(gradients, state, params)
        recorded = {name: gradients[name] for name in record}
        return (optax.apply_updates(params, updates), state), recorded

    def run(seed: int, order: int) -> tuple[jax.Array, Params]:
        params = task.init(jax.random.key(seed))
        keys = jax.random.split(jax.random.key(order), task.steps)
        (params, _), recorded = jax.lax.scan(step, (params, tx.init(params)), keys)
        return task.loss(params, task.held_out), recorded

    return jax.jit(run)


def everywhere(format: Any) -> Any:
    """A format for every matrix and kernel, however small."""
    return storage.large_leaves(format, min_size=1, min_ndim=2)


def variants() -> dict[str, dict[str, dict[str, Any]]]:
    """Options by family and name. A family's float32 is what its other members are paired with."""
    bfloat16, uint8 = everywhere(storage.bfloat16()), everywhere(storage.uint8())
    factored = everywhere(storage.factored())
    momentum, centered = {'momentum': 0.9}, {'centered': True}
    return {
        'plain': {
            'float32': {},
            'bfloat16': {'storage': bfloat16},
            'uint8': {'storage': uint8},
            'factored': {'storage': factored},
        },
        'momentum': {
            'float32': momentum,
            'nu uint8, trace bfloat16': momentum
            | {'storage': storage.per_statistic(nu=uint8, trace=bfloat16)},
        },
        'centered': {
            'float32': centered,
            'var uint8, mu bfloat16': centered
            | {'storage': storage.per_statistic(var=uint8, mu=bfloat16)},
        },
    }


def held_out_losses(task: Task, options: dict[str, Any], order: int = 0) -> list[float]:
    """One loss a seed; a seed decides the parameters, and with `order` the order of the data."""
    run = trainer(task, task.optimizer(**options))
    # XLA lets go of the interpreter's lock, so that two runs keep two cores busy.
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda seed: float(run(seed, seed + order)[0]), range(SEEDS)))


def compare(task: Task) -> Iterator[dict[str, Any]]:
    """The loss of each variant, paired by seed with the float32 of its family."""
    for family, members in variants().items():
        reference = held_out_losses(task, members['float32'])
        yield {'family': family, 'format': 'float32', 'losses': reference}
        found = {
            name: held_out_losses(task, members[name]) for name in members if name != 'float32'
        }
        if family == 'plain':
            found['float32, other order'] = held_out_losses(task, {}, OTHER_ORDER)
            faster = dataclasses.replace(task, learning_rate=FASTER * task.learning_rate)
            found[f'float32, rate x {FASTER}'] = held_out_losses(faster, {})
        for name, losses in found.items():
            pairs = paired(np.array(losses), np.array(reference))
            yield {'family': family, 'format': name, 'losses': losses} | pairs


def main(folder: Path) -> None:
    results = []
    for name, task in (('digits', digits()), ('language', language())):
        for result in compare(task):
            results.append({'task': name} | result)
            print(json.dumps(results[-1]), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'training.json').write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
