"""Recipes against values, learning rates and NumPy loops that were written from the sources."""

import functools
import inspect
import json
import math
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rmsprop_jax import recipes

TABLE = recipes.table()
DOCUMENT = pathlib.Path(__file__).parents[1] / 'docs' / 'recipes.md'
GOLDEN = pathlib.Path(__file__).parent / 'golden'
Tree = dict[str, Any]

# name: learning rate, decay, momentum, eps, centered, L2, clipping norm, clamp, average's decay
VALUES = {
    'graves': (1e-4, 0.95, 0.9, 1e-4, True, 0, None, None, None),
    'dqn_nature': (0.00025, 0.95, 0, 0.01, True, 0, None, None, None),
    'dopamine_dqn': (0.00025, 0.95, 0, 0.00001, True, 0, None, None, None),
    'a3c': (7e-4, 0.99, 0, 0.1, False, 0, None, None, None),
    'baselines_a2c': (7e-4, 0.99, 0, 1e-5, False, 0, 0.5, None, None),
    'sb3_a2c': (7e-4, 0.99, 0, 1e-5, False, 0, 0.5, None, None),
    'sb3_a2c_tf_like': (7e-4, 0.99, 0, 1e-5, False, 0, 0.5, None, None),
    'impala_dmlab': (0.00048, 0.99, 0, 0.1, False, 0, None, None, None),
    'impala_dmlab30': (0.00031866995608948655, 0.99, 0, 0.1, False, 0, None, None, None),
    'impala_atari': (0.0006, 0.99, 0, 0.01, False, 0, 40, None, None),
    'impala_torchbeast': (0.00048, 0.99, 0, 0.01, False, 0, 40, None, None),
    'inception_v3': (0.165, 0.9, 0.9, 1.0, False, 0.00004, None, None, 0.995),
    'mnasnet': (0.016, 0.9, 0.9, 0.001, False, 1e-5, None, None, 0.9999),
    'efficientnet': (0.016, 0.9, 0.9, 0.001, False, 1e-5, None, None, 0.9999),
    'mobilenet_v2': (0.045, 0.9, 0.9, 1.0, False, 0.00004, None, None, 0.9999),
    'efficientnet_timm': (0.016, 0.9, 0.9, 0.001, False, 1e-5, None, None, 0.9999),
    'mobilenet_v3_timm': (0.064, 0.9, 0.9, 0.001, False, 1e-5, None, None, 0.9999),
    'wgan': (0.00005, 0.99, 0, 1e-8, False, 0, None, 0.01, None),
}

# What each function needs, with epochs so short that 60 steps see warm-ups and drops.
FRAMES = {'total_frames': 400, 'frames_per_update': 10}
IMAGES = {'steps_per_epoch': 5, 'batch_size': 512}
ARGUMENTS: dict[str, Tree] = {
    'a3c': {**FRAMES, 'max_norm': 40.0},
    'baselines_a2c': {'total_timesteps': 400, 'batch_size': 8},
    'impala_dmlab': FRAMES,
    'impala_dmlab30': FRAMES,
    'impala_atari': FRAMES,
    'impala_torchbeast': {'total_steps': 400, 'steps_per_update': 10},
    'inception_v3': IMAGES,
    'mnasnet': IMAGES,
    'efficientnet': IMAGES,
    'mobilenet_v2': IMAGES,
    'efficientnet_timm': {**IMAGES, 'warmup_epochs': 3},
    'mobilenet_v3_timm': {'steps_per_epoch': 5, 'warmup_epochs': 3},
    'wgan': {'network': 'critic'},
}
NAMES = [recipe.name for recipe in recipes.RECIPES]


def build(name: str, **changes: Any) -> optax.GradientTransformationExtraArgs:
    return getattr(recipes, name)(**{**ARGUMENTS.get(name, {}), **changes})


# --- Records and functions -----------------------------------------------------------------------


@pytest.mark.parametrize('recipe', recipes.RECIPES, ids=NAMES)
def test_values(recipe: recipes.Recipe):
    lr, decay, momentum, eps, centered, weight_decay, norm, clamp, average = VALUES[recipe.name]
    assert recipe.learning_rate == lr
    assert recipe.decay == decay
    assert recipe.momentum == momentum
    assert recipe.eps == eps
    assert recipe.centered == centered
    assert recipe.weight_decay == weight_decay
    assert recipe.max_norm == (math.inf if norm is None else norm)
    assert recipe.clamp == (math.inf if clamp is None else clamp)
    assert recipe.average == average


def test_averages_of_tensorflow_follow_the_step_and_those_of_timm_do_not():
    forms = {r.name: r.average_form for r in recipes.RECIPES if r.average is not None}
    tensorflow = dict.fromkeys(
        ['inception_v3', 'mnasnet', 'efficientnet', 'mobilenet_v2'], 'num_updates'
    )
    assert forms == {**tensorflow, 'efficientnet_timm': 'plain', 'mobilenet_v3_timm': 'plain'}


def test_every_record_has_a_function_and_every_function_a_record():
    factories = {
        name
        for name, value in vars(recipes).items()
        if inspect.isfunction(value)
        and inspect.signature(value).return_annotation == optax.GradientTransformationExtraArgs
    }
    assert factories == set(NAMES) == set(VALUES)
    assert len(NAMES) == len(factories)


@pytest.mark.parametrize('name', NAMES)
def test_every_argument_is_a_keyword_and_a_source_is_named(name: str):
    function = getattr(recipes, name)
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY}
    assert 'Source: ' in inspect.getdoc(function)


FIGURES = ('learning_rate', 'decay', 'momentum', 'eps', 'weight_decay', 'max_norm', 'clamp')
FIGURES += ('average',)


