"""What the pages in docs/ state as tables is what the functions do; the site's own parts."""

import functools
import inspect
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import dialects

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
DECAYS, EPSILONS = ('alpha', 'rho', 'decay', 'gamma1'), ('eps', 'epsilon')
RATES = ('lr', 'learning_rate')


def rows_of_the_table() -> list[list[str]]:
    """The rows of the table of dialects, each a list of its cells."""
    rows = [line.split('|')[1:-1] for line in dialects.differences().splitlines()[2:]]
    assert len(rows) > 10
    return [[cell.strip() for cell in row] for row in rows]


def argument(names, function):
    """The name of an argument that frameworks call by one of these, or None."""
    return next((n for n in names if n in inspect.signature(function).parameters), None)


def made(title):
    """The factory that a row is about, with the options its title names."""
    name = re.findall(r'`([\w.]+)`', title)[0]
    function = optax.rmsprop if name == 'optax' else getattr(dialects, name)
    options = {'centered': True} if ', centered' in title else {}
    moves = 'no momentum' not in title
    key = argument(('momentum', 'gamma2'), function)
    return function, functools.partial(function, **options, **({key: 0.5} if key and moves else {}))


@pytest.mark.parametrize('row', rows_of_the_table(), ids=lambda row: row[0])
def test_the_table_of_dialects(row):
    title, place, start, rate_place, weight_decay, decay, eps, rate = row
    function, factory = made(title)
    parameters = inspect.signature(function).parameters
    rate_name = argument(RATES, function)
    for names, stated in ((DECAYS, decay), (EPSILONS, eps), (RATES, rate)):
        name = argument(names, function)
        default = inspect.Parameter.empty if name is None else parameters[name].default
        assert (default is inspect.Parameter.empty) == (stated == '')
        assert stated == '' or float(stated) == default
    assert _place_of_epsilon(function, factory) == place
    assert _start(factory(0.1)) == float(start)
    assert _place_of_rate(factory, rate_name) == rate_place
    assert _weight_decay(function, factory) == weight_decay


@pytest.mark.parametrize('table', [dialects.differences, dialects.table])
def test_the_page_has_the_tables_of_the_records(table):
    page = (DOCS / 'which-rmsprop.md').read_text()
    assert f'\n\n{table()}\n\n' in page, f'print(dialects.{table.__name__}()) prints the new one'


def moment(state):
    """The second moment or variance in a state, a number."""
    found = optax.tree.get(state, 'nu', None)
    return float(optax.tree.get(state, 'var') if found is None else found)


def _start(tx):
    return moment(tx.init(jnp.zeros(())))


def _place_of_epsilon(function, factory):
    name = argument(EPSILONS, function)
    if name is None:
        return 'none'
    tx = factory(1.0, **{name: 0.5})
    update, state = tx.update(jnp.ones(()), tx.init(jnp.zeros(())), jnp.zeros(()))
    after = moment(state)
    expected = {'inside': 1 / np.sqrt(after + 0.5), 'outside': 1 / (np.sqrt(after) + 0.5)}
    (place,) = [k for k, length in expected.items() if abs(-float(update) - length) < 1e-5]
    return place


def _place_of_rate(factory, rate_name):
    tx = factory(**{rate_name: lambda count: jnp.where(count == 0, 1.0, 0.0)})
    state = tx.init(jnp.zeros(()))
    if optax.tree.get(state, 'trace', None) is None:
        return 'no momentum'
    _, state = tx.update(jnp.ones(()), state, jnp.zeros(()))
    update, _ = tx.update(jnp.zeros(()), state, jnp.zeros(()))
    return 'before momentum' if update != 0 else 'after momentum'


def _weight_decay(function, factory):
    name = argument(('weight_decay', 'wd'), function)
    if name is None:
        return 'none'
    tx = factory(0.1, **{name: 0.5})

    def after_a_step(param):
        param = jnp.asarray(param)
        return tx.update(jnp.zeros(()), tx.init(param), param)

    (still, untouched), (update, state) = after_a_step(0.0), after_a_step(1.0)
    assert still == 0
    assert update < 0
    return 'decoupled' if moment(state) == moment(untouched) else 'coupled'


def links():
    """Each page, with the target and the anchor of each of its links to a page or a figure."""
    for path in sorted(DOCS.glob('*.md')):
        text = re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)
        for target, anchor in re.findall(r'\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)', text):
            yield path.name, target or path.name, anchor


def test_links_between_pages_lead_somewhere():
    found = list(links())
    assert len(found) > 30
    assert len({page for page, _, _ in found}) > 5
    for page, target, anchor in found:
        path = (DOCS / target).resolve()
        assert path.exists(), (page, target)
        if anchor:
            titles = re.findall(r'^#+ (.*)$', path.read_text(), re.MULTILINE)
            slugs = {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}
            assert anchor in slugs, (page, anchor)


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    named = set()
    for path in (*DOCS.glob('*.md'), *(ROOT / name for name in TEXTS)):
        # Within `make name`, and at the beginning of a line of a block.
        found = re.findall(r'(?:`|^)make ([a-z-]+)', path.read_text(), re.MULTILINE)
        named |= {(path.name, name) for name in found}
    assert len(named) > 20
    assert [(page, name) for page, name in sorted(named) if name not in targets] == []


def test_no_line_of_code_is_wider_than_the_page():
    # docs/site/site.css makes room for 100 columns in a window of 1280 pixels.
    blocks = 0
    for path in (*DOCS.glob('*.md'), *(ROOT / name for name in TEXTS)):
        for block in re.findall(r'^```.*?\n(.*?)^```', path.read_text(), re.DOTALL | re.MULTILINE):
            blocks += 1
            assert [line for line in block.splitlines() if len(line) > 100] == [], path.name
    assert blocks > 50


TEXTS = ('README.md', 'CHANGELOG.md', 'benchmarks/README.md', 'tests/mutation/README.md')


def test_private_names_and_files_in_the_internals_exist():
    code = ' '.join(re.findall(r'`([^`\n]+)`', (DOCS / 'internals.md').read_text()))
    sources = {path.relative_to(ROOT): path for path in ROOT.glob('rmsprop_jax/**/*.py')}
    words = {path.stem for path in sources}
    words = words.union(*(re.findall(r'\w+', path.read_text()) for path in sources.values()))
    private = set(re.findall(r'(?<!\w)_[A-Za-z]\w*', code))
    assert len(private) > 10
    assert private <= words
    files = [str(path) for path in (*sources, *ROOT.glob('tests/**/*.py'))]
    named = set(re.findall(r'[\w/]+\.py', code))
    assert len(named) > 10
    assert [name for name in named if not any(file.endswith(f'/{name}') for file in files)] == []
