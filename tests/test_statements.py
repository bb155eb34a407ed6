"""What README and the pages say about Optax, Flax and the packages that are needed, tried out.

Each test quotes the statement it tries, so that neither changes without the other. Statements that
other tests try are not repeated here:

- that a dialect is its framework, default by default, and that PyTorch and Keras turn NaN where
  gradients hardly change: test_golden.py and test_dialects.py;
- what Optax gets wrong: test_upstream.py;
- that we are Optax where both are well-conditioned: test_optax_equality.py;
- what wrappers, Flax and Equinox do with our states: test_integrations.py, test_sharding.py and
  test_restore.py;
- what gradients that are not finite do, here, in Optax and in PyTorch: test_faults.py;
- the table of 'Which RMSProp do I need?': test_docs.py.

Statements about programs that are not installed here, and figures that were measured, have the
version beside them.
"""

import contextlib
import functools
import inspect
import io
import re
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from parity.draw import configurations

import rmsprop_jax
from rmsprop_jax import dialects, recipes

pytestmark = pytest.mark.extended

ROOT = Path(__file__).parents[1]
README = 'README.md'
DIFFERENCES = 'docs/differences-from-optax.md'
INTEGRATIONS = 'docs/integrations.md'
FAULTS = 'docs/faults.md'
INDEX = 'docs/index.md'


@functools.cache
def words_of(page):
    return ' '.join((ROOT / page).read_text().split())


def assert_says(page, statement):
    assert ' '.join(statement.split()) in words_of(page), f'{page} no longer says so'


def parts_of(page, pattern):
    """What the groups of `pattern` match on a page."""
    found = re.search(pattern, words_of(page))
    assert found is not None, f'{page} no longer says so'
    return found.groups()


def final(tx, gradients, params=None):
    """The last update, and the state after it."""
    update: Any = None
    state = tx.init(gradients[0] if params is None else params)
    for g in gradients:
        update, state = tx.update(g, state, params)
    return update, state


# --- Differences from Optax ----------------------------------------------------------------------


def test_the_options_that_move_epsilon_and_the_start():
    assert_says(
        DIFFERENCES,
        '`eps_in_sqrt` and `initial_scale` move the first two in both libraries. For a learning '
        'rate after momentum, chain the parts or use `dialects.torch`.',
    )
    for function in (optax.rmsprop, rmsprop_jax.rmsprop):
        parameters = inspect.signature(function).parameters
        assert parameters['eps_in_sqrt'].default is True
        assert parameters['initial_scale'].default == 0
        assert 'lr_in_momentum' not in parameters
        # After a rate of zero the velocity goes on, which a rate after momentum would stop.
        tx = function(lambda count: jnp.where(count == 0, 1.0, 0.0), momentum=0.5)
        assert final(tx, [jnp.ones(()), jnp.ones(())])[0] < 0
    assert (
        final(
            dialects.torch(lambda count: jnp.where(count == 0, 1.0, 0.0), momentum=0.5),
            [jnp.ones(()), jnp.ones(())],
        )[0]
        == 0
    )


def test_an_average_in_bfloat16():
    assert_says(INDEX, 'An average in bfloat16 at decay 0.999 stalls at 0.5 instead of 0.993.')
    assert_says(DIFFERENCES, 'at decay 0.999 they stall at 0.5 where 0.993 is right')
    share = jnp.bfloat16(1 - 0.999)
    average = jax.lax.fori_loop(0, 5000, lambda _, x: 0.999 * x + share, jnp.bfloat16(0))
    assert (average.dtype, float(average)) == (jnp.bfloat16, 0.5)
    assert round(1 - 0.999**5000, 3) == 0.993


