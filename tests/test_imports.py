"""Imports point one way, and importing the package costs and starts nothing."""

import ast
import pathlib
import subprocess
import sys

import rmsprop_jax

PACKAGE = pathlib.Path(rmsprop_jax.__file__).parent
# Each module of the trunk may import only from those before it.
TRUNK = [
    '_types',
    '_moments',
    '_lift',
    '_precondition',
    '_momentum',
    '_optimizer',
    '_transforms',
    '_equivalents',
    'dialects',
    'recipes',
]
BRANCHES = {'plots', 'demo', 'identify', 'interchange'}


def imported_modules(path: pathlib.Path) -> set[str]:
    """The modules of this package that a source file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split('.')
            if parts[0] == 'rmsprop_jax':
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts = [alias.name.split('.') for alias in node.names]
            found |= {p[1] for p in parts if p[0] == 'rmsprop_jax' and len(p) > 1}
    return found & {p.stem for p in PACKAGE.glob('*.py')}


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.glob('*.py')}
    assert modules <= {*TRUNK, *BRANCHES, '__init__'}


def test_the_trunk_imports_only_downwards():
    present = {path.stem for path in PACKAGE.glob('*.py')}
    for position, name in enumerate(TRUNK):
        if name not in present:
            continue
        imported = imported_modules(PACKAGE / f'{name}.py')
        assert imported <= set(TRUNK[:position]), name
    assert not imported_modules(PACKAGE / '__init__.py') & BRANCHES


def test_only_plots_imports_matplotlib():
    for path in PACKAGE.rglob('*.py'):
        if path.stem != 'plots':
            assert 'import matplotlib' not in path.read_text(), path.name
            assert 'from matplotlib' not in path.read_text(), path.name


def test_importing_starts_no_backend_and_needs_no_extra():
    program = """
import sys
extras = ('flax', 'matplotlib', 'orbax', 'sklearn', 'tqdm', 'torch', 'tensorflow')
for name in extras:
    sys.modules[name] = None
import rmsprop_jax
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, '-c', program], check=True, cwd=PACKAGE.parent)