@pytest.mark.parametrize('recipe', recipes.RECIPES, ids=NAMES)
def test_help_tells_each_figure_of_the_record_or_names_the_recipe_that_does(recipe: recipes.Recipe):
    told = _told(recipe.name)
    others = {name for name in NAMES if f'`{name}`' in getattr(recipes, recipe.name).__doc__}
    for figure in FIGURES:
        value = getattr(recipe, figure)
        if value not in (None, 0, math.inf) and value not in told:
            rounded = float(f'{value:.3g}') in told
            same = {o.name for o in recipes.RECIPES if getattr(o, figure) == value}
            assert rounded or any(value in _told(o) for o in others & same), (figure, value)


def _told(name: str) -> set[float]:
    """The numbers in a recipe's docstring."""
    number = r'(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?'
    return {float(x) for x in re.findall(number, getattr(recipes, name).__doc__)}


def test_importing_starts_nothing():
    package = pathlib.Path(recipes.__file__).parent
    program = """
import sys
sys.modules.update(flax=None, matplotlib=None, torch=None, tensorflow=None)
from rmsprop_jax import recipes
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, '-c', program], check=True, cwd=package.parents[1])


def test_tables_have_every_record():
    updates, surroundings, sources = (part.splitlines() for part in TABLE.split('\n\n'))
    for lines in (updates, surroundings, sources):
        assert len(lines) == 2 + len(NAMES)
        assert len({line.count('|') for line in lines}) == 1
    for update, around, source, recipe in zip(
        updates[2:], surroundings[2:], sources[2:], recipes.RECIPES, strict=True
    ):
        for line in (update, around, source):
            assert line.startswith(f'| `{recipe.name}` |')
        rate, decay, momentum, eps = (
            cell.split()[0].rstrip(',') for cell in update.split('|')[3:7]
        )
        assert (float(rate), float(decay)) == (recipe.learning_rate, recipe.decay)
        assert (float(momentum), float(eps)) == (recipe.momentum, recipe.eps)
        assert around.endswith(f'| {recipe.loss} | {recipe.batch} |')
        assert f'| {recipe.verified} | {recipe.citation} | {recipe.source} |' in source


def test_document_has_the_tables():
    assert DOCUMENT.read_text().endswith(f'\n\n{TABLE}\n'), 'put recipes.table() at its end'


# --- Learning rates ------------------------------------------------------------------------------

IMAGENET = 1281167
EFFICIENTNET = {'steps_per_epoch': IMAGENET / 2048, 'batch_size': 2048}
MNASNET = {'steps_per_epoch': IMAGENET / 1024, 'batch_size': 1024}
# Eight GPUs, of which the source counts the epochs of one: int(1281167 2.5 / 8 / 96) = 4170.
MOBILENET = {'steps_per_epoch': IMAGENET / 768, 'batch_size': 768}
B2 = {'steps_per_epoch': 5004, 'batch_size': 256, 'warmup_epochs': 3}
DMLAB = {'total_frames': 1e9, 'frames_per_update': 12800}
DMLAB30 = {'total_frames': 1e10, 'frames_per_update': 12800}
BASELINES = {'total_timesteps': 80e6, 'batch_size': 80}

# recipe, arguments, learning rates by step, worked out by hand from the source
RATES = [
    # Warm-up of int(5 x 625.57) = 3127 steps; drops at 1501.4 and 3002.7 are inside it.
    (
        'efficientnet',
        EFFICIENTNET,
        {
            0: 0.0,
            1: 0.128 / 3127,
            2000: 0.128 * 2000 / 3127,
            3126: 0.128 * 3126 / 3127,
            3127: 0.128 * 0.9409,
            4504: 0.128 * 0.9409,
            4505: 0.128 * 0.912673,
        },
    ),
    ('mnasnet', MNASNET, {3127: 0.064 * 3127 / 6255, 6255: 0.064 * 0.9409}),
    # 0.165 for 256; a drop every int(3 x 1251.14) = 3753 steps, down to 1e-4 of the first rate.
    (
        'inception_v3',
        MNASNET,
        {
            0: 0.66,
            3752: 0.66,
            3753: 0.6204,
            **{k * 3753 - 1: 0.66 * 0.94 ** (k - 1) for k in range(2, 149)},
            **{k * 3753: 0.66 * 0.94**k for k in range(2, 149)},
            149 * 3753: 0.66e-4,
        },
    ),
    ('mobilenet_v2', MOBILENET, {4169: 0.36, 4170: 0.3528}),
    # Within an epoch the rate stays; 36 / 2.4 must not be rounded to below 15.
    (
        'efficientnet_timm',
        B2,
        {
            0: 1e-6,
            5003: 1e-6,
            5004: 1e-6 + 0.015999 / 3,
            3 * 5004 - 1: 1e-6 + 0.015999 * 2 / 3,
            3 * 5004: 0.016 * 0.97,
            5 * 5004 - 1: 0.016 * 0.97,
            5 * 5004: 0.016 * 0.9409,
            36 * 5004 - 1: 0.016 * 0.97**14,
            36 * 5004: 0.016 * 0.97**15,
            **{12 * k * 5004: 0.016 * 0.97 ** (5 * k) for k in range(1, 30)},
        },
    ),
    ('efficientnet_timm', {**B2, 'warmup_epochs': 0}, {0: 0.016, 5004 * 12: 0.016 * 0.97**5}),
    ('efficientnet_timm', {**B2, 'batch_size': 768}, {3 * 5004: 0.048 * 0.97}),
    ('efficientnet_timm', {**B2, 'batch_size': 1024}, {3 * 5004: 0.064 * 0.97}),
    (
        'mobilenet_v3_timm',
        {'steps_per_epoch': 1251, 'warmup_epochs': 5},
        {1251: 1e-6 + 0.063999 / 5, 6255: 0.064 * 0.973**2},
    ),
    (
        'impala_dmlab',
        DMLAB,
        {0: 0.00048, 39062: 0.00048 * (1 - 39062 * 12800 / 1e9), 78125: 0.0, 80000: 0.0},
    ),
    ('impala_dmlab30', DMLAB30, {390625: 0.00031866995608948655 / 2}),
    ('impala_atari', {'total_frames': 2e8, 'frames_per_update': 2560}, {15625: 0.0006 * 0.8}),
    ('a3c', {**FRAMES, 'max_norm': None}, {10: 7e-4 * 0.75}),
    # The scheduler is asked once for each of 80 steps, and the last answer counts.
    (
        'baselines_a2c',
        BASELINES,
        {0: 7e-4 * (1 - 79 / 80e6), 500_000: 7e-4 * (0.5 - 79 / 80e6), 999_999: 7e-4 / 80e6},
    ),
    ('baselines_a2c', {'total_timesteps': 10, 'batch_size': 5}, {0: 7e-4 * 0.6}),
]


def learning_rates(name: str, arguments: Tree, steps: Sequence[int]) -> list[float]:
    """Read off the updates of a parameter of zero, whose counters stand at each of `steps`."""
    eps, decay, start = VALUES[name][3], VALUES[name][1], 0.0 if name == 'a3c' else 1.0
    tx, gradient = build(name, **arguments), 0.5  # not clipped anywhere
    state = tx.init(jnp.zeros(1))

    @jax.jit
    def update(step: jax.Array) -> Any:
        at_step = optax.tree.set(state, count=step)
        return tx.update(jnp.array([gradient]), at_step, jnp.zeros(1))[0][0]

    root = math.sqrt(decay * start + (1 - decay) * gradient**2 + eps)
    return [-float(update(jnp.int32(step))) * root / gradient for step in steps]


@pytest.mark.parametrize(('name', 'arguments', 'expected'), RATES)
def test_learning_rates(name: str, arguments: Tree, expected: dict[int, float]):
    # In float32 a rate of 1 - step / steps is right to 6e-8 of the first rate, and a power of up to
    # 150 to 1e-5 of itself.
    got = learning_rates(name, arguments, list(expected))
    np.testing.assert_allclose(got, list(expected.values()), rtol=2e-5, atol=2e-7 * VALUES[name][0])
    with jax.enable_x64(True):
        got = learning_rates(name, arguments, list(expected))
    np.testing.assert_allclose(got, list(expected.values()), rtol=1e-10, atol=1e-15)


# --- Updates, against the sources' equations -----------------------------------------------------

STEPS = 60


def random_tree(seed: int, *leading: int) -> Tree:
    rng = np.random.default_rng(seed)
    return {
        'bn1': {'scale': rng.normal(size=(*leading, 3))},
        'dense': {
            'bias': rng.normal(size=(*leading, 3)),
            'kernel': rng.normal(size=(*leading, 2, 3)),
        },
        'depthwise': {'kernel': rng.normal(size=(*leading, 2, 2, 1, 3))},
    }


def leaves(tree: Tree) -> dict[str, np.ndarray]:
    return {f'{a}/{b}': x for a, inner in tree.items() for b, x in inner.items()}


def tensorflow(
    rate: Callable[[int], float],
    decay: float,
    momentum: float,
    eps: float,
    *,
    start: float = 1.0,
    centered: bool = False,
    l2: float = 0.0,
    decayed: tuple[str, ...] = (),
    clip: Callable[[dict[str, np.ndarray]], float] | None = None,
) -> Callable[[Tree, Tree], dict[str, np.ndarray]]:
    """TensorFlow 1's rule (training_ops.cc), and those of Graves and the Lua code by `start`."""

    def run(params: Tree, gradients: Tree) -> dict[str, np.ndarray]:
        p, gs = leaves(params), leaves(gradients)
        nu = {k: np.full_like(x, start) for k, x in p.items()}
        mu, b = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
        for t in range(STEPS):
            g = {k: x[t] for k, x in gs.items()}
            factor = 1.0 if clip is None else clip(g)
            for k in p:
                grad = g[k] * factor + (l2 * p[k] if k in decayed else 0.0)
                nu[k] = nu[k] + (grad * grad - nu[k]) * (1 - decay)
                mu[k] = mu[k] + (grad - mu[k]) * (1 - decay)
                inside = nu[k] + eps - (mu[k] ** 2 if centered else 0.0)
                b[k] = momentum * b[k] + rate(t) * grad / np.sqrt(inside)
                p[k] = p[k] - b[k]
        return p

    return run


