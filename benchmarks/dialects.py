"""The figure of README: a run of PyTorch, repeated in JAX by the right and by wrong RMSProps.

Run it with `python -m benchmarks.dialects docs/dialects.png`. The run is recorded in
notebooks/data/worked_example.npz: a network 10-5-1, `torch.optim.RMSprop(parameters, lr=0.01)`.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from rmsprop_jax import dialects

RECORDED = pathlib.Path(__file__).parents[1] / 'notebooks' / 'data' / 'worked_example.npz'
RULES = {
    'dialects.torch(0.01)': (dialects.torch(0.01), 'tab:blue', '-'),
    'optax.rmsprop(0.01, decay=0.99)': (optax.rmsprop(0.01, decay=0.99), 'tab:green', '--'),
    'optax.rmsprop(0.01)': (optax.rmsprop(0.01), 'tab:red', ':'),
    'dialects.tensorflow(0.01, 0.99)': (dialects.tensorflow(0.01, 0.99), 'tab:purple', '-.'),
}


def losses(tx: optax.GradientTransformation, recorded: dict[str, np.ndarray]) -> np.ndarray:
    """The loss before each of 100 updates, from the recorded weights."""
    x, y = (jnp.asarray(recorded[name], jnp.float32) for name in ('x', 'y'))
    params = {
        name: jnp.asarray(array, jnp.float32)
        for name, array in recorded.items()
        if name.startswith('fc')
    }

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        hidden = jax.nn.relu(x @ params['fc1.weight'].T + params['fc1.bias'])
        return jnp.mean((hidden @ params['fc2.weight'].T + params['fc2.bias'] - y) ** 2)

    def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    return np.asarray(jax.lax.scan(step, (params, tx.init(params)), length=100)[1])


def main() -> None:
    recorded = dict(np.load(RECORDED))
    pytorch = recorded['losses_float32']
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
    left.plot(pytorch, color='tab:orange', linewidth=5, alpha=0.5, label='PyTorch')
    for name, (tx, colour, line) in RULES.items():
        curve = losses(tx, recorded)
        apart = np.maximum(np.abs(curve - pytorch), 1e-9)
        left.plot(curve, line, color=colour, linewidth=1.4)
        right.plot(apart, line, color=colour, linewidth=1.4, label=name)
        print(f'{name:33} apart from PyTorch by {apart.max():.1e} at most')
    left.set(xlabel='update', ylabel='loss', title='A PyTorch run, repeated in JAX')
    right.set(xlabel='update', title='Distance of the loss from PyTorch', yscale='log')
    right.set_ylim(1e-8, 1)
    figure.legend(loc='outside lower center', ncols=2)
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == '__main__':
    main()
