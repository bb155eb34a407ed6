"""What a reader has to carry: `python -m benchmarks.weight`.

Prints how many Python calls, functions and files one leaf of `rmsprop(1e-3, momentum=0.9)` passes
while it is traced, beside Optax's; the lines of code of each module, without docstrings, comments
and blank lines; and the longest functions.
"""

import ast
import collections
import io
import os
import pathlib
import sys
import tokenize
import types
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import optax

import rmsprop_jax

PACKAGE = pathlib.Path(rmsprop_jax.__file__).parent


def calls(function: Callable[[], Any], package: pathlib.Path) -> collections.Counter[Any]:
    """How often each function of a package is called: by its file and its name."""
    found: collections.Counter[Any] = collections.Counter()

    def look(frame: types.FrameType, event: str, argument: object) -> None:
        del argument
        code = frame.f_code
        # Python 3.12 no longer makes a call of a comprehension.
        is_named = code.co_name == '<lambda>' or not code.co_name.startswith('<')
        if event == 'call' and is_named and pathlib.Path(code.co_filename).is_relative_to(package):
            found[code.co_filename, code.co_qualname] += 1

    sys.setprofile(look)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def traced(tx: optax.GradientTransformation) -> Callable[[], Any]:
    """One update of one leaf, traced."""
    leaf = jnp.ones((64, 64))
    state = tx.init(leaf)
    return lambda: jax.make_jaxpr(tx.update)(leaf, state, leaf)


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in {*skipped, tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Each function with the lines of code that are its own, not those of functions within it."""
    lines = code_lines(source)

    def own(node: ast.AST) -> set[int]:
        first, last = node.lineno, node.end_lineno  # pyright: ignore[reportAttributeAccessIssue]
        return lines & set(range(first, last + 1))

    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds):
            within = [x for x in ast.walk(node) if isinstance(x, kinds) and x is not node]
            yield node.name, len(own(node) - set[int]().union(*map(own, within)))


def main() -> None:
    print('One leaf of rmsprop(1e-3, momentum=0.9), traced\n\n| | calls | functions | files |')
    print('|---|---|---|---|')
    ours = traced(rmsprop_jax.rmsprop(1e-3, momentum=0.9))
    theirs = traced(optax.rmsprop(1e-3, momentum=0.9))
    for name, function, module in (('rmsprop_jax', ours, rmsprop_jax), ('optax', theirs, optax)):
        found = calls(function, pathlib.Path(module.__file__).parent)
        files = {file for file, _ in found}
        print(f'| {name} | {found.total()} | {len(found)} | {len(files)} |')

    sources = {path.relative_to(PACKAGE): path.read_text() for path in PACKAGE.rglob('*.py')}
    sizes: collections.Counter[str] = collections.Counter()
    longest: list[tuple[int, str]] = []
    for path, source in sources.items():
        sizes[path.parts[0].removesuffix('.py')] += len(code_lines(source))
        longest += [(size, f'{path}: {name}') for name, size in functions(source)]
    print(f'\nLines of code: {sizes.total()}\n\n| module | lines |\n|---|---|')
    for name, size in sizes.most_common():
        print(f'| {name} | {size} |')
    print('\nThe longest functions\n\n| function | lines |\n|---|---|')
    for size, name in sorted(longest, reverse=True)[:10]:
        print(f'| {name} | {size} |')


if __name__ == '__main__':
    main()
