"""Bad input gets one clear error, early, that names the argument and the leaf."""

import inspect
import io
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public_api
import pytest

import rmsprop_jax
from rmsprop_jax import (
    aot,
    diagnostics,
    dialects,
    identify_dialect,
    inject_hyperparams,
    interchange,
    recipes,
    reset,
    rmsprop,
    scale_by_rms,
    scale_by_stddev,
    sharding,
    storage,
    trace,
)

PARAMS = {'dense': {'kernel': jnp.ones((4, 3)), 'bias': jnp.ones(3)}}

BAD_HYPERPARAMETERS = [
    ('decay', 1.0, ValueError, r'decay must be in \[0, 1\), got 1.0'),
    ('decay', -0.1, ValueError, 'decay must be in'),
    ('decay', float('nan'), ValueError, 'decay must be finite, got nan'),
    ('decay', np.float64('nan'), ValueError, 'decay must be finite'),
    ('decay', 'big', TypeError, "decay must be a real scalar, got 'big'"),
    ('decay', None, TypeError, 'decay must be a real scalar, got None'),
    ('decay', True, TypeError, 'decay must be a real scalar'),
    ('decay', 0.9j, TypeError, 'decay must be a real scalar'),
    ('decay', [0.9], TypeError, 'decay must be a real scalar'),
    ('decay', jnp.ones(3), ValueError, r'decay must be a scalar, got an array of shape \(3,\)'),
    ('decay', jnp.array(0.9j), TypeError, 'decay must be real, got an array of dtype complex64'),
    ('decay', jnp.array(True), TypeError, 'decay must be real, got an array of dtype bool'),
    ('decay', jnp.bfloat16(0.999), TypeError, 'decay has dtype bfloat16.*hyperparam_dtype'),
    ('decay', jnp.float16(0.999), TypeError, 'decay has dtype float16'),
    ('decay', np.float16(0.999), TypeError, 'decay has dtype float16'),
    ('momentum', 1.5, ValueError, r'momentum must be in \[0, 1\)'),
    ('momentum', jnp.bfloat16(0.9), TypeError, 'momentum has dtype bfloat16'),
    ('eps', -1e-8, ValueError, r'eps must be in \[0, inf\)'),
    ('eps', float('inf'), ValueError, 'eps must be finite'),
    ('initial_scale', -1.0, ValueError, 'initial_scale must be in'),
    ('initial_scale', lambda count: 1.0, TypeError, 'initial_scale.*cannot be a schedule'),
    ('weight_decay', -1e-4, ValueError, 'weight_decay must be in'),
    ('weight_decay', float('nan'), ValueError, 'weight_decay must be finite'),
    ('learning_rate', float('nan'), ValueError, 'learning_rate must be finite'),
    ('learning_rate', '0.1', TypeError, 'learning_rate must be a real scalar'),
    ('learning_rate', jnp.ones((2, 2)), ValueError, 'learning_rate must be a scalar'),
    ('eps_in_sqrt', 1e-8, TypeError, 'eps_in_sqrt must be True or False, got 1e-08'),
    ('centered', 0.9, TypeError, 'centered must be True or False, got 0.9'),
    ('bias_correction', 'yes', TypeError, 'bias_correction must be True or False'),
]


@pytest.mark.parametrize(('name', 'value', 'error', 'message'), BAD_HYPERPARAMETERS)
def test_hyperparameters(name, value, error, message):
    with pytest.raises(error, match=message):
        rmsprop(**{'learning_rate': 0.1, name: value})
    if name in ('decay', 'eps', 'initial_scale', 'eps_in_sqrt', 'bias_correction'):
        for factory in (scale_by_rms, scale_by_stddev):
            with pytest.raises(error, match=message):
                factory(**{name: value})
    if name == 'decay':
        with pytest.raises(error, match=message):
            trace(value)


FRAMEWORKS_NAMES = [
    (function, name)
    for function in vars(dialects).values()
    if inspect.isfunction(function)
    and function.__module__ == dialects.__name__
    and not function.__name__.startswith('_')
    for name in inspect.signature(function).parameters
    if name in ('lr', 'alpha', 'rho', 'gamma1', 'gamma2', 'epsilon', 'wd')
]


