"""Imports point one way, and importing the package costs and starts nothing."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import rmsprop_jax

PACKAGE = pathlib.Path(rmsprop_jax.__file__).parent
# Each module (or folder of modules) of the trunk may import only from those before it. The
# mathematics comes before storage, whose formats say what they ask of it, and what takes leaves
# through both comes after.
TRUNK = [
    '_types',
    '_checks',
    '_core.moments',
    'storage',
    '_core.wrapped',
    '_core.programs',
    '_core.leaves',
    '_core.edge',
    '_core.chains',
    '_precondition',
    '_momentum',
    '_optimizer',
    '_parameters',
    '_transforms',
    'dialects',
    'recipes',
]
# What nothing in the trunk imports.
BRANCHES = {
    '_carry_over',
    '_command',
    '_labels',
    '_nonfinite',
    '_quantiles',
    '_reset',
    'aot',
    'demo',
    'diagnostics',
    'identify',
    'interchange',
    'plots',
    'sharding',
}


def room(parts: Sequence[str]) -> str:
    """The module or folder of the package that a path or a dotted name is of."""
    names = [part.removesuffix('.py') for part in parts]
    return '.'.join(names[: 2 if names[0] == '_core' else 1])


def sources() -> dict[str, list[pathlib.Path]]:
    """The source files of each module or folder of the package."""
    found: dict[str, list[pathlib.Path]] = {}
    for path in PACKAGE.rglob('*.py'):
        found.setdefault(room(path.relative_to(PACKAGE).parts), []).append(path)
    del found['_core.__init__']
    return found


def imported_modules(path: pathlib.Path) -> set[str]:
    """The modules of this package that a source file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split('.')
            if parts[0] == 'rmsprop_jax':
                names = [[*parts[1:], alias.name] for alias in node.names]
                found |= set(map(room, names))
        elif isinstance(node, ast.Import):
            parts = [alias.name.split('.') for alias in node.names]
            found |= {room(p[1:]) for p in parts if p[0] == 'rmsprop_jax' and len(p) > 1}
    return found & sources().keys()


def test_every_module_has_its_place():
    assert sources().keys() == {*TRUNK, *BRANCHES, '__init__'}


def test_the_trunk_imports_only_downwards():
    for position, name in enumerate(TRUNK):
        for path in sources()[name]:
            assert imported_modules(path) <= {*TRUNK[:position], name}, path


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
tools = {f'rmsprop_jax.{name}' for name in ('diagnostics', 'identify', 'interchange')}
assert not tools & {*sys.modules}, 'a tool is imported before it is asked for'
assert rmsprop_jax.identify_dialect is rmsprop_jax.identify.identify_dialect
assert tools & {*sys.modules} == {'rmsprop_jax.identify'}
"""
    subprocess.run([sys.executable, '-c', program], check=True, cwd=PACKAGE.parent)
