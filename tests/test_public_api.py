"""The public API changes only with a line in the changelog that names what changed."""

import re
from pathlib import Path

import public_api
import pytest

import rmsprop_jax

HERE = Path(__file__).parent
RECORD = HERE / 'public_api.txt'
CHANGELOG = HERE.parent / 'CHANGELOG.md'


def unreleased(changelog: str) -> str:
    """The section of what is not released yet."""
    sections = re.split(r'^## ', changelog, flags=re.MULTILINE)
    return ''.join(section for section in sections if section.startswith('[Unreleased]'))


def untold(then: list[str], now: list[str], text: str) -> list[str]:
    """The changes whose name stands nowhere between backticks in a text."""
    told = {word for code in re.findall(r'`+([^`]+)`+', text) for word in re.findall(r'\w+', code)}
    gone, come = set(then) - set(now), set(now) - set(then)
    lines = [f'- {line}' for line in sorted(gone)] + [f'+ {line}' for line in sorted(come)]
    return [line for line in lines if line[2:].partition('(')[0].split('.')[-1] not in told]


def test_changes_are_told():
    version, *then = RECORD.read_text().splitlines()
    assert version == f'rmsprop_jax {rmsprop_jax.__version__}', (
        'a new version: run python tests/public_api.py > tests/public_api.txt'
    )
    changes = untold(then, public_api.listing(), unreleased(CHANGELOG.read_text()))
    assert not changes, 'name these under [Unreleased] in CHANGELOG.md, between backticks'


@pytest.mark.parametrize(
    ('now', 'text', 'untold_lines'),
    [
        (['a.f(x)', 'a.g(x)'], '', []),
        (['a.f(x)'], 'without `f`', ['- a.g(x)']),
        (['a.f(x)'], '`a.g` is gone', []),
        (['a.f(x)', 'a.g(x, y)'], 'g takes y', ['- a.g(x)', '+ a.g(x, y)']),
        (['a.f(x)', 'a.g(x)', 'a.new(x)'], '`newer`', ['+ a.new(x)']),
        (['a.f(x)', 'a.g(x)', 'a.new(x)'], 'there is `a.new(x=1)` now', []),
    ],
)
def test_what_is_told(now, text, untold_lines):
    changelog = f'# Changelog\n\n## [Unreleased]\n\n{text}\n\n## [0.1.0]\n\n`f` `g` `new`\n'
    assert untold(['a.f(x)', 'a.g(x)'], now, unreleased(changelog)) == untold_lines


def test_the_record_holds_what_everybody_uses():
    names = {line.partition('(')[0] for line in public_api.listing()}
    assert {
        'rmsprop_jax.rmsprop',
        'rmsprop_jax.dialects.torch',
        'rmsprop_jax.storage.uint8',
    } <= names
    assert 'rmsprop_jax.storage.Format.encode' in names
    assert not [name for name in names if re.search(r'\._', name)]