@pytest.mark.parametrize(('dialect', 'name'), FRAMEWORKS_NAMES)
def test_numbers_go_by_the_name_that_the_framework_gives_them(dialect, name):
    rate = next(iter(inspect.signature(dialect).parameters))
    arguments = {rate: 0.1, 'centered': True}
    with pytest.raises(TypeError, match=f'^{name} must be a real scalar'):
        dialect(**{**arguments, name: '0.1'})
    if name == rate:
        with pytest.raises(TypeError, match=f'^{name} must be a real scalar'):
            dialect('0.1')
    params = jnp.ones(2)
    tx = dialect(**{**arguments, name: lambda count: jnp.nan})
    with pytest.raises(ValueError, match=f'^{name} must be finite'):
        tx.update(params, tx.init(params), params)


def test_nesterov_must_be_a_flag():
    with pytest.raises(TypeError, match='nesterov must be True or False'):
        rmsprop(0.1, momentum=0.9, nesterov=0.5)


def test_narrow_schedules_are_refused_when_traced():
    tx = rmsprop(0.1, decay=lambda count: jnp.bfloat16(0.999))
    with pytest.raises(TypeError, match='decay has dtype bfloat16'):
        jax.jit(tx.update)(PARAMS, tx.init(PARAMS))


def test_optax_injection_into_bfloat16_parameters():
    """Optax would hold 0.999 as 1 and freeze the average; ours says so, and how to mend it."""
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(TypeError, match='hyperparam_dtype=jnp.float32'):
        optax.inject_hyperparams(rmsprop)(0.1, decay=0.999).init(narrow)
    optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(0.1, decay=0.999).init(narrow)
    inject_hyperparams(rmsprop)(0.1, decay=0.999).init(narrow)


@pytest.mark.parametrize('tx', [rmsprop(0.1), scale_by_stddev(), trace(0.9)], ids=range(3))
@pytest.mark.parametrize(
    ('leaf', 'message'),
    [
        (jnp.ones(3, jnp.int32), "params['dense']['steps'] has dtype int32"),
        (jnp.ones(3, bool), "params['dense']['steps'] has dtype bool"),
        (np.arange(3), "params['dense']['steps'] has dtype int"),
        (7, "params['dense']['steps'] has dtype int32"),
        ('name', "params['dense']['steps'] is a str"),
        (jax.random.key(0), "params['dense']['steps'] has dtype key"),
    ],
    ids=['int', 'bool', 'numpy', 'python', 'str', 'key'],
)
def test_parameters_must_be_floating(tx, leaf, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        tx.init({'dense': {'kernel': jnp.ones(2), 'steps': leaf}})


def test_a_single_integer_parameter_is_named_too():
    with pytest.raises(TypeError, match='params has dtype int32'):
        rmsprop(0.1).init(jnp.arange(3))


@pytest.mark.parametrize('jit', [True, False], ids=['jit', 'eager'])
@pytest.mark.parametrize(
    'tx',
    [rmsprop(0.1), rmsprop(0.1, centered=True), rmsprop(0.1, momentum=0.9), trace(0.9)],
    ids=['rmsprop', 'centered', 'momentum', 'trace'],
)
class TestGradientsThatDoNotFit:
    def check(self, tx, jit, gradients, error, *messages):
        state = tx.init(PARAMS)
        with pytest.raises(error) as raised:
            (jax.jit(tx.update) if jit else tx.update)(gradients, state)
        for message in messages:
            assert message in str(raised.value)

    def test_missing_and_extra_leaves(self, tx, jit):
        gradients = {'dense': {'kernel': jnp.ones((4, 3)), 'scale': jnp.ones(3)}}
        self.check(
            tx,
            jit,
            gradients,
            ValueError,
            'structure of updates does not match',
            "only in updates: ['dense']['scale']",
            "only in the state: ['dense']['bias']",
        )

    def test_none_where_the_state_has_a_leaf(self, tx, jit):
        gradients = {'dense': {'kernel': jnp.ones((4, 3)), 'bias': None}}
        self.check(tx, jit, gradients, ValueError, "only in the state: ['dense']['bias']")

    def test_another_container(self, tx, jit):
        gradients = {'dense': (jnp.ones(3), jnp.ones((4, 3)))}
        self.check(tx, jit, gradients, ValueError, 'updates: PyTreeDef', 'state: PyTreeDef')

    def test_leaf_in_the_place_of_a_tree(self, tx, jit):
        self.check(
            tx,
            jit,
            {'dense': jnp.ones(3)},
            ValueError,
            "updates['dense'] has shape (3,), but ",
            'has dict there',
        )

    def test_shape(self, tx, jit):
        gradients = {'dense': {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(3)}}
        messages = "updates['dense']['kernel'] has shape (3, 4), but ", 'has (4, 3) there'
        self.check(tx, jit, gradients, ValueError, *messages)

    def test_integer_gradients(self, tx, jit):
        gradients = {'dense': {'kernel': jnp.ones((4, 3)), 'bias': jnp.ones(3, jnp.int32)}}
        self.check(tx, jit, gradients, TypeError, "updates['dense']['bias'] has dtype int32")


@pytest.mark.parametrize('tx', [rmsprop(0.1), trace(0.9)], ids=['rmsprop', 'trace'])
def test_gradients_of_integers(tx):
    """What `jax.grad(..., allow_int=True)` gives for an integer; jit itself refuses it earlier."""
    with pytest.raises(TypeError, match='updates has dtype'):
        tx.update(np.zeros(3, jax.dtypes.float0), tx.init(jnp.ones(3)))


@pytest.mark.parametrize('tx', [scale_by_stddev(), trace(0.9)], ids=['centered', 'trace'])
def test_complex_and_real_do_not_mix(tx):
    real, imaginary = jnp.ones(2), 1j * jnp.ones(2)
    with pytest.raises(TypeError, match='updates has dtype complex64, .* is float32'):
        tx.update(imaginary, tx.init(real))
    with pytest.raises(TypeError, match='updates has dtype float32, .* is complex64'):
        tx.update(real, tx.init(imaginary))


def test_complex_gradient_of_a_real_parameter_without_a_mean():
    """The second moment is real either way, so only the parameters can tell."""
    tx, real, imaginary = rmsprop(0.1), jnp.ones(2), 1j * jnp.ones(2)
    for p, g in ((real, imaginary), (imaginary, real)):
        with pytest.raises(TypeError, match='updates has dtype'):
            tx.update(g, tx.init(p), p)


def test_foreign_states():
    tx = scale_by_rms()
    with pytest.raises(TypeError, match='RmsState made by init, got ScaleByRmsState'):
        tx.update(PARAMS, optax.scale_by_rms().init(PARAMS))
    with pytest.raises(TypeError, match='TraceState that init returned, got EmptyState'):
        trace(0.9).update(PARAMS, optax.EmptyState())
    with pytest.raises(ValueError, match='another configuration.*centered=False.*mu, var'):
        tx.update(PARAMS, scale_by_stddev().init(PARAMS))
    with pytest.raises(ValueError, match='another configuration.*weight'):
        scale_by_rms(bias_correction=True).update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match='another configuration.*weight'):
        tx.update(PARAMS, scale_by_rms(bias_correction=True).init(PARAMS))


