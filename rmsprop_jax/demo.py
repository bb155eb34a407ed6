"""The main job: RMSProp trains a convolutional network on scikit-learn's handwritten digits.

::

    python -m rmsprop_jax.demo --output demo-output

One run is trained and checkpointed, then the same network is trained under seven optimizers, five
seeds each. Everything random is derived from the seed and the epoch, so that on the same machine a
run resumed with `--resume` ends with the very bits of one that was never interrupted.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import io
import json
import logging
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax import diagnostics, rmsprop
from rmsprop_jax._command import OneLineParser, install

EXTRAS = ('flax.nnx', 'matplotlib', 'orbax.checkpoint', 'sklearn.datasets', 'tqdm')
TEST_IMAGES = 360
TRAIN_IMAGES = 1797 - TEST_IMAGES
COMPARISON_SEEDS = 5
# What a run writes, and all that --overwrite removes.
CONFIG, CHECKPOINTS = 'config.json', 'checkpoints'
METRICS, COMPARISON = 'metrics.jsonl', 'comparison.jsonl'
FIGURES = ('training.png', 'comparison.png', 'diagnostics.png')


EPS = 1e-8
# What is measured, is measured of each layer of the network.
LAYERS = diagnostics.by_depth(2)


class DemoError(Exception):
    """What the user can put right. Its message is the one line they see."""


class Optimizer(NamedTuple):
    """An optimizer to compare, with the peak of its learning rate schedule."""

    name: str
    learning_rate: float
    build: Callable[[optax.Schedule], optax.GradientTransformation]


# One rule set each learning rate: the lowest log training loss, averaged over 20 epochs and five
# folds of the training images, in half decades with worse ones on either side. The test images took
# no part.
OPTIMIZERS = (
    Optimizer('RMSProp', 3e-2, rmsprop),
    Optimizer('RMSProp, bias-corrected', 3e-2, lambda rate: rmsprop(rate, bias_correction=True)),
    Optimizer('RMSProp, centered', 3e-2, lambda rate: rmsprop(rate, centered=True)),
    Optimizer('RMSProp, momentum', 3e-3, lambda rate: rmsprop(rate, momentum=0.9)),
    Optimizer('RMSProp, Nesterov', 3e-3, lambda rate: rmsprop(rate, momentum=0.9, nesterov=True)),
    Optimizer('SGD', 1.0, optax.sgd),
    Optimizer('AdaGrad', 0.3, optax.adagrad),
)


def number(
    kind: type[int] | type[float], lower: float, below: float, *, above: bool = False
) -> Callable[[str], float]:
    """An argparse type: an int or float in [lower, below), or in (lower, below) with `above`."""
    noun = 'a whole number' if kind is int else 'a number'
    wanted = f'{noun} in {"(" if above else "["}{lower:g}, {below:g})'

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lower <= value < below or (above and value == lower):
            raise argparse.ArgumentTypeError(f'must be {wanted}, got {text!r}')
        return value

    return parse


def option(default: float, parse: Callable[[str], float], text: str) -> Any:
    """A field of `Config` that is also a command-line option."""
    return dataclasses.field(default=default, metadata={'type': parse, 'help': text})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every option that decides the results. A run can be resumed only with equal ones."""

    seed: int = option(0, number(int, 0, 2**31), 'seed of everything random')
    # Epochs, learning rate and decay were chosen by five-fold cross-validation on training images.
    epochs: int = option(80, number(int, 1, 100_000), 'passes over the training images')
    batch_size: int = option(64, number(int, 1, TRAIN_IMAGES + 1), 'images per step')
    learning_rate: float = option(
        3e-3, number(float, 0, math.inf, above=True), 'peak of the warm-up/cosine schedule'
    )
    momentum: float = option(0.9, number(float, 0, 1), 'decay of the velocity')
    decay: float = option(0.9, number(float, 0, 1), 'decay of the mean squared gradient')
    comparison_epochs: int = option(
        20, number(int, 1, 100_000), 'passes over the training images per compared optimizer'
    )
    diagnose: bool = dataclasses.field(
        default=False,
        metadata={'action': 'store_true', 'help': 'measure the last step of each epoch'},
    )


