"""What an installed wheel must do: run by each of the environments that install.py makes.

python check.py [flax]
"""

import importlib
import importlib.metadata
import importlib.resources
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

# Everything that must work where only the dependencies of the core are installed.
MODULES = (
    '',
    '.dialects',
    '.recipes',
    '.storage',
    '.identify',
    '.interchange',
    '.sharding',
    '.diagnostics',
    '.aot',
)
MOST_SECONDS = 0.1
IMPORT = """
import time
import jax, optax
start = time.process_time()
import rmsprop_jax
seconds = time.process_time() - start
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), 'importing has started a backend'
print(seconds)
"""


def check_installation(extras: bool) -> None:
    """The package comes from this environment, whole, and alone unless it has extras."""
    import rmsprop_jax

    path = Path(rmsprop_jax.__file__)
    assert path.is_relative_to(sys.prefix), f'{path} is not in {sys.prefix}'
    assert rmsprop_jax.__version__ == importlib.metadata.version('rmsprop_jax')
    assert importlib.resources.files('rmsprop_jax').joinpath('py.typed').is_file()
    for name in MODULES:
        importlib.import_module(f'rmsprop_jax{name}')
    for name in () if extras else ('flax', 'matplotlib', 'orbax', 'sklearn', 'pytest'):
        assert importlib.util.find_spec(name) is None, f'{name} is installed too'


def check_import() -> None:
    """Importing starts nothing and costs little, once JAX and Optax are there.

    Processor time, since others may keep the machine busy.
    """
    times = []
    for _ in range(7):
        command = [sys.executable, '-I', '-c', IMPORT]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        times.append(float(done.stdout))
    median = statistics.median(times)
    print(f'  importing takes {median:.3f} s beyond JAX and Optax (median of {len(times)})')
    assert median < MOST_SECONDS, times


def check_training() -> None:
    """A network learns with Optax's arguments, a dialect, and a compact state."""
    import jax
    import jax.numpy as jnp
    import optax

    import rmsprop_jax
    from rmsprop_jax import diagnostics, dialects, sharding, storage

    inputs = jax.random.normal(jax.random.key(0), (256, 8))
    targets = jnp.sin(inputs @ jnp.linspace(-1.0, 1.0, 8))
    first, second = jax.random.split(jax.random.key(1))
    params = {
        'hidden': 0.3 * jax.random.normal(first, (8, 64)),
        'bias': jnp.zeros(64),
        'out': 0.1 * jax.random.normal(second, (64,)),
    }

    def loss(params: Any) -> jax.Array:
        hidden = jnp.tanh(inputs @ params['hidden'] + params['bias'])
        return jnp.mean((hidden @ params['out'] - targets) ** 2)

    compact = storage.large_leaves(storage.bfloat16(), min_size=1)
    ours = rmsprop_jax.rmsprop(3e-3, centered=True, momentum=0.9, storage=compact)
    mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for tx in (
        ours,
        dialects.torch(3e-3),
        sharding.zero1(diagnostics.measured(ours, storage=compact), params, place),
    ):
        state = tx.init(params)

        @jax.jit
        def step(params: Any, state: Any, tx: Any = tx) -> Any:
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        trained = params
        for _ in range(300):
            trained, state = step(trained, state)
        before, after = float(loss(params)), float(loss(trained))
        print(f'  the loss fell from {before:.3f} to {after:.4f}')
        assert after < before / 20


def check_sharding() -> None:
    """Gradients are summed under shard_map, and those that JAX has summed already are refused."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, PartitionSpec

    from rmsprop_jax import sharding

    def gradient(weights: jax.Array, inputs: jax.Array) -> jax.Array:
        own = jax.grad(lambda w: jnp.sum(w * inputs))(weights)
        return sharding.reduce_scatter(own, PartitionSpec('data'))

    def mapped(check_vma: bool) -> jax.Array:
        return jax.shard_map(
            gradient,
            mesh=jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,)),
            in_specs=(PartitionSpec(), PartitionSpec('data')),
            out_specs=PartitionSpec('data'),
            check_vma=check_vma,
        )(jnp.ones(4), jnp.arange(4.0))

    assert mapped(check_vma=False).tolist() == [0, 1, 2, 3]
    try:
        mapped(check_vma=True)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ''
    assert 'summed over' in refusal, f'a gradient may be summed twice: {refusal}'


def check_flax() -> None:
    """A Flax module learns, through Flax's own optimizer."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import rmsprop_jax

    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, rmsprop_jax.rmsprop(0.03), wrt=nnx.Param)
    inputs = jax.random.normal(jax.random.key(0), (64, 4))
    targets = inputs @ jnp.arange(4.0)[:, None]

    def loss(model: Any) -> jax.Array:
        return jnp.mean((model(inputs) - targets) ** 2)

    before = float(loss(model))
    for _ in range(300):
        optimizer.update(model, nnx.grad(loss)(model))
    after = float(loss(model))
    print(f'  with Flax the loss fell from {before:.3f} to {after:.4f}')
    assert after < before / 20
    params = nnx.state(model, nnx.Param)
    rates = rmsprop_jax.diagnostics.learning_rates(optimizer.tx, optimizer.opt_state, params)
    _, report = rmsprop_jax.carry_over(optimizer.tx, optimizer.opt_state, params, params)
    assert rates.keys() == {*report.kept} == {'bias', 'kernel'}


if __name__ == '__main__':
    extras = sys.argv[1:]
    check_installation(bool(extras))
    if extras:
        check_flax()
    else:
        check_import()
        check_training()
        check_sharding()