def test_weight_decay_without_params():
    tx = rmsprop(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match='weight_decay needs params'):
        tx.update(PARAMS, tx.init(PARAMS))


def test_schedule_as_the_value_of_a_traced_flag():
    with pytest.raises(TypeError, match='centered must be True or False'):
        jax.jit(lambda flag: rmsprop_jax.rmsprop(0.1, centered=flag).init(PARAMS))(True)


# --- Every public function ------------------------------------------------------------------------

TX = rmsprop(0.1)
STATE = TX.init(PARAMS)
PAIRS = interchange.torch.linear('dense', 'dense')
NAMES = [pair.theirs for pair in PAIRS]
GROUP = {
    'params': [0, 1],
    'lr': 0.1,
    'alpha': 0.99,
    'eps': 1e-8,
    'weight_decay': 0,
    'momentum': 0.0,
    'centered': False,
}
ENTRIES = {
    0: {'step': 1.0, 'square_avg': np.ones((3, 4), 'f')},
    1: {'step': 1.0, 'square_avg': np.ones(3, 'f')},
}
TORCH = {'state': ENTRIES, 'param_groups': [GROUP]}
RUN = {'params': np.ones((3, 2)), 'gradients': np.ones((2, 2)), 'learning_rate': 0.1}
BYTES = storage.per_leaf(lambda path, shape: storage.uint8())
NUMBER = 'must be a real scalar'
FLAG = 'must be True or False'
# Makers of transformations, masks, averages and storage: function, arguments, error and message.
WRONG = [
    (rmsprop, (0.1, 0.9, 'x'), TypeError, f'eps {NUMBER}'),
    (rmsprop, (None,), TypeError, f'learning_rate {NUMBER}'),
    (rmsprop, {'learning_rate': 0.1, 'momentum': 'x'}, TypeError, f'momentum {NUMBER}'),
    (rmsprop, {'learning_rate': 0.1, 'weight_decay': 'x'}, TypeError, f'weight_decay {NUMBER}'),
    (
        rmsprop,
        {'learning_rate': 0.1, 'weight_decay': 0.1, 'mask': {'dense': 3}},
        TypeError,
        rf"mask\['dense'\] {FLAG}, got 3",
    ),
    (scale_by_rms, {'storage': 'bfloat16'}, TypeError, "storage must be.*got 'bfloat16'"),
    (scale_by_stddev, (1,), ValueError, 'decay must be in'),
    (trace, (0.9, 'yes'), TypeError, f'nesterov {FLAG}'),
    (inject_hyperparams, (3,), TypeError, 'inner_factory must be a function, got 3'),
    (inject_hyperparams, (rmsprop, (), int), TypeError, 'hyperparam_dtype must be a floating'),
    (inject_hyperparams, (rmsprop, (), 'x'), TypeError, 'hyperparam_dtype must be a floating'),
    (reset, (3, STATE, PARAMS, True), TypeError, 'tx must be a gradient transformation, got 3'),
    (reset, (TX, 3, PARAMS, True), ValueError, 'state does not belong to tx'),
    (reset, (TX, STATE, PARAMS, {'dense': 3}), TypeError, f'mask.*{FLAG}'),
    (reset, (TX, STATE, PARAMS, {'x': True}), ValueError, 'mask is neither like params nor'),
    (reset, (TX, STATE, PARAMS, True, 'x'), TypeError, 'storage must be'),
    (
        reset,
        (TX, TX.init({'dense': {'kernel': jnp.ones(2), 'bias': jnp.ones(3)}}), PARAMS, True),
        ValueError,
        r"nu\['dense'\]\['kernel'\] has shape \(2,\), but tx.init\(params\) makes \(4, 3\)",
    ),
    (storage.large_leaves, (3,), TypeError, 'format must be a storage format, got 3'),
    (storage.large_leaves, (storage.uint8(), 'x'), ValueError, 'min_size must be an integer'),
    (storage.large_leaves, (storage.uint8(), 1, -1), ValueError, 'min_ndim must be an integer'),
    (storage.per_leaf, (3,), TypeError, 'needs a function of path and shape, got 3'),
    (storage.per_statistic, {'nu': 3}, TypeError, 'storage must be'),
    (storage.uint8, ('x',), TypeError, f'scale {NUMBER}'),
    (storage.uint8, (np.nan,), ValueError, 'scale must be finite'),
    (storage.bfloat16, {'seed': 1.5}, TypeError, 'seed must be a Python integer'),
    (storage.read, (STATE, 3), TypeError, 'storage must be'),
    (storage.read, (STATE, BYTES), ValueError, r"nu\['dense'\]\['bias'\] is stored as float32"),
    (storage.saturation, (STATE, 3), TypeError, 'storage must be'),
    (storage.describe, (STATE, BYTES), ValueError, 'is stored as float32'),
    (storage.convert, (STATE, PARAMS, None, 3), TypeError, 'storage must be'),
    (storage.convert, (STATE, {}, None, None), ValueError, r"params\['dense'\].* does not exist"),
    (
        storage.convert,
        (STATE, {'dense': {'kernel': 'x', 'bias': jnp.ones(3)}}, None, None),
        TypeError,
        r"params\['dense'\]\['kernel'\] is a str, not an array",
    ),
    (storage.check, (3, STATE, None), TypeError, 'description must be what'),
    (storage.check, ({}, STATE, None), ValueError, 'not one that storage.describe made'),
    (
        storage.check,
        ({'rmsprop_jax.storage': np.ones(3), 'leaves': {}}, STATE, None),
        ValueError,
        'not one that storage.describe made',
    ),
    (
        storage.check,
        ({'rmsprop_jax.storage': 1, 'leaves': {3: [[]], '.x': np.ones(3)}}, STATE, None),
        ValueError,
        r'the checkpoint is of another state:(.|\n)*\.x: array.* in the checkpoint, absent here',
    ),
    (dialects.torch, ('x',), TypeError, f'lr {NUMBER}'),
    (dialects.torch, {'maximize': 'x'}, TypeError, f'maximize {FLAG}'),
    (dialects.torch, {'weight_decay': 'x'}, TypeError, f'weight_decay {NUMBER}'),
    (dialects.torch, {'weight_decay': 0.1, 'mask': 3}, TypeError, f'mask {FLAG}'),
    (dialects.torch_clip_grad_norm, (-1.0,), ValueError, 'max_norm must be in'),
    (dialects.torch_clip_grad_norm, (1.0, 'x'), TypeError, "norm_type must be a number, got 'x'"),
    (dialects.keras, {'clipnorm': 'x'}, TypeError, f'clipnorm {NUMBER}'),
    (dialects.keras, {'use_ema': 'x'}, TypeError, f'use_ema {FLAG}'),
    (dialects.keras, {'loss_scale_factor': 0}, ValueError, 'loss_scale_factor must not be zero'),
    (
        dialects.keras,
        {'use_ema': True, 'ema_overwrite_frequency': 1.5},
        ValueError,
        'ema_overwrite_frequency must be an integer',
    ),
    (dialects.keras_legacy, {'decay': -1}, ValueError, 'decay must be in'),
    (dialects.tensorflow, (0.1, 0.9, None), TypeError, f'momentum {NUMBER}'),
    (dialects.tensorflow, {'learning_rate': 0.1, 'sparse': 3}, TypeError, f'sparse {FLAG}'),
    (dialects.timm, {'caution': 'x', 'momentum': 0.9}, TypeError, f'caution {FLAG}'),
    (dialects.timm, {'decoupled_decay': 'x'}, TypeError, f'decoupled_decay {FLAG}'),
    (dialects.timm, {'corrected_weight_decay': 1}, TypeError, f'corrected_weight_decay {FLAG}'),
    (dialects.timm, {'lr_in_momentum': 1}, TypeError, f'lr_in_momentum {FLAG}'),
    (
        dialects.timm,
        {'weight_decay': 1, 'decoupled_decay': True, 'corrected_weight_decay': True, 'max_lr': 0},
        ValueError,
        'max_lr must not be zero',
    ),
    (dialects.stable_baselines3, (0.1, 1.0), ValueError, 'alpha must be in'),
    (dialects.mxnet, {'clip_weights': 'x'}, TypeError, f'clip_weights {NUMBER}'),
    (dialects.mxnet, {'rescale_grad': 'x'}, TypeError, f'rescale_grad {NUMBER}'),
    (dialects.mxnet1, {'gamma2': 1, 'centered': True}, ValueError, 'gamma2 must be in'),
    (dialects.graves, {'momentum': 1}, ValueError, 'momentum must be in'),
    (dialects.hinton, (0.1, 2), ValueError, 'decay must be in'),
    (recipes.wgan, {'network': 'x'}, ValueError, "network must be.*got 'x'"),
    (recipes.wgan_clamp, (3,), TypeError, 'params has dtype int'),
    (recipes.wgan_clamp, ({'w': 'x'},), TypeError, r"params\['w'\] is a str"),
    (recipes.describe_mask, (PARAMS, 3), TypeError, f'mask {FLAG}'),
    (recipes.describe_mask, (PARAMS, {'x': True}), ValueError, 'mask is neither like params'),
    (recipes.slim_decay_mask, (PARAMS, 3), TypeError, 'depthwise must be a regular expression'),
    (recipes.slim_decay_mask, (PARAMS, '('), ValueError, 'depthwise is no regular expression'),
    (recipes.tensorflow_decay_mask, (PARAMS, '('), ValueError, 'batch_norm is no regular'),
    (recipes.ema_init, ({'w': 'x'},), TypeError, r"values\['w'\] is a str"),
    (recipes.ema_update, (PARAMS, PARAMS, 1, 2.0), ValueError, 'decay must be in'),
    (recipes.ema_update, (PARAMS, PARAMS, 'x', 0.9), TypeError, f'count {NUMBER}'),
    (recipes.ema_update, (3, PARAMS, 1, 0.9), ValueError, 'values and average differ'),
]

