"""The Python of README and pages runs as it stands, top to bottom; the table names what exists."""

import contextlib
import io
import pathlib
import re

import numpy as np
import pytest

import rmsprop_jax
from benchmarks import dialects as figure

README = pathlib.Path(__file__).parent.parent / 'README.md'


def test_python_blocks_run():
    blocks = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    exec('\n'.join(blocks), {'__name__': 'readme'})


# These show code for other frameworks, or for parameters of the reader's own.
NOT_RUN = {'identify', 'recipes'}
PAGES = {path.stem: path for path in (README.parent / 'docs').glob('*.md')}


@pytest.mark.extended
@pytest.mark.parametrize(
    'page', sorted(n for n in PAGES.keys() - NOT_RUN if '```python' in PAGES[n].read_text())
)
def test_python_blocks_of_the_documentation_run(page):
    blocks = re.findall(r'```python\n(.*?)```', PAGES[page].read_text(), re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec('\n'.join(blocks), {'__name__': page})
    if page == 'integrations':
        # Both of Flax's homes show the rate, and the section on logs does.
        assert printed.getvalue().count('0.01\n') == 3


@pytest.mark.extended
def test_the_figure_shows_what_its_caption_says():
    recorded = dict(np.load(figure.RECORDED))
    apart = {
        name: abs(figure.losses(tx, recorded) - recorded['losses_float32'])
        for name, (tx, *_) in figure.RULES.items()
    }
    assert apart.pop('dialects.torch(0.01)').max() < 1e-6
    assert all(distance[1] > 1e-4 for distance in apart.values())


def test_table_names_what_exists():
    calls = re.findall(r'`((?:dialects\.)?\w+)\(?[^`]*`', README.read_text().split('| you had')[1])
    names = [call.removeprefix('dialects.') for call in calls if call.startswith('dialects.')]
    assert len(names) >= 8
    for name in names:
        assert callable(getattr(rmsprop_jax.dialects, name))