def torch(
    rate: Callable[[int], float],
    alpha: float,
    eps: float,
    *,
    inside: bool = False,
    start: float = 0.0,
    clip: Callable[[dict[str, np.ndarray]], float] | None = None,
) -> Callable[[Tree, Tree], dict[str, np.ndarray]]:
    """`torch.optim.RMSprop` without momentum, and Stable-Baselines3's variant."""

    def run(params: Tree, gradients: Tree) -> dict[str, np.ndarray]:
        p, gs = leaves(params), leaves(gradients)
        nu = {k: np.full_like(x, start) for k, x in p.items()}
        for t in range(STEPS):
            g = {k: x[t] for k, x in gs.items()}
            factor = 1.0 if clip is None else clip(g)
            for k in p:
                grad = g[k] * factor
                nu[k] = alpha * nu[k] + (1 - alpha) * grad * grad
                p[k] = p[k] - rate(t) * grad / (
                    np.sqrt(nu[k] + eps) if inside else np.sqrt(nu[k]) + eps
                )
        return p

    return run


def norm_of(g: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(np.sum(x * x)) for x in g.values()))


def clip_by_global_norm(limit: float) -> Callable[[dict[str, np.ndarray]], float]:
    return lambda g: limit * min(1 / norm_of(g), 1 / limit)