NO_TX = 'must be a gradient transformation, got 3'
WRONG += [
    (rmsprop_jax.skip_nonfinite, (3,), TypeError, f'inner {NO_TX}'),
    (rmsprop_jax.skip_nonfinite, (TX, 'x'), TypeError, "per must be one of.*got 'x'"),
    (rmsprop_jax.nonfinite_entries, (3, STATE, PARAMS), TypeError, f'tx {NO_TX}'),
    (rmsprop_jax.nonfinite_entries, (TX, STATE, PARAMS, 3), TypeError, 'storage must be'),
    (diagnostics.measured, (3,), TypeError, f'inner {NO_TX}'),
    (diagnostics.measured, {'inner': TX, 'quantiles': (2.0,)}, ValueError, 'quantiles must be'),
    (diagnostics.measured, {'inner': TX, 'every': 0}, ValueError, 'every must be an integer'),
    (diagnostics.by_depth, ('x',), ValueError, 'depth must be an integer of at least 1'),
    (diagnostics.epsilon_shares, (3, PARAMS, 1e-8), ValueError, 'state has no second moment'),
    (diagnostics.epsilon_shares, (STATE, PARAMS, 'x'), TypeError, f'eps {NUMBER}'),
    (diagnostics.read, (3, PARAMS), ValueError, 'measurements of 0 measured optimizers'),
    (diagnostics.saturated_shares, (STATE, PARAMS, 3), TypeError, 'storage must be'),
    (diagnostics.stalled_shares, (STATE, STATE, PARAMS, 3), TypeError, 'storage must be'),
    (diagnostics.step_sizes, (PARAMS, 3), TypeError, r"labels\['dense'\].* must be a string"),
    (diagnostics.update_ratios, (PARAMS, {}), ValueError, r"params\['dense'\].* does not exist"),
    (sharding.abstract_state, (3, PARAMS), TypeError, f'tx {NO_TX}'),
    (sharding.state_shardings, (3, PARAMS), TypeError, f'tx {NO_TX}'),
    (sharding.zero1_shardings, (PARAMS, 3), TypeError, 'params.* has sharding 3'),
    (sharding.zero1, (TX, PARAMS, 3), TypeError, 'params.* has sharding 3'),
]
_POSITIVE, _STEPS = 'must be positive and finite', 'must be an integer of at least'
WRONG += [
    (recipe, numbers | {name: wrong}, ValueError, f'{name} {message}')
    for recipe, numbers, name, wrong, message in [
        (recipes.a3c, {'frames_per_update': 1, 'max_norm': 1}, 'total_frames', 0, _POSITIVE),
        (recipes.baselines_a2c, {'total_timesteps': 9}, 'batch_size', 0, _POSITIVE),
        (recipes.dqn_nature, {}, 'mean_over', 0, _STEPS),
        (recipes.impala_atari, {'total_frames': 9}, 'frames_per_update', 0, _POSITIVE),
        (recipes.impala_dmlab, {'total_frames': 9}, 'frames_per_update', -1, _POSITIVE),
        (recipes.impala_dmlab30, {'frames_per_update': 1}, 'total_frames', np.nan, _POSITIVE),
        (recipes.inception_v3, {'batch_size': 1}, 'steps_per_epoch', 0, _POSITIVE),
        (recipes.efficientnet, {'batch_size': 1}, 'steps_per_epoch', 0, _POSITIVE),
        (recipes.mnasnet, {'steps_per_epoch': 1}, 'batch_size', 0, _POSITIVE),
        (recipes.mobilenet_v2, {'steps_per_epoch': 1}, 'batch_size', 0, _POSITIVE),
        (recipes.mobilenet_v3_timm, {'steps_per_epoch': 1}, 'warmup_epochs', -1, _STEPS),
        (
            recipes.efficientnet_timm,
            {'steps_per_epoch': 1, 'batch_size': 1},
            'warmup_epochs',
            'x',
            _STEPS,
        ),
    ]
]
# What reads and writes files of others; none of it can be traced.
WRONG_FILES = [
    (interchange.flattened, (0,), ValueError, 'channels, window must be an integer of at least 1'),
    (interchange.Layout((0, 0)).to_ours, (np.ones((2, 2)),), ValueError, 'cannot be laid out'),
    (interchange.Layout((1, 0)).to_theirs, ([1],), ValueError, 'its 1 axes cannot be laid out'),
    (interchange.Pair, (3, 'x'), TypeError, 'theirs must be a name, got 3'),
    (interchange.Pair, ('x', 3), TypeError, 'ours must be a path.*got 3'),
    (interchange.Pair, ('x', 'y', 3), TypeError, 'layout must be a Layout, got 3'),
    (interchange.torch.linear, ('x', 3), TypeError, 'ours must be a path.*got 3'),
    (interchange.torch.conv, ('x', 3), TypeError, 'ours must be a path.*got 3'),
    (interchange.torch.norm, ('x', 3), TypeError, 'ours must be a path.*got 3'),
    (interchange.keras.dense, ('x', 3), TypeError, 'ours must be a path.*got 3'),
    (interchange.keras.norm, ('x', 3), TypeError, 'ours must be a path.*got 3'),
    (interchange.parameters_from, (3, PARAMS, PAIRS), TypeError, 'theirs must be a mapping'),
    (interchange.parameters_from, ({}, PARAMS, 3), TypeError, 'mapping must hold pairs.*got 3'),
    (
        interchange.parameters_from,
        ({'dense.weight': [[1, 2], [3]], 'dense.bias': 'x', 'y': 1}, PARAMS, PAIRS),
        ValueError,
        "'y' is in no pair(.|\\n)*'dense.bias' has dtype <U1(.|\\n)*'dense.weight' cannot be read",
    ),
    (
        interchange.parameters_from,
        ({'w': np.ones(2)}, {'w': 3}, [interchange.Pair('w', 'w')]),
        ValueError,
        "'w' has no place: ours is a int, not an array",
    ),
    (interchange.parameters_to, (PARAMS, [3]), TypeError, 'mapping must hold pairs.*got 3'),
    (interchange.parameters_to, (3, PAIRS), ValueError, "'dense/kernel'.* is not in params"),
    (interchange.from_torch, (3, TX, PARAMS, PAIRS), TypeError, 'state_dict must be a mapping'),
    (interchange.from_torch, (TORCH, 3, PARAMS, PAIRS), TypeError, 'tx must be a gradient trans'),
    (interchange.from_torch, ({}, TX, PARAMS, PAIRS), ValueError, "'param_groups' is missing"),
    (
        interchange.from_torch,
        ({'state': {0: 3}, 'param_groups': [GROUP]}, TX, PARAMS, PAIRS),
        ValueError,
        'state 0 is a int, not a dictionary',
    ),
    (
        interchange.from_torch,
        ({'param_groups': [3, {'params': 3}, {'params': [[]], 'param_names': [3]}]}, TX, 0, ()),
        ValueError,
        "group 0 is a int(.|\\n)*group 1: 'params' is(.|\\n)*group 2: 'param_names' is no list",
    ),
    *[
        (
            lambda **wrong: interchange.from_torch(
                TORCH, TX, PARAMS, PAIRS, **({'names': NAMES} | wrong)
            ),
            {name: value},
            error,
            message,
        )
        for name, value, error, message in [
            ('names', 3, TypeError, 'names must be a list of names, got 3'),
            ('fresh', 'dense.bias', TypeError, 'fresh must be a collection'),
            ('count', 'x', TypeError, "count must be an integer, got 'x'"),
            ('count', -1, ValueError, 'count must not be negative'),
            ('count', 1.5, TypeError, 'count must be an integer'),
        ]
    ],
    (interchange.torch_optimizer, ({}, PARAMS, PAIRS), ValueError, "'param_groups' is missing"),
    *[
        (
            lambda group: interchange.torch_optimizer(
                {'param_groups': [group]}, PARAMS, PAIRS, names=NAMES
            ),
            (GROUP | wrong,),
            ValueError,
            message,
        )
        for wrong, message in [
            ({'lr': 'x'}, "group 0: lr is 'x', which is no number"),
            ({'centered': np.ones(3)}, 'group 0: centered is array.*, which is no number'),
            ({'alpha': 2}, 'group 0: alpha must be in'),
            ({3: 3, 'z': 3}, "group 0: 3 is no setting(.|\\n)*group 0: 'z' is no setting"),
        ]
    ],
    (interchange.to_torch, (STATE, PARAMS, PAIRS, 3), ValueError, 'missing or no list'),
    (interchange.to_torch, (3, PARAMS, PAIRS, [GROUP]), ValueError, 'has step counts'),
    (
        lambda group: interchange.to_torch(STATE, PARAMS, PAIRS, [group], names=NAMES),
        (GROUP | {'momentum': np.ones(3)},),
        ValueError,
        "'dense.weight' has momentum=array.* in its group, which is no number",
    ),
    (interchange.from_optax, (3, TX, PARAMS), ValueError, 'no single step count'),
    (interchange.from_optax, (STATE, 3, PARAMS), TypeError, 'tx must be a gradient'),
    (
        interchange.from_optax,
        {'theirs': STATE, 'tx': TX, 'params': PARAMS, 'decay': 2},
        ValueError,
        'decay must be in',
    ),
    (interchange.to_optax, (3, optax.rmsprop(0.1), PARAMS), ValueError, 'has step counts'),
    (interchange.to_optax, (STATE, 3, PARAMS), TypeError, 'tx must be a gradient'),
    (interchange.from_keras, (3, TX, PARAMS, PAIRS), TypeError, 'variables must be a mapping'),
    (interchange.from_keras, ({3: 3}, TX, PARAMS, PAIRS), TypeError, 'keys of variables.*got 3'),
    (
        interchange.from_keras,
        ({'iteration': np.ones(3, int)}, TX, PARAMS, PAIRS),
        ValueError,
        "'iteration' is missing or no step count",
    ),
    (
        lambda steps: interchange.from_keras(
            {'iteration': 1}, TX, PARAMS, PAIRS, gradient_accumulation_steps=steps
        ),
        (0,),
        ValueError,
        'gradient_accumulation_steps must be an integer of at least 1',
    ),
    (interchange.to_keras, (STATE, PARAMS, 3), TypeError, 'mapping must hold pairs'),
    (
        interchange.to_keras,
        {'state': STATE, 'params': PARAMS, 'mapping': PAIRS, 'learning_rate': 'x'},
        TypeError,
        f'learning_rate {NUMBER}',
    ),
    (interchange.from_tensorflow, (3, TX, PARAMS, PAIRS), TypeError, 'variables must be a map'),
    (interchange.from_tensorflow, ({}, TX, PARAMS, PAIRS), ValueError, "'global_step' is missing"),
    (interchange.to_tensorflow, (3, PARAMS, PAIRS), ValueError, 'has step counts'),
    (identify_dialect, (3,), TypeError, 'trace must be a Trace, a mapping or a path, got 3'),
    (identify_dialect, ('/no/such.npz',), FileNotFoundError, 'no/such.npz'),
    (identify_dialect, ({3: 4},), ValueError, 'a trace has no entry 3'),
    (identify_dialect, (RUN | {'params/a': 1},), ValueError, 'has params twice'),
    (identify_dialect, {'trace': RUN, 'decay': 'x'}, ValueError, 'decay must be a number'),
    (identify_dialect, {'trace': RUN, 'eps': -1}, ValueError, 'eps must be in'),
    (aot.devices, ('x',), ValueError, "'x'"),
    (aot.compile_update, (3, PARAMS), TypeError, 'tx must be a gradient transformation'),
]
# Those that are in neither table, with a reason.
NOT_IN_TABLES = {
    diagnostics.nonfinite_counts: 'takes any tree of arrays',
    sharding.reduce_scatter: 'runs inside jax.shard_map: see test_sharding.py',
    aot.Report.text: 'has no arguments',
    aot.targets: 'has no arguments',
    aot.table: 'takes reports, which only compile_update and compile_step make',
    aot.compile_step: 'hands function and arguments to jax.jit, which complains',
    dialects.table: 'has no arguments',
    recipes.table: 'has no arguments',
    recipes.dopamine_dqn: 'has no arguments',
    recipes.graves: 'has no arguments',
    recipes.sb3_a2c: 'has no arguments',
    recipes.sb3_a2c_tf_like: 'has no arguments',
    recipes.timm_decay_mask: 'takes any tree',
    rmsprop_jax.identify.Identification.as_dict: 'has no arguments',
}