def test_classes_and_names_of_states():
    assert_says(
        DIFFERENCES,
        'Optax has four state classes, one for each configuration. Here there is one, `RmsState',
    )
    params = jnp.ones(2)
    forms = [(centered, corrected) for centered in (False, True) for corrected in (False, True)]

    def classes(scale_by_rms, scale_by_stddev):
        functions = {False: scale_by_rms, True: scale_by_stddev}
        return {type(functions[c](bias_correction=b).init(params)) for c, b in forms}

    assert len(classes(optax.scale_by_rms, optax.scale_by_stddev)) == 4
    assert classes(rmsprop_jax.scale_by_rms, rmsprop_jax.scale_by_stddev) == {rmsprop_jax.RmsState}
    (fields,) = parts_of(DIFFERENCES, r'`RmsState\(([^)]*)\)`')
    assert tuple(fields.split(', ')) == rmsprop_jax.RmsState._fields

    assert_says(
        DIFFERENCES,
        "`optax.tree.get(state, 'nu')` works in both libraries; `count` is not promised, since "
        "Optax's schedules hold one too.",
    )
    for rmsprop in (optax.rmsprop, rmsprop_jax.rmsprop):
        state = rmsprop(lambda count: 0.1, bias_correction=True).init(params)
        assert optax.tree.get(state, 'nu').shape == (2,)
        with pytest.raises(KeyError, match='multiple'):
            optax.tree.get(state, 'count')


# --- Integrations --------------------------------------------------------------------------------


def test_multi_steps_and_keras_accumulation():
    assert_says(
        INTEGRATIONS,
        "`optax.MultiSteps` accumulates in float32 and passes the mean on in the gradients' dtype. "
        '`dialects.keras(gradient_accumulation_steps=...)` stays in float32 throughout.',
    )
    gradients = [jnp.bfloat16(g) for g in (1.0, 2.0**-9, 2.0**-9, 2.0**-9)]
    mean = (1 + 3 * 2.0**-9) / 4
    params = jnp.zeros((), jnp.bfloat16)
    multi = optax.MultiSteps(optax.identity(), 4)
    assert multi.init(params).acc_grads.dtype == jnp.float32
    update, _ = final(multi, gradients, params)
    assert update.dtype == jnp.bfloat16
    assert update == jnp.bfloat16(mean)
    assert float(update) != mean
    # Where sums were bfloat16, the three small ones would be lost.
    assert update != jnp.bfloat16(0.25)

    _, state = final(dialects.keras(rho=0.5, gradient_accumulation_steps=4), gradients, params)
    assert float(optax.tree.get(state, 'nu')) == mean**2 / 2


def test_schedule_free_is_where_the_page_says():
    assert_says(
        INTEGRATIONS, '`optax.contrib.schedule_free` replaces momentum: leave `momentum` out.'
    )
    assert callable(optax.contrib.schedule_free)
    assert callable(optax.contrib.schedule_free_eval_params)
    for name in re.findall(r'`(optax\.[\w.]+)', words_of(INTEGRATIONS)):
        assert functools.reduce(getattr, name.split('.')[1:], optax)


def test_lookahead_wants_two_copies():
    assert_says(
        INTEGRATIONS,
        '`optax.lookahead` needs `params = optax.LookaheadParams.init_synced(params)`, and '
        'gradients with respect to `params.fast`.',
    )
    tx, params = optax.lookahead(rmsprop_jax.rmsprop(0.1), 2, 0.5), jnp.ones(2)
    both = optax.LookaheadParams.init_synced(params)
    update, _ = tx.update(jnp.ones(2), tx.init(both), both)
    assert isinstance(update, optax.LookaheadParams)
    with pytest.raises(AttributeError, match='fast'):
        tx.update(jnp.ones(2), tx.init(both), params)


def test_masked_hands_on_what_it_leaves_out():
    assert_says(
        INTEGRATIONS,
        '`optax.masked` passes the gradients of masked-out parameters through unchanged. To freeze '
        'those parameters, use `optax.partition` with `optax.set_to_zero()`.',
    )
    params, tx = {'a': jnp.ones(()), 'b': jnp.ones(())}, rmsprop_jax.rmsprop(0.1)
    assert final(optax.masked(tx, {'a': True, 'b': False}), [params])[0]['b'] == 1
    split = optax.partition({'x': tx, 'y': optax.set_to_zero()}, {'a': 'x', 'b': 'y'})
    update = final(split, [params])[0]
    assert update['a'] < 0
    assert update['b'] == 0


