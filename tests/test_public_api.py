"""The public API changes only with its record and with the changelog; see public_api.py."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

import public_api
import pytest

CHANGELOG = Path(__file__).parents[1] / 'CHANGELOG.md'
HOW = 'run python tests/public_api.py, and tell in CHANGELOG.md what has changed'


def is_told(changelog: str, lines: Sequence[str]) -> bool:
    """Whether the newest fingerprint in a changelog is that of a listing."""
    found = re.search(r'Public API: `sha256:\w+`', changelog)
    return found is not None and found[0] == public_api.fingerprint(lines)


def test_the_record_is_what_there_is():
    assert public_api.RECORD.read_text().splitlines() == public_api.listing(), HOW


@pytest.mark.parametrize('name', public_api.modules())
def test_modules_show_their_public_names_and_nothing_else(name):
    module = importlib.import_module(name)
    more = {'__version__'} & {*module.__all__}
    assert {*module.__all__} == {*public_api.public_names(module)} | more
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_changelog_tells_of_the_record():
    assert is_told(CHANGELOG.read_text(), public_api.RECORD.read_text().splitlines()), HOW


@pytest.mark.parametrize(
    'now',
    [
        ['a.f(x)'],
        ['a.f(x)', 'a.g(x)', 'a.h()'],
        ['a.f(x)', 'a.g(x, y=1)'],
        ['a.f(x)', 'b.g(x)'],
        ['a.f(x)', 'a.g(x=None)'],
    ],
    ids=['removed', 'added', 'parameter', 'moved', 'default'],
)
def test_every_change_needs_another_line(now):
    then = ['a.f(x)', 'a.g(x)']
    released = f'## [0.1.0]\n\n`a.f` `a.g` `a.h`\n\n{public_api.fingerprint(then)}\n'
    assert is_told(released, then)
    assert not is_told(released, now)
    told = f'## [Unreleased]\n\n{public_api.fingerprint(now)}\n\n{released}'
    assert is_told(told, now)
    assert not is_told(told, then)


def test_the_record_holds_what_everybody_uses():
    names = {line.partition('(')[0] for line in public_api.listing()}
    assert {
        'rmsprop_jax.rmsprop',
        'rmsprop_jax.dialects.torch',
        'rmsprop_jax.storage.uint8',
    } <= names
    assert 'rmsprop_jax.storage.Format.encode' in names
    assert not [name for name in names if re.search(r'\._', name)]
