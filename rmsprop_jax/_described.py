"""Gradient transformations that print as the call that made them."""

import functools
import inspect
import reprlib
from collections.abc import Callable
from typing import Any, ParamSpec

import optax

P = ParamSpec('P')

_SHORT = reprlib.Repr()
_SHORT.maxother = 80


class Described(optax.GradientTransformationExtraArgs):
    """A transformation whose `repr` is the call that made it; otherwise it is Optax's class.

    Attributes:
      call: The factory with its arguments, or None if `optax` or `jax.tree` rebuilt the tuple.
    """

    call: functools.partial[Any] | None = None

    def __repr__(self) -> str:
        """The call, with defaults; arguments that are None by default are left out."""
        if self.call is None:
            return super().__repr__()
        factory = self.call.func
        parameters = inspect.signature(factory).parameters
        given = inspect.signature(factory).bind(*self.call.args, **self.call.keywords)
        given.apply_defaults()
        shown = [
            f'{name}={_SHORT.repr(value)}'
            for name, value in given.arguments.items()
            if value is not None or parameters[name].default is not None
        ]
        names = [*factory.__module__.split('.'), factory.__name__]
        public = '.'.join(name for name in names if not name.startswith('_'))
        return f'{public}({", ".join(shown)})'


def described(
    factory: Callable[P, optax.GradientTransformationExtraArgs],
) -> Callable[P, optax.GradientTransformationExtraArgs]:
    """Makes the transformations of `factory` print as the call that made them.

    Arguments are looked at when the transformation is printed, so that arrays are not read before.
    """

    @functools.wraps(factory)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        made = Described(*factory(*args, **kwargs))
        made.call = functools.partial(factory, *args, **kwargs)
        return made

    return wrapped
