"""What frameworks do with the sparse gradients of an embedding, and which of it we reproduce.

`golden/record_embeddings.py` recorded it: a table of two rows and one column, which starts at zero.
Every lookup has a gradient of one. It is what the table on the porting page says.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import dialects

RATE = 0.01
# Row 0 is looked up once and then left alone.
LEFT, REPEATED = [[0], [1], [1], [1]], [[0, 0]]
RECORDED = json.loads((Path(__file__).parent / 'golden' / 'embeddings.json').read_text())
RECORDED.pop('versions')


def sonnet(momentum: float = 0.0, **options: Any) -> Any:
    # An array counts as a momentum, so that its rows are skipped at zero too.
    return dialects.keras_legacy(
        RATE, momentum=jnp.asarray(momentum), epsilon=1e-10, sparse=True, **options
    )


OURS: dict[str, Any] = {
    'keras': lambda **options: dialects.keras(RATE, **options),
    'tf_keras': lambda **options: dialects.keras(RATE, **options),
    'keras_legacy': lambda **options: dialects.keras_legacy(RATE, sparse=True, **options),
    'tensorflow': lambda **options: dialects.tensorflow(RATE, sparse=True, **options),
    'sonnet': sonnet,
}
OPTIONS: dict[str, Any] = {
    'momentum': 0.9,
    'centered': True,
    'clipnorm': 1.0,
    'clipvalue': 0.5,
    'global_clipnorm': 1.0,
}


def beyond_dense_gradients(framework: str, case: str) -> bool:
    """Whether it depends on how often a row was looked up, which a dense gradient does not tell."""
    apart = framework == 'keras' and case in ('repeated', 'repeated, centered')
    return apart or 'clip' in case


CELLS = [(framework, case) for framework, cases in RECORDED.items() for case in cases]


def run(tx: Any, steps: list[list[int]]) -> dict[str, list[Any]]:
    table = jnp.zeros((2, 1))
    state = tx.init(table)
    found: dict[str, list[Any]] = {'table': [], 'moment': []}
    for rows in steps:
        updates, state = tx.update(jnp.zeros((2, 1)).at[jnp.array(rows)].add(1.0), state, table)
        table = optax.apply_updates(table, updates)
        var, mu = optax.tree.get(state, 'var'), optax.tree.get(state, 'mu')
        moment = optax.tree.get(state, 'nu') if var is None else var + mu**2
        found['table'].append(np.ravel(table))
        found['moment'].append(np.ravel(moment))
    return found


@pytest.mark.parametrize(('framework', 'case'), CELLS)
def test_rows(framework: str, case: str) -> None:
    """The same to rounding, or else far off, where no dense gradient could do it."""
    words = case.split(', ')
    options = {word: OPTIONS[word] for word in words if word in OPTIONS}
    steps = LEFT if 'left' in words else REPEATED
    if 'accumulated' in words:
        steps, options = 2 * steps, {'gradient_accumulation_steps': 2}
    ours, theirs = run(OURS[framework](**options), steps), RECORDED[framework][case]
    if beyond_dense_gradients(framework, case):
        assert not all(np.allclose(ours[name], theirs[name], rtol=0.2) for name in theirs)
    else:
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=1e-8)


def test_the_table_on_the_porting_page() -> None:
    """Its numbers are these."""

    def after(framework: str, case: str, name: str) -> list[float]:
        return [rows[0] for rows in RECORDED[framework][case][name]]

    for framework in ('tensorflow', 'keras_legacy', 'sonnet'):
        assert len(set(after(framework, 'left, momentum', 'table'))) == 1
    for framework in ('keras', 'tf_keras'):
        np.testing.assert_allclose(
            after(framework, 'left, momentum', 'table')[0::3], [-0.0316, -0.109], rtol=3e-3
        )
    assert len(set(after('sonnet', 'left', 'moment'))) == 1
    np.testing.assert_allclose(after('keras_legacy', 'left', 'moment')[:2], [0.1, 0.09], rtol=1e-6)
    for framework, moment, step in (('keras', 0.2, 0.0447), ('tf_keras', 0.4, 0.0316)):
        np.testing.assert_allclose(after(framework, 'repeated', 'moment'), [moment], rtol=1e-6)
        np.testing.assert_allclose(after(framework, 'repeated', 'table'), [-step], rtol=1e-3)
    for case, merged, apart in (
        ('repeated, clipnorm', 0.2, 0.1),
        ('repeated, global_clipnorm', 0.2, 0.2),
        ('repeated, clipvalue', 0.1, 0.05),
    ):
        for framework, moment in (('tf_keras', merged), ('keras_legacy', merged), ('keras', apart)):
            np.testing.assert_allclose(after(framework, case, 'moment'), [moment], rtol=1e-6)