def clip_grad_norm_(limit: float) -> Callable[[dict[str, np.ndarray]], float]:
    return lambda g: min(1.0, limit / (norm_of(g) + 1e-6))


def constant(rate: float) -> Callable[[int], float]:
    return lambda t: rate


def falling(first: float) -> Callable[[int], float]:
    return lambda t: first * max(0.0, 1 - 10 * t / 400)


def lr_lambda(first: float) -> Callable[[int], float]:
    """torchbeast's, with an update of 10 of 400 steps."""
    return lambda epoch: first * (1 - min(epoch * 10, 400) / 400)


def build_learning_rate(initial: float) -> Callable[[int], float]:
    """tensorflow/tpu's function of that name, at 5 steps per epoch."""

    def rate(t: int) -> float:
        return initial * t / 25 if t < 25 else initial * 0.97 ** math.floor(t / (5 * 2.4))

    return rate


def step_lr(base: float, factor: float) -> Callable[[int], float]:
    """timm's StepLRScheduler at 5 steps per epoch and 3 epochs of warm-up."""

    def rate(t: int) -> float:
        epoch = t // 5
        if epoch < 3:
            return 1e-6 + epoch * ((base - 1e-6) / 3)
        return base * factor ** (epoch // 2.4)

    return rate


WEIGHTS = ('dense/kernel', 'depthwise/kernel')
REFERENCES = {
    'graves': tensorflow(constant(1e-4), 0.95, 0.9, 1e-4, start=0, centered=True),
    'dqn_nature': tensorflow(constant(2.5e-4), 0.95, 0, 0.01, start=0, centered=True),
    'dopamine_dqn': tensorflow(constant(2.5e-4), 0.95, 0, 1e-5, centered=True),
    'a3c': tensorflow(falling(7e-4), 0.99, 0, 0.1, start=0, clip=clip_by_global_norm(40)),
    'baselines_a2c': tensorflow(
        lambda t: 7e-4 * max(0.0, 1 - (8 * t + 7) / 400),
        0.99,
        0,
        1e-5,
        clip=clip_by_global_norm(0.5),
    ),
    'sb3_a2c': torch(constant(7e-4), 0.99, 1e-5, clip=clip_grad_norm_(0.5)),
    'sb3_a2c_tf_like': torch(
        constant(7e-4), 0.99, 1e-5, inside=True, start=1, clip=clip_grad_norm_(0.5)
    ),
    'impala_dmlab': tensorflow(falling(4.8e-4), 0.99, 0, 0.1),
    'impala_dmlab30': tensorflow(falling(3.1866995608948655e-4), 0.99, 0, 0.1),
    'impala_atari': tensorflow(falling(6e-4), 0.99, 0, 0.01, clip=clip_by_global_norm(40)),
    'impala_torchbeast': torch(lr_lambda(4.8e-4), 0.99, 0.01, clip=clip_grad_norm_(40)),
    'inception_v3': tensorflow(
        lambda t: 0.33 * 0.94 ** (t // 15), 0.9, 0.9, 1.0, l2=4e-5, decayed=('dense/kernel',)
    ),
    'mnasnet': tensorflow(
        build_learning_rate(0.032), 0.9, 0.9, 1e-3, l2=1e-5, decayed=('dense/bias', *WEIGHTS)
    ),
    'efficientnet': tensorflow(
        build_learning_rate(0.032), 0.9, 0.9, 1e-3, l2=1e-5, decayed=('dense/bias', *WEIGHTS)
    ),
    'mobilenet_v2': tensorflow(
        lambda t: 0.24 * 0.98 ** (t // 12), 0.9, 0.9, 1.0, l2=4e-5, decayed=('dense/kernel',)
    ),
    'efficientnet_timm': tensorflow(step_lr(0.032, 0.97), 0.9, 0.9, 1e-3, l2=1e-5, decayed=WEIGHTS),
    'mobilenet_v3_timm': tensorflow(
        step_lr(0.064, 0.973), 0.9, 0.9, 1e-3, l2=1e-5, decayed=WEIGHTS
    ),
}


def train(tx: optax.GradientTransformation, params: Tree, gradients: Tree) -> dict[str, np.ndarray]:
    def step(carry: Any, g: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.asarray, params)
    (params, _), _ = jax.jit(lambda *args: jax.lax.scan(step, *args))(
        (params, tx.init(params)), jax.tree.map(jnp.asarray, gradients)
    )
    return {key: np.asarray(x) for key, x in leaves(params).items()}


@pytest.mark.parametrize('scale', [0.01, 10.0])  # the larger gradients are clipped
@pytest.mark.parametrize('name', REFERENCES)
def test_updates_are_those_of_the_source(name: str, scale: float):
    # Weight decay shows at large parameters; small ones keep more digits of the way they went.
    size = 1e3 if VALUES[name][5] else 1e-3
    params = jax.tree.map(lambda x: size * x, random_tree(0))
    gradients = jax.tree.map(lambda x: scale * x, random_tree(1, STEPS))
    expected = REFERENCES[name](params, gradients)
    with jax.enable_x64(True):
        got = train(build(name), params, gradients)
    for key, start in leaves(params).items():
        way = expected[key] - start
        # Each of the 60 sums is rounded by up to 1e-16 of the parameter.
        np.testing.assert_allclose(got[key] - start, way, rtol=1e-12, atol=1e-14 * size)
        assert np.abs(way).max() > 1e-6


def test_dqn_takes_the_same_steps_on_a_mean():
    params, gradients = random_tree(2), random_tree(3, STEPS)
    mean = jax.tree.map(lambda x: x / 32, gradients)
    with jax.enable_x64(True):
        of_sum = train(recipes.dqn_nature(), params, gradients)
        of_mean = train(recipes.dqn_nature(mean_over=32), params, mean)
        wrong = train(recipes.dqn_nature(), params, mean)
    for key in of_sum:
        np.testing.assert_allclose(of_mean[key], of_sum[key], rtol=1e-12)
        assert np.abs(wrong[key] - of_sum[key]).max() > 1e-4


@pytest.mark.extended
@pytest.mark.parametrize(
    'name', ['impala_dmlab', 'impala_dmlab30', 'impala_atari', 'impala_torchbeast']
)
@pytest.mark.parametrize('scale', [1.0, 1e3])
def test_impala_takes_the_same_steps_on_a_mean(name: str, scale: float):
    params = random_tree(2)
    gradients = jax.tree.map(lambda x: scale * x, random_tree(3, STEPS))
    mean = jax.tree.map(lambda x: x / 3200, gradients)
    with jax.enable_x64(True):
        of_sum = train(build(name), params, gradients)
        of_mean = train(build(name, mean_over=3200), params, mean)
    for key in of_sum:
        np.testing.assert_allclose(of_mean[key], of_sum[key], rtol=1e-12)


# --- WGAN ----------------------------------------------------------------------------------------


def pull(p: np.ndarray, t: int) -> np.ndarray:
    """A gradient that depends on where it is taken."""
    return np.cos(np.arange(len(p)) + 0.01 * t) + 20 * p


def test_critic_is_clamped_before_each_step_there_and_after_it_here():
    start = np.random.default_rng(4).normal(scale=0.02, size=40)
    p, nu, source = start.copy(), np.zeros(40), []
    for t in range(STEPS):
        p = np.clip(p, -0.01, 0.01)
        source.append(p)
        g = pull(p, t)
        nu = 0.99 * nu + 0.01 * g * g
        p = p - 5e-5 * g / (np.sqrt(nu) + 1e-8)
    source.append(np.clip(p, -0.01, 0.01))
    with jax.enable_x64(True):
        tx = recipes.wgan(network='critic')
        params = recipes.wgan_clamp(jnp.asarray(start))
        state, ours = tx.init(params), [np.asarray(params)]
        for t in range(STEPS):
            g = jnp.asarray(pull(np.asarray(params), t))
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            ours.append(np.asarray(params))
    np.testing.assert_allclose(ours, source, rtol=1e-12)
    assert np.any(np.abs(p) > 0.01)
    assert np.all(np.abs(ours) <= 0.01 * (1 + 1e-15))


def test_generator_is_not_clamped():
    params, gradients = random_tree(5), random_tree(6, STEPS)
    expected = torch(constant(5e-5), 0.99, 1e-8)(params, gradients)
    with jax.enable_x64(True):
        got = train(recipes.wgan(network='generator'), params, gradients)
    for key in got:
        np.testing.assert_allclose(got[key], expected[key], rtol=1e-12)


# --- Masks ---------------------------------------------------------------------------------------


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(4, (3, 3))(x)
        x = nn.Conv(4, (3, 3), feature_group_count=4, name='depthwise_conv')(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        x = nn.BatchNorm(use_running_average=False, name='expand_bn')(x)
        return nn.Dense(2, name='bnet')(x)


class NnxNet(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, rngs=rngs)
        self.depthwise = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 2, rngs=rngs)])


def linen_shapes() -> Any:
    return jax.eval_shape(LinenNet().init, jax.random.key(0), jnp.ones((1, 4, 4, 1)))


def linen_params() -> Any:
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), linen_shapes()['params'])