def test_injected_numbers_take_the_dtype_of_the_parameters_in_optax():
    assert_says(
        INTEGRATIONS,
        'is `optax.inject_hyperparams` with two differences: hyperparameters are float32 whatever '
        'the dtype of the parameters, and arguments such as `storage` and `mask` stay static.',
    )
    assert_says(
        INTEGRATIONS,
        "With Optax's own, list these arguments in `static_args`, and pass "
        '`hyperparam_dtype=jnp.float32` if parameters are narrower.',
    )
    params = jnp.ones(2, jnp.bfloat16)

    def decay(inject, **options):
        tx = inject(rmsprop_jax.trace, **options)(0.999)
        return tx.init(params).hyperparams['decay']

    assert optax.inject_hyperparams(optax.trace)(0.999).init(params).hyperparams['decay'] == 1
    with pytest.raises(TypeError, match='hyperparam_dtype'):
        decay(optax.inject_hyperparams)
    assert decay(optax.inject_hyperparams, hyperparam_dtype=jnp.float32) == np.float32(0.999)
    assert decay(rmsprop_jax.inject_hyperparams) == np.float32(0.999)

    def mask(params):
        raise AssertionError('Optax takes it for a schedule')

    inject = optax.inject_hyperparams
    with pytest.raises(AssertionError, match='schedule'):
        inject(rmsprop_jax.rmsprop)(0.1, weight_decay=0.1, mask=mask).init(jnp.ones(2))
    inject(rmsprop_jax.rmsprop, static_args='mask')(0.1, weight_decay=0.1, mask=mask)
    rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(0.1, weight_decay=0.1, mask=mask)


def test_steps_that_bfloat16_parameters_do_not_notice():
    assert_says(
        INTEGRATIONS,
        'a bfloat16 parameter does not move when its update is smaller than a 512th of it; for '
        'some values the limit is a 256th.',
    )
    params = jnp.arange(128, 256, dtype=jnp.bfloat16) / 128
    moved = {
        part: optax.apply_updates(params, params.astype(jnp.float32) / part) != params
        for part in (255, 257, 509, 513)
    }
    assert moved[255].all()
    assert moved[509].any()
    assert not moved[257].all()
    assert not moved[513].any()


def test_small_float16_gradients_vanish_in_the_division():
    assert_says(
        INTEGRATIONS,
        'float16 gradients would vanish again in that division',
    )
    scale, gradient = 2.0**15, [jnp.float16(1e-4)]
    assert final(optax.scale(1 / scale), gradient)[0] == 0
    _, state = final(dialects.keras(loss_scale_factor=scale), gradient)
    assert optax.tree.get(state, 'nu') > 0


def test_the_state_in_nnx_is_read_as_pure():
    assert_says(INTEGRATIONS, 'With `nnx.Optimizer`, read `nnx.as_pure(optimizer.opt_state)`.')
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, rmsprop_jax.rmsprop(0.1), wrt=nnx.Param)
    state = nnx.as_pure(optimizer.opt_state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert optax.tree.get(state, 'nu')['kernel'].shape == (3, 1)


# --- Storage -------------------------------------------------------------------------------------


def test_orbax_casts_codes(tmp_path):
    assert_says('docs/storage.md', 'Orbax casts restored arrays to the requested dtype, even codes')
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'codes', {'nu': jnp.arange(4, dtype=jnp.uint8)})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / 'codes', {'nu': jnp.zeros(4)})
    np.testing.assert_array_equal(restored['nu'], [0.0, 1.0, 2.0, 3.0])
    assert restored['nu'].dtype == jnp.float32


# --- Faults --------------------------------------------------------------------------------------


