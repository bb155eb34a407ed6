"""Facts about each framework's RMSProp: a record for each dialect, and a table of them all.

Importing a framework's module registers its record. Tables and messages follow the order in which
the package imports these modules.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rmsprop_jax._optimizer import rmsprop
from rmsprop_jax.dialects._shared import Optimizer, P, checked

Epsilon = Literal['inside the root', 'outside the root']
Start = Literal['zero', 'one']
Momentum = Literal['none', 'heavy ball', 'Nesterov']
RatePlace = Literal['before momentum', 'after momentum', 'no momentum']
WeightDecay = Literal['none', 'coupled', 'decoupled']
YesNo = Literal['no', 'yes']

# The frameworks' names for the numbers in the table.
_DECAY, _EPSILON = ('alpha', 'rho', 'decay', 'gamma1'), ('eps', 'epsilon')
_RATE = ('lr', 'learning_rate')


@dataclasses.dataclass(frozen=True)
class Rule:
    """The update rule of a framework: to each question, the answers that its options allow.

    The first answer is the default. `identify_dialect` asks the same questions about a recorded
    run.

    Attributes:
      epsilon: Where epsilon is added; empty if there is none.
      start: The second moment before the first step.
      bias_correction: Whether averages are divided by the sum of their weights.
      centered: Whether the variance replaces the second moment.
      momentum: The kinds of momentum.
      learning_rate: Whether the rate multiplies the input of the momentum buffer or its output.
      weight_decay: The kinds of weight decay.
      when: The options that lead to this rule, in the table's words; empty if all do.
    """

    epsilon: tuple[Epsilon, ...] = ('inside the root',)
    start: tuple[Start, ...] = ('zero',)
    bias_correction: tuple[YesNo, ...] = ('no',)
    centered: tuple[YesNo, ...] = ('no', 'yes')
    momentum: tuple[Momentum, ...] = ('none', 'heavy ball')
    learning_rate: tuple[RatePlace, ...] = ('before momentum',)
    weight_decay: tuple[WeightDecay, ...] = ('none',)
    when: str = ''

    def allows(self, answers: Mapping[str, str]) -> bool:
        """Whether some options give these answers. The keys are the field names above."""
        return all(
            answer in (*getattr(self, question), *_WITHOUT.get(question, ()))
            for question, answer in answers.items()
        )


# The answers without momentum and without weight decay. Every rule allows them: set the number to
# zero.
_WITHOUT = {'learning_rate': ('no momentum',), 'weight_decay': ('none',)}


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The facts about one function of `rmsprop_jax.dialects`, and the decorator that registers it.

    The function's signature has the names, order and defaults of the arguments. The end of its
    docstring has the files and versions that were read.

    Attributes:
      rules: The update rule, or several if an option chooses between them.
      title: The framework, if the function's name does not say it.
      refused: The framework's arguments that the function does not take, with what to do instead.
      twin: A dialect with the same rule, which differs only in how it averages the parameters.
      recorded: Whether the framework itself was run and recorded. If not, its source was read.
      function: The function; None for `rmsprop_jax.rmsprop`, which is not a dialect.
    """

    rules: tuple[Rule, ...]
    title: str = ''
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    twin: str = ''
    recorded: bool = True
    function: Callable[..., Any] | None = None

    def __call__(self, function: Callable[P, Optimizer]) -> Callable[P, Optimizer]:
        """Registers `function` as this dialect, and checks its arguments."""
        made = checked(function, self.refused)
        RECORDS[function.__name__] = dataclasses.replace(self, function=made)
        return made


RECORDS: dict[str, Dialect] = {}


def functions() -> dict[str, Callable[..., Any]]:
    """The dialects by name."""
    return {name: d.function for name, d in RECORDS.items() if d.function is not None}


def differences() -> str:
    """The differences between the dialects, as a Markdown table.

    Example:
      >>> from rmsprop_jax import dialects
      >>> print(dialects.differences().splitlines()[2])
      | `torch` | outside | 0 | after momentum | coupled | 0.99 | 1e-8 | 0.01 |
    """
    header = ('function', 'epsilon', 'starts at', 'learning rate', 'weight decay')
    rows = [
        _row(name, dialect, rule) for name, dialect in RECORDS.items() for rule in dialect.rules
    ]
    return as_markdown((*header, 'decay', 'eps', 'rate'), rows)


def _row(name: str, dialect: Dialect, rule: Rule) -> tuple[str, ...]:
    parameters = inspect.signature(dialect.function or rmsprop).parameters

    def default(names: tuple[str, ...]) -> str:
        found = next((parameters[n].default for n in names if n in parameters), inspect._empty)
        return '' if found is inspect._empty else f'{found:g}'.replace('e-0', 'e-')

    title = f'`{name}` ({dialect.title})' if dialect.title else f'`{name}`'
    moves = rule.momentum != ('none',)
    return (
        f'{title}, {rule.when}' if rule.when else title,
        rule.epsilon[0].partition(' ')[0] if rule.epsilon else 'none',
        {'zero': '0', 'one': '1'}[rule.start[0]],
        rule.learning_rate[0] if moves else 'no momentum',
        rule.weight_decay[0],
        *map(default, (_DECAY, _EPSILON, _RATE)),
    )


def as_markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ('---',) * len(header), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