def nnx_params() -> Any:
    return nnx.state(NnxNet(), nnx.Param)


def decayed(params: Any, mask: Any) -> set[str]:
    lines = recipes.describe_mask(params, mask).splitlines()
    assert len(lines) == len(jax.tree.leaves(params))
    return {line.split()[0] for line in lines if line.endswith('  decayed')}


def test_masks_of_a_linen_model():
    conv, depthwise, dense = 'Conv_0/kernel', 'depthwise_conv/kernel', 'bnet/kernel'
    biases = {'Conv_0/bias', 'depthwise_conv/bias', 'bnet/bias'}
    for params in (linen_params(), linen_shapes()['params']):
        assert decayed(params, recipes.tensorflow_decay_mask) == {conv, depthwise, dense, *biases}
        assert decayed(params, recipes.slim_decay_mask) == {conv, dense}
        assert decayed(params, recipes.timm_decay_mask) == {conv, depthwise, dense}


@pytest.mark.extended
def test_masks_of_an_nnx_model():
    conv, depthwise, dense = 'conv/kernel', 'depthwise/kernel', 'blocks/0/kernel'
    biases = {'conv/bias', 'depthwise/bias', 'blocks/0/bias'}
    for params in (nnx_params(), nnx.to_pure_dict(nnx_params())):
        assert decayed(params, recipes.tensorflow_decay_mask) == {conv, depthwise, dense, *biases}
        assert decayed(params, recipes.slim_decay_mask) == {conv, dense}
        assert decayed(params, recipes.timm_decay_mask) == {conv, depthwise, dense}


def test_patterns_can_be_changed():
    params = {'norm': {'scale': jnp.ones(2)}, 'dw': {'w': jnp.ones((2, 2))}, 'bn': jnp.ones((2, 2))}
    whole = functools.partial(recipes.tensorflow_decay_mask, batch_norm='norm')
    assert decayed(params, recipes.tensorflow_decay_mask) == {'norm/scale', 'dw/w'}
    assert decayed(params, whole) == {'dw/w', 'bn'}
    assert decayed(params, functools.partial(recipes.slim_decay_mask, depthwise='dw')) == {'bn'}


