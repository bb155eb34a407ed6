"""The public names of the package and their signatures, and how a change of them is recorded.

    python tests/public_api.py

writes them to public_api.txt and prints a line with their fingerprint. The first line of that kind
in CHANGELOG.md must be this one: put it under [Unreleased], in the place of the one that is there,
and say beside it what has changed, by its full name. test_public_api.py fails until both are done,
so that no name or signature changes without an edit of the changelog. At a release the line stays
with its section; the next change adds one to the new [Unreleased].
"""

import ast
import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rmsprop_jax

RECORD = Path(__file__).with_name('public_api.txt')

# Commands, and what draws their figures: they may change at any time.
COMMANDS = {'demo', 'plots'}


def modules() -> list[str]:
    """Every module that a user may import from, the package first."""
    found = pkgutil.walk_packages(rmsprop_jax.__path__, 'rmsprop_jax.')
    public = [m.name for m in found if not {p[0] for p in m.name.split('.')} & {'_'}]
    return ['rmsprop_jax', *(name for name in public if name.split('.')[1] not in COMMANDS)]


def public_names(module: Any) -> list[str]:
    """What a module defines without an underscore, and what it imports from its own parts.

    What it imports only when it is asked for stands under `if TYPE_CHECKING`.
    """
    names, body = [], ast.parse(inspect.getsource(module)).body
    later = [node for block in body if isinstance(block, ast.If) for node in block.body]
    for node in body + later:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            is_part = f'{node.module}.'.startswith(f'{module.__name__}.')
            names += [alias.name for alias in node.names if is_part]
    return sorted(name for name in names if not name.startswith('_'))


def objects() -> Iterator[tuple[str, Any]]:
    """Every public object under its full name; a module that is one too is not repeated."""
    for path in modules():
        module = importlib.import_module(path)
        for name in public_names(module):
            thing = getattr(module, name)
            if not inspect.ismodule(thing):
                yield f'{path}.{name}', thing


def functions() -> dict[str, Any]:
    """The public functions and methods by full name."""
    found = {}
    for name, thing in objects():
        if inspect.isfunction(thing):
            found[name] = thing
        elif inspect.isclass(thing):
            found |= {f'{name}.{method}': value for method, value in _methods(thing)}
    return found


def listing() -> list[str]:
    """One line for each public function, class, method and constant."""
    lines = []
    for name, thing in objects():
        lines.append(name + (_signature(thing) if callable(thing) else ''))
        if inspect.isclass(thing):
            lines += [f'{name}.{method}{_signature(value)}' for method, value in _methods(thing)]
    return sorted(lines)


def fingerprint(lines: Sequence[str]) -> str:
    """The line for CHANGELOG.md."""
    digest = hashlib.sha256('\n'.join(lines).encode()).hexdigest()
    return f'Public API: `sha256:{digest[:16]}`'


def _methods(thing: type) -> list[tuple[str, Any]]:
    """The public methods that a class is the first of its family to have."""
    inherited = {name for base in thing.__mro__[1:] for name in vars(base)}
    own = {name: x for name, x in vars(thing).items() if inspect.isfunction(x)}
    return sorted((n, x) for n, x in own.items() if n not in inherited and not n.startswith('_'))


def _signature(thing: Any) -> str:
    """Without annotations, whose text depends on the version of Python."""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return ''
    parameters = [
        p.replace(annotation=p.empty, default=_default(p.default))
        for p in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


class _Text(str):
    def __repr__(self) -> str:
        return str(self)


def _default(value: Any) -> Any:
    """Functions have an address in their text, which is another one in every process."""
    return _Text(value.__name__) if callable(value) and value is not inspect._empty else value


if __name__ == '__main__':
    RECORD.write_text('\n'.join([*listing(), '']))
    print(fingerprint(listing()))
