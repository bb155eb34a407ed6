"""Runs the problems in JAX, from the other frameworks' states and to them, in float64."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from interchange_data import problem
from rmsprop_jax import dialects, interchange

Arrays = dict[str, np.ndarray]

# Our network calls its layers otherwise, so that nothing is found by its name alone.
NET_PAIRS = (
    *interchange.torch.conv('conv', 'Conv_0'),
    *interchange.torch.linear(
        'fc', 'Dense_0', layout=interchange.flattened(problem.CHANNELS, problem.SIDE, problem.SIDE)
    ),
    *interchange.torch.norm('norm', ('LayerNorm_0',)),
    *interchange.torch.linear('head', 'Dense_1'),
)
PAIRS = tuple(interchange.Pair(f'net/{name}', ('layer', name)) for name in problem.SHAPES)
COMPLEX_PAIRS = tuple(interchange.Pair(name, ('layer', name)) for name in problem.SHAPES)


def net_like() -> Any:
    """The structure of our network's parameters."""
    like: dict[str, dict[str, Any]] = {}
    for pair in NET_PAIRS:
        layer, name = str(pair.ours).split('/')
        shape = pair.layout.to_ours(np.zeros(problem.NET_SHAPES[pair.theirs])).shape
        like.setdefault(layer, {})[name] = jax.ShapeDtypeStruct(shape, jnp.float64)
    return like