@pytest.mark.parametrize(
    ('name', 'found'),
    [
        *((name, True) for name in ('BatchNorm_0', 'tpu_batch_normalization_1', 'bn', 'bn12')),
        *((name, True) for name in ('bn_2', 'expand_bn', 'BN', 'batchnorm')),
        *((name, False) for name in ('bnet', 'LayerNorm_0', 'subnet', 'carbn', 'norm', 'bns')),
    ],
)
def test_names_of_batch_normalisation(name: str, found: bool):
    assert recipes.tensorflow_decay_mask({name: jnp.ones(2)}) == {name: not found}


def test_a_mask_that_finds_no_batch_normalisation_says_so():
    layers = [{'kernel': jnp.ones((3, 3, 2, 4))}, {'scale': jnp.ones(4), 'bias': jnp.ones(4)}]
    params = {'features': [layers]}
    message = r"tensorflow_decay_mask .* batch_norm=.* lets 'features/0/1/scale' decay"
    with pytest.warns(UserWarning, match=message):
        assert all(jax.tree.leaves(recipes.tensorflow_decay_mask(params)))
    for name in ('gamma', 'beta', 'Scale', 'features/0/1/gamma:0'):
        with pytest.warns(UserWarning, match=f"lets 'layer/{name}' decay"):
            recipes.tensorflow_decay_mask({'layer': {name: jnp.ones(4), 'kernel': jnp.ones(4)}})
    # Silent, since pytest raises warnings: a match of our pattern or theirs, or no normalisation.
    recipes.tensorflow_decay_mask(params | {'bn1': {'scale': jnp.ones(4)}})
    recipes.tensorflow_decay_mask(params, batch_norm='^1$')
    recipes.tensorflow_decay_mask({'dense': layers[0], 'grayscale': jnp.ones(4)})
    recipes.tensorflow_decay_mask({})


def test_a_mask_that_finds_no_depthwise_convolution_says_so():
    first, depthwise, dense = jnp.ones((3, 3, 1, 8)), jnp.ones((3, 3, 1, 16)), jnp.ones((1, 8))
    params = {'0': {'kernel': first}, '1': {'kernel': depthwise}, '2': {'kernel': dense}}
    with pytest.warns(UserWarning, match=r"slim_decay_mask .* depthwise=.* lets '1/kernel' decay"):
        assert all(jax.tree.leaves(recipes.slim_decay_mask(params)))
    recipes.slim_decay_mask(params, depthwise='^1$')
    recipes.slim_decay_mask({'0': params['0'], '2': params['2']})


def test_a_wide_bias_does_not_decay_in_timm():
    params = {'bias': jnp.ones((2, 2)), 'value': jnp.ones((2, 2)), 'scalar': jnp.ones(())}
    assert recipes.timm_decay_mask(params) == {'bias': False, 'value': True, 'scalar': False}


def test_masks_keep_empty_parts():
    assert recipes.timm_decay_mask({'a': None, 'b': ()}) == {'a': None, 'b': ()}
    assert recipes.describe_mask({}, recipes.timm_decay_mask) == ''
    assert recipes.tensorflow_decay_mask(jnp.ones(2)) is True


def test_describe_mask_takes_what_an_optimizer_takes():
    params = {'a': {'w': jnp.ones((2, 3)), 'b': jnp.ones(3)}, 'c': jnp.ones(())}
    assert recipes.describe_mask(params, {'a': True, 'c': False}).splitlines() == [
        'a/b  (3,)    decayed',
        'a/w  (2, 3)  decayed',
        'c    ()      not decayed',
    ]
    assert decayed(params, None) == {'a/w', 'a/b', 'c'}
    with pytest.raises(TypeError, match=r"mask\['a'\] must be True or False, got 1"):
        recipes.describe_mask(params, {'a': 1, 'c': False})


@pytest.mark.extended
@pytest.mark.parametrize('name', ['efficientnet', 'mobilenet_v2', 'efficientnet_timm'])
@pytest.mark.parametrize('make', [linen_params, nnx_params])
def test_only_the_masked_parameters_decay(name: str, make: Callable[[], Any]):
    params = jax.tree.map(lambda x: jnp.ones(x.shape), make())
    mask = {
        'efficientnet': recipes.tensorflow_decay_mask,
        'mobilenet_v2': recipes.slim_decay_mask,
        'efficientnet_timm': recipes.timm_decay_mask,
    }[name]
    tx = build(name)
    zeros = jax.tree.map(jnp.zeros_like, params)
    # The first step of a warm-up from zero has no rate.
    _, state = tx.update(zeros, tx.init(params), params)
    updates, _ = tx.update(zeros, state, params)
    moves = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    assert moves == mask(params)


# --- Averages ------------------------------------------------------------------------------------


@pytest.mark.parametrize('decay', [0.9999, 0.995, 0.5, 0.0])
@pytest.mark.parametrize('counted', [False, True])
def test_average(decay: float, counted: bool):
    values = np.random.default_rng(7).normal(size=(40, 5))
    shadow = values[0].copy()
    for n in range(1, 40):
        d = min(decay, (1 + n) / (10 + n)) if counted else decay
        shadow = d * shadow + (1 - d) * values[n]

    def step(average: Any, inputs: Any) -> tuple[Any, None]:
        value, count = inputs
        return recipes.ema_update(average, value, count if counted else None, decay), None

    with jax.enable_x64(True):
        inputs = jnp.asarray(values[1:]), jnp.arange(1, 40)
        got, _ = jax.jit(lambda a, xs: jax.lax.scan(step, a, xs))(jnp.asarray(values[0]), inputs)
    np.testing.assert_allclose(got, shadow, rtol=1e-12, atol=1e-15)
    start = recipes.ema_init(jnp.asarray(values[0], jnp.float32))
    narrow, _ = jax.lax.scan(step, start, (jnp.asarray(values[1:], jnp.float32), jnp.arange(1, 40)))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, shadow, rtol=1e-5, atol=1e-6)