def call(function, arguments):
    result = function(**arguments) if isinstance(arguments, dict) else function(*arguments)
    if isinstance(result, optax.GradientTransformation):
        # A mask is looked at where the parameters are known.
        result.update(PARAMS, result.init(PARAMS), PARAMS)


@pytest.mark.parametrize('traced', [False, True], ids=['eager', 'jit'])
@pytest.mark.parametrize(('function', 'arguments', 'error', 'message'), WRONG)
def test_wrong_arguments(function, arguments, error, message, traced):
    run = jax.eval_shape if traced else lambda f: f()
    with pytest.raises(error, match=message):
        run(lambda: call(function, arguments))


@pytest.mark.parametrize(('function', 'arguments', 'error', 'message'), WRONG_FILES)
def test_wrong_files(function, arguments, error, message):
    with pytest.raises(error, match=message):
        call(function, arguments)


def test_every_public_function_is_called_wrongly():
    called = {getattr(row[0], '__func__', row[0]) for row in [*WRONG, *WRONG_FILES]}
    absent = [
        name
        for name, function in public_api.functions().items()
        if function not in called | NOT_IN_TABLES.keys()
        # What a format does for the package is given arguments that have been looked at.
        and not name.startswith('rmsprop_jax.storage.Format.')
    ]
    assert not absent, absent


@pytest.mark.parametrize('kind', ['cut', 'flipped', 'pickle', 'promises too much', 'text'])
def test_hostile_traces_are_refused(kind, tmp_path):
    """A file is read whole or not at all, and nothing in it is ever unpickled."""
    path, buffer = tmp_path / 'trace.npz', io.BytesIO()
    np.savez_compressed(buffer, **RUN | ({'decay': np.array([set()])} if kind == 'pickle' else {}))
    content = buffer.getvalue()
    if kind == 'cut':
        content = content[: len(content) // 2]
    elif kind == 'flipped':
        content = content[:60] + bytes(255 - x for x in content[60:80]) + content[80:]
    elif kind == 'promises too much':
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {'descr': '<f8', 'fortran_order': False, 'shape': (2**60,)}
        )
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w') as archive:
            archive.writestr('params.npy', header.getvalue())
        content = buffer.getvalue()
    elif kind == 'text':
        content = b'params'
    path.write_bytes(content)
    with pytest.raises(ValueError, match='trace.npz is (damaged|no .npz file)'):
        identify_dialect(path)
