"""What Optax gets wrong and this package right, one check each; what the page says about it.

Only this package can fail: where the installed Optax has mended something, or its version is not
that of the page, a test says so and is skipped.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import optax
import pytest
import upstream

import rmsprop_jax

PAGE = upstream.PAGE.read_text()
ALL = (*upstream.DIFFERENCES, *upstream.REFUSALS)
NOTES = dict(re.findall(r'^### (.*?)\n(.*?)(?=^###? |\Z)', PAGE, re.DOTALL | re.MULTILINE))
DIFFS = {
    title: diff
    for title, note in NOTES.items()
    for diff in re.findall(r'^```diff\n(.*?)^```', note, re.DOTALL | re.MULTILINE)
}


@pytest.mark.parametrize('difference', ALL, ids=lambda x: x.title)
def test_ours_is_right(difference):
    assert upstream.verdict(difference, rmsprop_jax) == 'right'


@pytest.mark.parametrize('difference', ALL, ids=lambda x: x.title)
def test_optax_is_wrong(difference):
    now = upstream.verdict(difference, optax)
    if now != 'wrong':
        pytest.skip(f'Optax {optax.__version__}: {now}. Run make upstream ARGS=--write.')


@pytest.mark.parametrize('name', ['differences', 'refusals'])
def test_the_page_has_the_tables(name):
    on_page, made = upstream.table_on(PAGE, name), upstream.tables()[name]
    # What we write about either library is on the page whatever Optax does.
    columns = slice(0, -2)
    assert cells(on_page, columns)[2:] == cells(made, columns)[2:]
    if on_page != made:
        pytest.skip(f'Optax {optax.__version__} differs from the page: make upstream ARGS=--write.')


def cells(table: str, columns: slice) -> list[list[str]]:
    """Some of the columns of each row."""
    return [line.split('|')[columns] for line in table.splitlines()]


def test_each_difference_has_a_note():
    assert list(NOTES) == [x.title for x in upstream.DIFFERENCES]
    for note in NOTES.values():
        assert '**Cause.**' in note
        assert 'Change' in note
        assert 'ld checkpoints' in note
        named = [f'optax/{path}' for path in re.findall(r'`optax/([\w/]+\.py)`', note)]
        named += re.findall(r'^--- (.*)$', note, re.MULTILINE)
        for path in named:
            assert (Path(optax.__file__).parents[1] / path).exists(), path


def applied(diff: str, folder: Path) -> None:
    """Changes a file of `folder` as a diff of the page says, whose parts name where they start."""
    (path,) = re.findall(r'^--- (.*)$', diff, re.MULTILINE)
    file = folder / path
    text = file.read_text()
    parts = re.findall(r'^@@ (.*)\n((?:[ +-].*\n|\n)*)', diff, re.MULTILINE)
    assert parts
    for place, part in parts:
        lines = part.splitlines()
        old = ''.join(f'{line[1:]}\n' for line in lines if line[:1] != '+')
        new = ''.join(f'{line[1:]}\n' for line in lines if line[:1] != '-')
        before, found, after = text.partition(place)
        assert found, place
        assert old in after, old
        text = before + found + after.replace(old, new, 1)
    file.write_text(text)


@pytest.mark.extended
@pytest.mark.skipif(
    f'Optax {optax.__version__} |' not in PAGE, reason='the diffs are for the version of the page'
)
@pytest.mark.parametrize('title', DIFFS)
def test_the_change_mends_it(title, tmp_path):
    shutil.copytree(Path(optax.__file__).parent, tmp_path / 'optax')
    applied(DIFFS[title], tmp_path)
    path = os.pathsep.join(map(str, (tmp_path, upstream.PAGE.parents[1])))
    run = subprocess.run(
        [sys.executable, '-c', "import upstream; print(upstream.tables()['differences'])"],
        cwd=Path(__file__).parent,
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {re.findall(r'\[(.*?)\]', line)[0]: line for line in run.stdout.splitlines()[2:]}
    mended = {name for name, row in rows.items() if row.endswith('| mended |')}
    assert mended == {title, *ALSO.get(title, ())}


# Titles of rows that the change for another one mends too.
ALSO = {
    'Centered, and gradients that hardly change': ['The first centered, bias-corrected step'],
    'Accumulators of bfloat16 and float16 parameters': ['Float32 gradients of bfloat16 parameters'],
}
