"""Configurations of `rmsprop` that are different programs, as opposed to its numbers.

A program takes a second to compile, and numbers are its arguments. So laws are tried on these few
forms, in which every two values of two options meet, and on any numbers.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import rmsprop_jax
from rmsprop_jax import storage

Numbers = Mapping[str, Any]
OPTIONS: dict[str, tuple[Any, ...]] = {
    'centered': (False, True),
    'corrected': (False, True),
    'eps_in_sqrt': (False, True),
    'velocity': ('none', 'momentum', 'nesterov'),
    'given': ('arrays', 'floats', 'schedules'),
    'dtype': ('float32', 'bfloat16', 'float16', 'complex64'),
    'kept': ('float32', 'bfloat16', 'uint8', 'factored'),
}
SHAPES = ((), (1,), (4,), (2, 3), (3, 2), (1, 4), (2, 1, 2), (0, 3))


class Form(NamedTuple):
    """What decides the program.

    Attributes:
      given: How hyperparameters come: as arrays, as Python numbers (`constants`), or as schedules,
        which halve each of them at the first step: that is exact.
      kept: The format of the second moment or the variance. A mean and a velocity are then kept in
        bfloat16, which no complex ones can, and a variance is where means are `factored`.
      shapes: Of the leaves.
      steps: How many are taken.
    """

    centered: bool = False
    corrected: bool = False
    eps_in_sqrt: bool = True
    velocity: str = 'none'
    given: str = 'arrays'
    dtype: str = 'float32'
    kept: str = 'float32'
    shapes: tuple[tuple[int, ...], ...] = ((8,),)
    steps: int = 4
    constants: tuple[tuple[str, float], ...] = ()

    def build(self, numbers: Numbers) -> optax.GradientTransformationExtraArgs:
        given = self._given(numbers)

        def number(name: str) -> Any:
            value = given[name]
            if self.given != 'schedules':
                return value
            return lambda count: value * jnp.where(count == 0, 0.5, 1.0)

        return rmsprop_jax.rmsprop(
            number('rate'),
            number('decay'),
            number('eps'),
            given['start'],
            self.eps_in_sqrt,
            self.centered,
            None if self.velocity == 'none' else number('momentum'),
            self.velocity == 'nesterov',
            self.corrected,
            storage=self.storage,
        )

    def at(self, numbers: Numbers, count: int) -> dict[str, float]:
        """The hyperparameters of a step."""
        factor = 0.5 if self.given == 'schedules' and count == 0 else 1.0
        return {name: factor * float(value) for name, value in self._given(numbers).items()}

    def _given(self, numbers: Numbers) -> Numbers:
        return dict(self.constants) if self.given == 'floats' else numbers

    @property
    def formats(self) -> dict[str, str]:
        """How each statistic is kept: the large leaves, where means are factored."""
        narrow = 'float32' if self.kept == 'float32' else 'bfloat16'
        signed = 'float32' if self.is_complex else narrow
        return {
            'nu': self.kept,
            'var': narrow if self.kept == 'factored' else self.kept,
            'mu': signed,
            'trace': signed,
        }

    @property
    def storage(self) -> storage.Storage | None:
        if self.kept == 'float32':
            return None

        def choice(name: str) -> Any:
            size = 1 if name == 'factored' else 0
            return storage.large_leaves(getattr(storage, name)(), size, 2 * size)

        return storage.per_statistic(**{name: choice(kept) for name, kept in self.formats.items()})

    @property
    def is_complex(self) -> bool:
        return self.dtype == 'complex64'

    @property
    def entries(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def split(self, x: np.ndarray) -> list[np.ndarray]:
        """An array with a last axis of `entries` as one array for each leaf."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
        parts = np.split(x, ends, axis=-1)
        return [
            part.reshape((*x.shape[:-1], *shape))
            for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def tree(self, x: np.ndarray) -> Any:
        """An array with a last axis of `entries` as a tree like the parameters, of their dtype."""
        return self.arranged(self.split(np.asarray(x).astype(jnp.dtype(self.dtype))))

    def arranged(self, leaves: Sequence[Any]) -> Any:
        """Something for each leaf as a tree like the parameters."""
        first, *others = leaves
        return {'b': first, 'a': (others, {'c': []})} if others else first

    def flat(self, tree: Any, axes: int = 0) -> np.ndarray:
        """The inverse of `tree`, in double precision; `axes` come before those of the leaves."""
        wide = [
            np.asarray(x).astype(complex if jnp.iscomplexobj(x) else float) for x in _in_order(tree)
        ]
        return np.concatenate([x.reshape(*x.shape[:axes], -1) for x in wide], axis=-1)

    def statistics(self, state: Any, decoded: Any, axes: int = 0) -> dict[str, np.ndarray]:
        """What a state holds, which `storage.read` has decoded: flat arrays by name."""
        rms = decoded[0]
        found = {
            name: self.flat(getattr(rms, name), axes)
            for name in (('mu', 'var') if self.centered else ('nu',))
        }
        if self.velocity != 'none':
            found['trace'] = self.flat(decoded[2].trace, axes)
        for name in ('weight', 'unit'):
            if getattr(state[0], name) is not None:
                found[name] = np.asarray(getattr(state[0], name), float)
        return found


def _in_order(tree: Any) -> list[Any]:
    return [tree['b'], *tree['a'][0]] if isinstance(tree, dict) else [tree]


def covering(options: Mapping[str, Sequence[Any]], seed: int) -> list[dict[str, Any]]:
    """Choices of a value for each option such that every pair of values of two options occurs."""
    rng = np.random.default_rng(seed)
    names = list(options)

    def pairs(choice: Mapping[str, Any]) -> set[Any]:
        return set(itertools.combinations(((name, choice[name]) for name in names), 2))

    def drawn() -> dict[str, Any]:
        return {name: values[rng.integers(len(values))] for name, values in options.items()}

    missing = {
        pair
        for one, other in itertools.combinations(names, 2)
        for pair in itertools.product(
            ((one, x) for x in options[one]), ((other, y) for y in options[other])
        )
    }
    chosen = []
    while missing:
        best = max((drawn() for _ in range(200)), key=lambda choice: len(missing & pairs(choice)))
        if missing & pairs(best):
            chosen.append(best)
            missing -= pairs(best)
    return chosen


def forms(
    seed: int, complete: Callable[[np.random.Generator], dict[str, Any]], **options: Any
) -> tuple[Form, ...]:
    """Forms of a covering of the options, some of which may have fewer values, with the shapes and
    steps that `complete` draws for each."""
    rng = np.random.default_rng(seed)

    def one(choice: dict[str, Any]) -> Form:
        constants = {
            'rate': float(rng.uniform(0.01, 2)),
            'decay': float(rng.choice([0.0, 0.5, 0.9, 0.99])),
            'eps': float(rng.choice([0.0, 1e-8, 1e-3])),
            'start': float(rng.choice([0.0, 1.0])),
            'momentum': float(rng.choice([0.0, 0.5, 0.9])),
        }
        return Form(**choice, **complete(rng), constants=tuple(constants.items()))

    return tuple(one(choice) for choice in covering(OPTIONS | options, seed))


def any_shapes(rng: np.random.Generator) -> dict[str, Any]:
    """One to three leaves, at least one of which is a matrix or more, and two to four steps."""
    number = int(rng.integers(0, 3))
    others = [SHAPES[i] for i in rng.integers(0, len(SHAPES), number)]
    shapes = [SHAPES[int(rng.integers(3, 7))], *others]
    order = rng.permutation(len(shapes))
    return {'shapes': tuple(shapes[i] for i in order), 'steps': int(rng.integers(2, 5))}


FORMS = forms(1, any_shapes)