# Of golden/record_averages.py: weights are sin(n) and buffers cos(n) after update n, decay is 0.9.
AVERAGES = {
    framework: json.loads((GOLDEN / f'averages_{framework}.json').read_text())
    for framework in ('torch', 'tensorflow')
}
LATE = 20
FORMS: dict[tuple[str, str], dict[str, Any]] = {
    ('torch', 'ModelEma'): {'counted': False},
    ('torch', 'ModelEmaV2'): {'counted': False},
    ('torch', 'ModelEmaV3'): {'counted': False},
    ('torch', 'ModelEmaV3 step'): {'copies': 1},
    ('torch', 'ModelEmaV3 step late'): {'copies': 1 + LATE},
    ('torch', 'ModelEmaV3 step warmup'): {'copies': 1, 'warmup_power': 2 / 3},
    ('torch', 'ModelEmaV3 step warmup late'): {'copies': 1 + LATE, 'warmup_power': 0.75},
    ('torch', 'AveragedModel'): {'copies': 1},
    ('torch', 'AveragedModel without buffers'): {'copies': 1},
    ('torch', 'torchvision'): {'copies': LATE + 1},
    ('tensorflow', 'num_updates'): {},
    ('tensorflow', 'plain'): {'counted': False},
}


@pytest.mark.parametrize(('framework', 'form'), FORMS)
def test_averages_of_the_sources(framework: str, form: str):
    """TensorFlow holds the decay in float32."""
    options = dict(FORMS[framework, form])
    counted = options.pop('counted', True)
    recorded = AVERAGES[framework][form]
    with jax.enable_x64(True):
        n = jnp.arange(101.0)
        values = {'weight': jnp.sin(n), 'buffer': jnp.cos(n)}

        def step(average: Any, inputs: Any) -> tuple[Any, Any]:
            count, now = inputs
            new = recipes.ema_update(average, now, count if counted else None, 0.9, **options)
            return new, new['weight']

        start = recipes.ema_init(jax.tree.map(lambda x: x[0], values))
        rest = jnp.arange(1, 101), jax.tree.map(lambda x: x[1:], values)
        last, weights = jax.jit(lambda a, xs: jax.lax.scan(step, a, xs))(start, rest)
    rtol, atol = (1e-6, 1e-7) if framework == 'tensorflow' else (1e-12, 1e-14)
    np.testing.assert_allclose(weights, recorded['weight'], rtol, atol)
    buffer = values['buffer'][-1] if form == 'AveragedModel without buffers' else last['buffer']
    np.testing.assert_allclose(buffer, recorded['buffer'], rtol, atol)


def test_every_recorded_average_has_its_form():
    made = {(f, form) for f, forms in AVERAGES.items() for form in forms if form != 'versions'}
    assert made == FORMS.keys()


def test_a_copy_is_exact():
    average = {'a': jnp.float32(1e8), 'b': jnp.float32(jnp.inf)}
    values = {'a': jnp.float32(0.1), 'b': jnp.float32(0.2)}
    assert recipes.ema_update(average, values, 3, 0.9999, copies=3) == values


def test_average_of_narrow_integer_and_complex_leaves():
    values = {
        'half': jnp.ones(3, jnp.bfloat16),
        'count': jnp.arange(3),
        'flag': jnp.array([True]),
        'key': jax.random.key(0),
        'complex': jnp.ones(2, jnp.complex64),
        'none': None,
    }
    zero = {**values, 'half': jnp.zeros(3, jnp.bfloat16), 'complex': jnp.zeros(2, jnp.complex64)}
    zero['count'] = jnp.zeros(3, int)
    average = recipes.ema_init(zero)
    for _ in range(100):
        # In bfloat16 the average would stall at once: 1e-3 of the way is below its last digit.
        average = jax.jit(recipes.ema_update)(average, values, None, 0.999)
    reached = 1 - 0.999**100
    assert average['half'].dtype == jnp.float32
    np.testing.assert_allclose(average['half'], reached, rtol=1e-4)
    np.testing.assert_allclose(average['complex'], reached * np.ones(2), rtol=1e-4)
    np.testing.assert_array_equal(average['count'], [0, 1, 2])
    assert average['flag'].dtype == bool
    assert average['key'] == values['key']


@pytest.mark.extended
def test_average_includes_batch_statistics():
    variables = jax.tree.map(lambda x: jnp.ones(x.shape), linen_shapes())
    assert set(variables) == {'params', 'batch_stats'}
    after = jax.tree.map(lambda x: x + 1.0, variables)
    average = recipes.ema_update(recipes.ema_init(variables), after, 8, decay=0.9999)
    jax.tree.map(lambda a, v: np.testing.assert_allclose(a, v + 0.5, rtol=1e-6), average, variables)
    state = nnx.state(NnxNet())
    moved = recipes.ema_update(
        recipes.ema_init(state), jax.tree.map(lambda x: x + 1, state), None, 0.75
    )
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    np.testing.assert_allclose(moved['bn1']['mean'][...], 0.25)


def test_average_starts_as_a_copy_and_may_be_given_narrow():
    value = jnp.ones(3)
    assert recipes.ema_init(value).unsafe_buffer_pointer() != value.unsafe_buffer_pointer()
    narrow = recipes.ema_update(jnp.zeros(2, jnp.float16), jnp.ones(2, jnp.float16), None, 0.5)
    assert narrow.dtype == jnp.float32


