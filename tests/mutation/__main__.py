"""Breaks the mathematics, mutant by mutant, and reports which of them no test notices.

    python -m mutation [--table FILE] [NAME...]

It is run in tests/, and takes names of MUTANTS. Each mutant is a copy of the package that a child
process imports; what all of them import, such as JAX, is imported once before. A mutant counts as
noticed only if a test fails: the same tests must pass on the unbroken package, which is seen to
first.
"""

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mutation.mutants import MUTANTS, SELECTIONS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / 'rmsprop_jax'
PASSED, FAILED = 0, 1
# Nothing here may start a backend, which does not survive a fork.
SHARED = ('chex', 'jax', 'jax.numpy', 'numpy', 'optax', 'pytest', '_pytest.doctest')


def run(copy: Path, tests: Sequence[str], log: Path) -> int:
    """pytest's verdict on the package in `copy`, from a child of this process."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        with log.open('wb') as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = _in_child(copy, tests)
    finally:
        os._exit(code)


def _in_child(copy: Path, tests: Sequence[str]) -> int:
    os.chdir(ROOT)
    sys.path.insert(0, str(copy))
    found = importlib.import_module('rmsprop_jax')
    assert Path(found.__file__ or '').is_relative_to(copy), found.__file__
    options = ['-x', '-q', '-p', 'no:cacheprovider', '-n', '0', '-o', f'pythonpath={copy}']
    code = int(sys.modules['pytest'].main([*options, *tests]))
    sys.stdout.flush()
    return code


def mutated(copy: Path, name: str, old: str, new: str) -> None:
    """Puts the package into `copy`, with one line of one file replaced."""
    shutil.copytree(PACKAGE, copy / 'rmsprop_jax', ignore=shutil.ignore_patterns('__pycache__'))
    path = copy / 'rmsprop_jax' / f'{name}.py'
    source = path.read_text()
    assert source.count(old) >= 1, f'{name} has changed, and {old!r} is no more in it'
    path.write_text(source.replace(old, new))


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m mutation')
    parser.add_argument('names', nargs='*', help='of modules, as in MUTANTS; all by default')
    parser.add_argument('--every', type=int, default=1, help='only each N-th mutant')
    parser.add_argument('--table', type=Path, help='where to write the result as Markdown')
    parser.add_argument('--logs', type=Path, help="where to keep pytest's output")
    options = parser.parse_args()
    chosen = [(name, *mutant) for name in options.names or MUTANTS for mutant in MUTANTS[name]][
        :: options.every
    ]
    for module in SHARED:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        logs = options.logs or Path(folder)
        logs.mkdir(exist_ok=True)
        wanted = {test for *_, names in chosen for n in names for test in SELECTIONS[n]}
        start = time.time()
        code = run(ROOT, sorted(wanted), logs / 'unbroken')
        print(f'unbroken: {time.time() - start:.0f} s', flush=True)
        if code != PASSED:
            print((logs / 'unbroken').read_text())
            return 1
        rows = []
        for number, (name, old, new, names) in enumerate(chosen):
            copy = Path(folder) / f'{number}'
            mutated(copy, name, old, new)
            start = time.time()
            tests = [test for n in names for test in SELECTIONS[n]]
            code = run(copy, tests, logs / f'{number:03}')
            shutil.rmtree(copy)
            verdict = {FAILED: 'noticed', PASSED: 'SURVIVED'}.get(code, f'BROKEN ({code})')
            rows.append((name, old, new, ', '.join(names), verdict))
            print(
                f'{number:3} {verdict:9} {time.time() - start:4.0f} s  {name}: {new!r}', flush=True
            )
    survivors = [row for row in rows if row[-1] != 'noticed']
    print(f'{len(rows) - len(survivors)} of {len(rows)} noticed')
    if options.table:
        options.table.write_text(table(rows))
    return bool(survivors)


def table(rows: Sequence[Sequence[str]]) -> str:
    """The result as Markdown, in one line for each mutant."""

    def cell(text: str) -> str:
        return ' '.join(text.split()).replace('|', '\\|')

    lines = ['| file | was | became | tests | verdict |', '|---|---|---|---|---|']
    lines += [
        f'| {name} | `{cell(old)}` | `{cell(new)}` | {tests} | {verdict} |'
        for name, old, new, tests, verdict in rows
    ]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    sys.exit(main())