def test_a_nan_spreads_through_a_norm():
    assert_says(
        FAULTS,
        'the norm of a gradient with one NaN is NaN, and clipping by that norm makes all '
        'parameters NaN.',
    )
    gradient = {'a': jnp.array([1.0, jnp.nan]), 'b': jnp.ones(2)}
    for clip in (optax.clip_by_global_norm(1.0), dialects.torch_clip_grad_norm(1.0)):
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(final(clip, [gradient])[0]))


def test_a_step_is_skipped_as_by_optax():
    assert_says(FAULTS, '| the whole step, as with `optax.apply_if_finite` |')
    gradients = [jnp.array(g) for g in ([1.0, 2.0], [jnp.nan, 1.0], [2.0, jnp.inf], [0.5, -1.0])]
    tx = rmsprop_jax.rmsprop(0.1, momentum=0.9)
    ours, ours_after = final(rmsprop_jax.skip_nonfinite(tx, 'step'), gradients)
    theirs, theirs_after = final(optax.apply_if_finite(tx, 5), gradients)
    np.testing.assert_array_equal(ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, ours_after.inner_state, theirs_after.inner_state)
    assert optax.tree.get(ours_after, 'total_notfinite') == 2
    assert theirs_after.total_notfinite == 2


# --- README, and the first page ------------------------------------------------------------------


def test_the_number_of_drawn_configurations():
    (number,) = parts_of(README, r'replays (\d+) random configurations, to 1e-12')
    assert int(number) == len(configurations(0))


def test_the_packages_that_are_needed():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    needed = (*project['dependencies'], *project['optional-dependencies']['flax'])
    bounds = dict(requirement.split('>=') for requirement in needed)
    assert_says(README, '# jax, jaxlib, optax and chex; for extras ')
    extras = set(re.findall(r"'\.\[(\w+)\]'", (ROOT / README).read_text()))
    assert {'flax', 'notebooks'} <= extras <= project['optional-dependencies'].keys()
    assert {'jax', 'jaxlib', 'optax', 'chex', 'flax'} == bounds.keys()
    stated = parts_of(README, r'with JAX ([\d.]+), Optax ([\d.]+) and Flax ([\d.]+), the oldest')
    for name, version in zip(('jax', 'optax', 'flax'), stated, strict=True):
        assert bounds[name].removesuffix('.0') == version
    assert_says(README, 'Python 3.11 or newer')
    assert project['requires-python'] == '>=3.11'


def test_every_call_of_the_table_in_readme_can_be_made():
    rows = re.findall(r'^\| (.*) \| (.*) \|$', (ROOT / README).read_text(), re.MULTILINE)
    calls = [c for _, write in rows for c in re.findall(r'`(dialects\.\w+\([^`]*\))`', write)]
    assert len(calls) >= 8
    known = {'dialects': dialects, 'lr': 0.1, 'm': 0.9, 'c': 1.0, 'print': lambda text: text}
    for call in calls:
        eval(call, known)
    assert_says(
        README,
        '| Stable-Baselines3 A2C (`use_rms_prop`) | `dialects.torch(7e-4, eps=1e-5)` after '
        '`torch_clip_grad_norm(0.5)` |',
    )
    written = optax.chain(dialects.torch_clip_grad_norm(0.5), dialects.torch(7e-4, eps=1e-5))
    gradients = [jnp.array([1.0, -2.0]), jnp.array([0.01, 0.3])]
    np.testing.assert_array_equal(
        final(written, gradients)[0], final(recipes.sb3_a2c(), gradients)[0]
    )


def test_the_first_page_prints_what_it_shows():
    block, shown = re.findall(
        r'```python\n(.*?)```\n\n```\n(.*?)```', (ROOT / INDEX).read_text(), re.DOTALL
    )[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block, {})
    assert printed.getvalue() == shown


def test_how_long_a_start_at_one_is_felt():
    page = 'docs/which-rmsprop.md'
    found = parts_of(page, r'for (\d+) steps at decay 0.9 and for (\d+) at 0.99')
    for decay, steps in zip((0.9, 0.99), map(int, found), strict=True):
        past = decay ** np.arange(1, 2000)
        assert np.sum(past > (1 - past) * 1e-6) == steps