def net_loss(params: Any, step: Any) -> jax.Array:
    conv, fc, norm, head = (params[k] for k in ('Conv_0', 'Dense_0', 'LayerNorm_0', 'Dense_1'))
    batch = step % problem.BATCHES
    x = jnp.asarray(problem.INPUTS)[batch].transpose(0, 2, 3, 1)
    x = jax.lax.conv_general_dilated(
        x, conv['kernel'], (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    x = jnp.tanh(x + conv['bias']).reshape(len(x), -1) @ fc['kernel'] + fc['bias']
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = jnp.tanh(x * norm['scale'] + norm['bias']) @ head['kernel'] + head['bias']
    return jnp.mean((x - jnp.asarray(problem.TARGETS)[batch]) ** 2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _steps(tx: Any, gradient: Any, params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
    """Steps with `gradient(params, x)` for each `x`, compiled once for each transformation."""

    def step(carry: Any, x: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradient(params, x), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), inputs)[0]


_net_gradient = jax.grad(net_loss)


def run_net(tx: Any, params: Any, state: Any, start: int, stop: int) -> tuple[Any, Any]:
    """Steps on the network."""
    return _steps(tx, _net_gradient, params, state, jnp.arange(start, stop))


def _gradient(params: Any, push: Any) -> Any:
    return jax.tree.map(lambda p, f: problem.PULL * (p - problem.target(p)) + f, params, push)


def run(tx: Any, params: Any, state: Any, start: int, stop: int) -> tuple[Any, Any]:
    """Steps on the moving quadratic, as `problem.gradient` has it."""

    def pushes(p: Any) -> np.ndarray:
        return np.stack([problem.push(p, step) for step in range(start, stop)])

    return _steps(tx, _gradient, params, state, jax.tree.map(pushes, params))


@dataclasses.dataclass(frozen=True)
class Port:
    """How one recorded case comes over and goes back.

    Attributes:
      make: Our transformation, with every learning rate times a factor.
      bring: `bring(state, tx, params)` converts their state to ours.
      send: `send(state, params, tx)` converts ours to theirs.
      params_from: Their parameters as ours.
      params_to: Ours as theirs.
      run: Trains.
    """

    make: Callable[[float], Any]
    bring: Callable[[Any, Any, Any], Any]
    send: Callable[[Any, Any, Any], Any]
    params_from: Callable[[Any], Any]
    params_to: Callable[[Any], Arrays]
    run: Callable[..., tuple[Any, Any]]

    def goes_on_here(self, recorded: dict[str, Any]) -> Arrays:
        """Where a run of theirs ends that we take over halfway."""
        params, tx = self.params_from(recorded['params']), self.make(problem.DROP)
        state = self.bring(_at_rate(recorded['state'], problem.DROP), tx, params)
        return self.params_to(self.run(tx, params, state, problem.HANDOVER, problem.END)[0])

    def starts_here(self, params: Arrays) -> dict[str, Any]:
        """What we hand over to them halfway."""
        ours, tx = self.params_from(params), self.make(1.0)
        ours, state = self.run(tx, ours, tx.init(ours), 0, problem.HANDOVER)
        return {'params': self.params_to(ours), 'state': self.send(state, ours, tx)}

    def visit(self, recorded: dict[str, Any]) -> Any:
        """Their state after it has been ours."""
        params, tx = self.params_from(recorded['params']), self.make(1.0)
        return self.send(self.bring(recorded['state'], tx, params), params, tx)


def _at_rate(state: Any, factor: float) -> Any:
    """Their state after the learning rate has been set to `factor` times what it was."""
    if 'param_groups' in state:
        groups = [group | {'lr': factor * group['lr']} for group in state['param_groups']]
        return state | {'param_groups': groups}
    rates = {name: factor * state[name] for name in ('learning_rate',) if name in state}
    return state | rates


def port(framework: str, case: str, theirs: Any) -> Port:
    """The port of a case; `theirs` is a state of it, for what a state holds beside moments."""
    if framework == 'torch':
        return _torch_port(case, theirs['param_groups'])
    bring, send = {'keras': _keras_doors, 'tensorflow': _tensorflow_doors}[framework](case, theirs)
    make = dialects.keras if framework == 'keras' else dialects.tensorflow
    settings = (problem.KERAS if framework == 'keras' else problem.TENSORFLOW)[case]
    return Port(
        lambda factor: make(factor * problem.RATE, **settings),
        bring,
        send,
        layer,
        lambda params: {name: np.asarray(value) for name, value in params['layer'].items()},
        run,
    )


def _torch_port(case: str, groups: Any) -> Port:
    is_net = case == 'net'
    pairs, names = (NET_PAIRS, problem.NET_NAMES) if is_net else (COMPLEX_PAIRS, None)
    like = net_like() if is_net else layer(problem.params(is_complex=True))

    def make(factor: float) -> Any:
        given = [group | {'lr': factor * group['lr']} for group in groups]
        described = {'state': {}, 'param_groups': given}
        return interchange.torch_optimizer(described, like, pairs, names=names)

    return Port(
        make,
        lambda state, tx, params: interchange.from_torch(state, tx, params, pairs, names=names),
        lambda state, params, tx: interchange.to_torch(
            state, params, pairs, groups, names=names, tx=tx
        ),
        lambda theirs: interchange.parameters_from(theirs, like, pairs),
        lambda params: interchange.parameters_to(params, pairs),
        run_net if is_net else run,
    )


def _keras_doors(case: str, theirs: Any) -> tuple[Any, Any]:
    every = problem.KERAS[case].get('gradient_accumulation_steps', 1)

    def bring(state: Any, tx: Any, params: Any) -> Any:
        return interchange.from_keras(state, tx, params, PAIRS, gradient_accumulation_steps=every)

    def send(state: Any, params: Any, tx: Any) -> Any:
        rate = theirs['learning_rate']
        return interchange.to_keras(
            state, params, PAIRS, tx=tx, learning_rate=rate, gradient_accumulation_steps=every
        )

    return bring, send


def _tensorflow_doors(case: str, theirs: Any) -> tuple[Any, Any]:
    del theirs
    centered = problem.TENSORFLOW[case].get('centered', False)

    def bring(state: Any, tx: Any, params: Any) -> Any:
        return interchange.from_tensorflow(state, tx, params, PAIRS, centered=centered)

    def send(state: Any, params: Any, tx: Any) -> Any:
        return interchange.to_tensorflow(state, params, PAIRS, tx=tx)

    return bring, send


def layer(params: Any) -> Any:
    """Parameters of the quadratic as our tree."""
    return {'layer': {name: jnp.asarray(value) for name, value in params.items()}}


def worst(found: Any, wanted: Any) -> float:
    """The largest deviation from `wanted`, relative to the largest entry of its array."""
    assert set(found) == set(wanted)
    pairs = [(np.asarray(found[name]), np.asarray(wanted[name])) for name in wanted]
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)