@pytest.mark.parametrize('decay', [0.9, jnp.float32(0.9), np.float64(0.9)])
def test_average_under_strict_promotion(decay: Any):
    with jax.numpy_dtype_promotion('strict'):
        for count in (None, 100, jnp.int32(100)):
            got = recipes.ema_update(jnp.zeros(2), jnp.ones(2), count, decay)
            np.testing.assert_allclose(got, 0.1, rtol=1e-6)
        for copies in (1, jnp.int32(1)):
            late: dict[str, Any] = {'copies': copies, 'warmup_power': 1}
            got = recipes.ema_update(jnp.zeros(2), jnp.ones(2), jnp.int32(100), decay, **late)
            np.testing.assert_allclose(got, 0.1, rtol=1e-6)


def test_average_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"values\['a'\] has shape \(3,\), but its average \(\)"):
        recipes.ema_update({'a': jnp.ones(())}, {'a': jnp.ones(3)}, None, 0.9)
    with pytest.raises(ValueError, match=r'decay must be in \[0, 1\], got 1\.5'):
        recipes.ema_update(jnp.ones(()), jnp.ones(()), None, 1.5)
    with pytest.raises(ValueError, match=r'count must be in \[0, inf\), got -1'):
        recipes.ema_update(jnp.ones(()), jnp.ones(()), -1, 0.9)
    with pytest.raises(ValueError, match='copies needs count'):
        recipes.ema_update(jnp.ones(()), jnp.ones(()), None, 0.9, copies=1)
    with pytest.raises(ValueError, match='warmup_power needs copies'):
        recipes.ema_update(jnp.ones(()), jnp.ones(()), 1, 0.9, warmup_power=2 / 3)
    with pytest.raises(TypeError, match='decay cannot be a schedule'):
        recipes.ema_update(jnp.ones(()), jnp.ones(()), None, lambda count: 0.9)  # pyright: ignore[reportArgumentType]


# --- What is refused, and what every optimizer must do -------------------------------------------


def required_arguments() -> list[tuple[str, str]]:
    return [
        (name, p.name)
        for name in NAMES
        for p in inspect.signature(getattr(recipes, name)).parameters.values()
        if p.default is inspect.Parameter.empty
    ]


def test_arguments_of_schedules_are_required():
    required = set(required_arguments())
    assert {('efficientnet', 'steps_per_epoch'), ('efficientnet', 'batch_size')} <= required
    assert {('a3c', 'max_norm'), ('impala_dmlab', 'frames_per_update')} <= required
    assert {('efficientnet_timm', 'warmup_epochs'), ('wgan', 'network')} <= required


@pytest.mark.parametrize(('name', 'missing'), required_arguments())
def test_missing_arguments(name: str, missing: str):
    given = {key: value for key, value in ARGUMENTS[name].items() if key != missing}
    with pytest.raises(TypeError, match=missing):
        getattr(recipes, name)(**given)


@pytest.mark.parametrize(
    ('name', 'changes', 'error', 'message'),
    [
        ('efficientnet', {'steps_per_epoch': 0}, ValueError, 'steps_per_epoch must be positive'),
        ('efficientnet', {'batch_size': -1}, ValueError, 'batch_size must be positive'),
        ('efficientnet', {'batch_size': math.inf}, ValueError, 'batch_size must be .* finite'),
        ('efficientnet', {'batch_size': math.nan}, ValueError, 'batch_size must be .* finite'),
        ('efficientnet', {'batch_size': jnp.ones(())}, TypeError, 'batch_size must be a Python'),
        ('efficientnet', {'batch_size': '8'}, TypeError, "batch_size must be a Python .*'8'"),
        ('inception_v3', {'steps_per_epoch': 0.2}, ValueError, 'steps_per_epoch must be at least'),
        ('mobilenet_v2', {'steps_per_epoch': True}, TypeError, 'steps_per_epoch must be a Python'),
        ('efficientnet_timm', {'steps_per_epoch': 2.5}, ValueError, 'steps_per_epoch must be an'),
        ('efficientnet_timm', {'warmup_epochs': -1}, ValueError, 'warmup_epochs must be an'),
        ('impala_dmlab', {'total_frames': 5}, ValueError, 'total_frames must be at least frames_'),
        ('impala_atari', {'mean_over': 0}, ValueError, 'mean_over must be an integer'),
        ('impala_torchbeast', {'mean_over': 0}, ValueError, 'mean_over must be an integer'),
        (
            'impala_torchbeast',
            {'total_steps': 5},
            ValueError,
            'total_steps must be at least steps_',
        ),
        ('dqn_nature', {'mean_over': 0.5}, ValueError, 'mean_over must be an integer'),
        ('baselines_a2c', {'batch_size': 1000}, ValueError, 'total_timesteps must be at least bat'),
        ('a3c', {'max_norm': -1.0}, ValueError, 'max_norm must be in'),
        ('wgan', {'network': 'discriminator'}, ValueError, "'critic' or 'generator', got 'discr"),
    ],
)
def test_bad_values_are_named(name: str, changes: Tree, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        build(name, **changes)


@pytest.mark.extended
@pytest.mark.parametrize('name', NAMES)
def test_narrow_parameters_keep_their_dtype_and_wide_state(name: str):
    tx = build(name)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_tree(8))
    update, start = jax.jit(tx.update), tx.init(params)
    _, state = update(params, start, params)
    updates, state = update(params, state, params)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, start)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    moments = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(moments) == {jnp.dtype(jnp.float32)}


@pytest.mark.extended
@pytest.mark.parametrize('name', NAMES)
def test_strict_promotion(name: str):
    with jax.numpy_dtype_promotion('strict'):
        tx = build(name)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_tree(8))
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
