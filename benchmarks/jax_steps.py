"""Optimizers on JAX as contestants: ours, also fused, Optax's, and Keras's on its JAX backend."""

import copy
import functools
import importlib
import itertools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmsprop_jax
from benchmarks.timing import stopwatch
from benchmarks.works import DECAY, EPS, LEARNING_RATE, Shape
from rmsprop_jax.aot._compile import update_and_apply

PARTS = ('trace', 'lower', 'compile')
OPTAX_LIKE = {'rmsprop_jax': rmsprop_jax.rmsprop, 'optax': optax.rmsprop}


def transformation(name: str, options: dict) -> optax.GradientTransformation:
    return OPTAX_LIKE[name](LEARNING_RATE, DECAY, EPS, **options)


# Larger leaves repeat as many numbers, on the device.
MOST_DRAWN = 2**25
resized = jax.jit(jnp.resize, static_argnums=1)


def normal(shapes: list[Shape], scale: float = 1.0, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Normal numbers, in buffers that JAX may reuse."""
    generator = np.random.default_rng(0)

    def leaf(shape: Shape) -> jax.Array:
        drawn = min(math.prod(shape), MOST_DRAWN)
        x = jnp.array(scale * generator.standard_normal(drawn, np.float32), dtype, copy=True)
        return resized(x, shape) if drawn < math.prod(shape) else x.reshape(shape)

    return [leaf(shape) for shape in shapes]


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class JaxContestant:
    """A jitted, donated step on trees of JAX arrays, with gradients that stay the same.

    Attributes:
      seconds: How long tracing, lowering and compiling took.
      memory: Peak bytes of an execution, arguments included.
      bytes_moved: The bytes a step must move.
      params: The parameters after the steps so far.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        init: Callable[[Any], Any],
        shapes: list[Shape],
        dtype: Any = jnp.float32,
    ) -> None:
        self._init, self._shapes, self._dtype = init, shapes, dtype
        self._step = jax.jit(step, donate_argnums=(0, 1))
        params = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        state = jax.eval_shape(init, params)
        # Parameters and state are read and written, gradients are read.
        self.bytes_moved = 2 * nbytes((params, state)) + nbytes(params)
        stages = [time.perf_counter()]
        traced = self._step.trace(params, state, params)
        stages.append(time.perf_counter())
        lowered = traced.lower()
        stages.append(time.perf_counter())
        compiled = lowered.compile()
        stages.append(time.perf_counter())
        spans = [late - early for early, late in itertools.pairwise(stages)]
        self.seconds: dict[str, float] = dict(zip(PARTS, spans, strict=True))
        use: Any = compiled.memory_analysis()
        self.memory = (
            use.argument_size_in_bytes
            + use.output_size_in_bytes
            + use.temp_size_in_bytes
            - use.alias_size_in_bytes
        )

    def again(self) -> 'JaxContestant':
        """The same program with buffers of its own."""
        return copy.copy(self)

    def place(self) -> None:
        self.params = self._state = self._gradients = None
        self._gradients = normal(self._shapes, dtype=self._dtype)
        self.params = normal(self._shapes, 0.05, self._dtype)
        self._state = self._init(self.params)

    def run(self, steps: int) -> float:
        def steps_in_a_row() -> None:
            for _ in range(steps):
                self.params, self._state = self._step(self.params, self._state, self._gradients)
            jax.block_until_ready((self.params, self._state))

        return stopwatch(steps_in_a_row)


def prepare(name: str, shapes: list[Shape], options: dict) -> JaxContestant:
    if name == 'keras':
        return _keras(shapes, options)
    if name == 'fused':
        return _fused(shapes, options)
    tx = transformation(name, options)
    return JaxContestant(update_and_apply(tx), tx.init, shapes)


def _fused(shapes: list[Shape], options: dict) -> JaxContestant:
    package = importlib.import_module('rmsprop_jax_fused')
    if not package.available():
        raise SystemExit('the kernel of rmsprop_jax_fused is not compiled: run make fused.')
    tx = package.rmsprop(LEARNING_RATE, DECAY, EPS, **options)

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        return tx.apply(gradients, state, params)

    return JaxContestant(step, tx.init, shapes)


def _keras(shapes: list[Shape], options: dict) -> JaxContestant:
    os.environ['KERAS_BACKEND'] = 'jax'
    keras = importlib.import_module('keras')
    optimizer = keras.optimizers.RMSprop(LEARNING_RATE, DECAY, epsilon=EPS, **options)
    optimizer.build([keras.Variable(np.zeros(shape, np.float32)) for shape in shapes])

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        return optimizer.stateless_apply(state, gradients, params)

    def init(params: Any) -> Any:
        del params
        return [jnp.array(variable.value) for variable in optimizer.variables]

    return JaxContestant(step, init, shapes)


def time_to_init(name: str, shapes: list[Shape], options: dict) -> Callable[[], float]:
    """A function that times one eager `init`."""
    tx = transformation(name, options)
    params = [jnp.zeros(shape) for shape in shapes]
    return lambda: stopwatch(lambda: jax.block_until_ready(tx.init(params)))


def train_step(name: str | None, shapes: list[Shape], options: dict, batch: int) -> JaxContestant:
    """A whole training step of a network of dense layers; without a name, its gradient only."""
    inputs = jnp.ones((batch, shapes[0][0]))
    labels = jnp.zeros(batch, int)

    def loss(params: Any) -> jax.Array:
        *hidden, last = zip(params[::2], params[1::2], strict=True)
        x = functools.reduce(lambda x, layer: jax.nn.relu(x @ layer[0] + layer[1]), hidden, inputs)
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            x @ last[0] + last[1], labels
        ).mean()

    def gradient_step(params: Any, state: Any, _: Any) -> tuple[Any, Any]:
        return params, jax.tree.map(lambda _, g: g, state, jax.grad(loss)(params))

    if name is None:
        return JaxContestant(gradient_step, optax.tree.zeros_like, shapes)
    tx = transformation(name, options)
    update = update_and_apply(tx)

    def step(params: Any, state: Any, _: Any) -> tuple[Any, Any]:
        return update(params, state, jax.grad(loss)(params))

    return JaxContestant(step, tx.init, shapes)