class Digits(NamedTuple):
    """Images of shape (count, 8, 8, 1) with values in [0, 1], and their labels."""

    train_images: jax.Array
    train_labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


def load_digits() -> Digits:
    """The 1797 digits in a fixed split, each class in proportion."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    pixels, labels = load(return_X_y=True)
    images = pixels.reshape(-1, 8, 8, 1).astype('float32') / 16
    split = train_test_split(images, labels, test_size=TEST_IMAGES, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, split)
    return Digits(train_images, train_labels, test_images, test_labels)


def network(key: jax.Array) -> Any:
    """Two 3x3 convolutions and two dense layers, as a `flax.nnx` module."""
    from flax import nnx

    rngs = nnx.Rngs(key)

    def convolution(inputs: int, outputs: int) -> nnx.Conv:
        return nnx.Conv(inputs, outputs, (3, 3), conv_general_dilated=convolve, rngs=rngs)

    return nnx.Sequential(
        convolution(1, 32),
        nnx.relu,
        halve,
        convolution(32, 64),
        nnx.relu,
        halve,
        lambda x: x.reshape(len(x), -1),
        nnx.Linear(2 * 2 * 64, 128, rngs=rngs),
        nnx.relu,
        nnx.Linear(128, 10, rngs=rngs),
    )


def convolve(images: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """A 3x3 convolution with zero padding as one matrix product.

    On CPU, XLA's own takes several times as long, above all where vmap gives each seed a kernel.
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(windows, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def halve(images: jax.Array) -> jax.Array:
    """Averages 2x2 squares; much faster on CPU than the gradient of `nnx.avg_pool`."""
    count, height, width, channels = images.shape
    return images.reshape(count, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def shift(key: jax.Array, images: jax.Array) -> jax.Array:
    """Moves each image by -1, 0 or 1 pixel in either direction."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = jnp.pad(jax.random.randint(key, (len(images), 2), 0, 3), ((0, 0), (0, 1)))
    cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, (8, 8, 1)))
    return cut(padded, corners)


class TrainState(NamedTuple):
    """All that training changes: `epoch` is the number of epochs completed."""

    epoch: jax.Array
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The network, the digits and an optimizer, as pure functions of a key and a state.

    Attributes:
      digits: The images.
      optimizer: The optimizer to train under.
      epochs: Passes over the training images, over which the learning rate is scheduled.
      batch_size: Images per step.
      sharding: How the images of a batch are spread over devices; None leaves it to the compiler.
    """

    digits: Digits
    optimizer: Optimizer
    epochs: int
    batch_size: int
    sharding: jax.sharding.Sharding | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches only: the rest of an epoch's permutation is left out."""
        return len(self.digits.train_labels) // self.batch_size

    @property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer behind clipping, under a warm-up/cosine schedule."""
        steps = self.epochs * self.steps_per_epoch
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.optimizer.learning_rate, warmup_steps=steps // 10, decay_steps=steps
        )
        return optax.chain(optax.clip_by_global_norm(1.0), self.optimizer.build(rate))

    def init(self, key: jax.Array) -> TrainState:
        """The state before training."""
        from flax import nnx

        params = nnx.state(network(jax.random.fold_in(key, 0)))
        return TrainState(jnp.zeros([], jnp.int32), params, self.tx.init(params))

    def epoch(self, key: jax.Array, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
        """One pass over the training images, and what the metrics say of it."""
        from flax import nnx

        digits, tx = self.digits, self.tx
        graph = nnx.graphdef(nnx.eval_shape(lambda: network(jax.random.key(0))))
        order_key, shift_key = jax.random.split(jax.random.fold_in(key, state.epoch + 1))
        order = jax.random.permutation(order_key, len(digits.train_labels))
        batches = order[: self.steps_per_epoch * self.batch_size].reshape(-1, self.batch_size)

        def loss(params: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = nnx.merge(graph, params)(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (logits.argmax(-1) == labels).mean()

        def step(carry: tuple[Any, Any], batch: tuple[jax.Array, jax.Array]) -> Any:
            params, opt_state = carry
            indices, step_key = batch
            images, labels = digits.train_images[indices], digits.train_labels[indices]
            shown = shift(step_key, images), labels
            if self.sharding is not None:
                shown = jax.lax.with_sharding_constraint(shown, self.sharding)
            measured, grads = jax.value_and_grad(loss, has_aux=True)(params, *shown)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), measured

        keys = jax.random.split(shift_key, self.steps_per_epoch)
        carry = state.params, state.opt_state
        (params, opt_state), (losses, accuracies) = jax.lax.scan(step, carry, (batches, keys))
        metrics = {
            'loss': losses.mean(),
            'train_accuracy': accuracies.mean(),
            'test_accuracy': loss(params, digits.test_images, digits.test_labels)[1],
        }
        return TrainState(state.epoch + 1, params, opt_state), metrics

    def epoch_with_rate(self, key: jax.Array, state: TrainState) -> Any:
        """An epoch, with the learning rate of its first step among the metrics.

        For optimizers of this package, all of whose parameters share one rate.
        """
        rates = diagnostics.learning_rates(self.tx, state.opt_state, state.params)
        state, metrics = self.epoch(key, state)
        return state, metrics | {'learning_rate': next(iter(rates.values()))}


def open_checkpoints(folder: Path) -> Any:
    """An Orbax manager that keeps the last two complete checkpoints, by number of epochs."""
    import orbax.checkpoint as ocp

    # Orbax writes under another name and renames, so a killed write leaves no checkpoint.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def restore(
    checkpoints: Any,
    init: Callable[[], TrainState],
    sharding: jax.sharding.Sharding | None = None,
) -> TrainState | None:
    """The last complete state, shaped as `init` would make it; None where there is none.

    It comes on the devices of `sharding`, or on one, wherever it was when it was saved.
    """
    import orbax.checkpoint as ocp

    latest = checkpoints.latest_step()
    if latest is None:
        return None
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: x.update(sharding=sharding), jax.eval_shape(init))
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return checkpoints.restore(latest, args=ocp.args.StandardRestore(target))
        except Exception as error:  # Orbax and TensorStore share no narrower class.
            reason = textwrap.shorten(str(error), 160, placeholder=' ...')
        # Orbax has abandoned the reads of the other arrays: let them complain where nobody hears.
        time.sleep(1)
        gc.collect()
    folder = checkpoints.directory / str(latest)
    raise DemoError(
        f'cannot read the checkpoint {folder} (delete it to use an older one): {reason}'
    )


def train(config: Config, digits: Digits, output: Path, every: int) -> list[dict[str, Any]]:
    """Trains from the last checkpoint, if any, to the end; returns the metrics of each epoch."""
    import orbax.checkpoint as ocp
    from tqdm import tqdm

    def build(rate: optax.Schedule) -> optax.GradientTransformation:
        tx = rmsprop(rate, config.decay, EPS, momentum=config.momentum)
        steps = len(digits.train_labels) // config.batch_size
        measured = diagnostics.measured(tx, labels=LAYERS, eps=EPS, every=steps)
        return measured if config.diagnose else tx

    optimizer = Optimizer('RMSProp', config.learning_rate, build)
    experiment = Experiment(digits, optimizer, config.epochs, config.batch_size)
    key, path = jax.random.key(config.seed), output / METRICS
    run_epoch = jax.jit(experiment.epoch_with_rate, donate_argnums=1)
    with open_checkpoints(output / CHECKPOINTS) as checkpoints:
        state = restore(checkpoints, lambda: experiment.init(key))
        state = jax.jit(experiment.init)(key) if state is None else state
        records = rewind(path, int(state.epoch))
        with tqdm(desc='training', initial=len(records), total=config.epochs, unit='epoch') as bar:
            for done in range(len(records) + 1, config.epochs + 1):
                state, measured = run_epoch(key, state)
                metrics = {name: float(value) for name, value in measured.items()}
                if not math.isfinite(metrics['loss']):
                    raise DemoError(f'training diverged in epoch {done}: lower --learning-rate')
                step = done * experiment.steps_per_epoch
                found = diagnosis(state) if config.diagnose else {}
                records.append({'epoch': done, 'step': step, **metrics, **found})
                with path.open('a') as file:
                    file.write(json.dumps(records[-1]) + '\n')
                if done % every == 0 or done == config.epochs:
                    checkpoints.save(done, args=ocp.args.StandardSave(state))
                bar.set_postfix({name: f'{x:.4f}' for name, x in metrics.items()}, refresh=False)
                bar.update()
    return records


def diagnosis(state: TrainState) -> dict[str, Any]:
    """What the optimizer has measured of the last step, for JSON."""
    found = diagnostics.read(state.opt_state, state.params, LAYERS)
    return {name: x.tolist() for name, x in jax.device_get(found).items()}


def rewind(path: Path, epoch: int) -> list[dict[str, Any]]:
    """Cuts off the metrics after a checkpoint's epoch: they will be run, and written, again."""
    records = read_lines(path)[:epoch]
    if [record.get('epoch') for record in records] != list(range(1, epoch + 1)):
        raise DemoError(f'{path} lacks epochs that the checkpoint has')
    write_lines(path, records)
    return records


def compare(config: Config, digits: Digits, output: Path) -> list[dict[str, Any]]:
    """Trains under each of `OPTIMIZERS` that `output` has no result of yet; returns all results."""
    from tqdm import tqdm

    results = read_lines(output / COMPARISON)
    names = [optimizer.name for optimizer in OPTIMIZERS]
    if [result.get('method') for result in results] != names[: len(results)]:
        raise DemoError(f'{output / COMPARISON} was not written by this version of the demo')
    keys = jax.random.split(jax.random.key(config.seed), COMPARISON_SEEDS)
    epochs = config.comparison_epochs
    with tqdm(total=len(OPTIMIZERS) * epochs, initial=len(results) * epochs, unit='epoch') as bar:
        for optimizer in OPTIMIZERS[len(results) :]:
            bar.set_description(optimizer.name)
            experiment = Experiment(digits, optimizer, epochs, config.batch_size)
            run_epoch = jax.jit(jax.vmap(experiment.epoch), donate_argnums=1)
            state = jax.jit(jax.vmap(experiment.init))(keys)
            history = []
            for _ in range(epochs):
                state, metrics = run_epoch(keys, state)
                history.append(jax.device_get(metrics))
                bar.update()
            steps = [epoch * experiment.steps_per_epoch for epoch in range(1, epochs + 1)]
            curves = {
                name: [[float(row[name][seed]) for row in history] for seed in range(len(keys))]
                for name in ('loss', 'test_accuracy')
            }
            result = {'method': optimizer.name, 'learning_rate': optimizer.learning_rate}
            results.append({**result, 'steps': steps, **curves})
            write_lines(output / COMPARISON, results)
    return results


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file, up to a last line that a killed run left unfinished."""
    if not path.exists():
        return []
    try:
        lines = path.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith('\n')]
        if all(isinstance(record, dict) for record in records):
            return records
    except ValueError:
        pass
    raise DemoError(f'{path} is damaged, or was not written by this demo')


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Replaces a file in one go, so that a killed run leaves the old one or the new one."""
    draft = path.with_name(path.name + '.tmp')
    draft.write_text(''.join(json.dumps(record) + '\n' for record in records))
    draft.replace(path)


def prepare(output: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Makes `output` the folder of a run with this configuration, or says why it cannot be."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / CONFIG
    if resume:
        if not path.exists():
            raise DemoError(f'{output} holds no run to resume')
        check_config(path, config)
    elif path.exists() and not overwrite:
        raise DemoError(f'{output} already holds a run: add --resume or --overwrite')
    elif not path.exists() and any(output.iterdir()):
        raise DemoError(f'{output} holds other files and no run: choose an empty folder')
    else:
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        for name in (METRICS, COMPARISON, *FIGURES):
            (output / name).unlink(missing_ok=True)
    (output / CHECKPOINTS).mkdir(exist_ok=True)
    write_lines(path, [dataclasses.asdict(config)])


def check_config(path: Path, config: Config) -> None:
    """Refuses to continue a run under options other than its own."""
    saved, given = next(iter(read_lines(path)), {}), dataclasses.asdict(config)
    differences = [
        f'--{name.replace("_", "-")} was {saved.get(name)}, now {given.get(name)}'
        for name in {**given, **saved}
        if saved.get(name) != given.get(name)
    ]
    if differences:
        raise DemoError(f'{path.parent} holds a run with other options: {"; ".join(differences)}')


def parser() -> OneLineParser:
    """The command line: the fields of `Config`, and what does not decide the results."""
    made = OneLineParser(
        prog='rmsprop-jax-demo',
        description='Train a convolutional network on handwritten digits with RMSProp, then '
        'compare seven optimizers. Writes figures, metrics and a checkpoint.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument('--output', type=Path, default='demo-output', help='folder to write to')
    existing = made.add_mutually_exclusive_group()
    flag: dict[str, Any] = {'action': 'store_true', 'default': argparse.SUPPRESS}
    existing.add_argument('--resume', **flag, help='continue the run in the output folder')
    existing.add_argument('--overwrite', **flag, help='replace the run in the output folder')
    for field in dataclasses.fields(Config):
        name = f'--{field.name.replace("_", "-")}'
        typed = {'metavar': 'N' if field.type is int else 'X'} if 'type' in field.metadata else {}
        made.add_argument(name, default=field.default, **typed, **field.metadata)
    made.add_argument(
        '--checkpoint-every',
        metavar='N',
        type=number(int, 1, 2**31),
        default=10,
        help='epochs between checkpoints',
    )
    made.add_argument('--no-comparison', **flag, help='leave out the comparison of optimizers')
    return made


def check_extras() -> None:
    """Imports all that the job needs, to fail before it has begun."""
    try:
        for name in EXTRAS:
            importlib.import_module(name)
    except ImportError as error:
        raise DemoError(f'{error}: {install("demo")}') from error


def run(config: Config, output: Path, every: int, comparison: bool) -> str:
    """Does the whole job in a prepared folder and sums it up."""
    from rmsprop_jax.plots import comparison_figure, diagnostics_figure, training_figure

    started = time.perf_counter()
    digits = load_digits()
    records = train(config, digits, output, every)
    trained = time.perf_counter() - started
    title = 'RMSProp with momentum on handwritten digits'
    training_figure(records, title).savefig(output / FIGURES[0])
    if config.diagnose:
        title = 'The last step of each epoch, by layer (band: middle half)'
        diagnostics_figure(records, title).savefig(output / FIGURES[2])
    if comparison:
        results = compare(config, digits, output)
        title = 'Handwritten digits: the same network under seven optimizers'
        comparison_figure(results, title).savefig(output / FIGURES[1])
    seconds = time.perf_counter() - started
    return (
        f'test accuracy {records[-1]["test_accuracy"]:.2%} after {config.epochs} epochs; '
        f'{trained:.0f} s of training, {seconds:.0f} s in all; results in {output}'
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; exits with code 2 and one line where it cannot be done."""
    command = parser()
    options = vars(command.parse_args(argv))
    config = Config(**{field.name: options[field.name] for field in dataclasses.fields(Config)})
    try:
        check_extras()
        # What matters Orbax raises; what it logs would break into the progress bar.
        logging.getLogger('absl').setLevel(logging.CRITICAL)
        output = options['output']
        prepare(output, config, resume='resume' in options, overwrite='overwrite' in options)
        print(run(config, output, options['checkpoint_every'], 'no_comparison' not in options))
    except (DemoError, OSError) as error:
        command.error(str(error))
    except KeyboardInterrupt:
        command.exit(130, 'interrupted: add --resume to continue\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
