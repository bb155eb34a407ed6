"""Every argument of every public function, given a wrong value, gets one clear error."""

import inspect
import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public_api
import pytest
from flax import nnx
from jax.typing import ArrayLike

import rmsprop_jax
from rmsprop_jax import (
    aot,
    carry_over,
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
from rmsprop_jax._types import ScalarOrSchedule
from rmsprop_jax.dialects._record import functions

PARAMS = {'dense': {'kernel': jnp.ones((4, 3)), 'bias': jnp.ones(3)}}
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
    'maximize': False,
}
ENTRIES = {
    0: {'step': 1.0, 'square_avg': np.ones((3, 4), 'f')},
    1: {'step': 1.0, 'square_avg': np.ones(3, 'f')},
}
TORCH = {'state': ENTRIES, 'param_groups': [GROUP]}
RUN = {'params': np.ones((3, 2)), 'gradients': np.ones((2, 2)), 'learning_rate': 0.1}
BYTES = storage.per_leaf(lambda path, shape: storage.uint8())
IN_BYTES = rmsprop(0.1, storage=BYTES).init(PARAMS)
WITH_TRACE = rmsprop(0.1, momentum=0.9).init(PARAMS)
THEIRS = {'dense.weight': np.ones((3, 4), 'f'), 'dense.bias': np.ones(3, 'f')}
SAFETENSORS = Path(__file__).parent / 'interchange_data' / 'files' / 'run.safetensors'
FROM_TORCH = {
    'state_dict': TORCH,
    'tx': dialects.torch(0.1),
    'params': PARAMS,
    'mapping': PAIRS,
    'names': NAMES,
}
NNX = nnx.Optimizer(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rmsprop(0.1), wrt=nnx.Param)
WITH_VELOCITY = {
    'state': WITH_TRACE,
    'params': PARAMS,
    'mapping': PAIRS,
    'tx': rmsprop(0.1, momentum=0.9),
}
LAYERS = (
    *(interchange.torch.linear, interchange.torch.conv, interchange.torch.norm),
    *(interchange.keras.dense, interchange.keras.norm),
    *(interchange.torch.batch_stats, interchange.keras.batch_stats),
)
PLACE = jax.sharding.NamedSharding(jax.make_mesh((1,), ('data',)), jax.sharding.PartitionSpec())
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
    (scale_by_stddev, (2,), ValueError, 'decay must be in'),
    (trace, (0.9, 'yes'), TypeError, f'nesterov {FLAG}'),
    (inject_hyperparams, (3,), TypeError, 'inner_factory must be a function, got 3'),
    (inject_hyperparams, (rmsprop, (), int), TypeError, 'hyperparam_dtype must be a floating'),
    (inject_hyperparams, (rmsprop, (), 'x'), TypeError, 'hyperparam_dtype must be a floating'),
    (reset, (3, STATE, PARAMS, True), TypeError, 'tx must be a gradient transformation, got 3'),
    (reset, (TX, 3, PARAMS, True), ValueError, r'of state does not match that of tx.init\(params'),
    (reset, (TX, STATE, PARAMS, {'dense': 3}), TypeError, f'mask.*{FLAG}'),
    (reset, (TX, STATE, PARAMS, {'x': True}), ValueError, 'mask is neither like params nor'),
    (reset, (TX, STATE, PARAMS, True, 'x'), TypeError, 'storage must be'),
    (
        reset,
        (TX, TX.init({'dense': {'kernel': jnp.ones(2), 'bias': jnp.ones(3)}}), PARAMS, True),
        ValueError,
        r"nu\['dense'\]\['kernel'\] has shape \(2,\), but tx.init\(params\) has \(4, 3\)",
    ),
    (storage.large_leaves, (3,), TypeError, 'format must be a storage format, got 3'),
    (storage.large_leaves, (storage.uint8(), 'x'), ValueError, 'min_size must be an integer'),
    (storage.large_leaves, (storage.uint8(), 1, -1), ValueError, 'min_ndim must be an integer'),
    (storage.per_leaf, (3,), TypeError, 'needs a function of path and shape, got 3'),
    (storage.per_statistic, {'nu': 3}, TypeError, 'nu must be a format'),
    (storage.uint8, ('x',), TypeError, f'scale {NUMBER}'),
    (storage.uint8, (np.nan,), ValueError, 'scale must be finite'),
    (storage.bfloat16, {'seed': 1.5}, TypeError, 'seed must be a Python integer'),
    (storage.read, (STATE, 3), TypeError, 'storage must be'),
    (storage.read, (STATE, BYTES), ValueError, r"nu\['dense'\]\['bias'\] is stored as float32"),
    (storage.saturation, (STATE, 3), TypeError, 'storage must be'),
    (storage.describe, (STATE, BYTES), ValueError, 'is stored as float32'),
    (storage.convert, (STATE, PARAMS, None, 3), TypeError, '^to must be a format'),
    (storage.convert, (STATE, {}, None, None), ValueError, r"params\['dense'\].* does not exist"),
    (
        storage.convert,
        (STATE, {'dense': {'kernel': 'x', 'bias': jnp.ones(3)}}, None, None),
        TypeError,
        r"params\['dense'\]\['kernel'\] is a str, not an array",
    ),
    (storage.check, (3, STATE, None), TypeError, 'description must be a result'),
    (storage.check, ({}, STATE, None), ValueError, 'was not made by storage.describe'),
    (
        storage.check,
        ({'rmsprop_jax.storage': np.ones(3), 'leaves': {}}, STATE, None),
        ValueError,
        'was not made by storage.describe',
    ),
    (
        storage.check,
        ({'rmsprop_jax.storage': 1, 'leaves': {3: [[]], '.x': np.ones(3)}}, STATE, None),
        ValueError,
        r'does not match the state: rmsprop_jax None wrote it(.|\n)*\.x: array.*',
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
    (
        dialects.tf_keras,
        {'use_ema': True, 'ema_overwrite_frequency': -1},
        ValueError,
        'ema_overwrite_frequency must be an integer',
    ),
    (
        dialects.tf_keras,
        {'clipnorm': 1.0, 'clipvalue': 'x'},
        TypeError,
        f'clipvalue {NUMBER}',
    ),
    (dialects.keras_legacy, {'decay': -1}, ValueError, 'decay must be in'),
    (dialects.keras_legacy, {'sparse': 3}, TypeError, f'sparse {FLAG}'),
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
    (dialects.stable_baselines3, (0.1, 1.5), ValueError, 'alpha must be in'),
    (dialects.mxnet, {'clip_weights': 'x'}, TypeError, f'clip_weights {NUMBER}'),
    (dialects.mxnet, {'rescale_grad': 'x'}, TypeError, f'rescale_grad {NUMBER}'),
    (dialects.mxnet1, {'gamma2': 2, 'centered': True}, ValueError, 'gamma2 must be in'),
    (dialects.graves, {'momentum': 2}, ValueError, 'momentum must be in'),
    (dialects.hinton, (0.1, 2), ValueError, 'decay must be in'),
    (recipes.wgan, {'network': 'x'}, ValueError, "network must be.*got 'x'"),
    (recipes.wgan_clamp, (3,), TypeError, 'params has dtype int'),
    (recipes.wgan_clamp, ({'w': 'x'},), TypeError, r"params\['w'\] is a str"),
    (recipes.describe_mask, (PARAMS, 3), TypeError, f'mask {FLAG}'),
    (recipes.describe_mask, (PARAMS, {'x': True}), ValueError, 'mask is neither like params'),
    (recipes.slim_decay_mask, (PARAMS, 3), TypeError, 'depthwise must be a regular expression'),
    (recipes.slim_decay_mask, (PARAMS, '('), ValueError, 'depthwise is not a regular expression'),
    (recipes.tensorflow_decay_mask, (PARAMS, '('), ValueError, 'batch_norm is not a regular'),
    (recipes.ema_init, ({'w': 'x'},), TypeError, r"values\['w'\] is a str"),
    (recipes.ema_update, (PARAMS, PARAMS, 1, 2.0), ValueError, 'decay must be in'),
    (recipes.ema_update, (PARAMS, PARAMS, 'x', 0.9), TypeError, f'count {NUMBER}'),
    (recipes.ema_update, (3, PARAMS, 1, 0.9), ValueError, 'values and average differ'),
]

NO_TX = 'must be a gradient transformation, got 3'
WRONG += [
    (rmsprop_jax.skip_nonfinite, (3,), TypeError, f'inner {NO_TX}'),
    (rmsprop_jax.round_parameters, (3,), TypeError, f'inner {NO_TX}'),
    (rmsprop_jax.skip_nonfinite, (TX, 'x'), TypeError, "per must be one of.*got 'x'"),
    (rmsprop_jax.nonfinite_entries, (3, STATE, PARAMS), TypeError, f'tx {NO_TX}'),
    (rmsprop_jax.nonfinite_entries, (TX, STATE, PARAMS, 3), TypeError, 'storage must be'),
    (diagnostics.measured, (3,), TypeError, f'inner {NO_TX}'),
    (diagnostics.measured, {'inner': TX, 'quantiles': (2.0,)}, ValueError, 'quantiles must be'),
    (diagnostics.step_sizes, (PARAMS, None, (10**400,)), ValueError, 'quantiles must be'),
    (recipes.baselines_a2c, {'total_timesteps': 9, 'batch_size': 10**400}, ValueError, '_size mus'),
    (diagnostics.measured, {'inner': TX, 'every': 0}, ValueError, 'every must be an integer'),
    (diagnostics.by_depth, ('x',), ValueError, 'depth must be an integer of at least 1'),
    (diagnostics.epsilon_shares, (3, PARAMS, 1e-8), ValueError, 'state has no second moment'),
    (diagnostics.epsilon_shares, (STATE, PARAMS, 'x'), TypeError, f'eps {NUMBER}'),
    (diagnostics.read, (3, PARAMS), ValueError, 'measurements of 0 optimizers'),
    (diagnostics.saturated_shares, (STATE, PARAMS, 3), TypeError, 'storage must be'),
    (diagnostics.stalled_shares, (STATE, STATE, PARAMS, 3), TypeError, 'storage must be'),
    (diagnostics.step_sizes, (PARAMS, 3), TypeError, r"labels\['dense'\].* must be a string"),
    (diagnostics.update_ratios, (PARAMS, {}), ValueError, r"params\['dense'\].* does not exist"),
    (sharding.abstract_state, (3, PARAMS), TypeError, f'tx {NO_TX}'),
    (sharding.state_shardings, (3, PARAMS), TypeError, f'tx {NO_TX}'),
    (sharding.zero1_shardings, (PARAMS, 3), TypeError, r'shardings\[.* must be a sharding'),
    (sharding.zero1, (TX, PARAMS, 3), TypeError, r'shardings\[.* must be a sharding'),
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

# The hyperparameters that the makers of steps share.
NUMBERS_AND_FLAGS = [
    ('decay', 1.5, ValueError, r'decay must be in \[0, 1\], got 1.5'),
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
    ('momentum', 1.5, ValueError, r'momentum must be in \[0, 1\]'),
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
    ('nesterov', 0.5, TypeError, 'nesterov must be True or False'),
]
WRONG += [
    (function, rest | {name: value}, error, message)
    for name, value, error, message in NUMBERS_AND_FLAGS
    for function, rest in (
        (rmsprop, {'learning_rate': 0.1, 'momentum': 0.9}),
        (scale_by_rms, {}),
        (scale_by_stddev, {}),
        (trace, {'decay': 0.9}),
    )
    if name in inspect.signature(function).parameters
]

# Parameters, gradients and states.
STEPS = (TX, rmsprop(0.1, centered=True), rmsprop(0.1, momentum=0.9), trace(0.9))
NOT_FLOATING = (
    (jnp.ones(3, jnp.int32), 'has dtype int32'),
    (jnp.ones(3, bool), 'has dtype bool'),
    (np.arange(3), 'has dtype int'),
    (7, 'has dtype int32'),
    ('name', 'is a str'),
    (jax.random.key(0), 'has dtype key'),
)
WRONG += [
    (
        tx.init,
        ({'dense': {'kernel': jnp.ones(2), 'steps': leaf}},),
        TypeError,
        re.escape("params['dense']['steps'] ") + message,
    )
    for tx in (TX, scale_by_stddev(), trace(0.9))
    for leaf, message in NOT_FLOATING
]
KERNEL, BIAS = PARAMS['dense'].values()
MISFITS = (
    (
        {'dense': {'kernel': KERNEL, 'scale': BIAS}},
        ValueError,
        (
            'structure of updates does not match',
            "only in updates: ['dense']['scale']",
            "only in the state: ['dense']['bias']",
        ),
    ),
    (
        {'dense': {'kernel': KERNEL, 'bias': None}},
        ValueError,
        ("only in the state: ['dense']['bias']",),
    ),
    ({'dense': (BIAS, KERNEL)}, ValueError, ('updates: PyTreeDef', 'state: PyTreeDef')),
    ({'dense': BIAS}, ValueError, ("updates['dense'] has shape (3,), but ", 'has dict there')),
    (
        {'dense': {'kernel': KERNEL.T, 'bias': BIAS}},
        ValueError,
        ("updates['dense']['kernel'] has shape (3, 4), but ", 'has (4, 3) there'),
    ),
    (
        {'dense': {'kernel': KERNEL, 'bias': jnp.ones(3, jnp.int32)}},
        TypeError,
        ("updates['dense']['bias'] has dtype int32",),
    ),
)
WRONG += [
    (
        tx.update,
        (gradients, tx.init(PARAMS)),
        error,
        '(?s)' + ''.join(f'(?=.*{re.escape(message)})' for message in messages),
    )
    for tx in STEPS
    for gradients, error, messages in MISFITS
]
REAL, IMAGINARY = jnp.ones(2), 1j * jnp.ones(2)
NARROW = rmsprop(0.1, decay=lambda count: jnp.bfloat16(0.999))
OTHER = 'another configuration'
CORRECTED = scale_by_rms(bias_correction=True)
WRONG += [
    (TX.init, (jnp.arange(3),), TypeError, 'params has dtype int32'),
    (NARROW.update, (PARAMS, NARROW.init(PARAMS)), TypeError, 'decay has dtype bfloat16'),
    # What jax.grad(..., allow_int=True) gives for an integer.
    *(
        (tx.update, (np.zeros(3, jax.dtypes.float0), tx.init(BIAS)), TypeError, 'updates has dtype')
        for tx in (TX, trace(0.9))
    ),
    *(
        (tx.update, (g, tx.init(p)), TypeError, f'updates has dtype {of_g}, .* is {of_p}')
        for tx in (scale_by_stddev(), trace(0.9))
        for g, p, of_g, of_p in (
            (IMAGINARY, REAL, 'complex64', 'float32'),
            (REAL, IMAGINARY, 'float32', 'complex64'),
        )
    ),
    # The second moment is real either way, so only the parameters can tell.
    (TX.update, (IMAGINARY, TX.init(REAL), REAL), TypeError, 'updates has dtype'),
    (TX.update, (REAL, TX.init(IMAGINARY), IMAGINARY), TypeError, 'updates has dtype'),
    (
        scale_by_rms().update,
        (PARAMS, optax.scale_by_rms().init(PARAMS)),
        TypeError,
        'RmsState that init returned, got ScaleByRmsState',
    ),
    (
        trace(0.9).update,
        (PARAMS, optax.EmptyState()),
        TypeError,
        'TraceState that init returned, got EmptyState',
    ),
    (
        scale_by_rms().update,
        (PARAMS, scale_by_stddev().init(PARAMS)),
        ValueError,
        f'{OTHER}.*centered=False.*mu, var',
    ),
    (
        CORRECTED.update,
        (PARAMS, scale_by_rms().init(PARAMS)),
        ValueError,
        f'{OTHER}.*weight',
    ),
    (
        scale_by_rms().update,
        (PARAMS, CORRECTED.init(PARAMS)),
        ValueError,
        f'{OTHER}.*weight',
    ),
    *(
        (tx.update, (PARAMS, tx.init(PARAMS)), ValueError, f'^{name} needs params')
        for tx, name in (
            (rmsprop(0.1, weight_decay=0.1), 'weight_decay'),
            (dialects.torch(0.1, weight_decay=0.1), 'weight_decay'),
            (dialects.mxnet(0.1, wd=0.1), 'wd'),
        )
    ),
]

# What reads and writes files of others; none of it can be traced.
WRONG_FILES = [
    (interchange.flattened, (0,), ValueError, 'channels, window must be an integer of at least 1'),
    (interchange.Layout((0, 0)).to_ours, (np.ones((2, 2)),), ValueError, 'cannot be laid out'),
    (interchange.Layout((1, 0)).to_theirs, ([1],), ValueError, 'its 1 axes cannot be laid out'),
    (interchange.Pair, (3, 'x'), TypeError, 'theirs must be a name, got 3'),
    (interchange.Pair, ('x', 3), TypeError, 'ours must be a path.*got 3'),
    (interchange.Pair, ('x', 'y', 3), TypeError, 'layout must be a Layout, got 3'),
    (
        interchange.Layout,
        {'part': (4, 4, 0)},
        ValueError,
        r'part must be \(which, of how many, axis',
    ),
    (interchange.Layout((0,), (), (0, 4, 0)).to_ours, ([1],), ValueError, 'has not 4 equal parts'),
    (interchange.Layout, {'blocks': (0, 2)}, ValueError, r'blocks must be each of 0, 1, .* once'),
    (interchange.keras.recurrent, ('x', 'y', 'linen.GRUCell'), ValueError, 'cell must be one of'),
    (interchange.torch.recurrent, ('x', 'y', 'z'), ValueError, "cell must be one of.*got 'z'"),
    (
        interchange.torch.recurrent,
        {'theirs': 'x', 'ours': 'y', 'cell': 'nnx.GRUCell', 'biases': ['z']},
        ValueError,
        "biases must be among 'ih' and 'hh', got 'z'",
    ),
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
        "'y' is not in any pair(.|\\n)*'dense.bias' has dtype <U1(.|\\n)*'dense.weight' cannot be",
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
        "group 0 is a int(.|\\n)*group 1: 'params' is(.|\\n)*group 2: 'param_names' is not a list",
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
            ({'lr': 'x'}, "group 0: lr is 'x', which is not a number"),
            ({'centered': np.ones(3)}, 'group 0: centered is array.*, which is not a number'),
            ({'alpha': 2}, 'group 0: alpha must be in'),
            ({3: 3, 'z': 3}, "group 0: 3 is not a setting(.|\\n)*group 0: 'z' is not a s"),
        ]
    ],
    (interchange.to_torch, (STATE, PARAMS, PAIRS, 3), ValueError, 'missing or not a list'),
    (interchange.to_torch, (3, PARAMS, PAIRS, [GROUP]), ValueError, 'has step counts'),
    (
        lambda group: interchange.to_torch(STATE, PARAMS, PAIRS, [group], names=NAMES),
        (GROUP | {'momentum': np.ones(3)},),
        ValueError,
        "'dense.weight' has momentum=array.* in its group, which is not a number",
    ),
    (interchange.nnx.set_state, (3, STATE), TypeError, 'optimizer must be an nnx.Optimizer, got'),
    (interchange.nnx.set_state, (NNX, {'x': 3}), ValueError, "'x' is not in the optimizer"),
    (interchange.nnx.set_state, (NNX, {'x': 'x'}), TypeError, r"state\['x'\] is a str, not an"),
    (interchange.from_optax, (3, TX, PARAMS), ValueError, 'has no step count: pass count'),
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
        "'iteration' is missing or not a step count",
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
    (identify_dialect, {'trace': RUN, 'decay': 10**400}, ValueError, 'decay must be a number'),
    (
        identify_dialect,
        {'trace': RUN, 'learning_rate': 10**400},
        ValueError,
        'learning_rate must be a number',
    ),
    (aot.devices, ('x',), ValueError, "^target must be one of cpu, .*, got 'x'"),
    (aot.compile_update, (3, PARAMS), TypeError, 'tx must be a gradient transformation'),
]


# --- Every argument -------------------------------------------------------------------------------

# The arguments of each dialect.
TAKEN = {f: inspect.signature(f).parameters for f in functions().values()}
# What a function is called with besides the argument that is wrong.
VALID: dict[Any, dict[str, Any]] = {
    rmsprop: {'learning_rate': 0.1, 'momentum': 0.9, 'weight_decay': 0.1},
    trace: {'decay': 0.9},
    inject_hyperparams: {'inner_factory': rmsprop},
    reset: {'tx': TX, 'state': STATE, 'params': PARAMS, 'mask': True},
    carry_over: {'tx': TX, 'state': STATE, 'params': PARAMS, 'new_params': PARAMS},
    diagnostics.learning_rates: {'tx': TX, 'state': STATE, 'params': PARAMS},
    rmsprop_jax.nonfinite_entries: {'tx': TX, 'state': STATE, 'params': PARAMS},
    rmsprop_jax.round_parameters: {'inner': TX},
    rmsprop_jax.cautious: {'inner': TX},
    sharding.offload: {'inner': TX},
    rmsprop_jax.skip_nonfinite: {'inner': TX},
    **{f: {n: 0.1 for n in ('weight_decay', 'wd') if n in names} for f, names in TAKEN.items()},
    dialects.torch: {'weight_decay': 0.1, 'momentum': 0.9},
    dialects.torch_clip_grad_norm: {'max_norm': 1.0},
    dialects.keras: {'weight_decay': 0.1, 'momentum': 0.9, 'use_ema': True},
    dialects.keras_legacy: {'momentum': 0.9},
    dialects.tf_keras: {'weight_decay': 0.1, 'momentum': 0.9, 'use_ema': True},
    dialects.tensorflow: {'learning_rate': 0.1},
    dialects.timm: {
        'weight_decay': 0.1,
        'momentum': 0.9,
        'decoupled_decay': True,
        'corrected_weight_decay': True,
    },
    dialects.stable_baselines3: {'weight_decay': 0.1, 'momentum': 0.9},
    dialects.mxnet: {'wd': 0.1, 'centered': True},
    dialects.mxnet1: {'wd': 0.1, 'centered': True},
    dialects.hinton: {'learning_rate': 0.1},
    recipes.a3c: {'total_frames': 9, 'frames_per_update': 1, 'max_norm': 1},
    recipes.baselines_a2c: {'total_timesteps': 9, 'batch_size': 1},
    recipes.impala_atari: {'total_frames': 9, 'frames_per_update': 1},
    recipes.impala_dmlab: {'total_frames': 9, 'frames_per_update': 1},
    recipes.impala_dmlab30: {'total_frames': 9, 'frames_per_update': 1},
    recipes.impala_torchbeast: {'total_steps': 9, 'steps_per_update': 1},
    recipes.inception_v3: {'steps_per_epoch': 99, 'batch_size': 1},
    recipes.efficientnet: {'steps_per_epoch': 99, 'batch_size': 1},
    recipes.efficientnet_timm: {'steps_per_epoch': 99, 'warmup_epochs': 1, 'batch_size': 1},
    recipes.mnasnet: {'steps_per_epoch': 99, 'batch_size': 1},
    recipes.mobilenet_v2: {'steps_per_epoch': 99, 'batch_size': 1},
    recipes.mobilenet_v3_timm: {'steps_per_epoch': 99, 'warmup_epochs': 1},
    recipes.wgan: {'network': 'critic'},
    recipes.describe_mask: {'params': PARAMS, 'mask': True},
    recipes.slim_decay_mask: {'params': PARAMS},
    recipes.tensorflow_decay_mask: {'params': PARAMS},
    recipes.ema_update: {
        'average': PARAMS,
        'values': PARAMS,
        'count': 1,
        'decay': 0.9,
        'copies': 1,
    },
    storage.large_leaves: {'format': storage.uint8()},
    storage.read: {'state': STATE, 'storage': None},
    storage.saturation: {'state': STATE, 'storage': None},
    storage.describe: {'state': STATE, 'storage': None},
    storage.check: {
        'description': storage.describe(STATE, None),
        'state': STATE,
        'storage': None,
    },
    storage.convert: {'state': STATE, 'params': PARAMS, 'from_': None, 'to': None},
    sharding.state_shardings: {'tx': TX, 'params': PARAMS, 'shardings': PLACE},
    sharding.abstract_state: {'tx': TX, 'params': PARAMS, 'shardings': PLACE},
    sharding.zero1_shardings: {'params': PARAMS, 'shardings': PLACE},
    sharding.zero1: {'tx': TX, 'params': PARAMS, 'shardings': PLACE},
    sharding.reduce_scatter: {'gradients': PARAMS, 'shardings': PLACE},
    diagnostics.step_sizes: {'updates': PARAMS},
    diagnostics.update_ratios: {'updates': PARAMS, 'params': PARAMS},
    diagnostics.epsilon_shares: {'state': STATE, 'params': PARAMS, 'eps': 1e-8},
    diagnostics.saturated_shares: {'state': IN_BYTES, 'params': PARAMS, 'storage': BYTES},
    diagnostics.stalled_shares: {
        'before': IN_BYTES,
        'after': IN_BYTES,
        'gradients': PARAMS,
        'storage': BYTES,
    },
    diagnostics.measured: {'inner': TX},
    diagnostics.read: {'state': diagnostics.measured(TX).init(PARAMS), 'params': PARAMS},
    interchange.Pair: {'theirs': 'x', 'ours': 'y'},
    interchange.flattened: {'channels': 2},
    interchange.parameters_from: {'theirs': THEIRS, 'like': PARAMS, 'mapping': PAIRS},
    interchange.parameters_to: {'params': PARAMS, 'mapping': PAIRS},
    interchange.propose_pairs: {'theirs': THEIRS, 'params': PARAMS},
    interchange.from_checkpoint: {
        'checkpoint': interchange.Checkpoint(THEIRS, TORCH),
        'params': PARAMS,
        'names': NAMES,
    },
    interchange.read_checkpoint: {'path': SAFETENSORS},
    interchange.save_template: {'path': os.devnull, 'params': PARAMS},
    interchange.restore_port: {'folder': 'absent', 'params': PARAMS},
    interchange.from_torch: FROM_TORCH,
    interchange.torch_optimizer: {
        'state_dict': TORCH,
        'params': PARAMS,
        'mapping': PAIRS,
        'names': NAMES,
    },
    interchange.to_torch: {
        'state': STATE,
        'params': PARAMS,
        'mapping': PAIRS,
        'param_groups': [GROUP],
        'names': NAMES,
    },
    interchange.nnx.set_state: {'optimizer': NNX, 'state': NNX.opt_state},
    interchange.from_optax: {'theirs': STATE, 'tx': TX, 'params': PARAMS},
    interchange.to_optax: {'state': STATE, 'tx': optax.rmsprop(0.1), 'params': PARAMS},
    interchange.from_keras: {
        'variables': interchange.to_keras(STATE, PARAMS, PAIRS),
        'tx': TX,
        'params': PARAMS,
        'mapping': PAIRS,
    },
    interchange.to_keras: {'state': STATE, 'params': PARAMS, 'mapping': PAIRS},
    interchange.from_tensorflow: {
        'variables': interchange.to_tensorflow(**WITH_VELOCITY),
        'tx': dialects.tensorflow(0.1),
        'params': PARAMS,
        'mapping': PAIRS,
    },
    interchange.to_tensorflow: WITH_VELOCITY,
    **{layer: {'theirs': 'x', 'ours': 'y'} for layer in LAYERS},
    interchange.torch.recurrent: {'theirs': 'x', 'ours': 'y', 'cell': 'nnx.GRUCell'},
    interchange.keras.recurrent: {'theirs': 'x', 'ours': 'y', 'cell': 'nnx.GRUCell'},
    identify_dialect: {'trace': RUN},
    aot.compile_step: {'fn': lambda *x: x, 'args': (jnp.ones(2),)},
    aot.compile_update: {'tx': TX, 'params': PARAMS},
    aot.devices: {'target': 'cpu'},
    aot.table: {'reports': ()},
}
_ARE_NUMBERS = (ScalarOrSchedule, ScalarOrSchedule | None, ArrayLike, ArrayLike | None)
# A wrong value of arguments of one name, its error and its message after the name.
NUMBERS = (
    *(n for names in TAKEN.values() for n, p in names.items() if p.annotation in _ARE_NUMBERS),
    *('initial_scale', 'max_lr', 'max_norm', 'scale', 'count', 'copies', 'warmup_power'),
)
FLAGS = (
    *('centered', 'eps_in_sqrt', 'bias_correction', 'nesterov', 'maximize', 'use_ema', 'caution'),
    *('decoupled_decay', 'corrected_weight_decay', 'lr_in_momentum', 'sparse', 'bias', 'resize'),
)
AMOUNTS = (
    *('total_frames', 'frames_per_update', 'total_timesteps', 'batch_size', 'steps_per_epoch'),
    *('total_steps', 'steps_per_update'),
)
STEPS = (
    *('mean_over', 'warmup_epochs', 'ema_overwrite_frequency', 'gradient_accumulation_steps'),
    *('every', 'depth', 'min_size', 'min_ndim'),
)
# The name of a dtype is no array.
WORDS = {'w': 'float32'}
RULES: dict[str, tuple[Any, Any, str]] = {
    **dict.fromkeys(NUMBERS, ('x', TypeError, f'{NUMBER}, got')),
    **dict.fromkeys(FLAGS, (3, TypeError, FLAG)),
    **dict.fromkeys(AMOUNTS, ('x', TypeError, "must be a Python number, got 'x'")),
    **dict.fromkeys(STEPS, ('x', ValueError, 'must be an integer of at least')),
    **dict.fromkeys(
        ('tx', 'new_tx', 'inner'), (3, TypeError, 'must be a gradient transformation, got 3')
    ),
    **dict.fromkeys(
        ('storage', 'nu', 'mu', 'var', 'trace', 'from_', 'to'), ('x', TypeError, 'must be a format')
    ),
    **dict.fromkeys(
        ('params', 'new_params', 'tree', 'updates', 'gradients', 'values'),
        (WORDS, TypeError, r"\['w'\] is a str, not an array"),
    ),
    'mask': ({'dense': 3}, TypeError, r"\['dense'\] must be True or False, got 3"),
    'mapping': (3, TypeError, r'must hold pairs \(interchange.Pair\), got 3'),
    'names': (3, TypeError, 'must be a list of names, got 3'),
    **dict.fromkeys(
        ('fresh', 'frozen'), ('x', TypeError, "must be a collection of names, got 'x'")
    ),
    'dialect': (3, TypeError, r'must be dialects\.torch, dialects\.timm or .*, got 3'),
    'labels': (3, TypeError, r"\['dense'\].* must be a string, got 3"),
    'quantiles': ('x', ValueError, "must be one or more numbers in .*, got 'x'"),
    'shardings': (3, TypeError, r"\['dense'\].* must be a sharding or a PartitionSpec, got 3"),
    'axis': (3, TypeError, 'must be the name of a mesh axis, or several, got 3'),
    'seed': ('x', TypeError, "must be a Python integer, got 'x'"),
    'theirs': (3, TypeError, 'must be a name, got 3'),
    'ours': (3, TypeError, 'must be a path'),
    'layout': (3, TypeError, 'must be a Layout, got 3'),
    'variables': (3, TypeError, 'must be a mapping from names, got int'),
    'state_dict': (3, TypeError, 'must be a mapping from names, got int'),
    'target': ('x', ValueError, "must be one of cpu, .*, got 'x'"),
    'topology': ('x', ValueError, "of cpu must be a number from 1 to .*, got 'x'"),
    'name': (3, TypeError, "must be the optimizer's name or None, got 3"),
}
STRAY = 'state has step counts'
IS_BYTES = r"state.*\['dense'\].* is stored as uint8"
# The same for arguments whose messages are not of that form: they have to be told whole.
SPECIAL: dict[tuple[Any, str], tuple[Any, Any, str]] = {
    (rmsprop_jax.skip_nonfinite, 'per'): ('x', TypeError, "^per must be one of .*, got 'x'"),
    (inject_hyperparams, 'inner_factory'): (3, TypeError, '^inner_factory must be a function'),
    (inject_hyperparams, 'static_args'): (
        ('decay', 'decoy'),
        ValueError,
        "^static_args names 'decoy', but inner_factory takes bias_correction, centered, decay",
    ),
    (inject_hyperparams, 'hyperparam_dtype'): ('x', TypeError, '^hyperparam_dtype must be a fl'),
    (reset, 'state'): (TX.init({}), ValueError, '^the structure of state does not match that of'),
    (carry_over, 'state'): (TX.init({}), ValueError, '^the structure of state does not match that'),
    (diagnostics.learning_rates, 'state'): (3, TypeError, '^state must be the tuple'),
    (rmsprop_jax.labels_by_path, 'patterns'): (3, TypeError, '^patterns must be a mapping'),
    (rmsprop_jax.nonfinite_entries, 'state'): (3, ValueError, '^the structure of state does not'),
    (dialects.torch_clip_grad_norm, 'norm_type'): ('x', TypeError, '^norm_type must be a number'),
    **{
        (recipe, 'steps_per_epoch'): ('x', ValueError, '^steps_per_epoch must be an integer of')
        for recipe in (recipes.efficientnet_timm, recipes.mobilenet_v3_timm)
    },
    (recipes.wgan, 'network'): ('x', ValueError, "^network must be .*, got 'x'"),
    (recipes.slim_decay_mask, 'depthwise'): (3, TypeError, '^depthwise must be a regular expr'),
    (recipes.tensorflow_decay_mask, 'batch_norm'): (3, TypeError, '^batch_norm must be a regular'),
    (recipes.ema_update, 'average'): (3, ValueError, '^values and average differ in structure'),
    (recipes.ema_update, 'values'): (WORDS, ValueError, '^values and average differ in structure'),
    (storage.large_leaves, 'format'): (3, TypeError, '^format must be a storage format, got 3'),
    (storage.per_leaf, 'function'): (3, TypeError, '^storage.per_leaf needs a function .*, got 3'),
    (storage.read, 'state'): (IN_BYTES, ValueError, IS_BYTES),
    (storage.saturation, 'state'): (IN_BYTES, ValueError, IS_BYTES),
    (storage.describe, 'state'): (WORDS, TypeError, r"^state\['w'\] is a str, not an array"),
    (storage.check, 'state'): (WORDS, TypeError, r"^state\['w'\] is a str, not an array"),
    (storage.check, 'description'): (3, TypeError, '^description must be a result of storage.desc'),
    (storage.convert, 'state'): (IN_BYTES, ValueError, IS_BYTES),
    (storage.convert, 'params'): ({}, ValueError, r"^params\['dense'\].* does not exist"),
    (storage.Format.decode, 'stored'): (jnp.ones(3), ValueError, '^stored is stored as float32'),
    (storage.Format.encode, 'x'): ('float32', TypeError, '^x is a str, not an array'),
    (diagnostics.epsilon_shares, 'state'): (3, ValueError, '^the state has no second moment'),
    (diagnostics.epsilon_shares, 'params'): ({}, ValueError, r"^params\['dense'\].* does not"),
    (diagnostics.saturated_shares, 'state'): (STATE, ValueError, 'state.* is stored as float32'),
    (diagnostics.saturated_shares, 'params'): ({}, ValueError, r"^params\['dense'\].* does not"),
    (diagnostics.stalled_shares, 'before'): (3, ValueError, '^the structure of after does not'),
    (diagnostics.stalled_shares, 'after'): (3, ValueError, '^the structure of after does not'),
    (diagnostics.read, 'state'): (3, ValueError, '^the state has measurements of 0 optimizers'),
    (diagnostics.read, 'params'): ({}, ValueError, '^.* has 2 groups, but params and labels'),
    (interchange.Layout, 'axes'): (3, TypeError, '^axes must be a tuple of integers'),
    (interchange.Layout, 'split'): (('x',), TypeError, '^split must be a tuple of integers'),
    (interchange.Layout.to_ours, 'array'): (np.ones(3), ValueError, '^its 1 axes cannot be laid'),
    (interchange.Layout.to_theirs, 'array'): (np.ones(3), ValueError, '^its 1 axes cannot be laid'),
    (interchange.flattened, 'channels'): (0, ValueError, '^channels, window must be an integer'),
    (interchange.flattened, 'window'): ((2, 0), ValueError, '^channels, window must be an integer'),
    (interchange.parameters_from, 'theirs'): (3, TypeError, '^theirs must be a mapping from names'),
    (interchange.parameters_from, 'optimizer'): (
        3,
        TypeError,
        '^optimizer must be the optim',
    ),
    (interchange.parameters_from, 'like'): ({}, ValueError, "'dense/kernel'.* is not in params"),
    (interchange.parameters_to, 'params'): ({}, ValueError, "'dense/kernel'.* is not in params"),
    **{
        (function, 'params'): ({}, ValueError, "'dense/kernel'.* is not in params")
        for function in (
            interchange.from_torch,
            interchange.torch_optimizer,
            interchange.to_torch,
            interchange.from_keras,
            interchange.to_keras,
            interchange.from_tensorflow,
            interchange.to_tensorflow,
        )
    },
    **{
        (function, 'count'): ('x', TypeError, "^count must be an integer, got 'x'")
        for function in (
            interchange.from_torch,
            interchange.from_optax,
            interchange.from_tensorflow,
        )
    },
    **{
        (function, 'dialect'): (3, TypeError, '^dialect must be dialects.torch, dialects.timm or')
        for function in (interchange.from_torch, interchange.to_torch)
    },
    **{
        (function, 'source'): (3, TypeError, '^source must be a gradient transformation')
        for function in (interchange.from_optax, interchange.to_optax)
    },
    **{
        (function, 'buffers'): ({'w': 'x'}, TypeError, r"^buffers\['w'\] is a str, not an array")
        for function in (
            interchange.propose_pairs,
            interchange.from_checkpoint,
            interchange.save_template,
            interchange.restore_port,
        )
    },
    **{
        (function, name): found
        for function in (interchange.propose_pairs, interchange.from_checkpoint)
        for name, found in {
            'known': ([3], TypeError, '^known must hold pairs .*, got 3'),
            'ignore': (['x'], ValueError, "^ignore has 'x', which is not in theirs"),
        }.items()
    },
    (interchange.propose_pairs, 'theirs'): (3, TypeError, '^theirs must be a mapping from names'),
    (interchange.from_checkpoint, 'checkpoint'): (3, TypeError, '^path must be a path, got 3'),
    (interchange.from_checkpoint, 'accept_guesses'): ('x', TypeError, f'^accept_guesses {FLAG}'),
    **{
        (function, name): (3, TypeError, f'^{name} must be a path, got 3')
        for function, name in (
            (interchange.read_checkpoint, 'path'),
            (interchange.save_template, 'path'),
            (interchange.restore_port, 'folder'),
        )
    },
    **{
        (interchange.read_checkpoint, name): (3, TypeError, f'^{name} must be keys.*got 3')
        for name in ('model', 'optimizer')
    },
    (interchange.restore_port, 'learning_rate'): ('x', ValueError, 'not a complete port'),
    (interchange.to_torch, 'state'): (3, ValueError, STRAY),
    (interchange.to_torch, 'param_groups'): (
        3,
        ValueError,
        "'param_groups' is missing or not a list",
    ),
    (interchange.to_torch, 'as_tensor'): (3, TypeError, '^as_tensor must be a function'),
    (interchange.Layout, 'part'): (3, TypeError, '^part must be a tuple of integers, got 3'),
    (interchange.Layout, 'blocks'): (3, TypeError, '^blocks must be a tuple of integers, got 3'),
    **{
        (function.recurrent, 'cell'): ('x', ValueError, '^cell must be one of nnx.LSTMCell')
        for function in (interchange.torch, interchange.keras)
    },
    (interchange.torch.recurrent, 'suffix'): (3, TypeError, '^suffix must be a name, got 3'),
    (interchange.torch.recurrent, 'biases'): ('x', TypeError, '^biases must be a collection'),
    (interchange.nnx.set_state, 'optimizer'): (3, TypeError, '^optimizer must be an nnx.Optimizer'),
    (interchange.nnx.set_state, 'state'): (
        WORDS,
        TypeError,
        r"^state\['w'\] is a str, not an array",
    ),
    (interchange.to_optax, 'state'): (3, ValueError, STRAY),
    (interchange.to_keras, 'state'): (3, ValueError, STRAY),
    (interchange.to_tensorflow, 'state'): (3, ValueError, STRAY),
    (interchange.from_optax, 'theirs'): (WORDS, TypeError, r"^theirs\['w'\] is a str"),
    (identify_dialect, 'trace'): (3, TypeError, '^trace must be a Trace, a mapping or a path'),
    **{
        (identify_dialect, name): ('x', ValueError, f'^{name} must be a number')
        for name in ('learning_rate', 'decay', 'eps', 'momentum', 'weight_decay', 'tolerance')
    },
    (aot.compile_step, 'fn'): (3, TypeError, '^fn must be a function, got 3'),
    (aot.compile_step, 'args'): (('x',), TypeError, r'^args\[0\] is a str, not an array'),
    (aot.compile_step, 'donate'): ((7,), ValueError, '^donate must hold positions among 1 arg'),
    (aot.compile_update, 'state'): (3, TypeError, '^state must be the tuple'),
    (aot.table, 'reports'): (3, TypeError, '^reports must hold Reports, got 3'),
    (aot.table, 'names'): (3, TypeError, '^names must hold strs, got 3'),
}
# Classes that a user makes records of. All others hold what the package says, and look at nothing.
RECORDS = (interchange.Pair, interchange.Layout, storage.uint8, storage.bfloat16)
# What a format is asked by the package, which gives it shapes, names and bits of its own making.
ASKED = {
    getattr(storage.Format, method)
    for method in ('bits', 'fault', 'init', 'key', 'nbytes', 'refusal', 'spec')
}
# Those of the other two methods that the package makes as well.
INTERNAL = {(storage.Format.decode, 'unit'), (storage.Format.encode, 'unit')}
INTERNAL |= {(storage.Format.encode, 'bits')}
# How to call what is no plain function of its arguments by name.
CALLS = {
    storage.Format.decode: storage.uint8().decode,
    storage.Format.encode: storage.uint8().encode,
    interchange.Layout.to_ours: interchange.Layout((1, 0)).to_ours,
    interchange.Layout.to_theirs: interchange.Layout((1, 0)).to_theirs,
    interchange.flattened: lambda channels, window=(): interchange.flattened(channels, *window),
    aot.compile_step: lambda fn, args, **options: aot.compile_step(fn, *args, **options),
    sharding.reduce_scatter: lambda gradients, **options: jax.shard_map(
        lambda: sharding.reduce_scatter(gradients, **options),
        mesh=PLACE.mesh,
        in_specs=(),
        out_specs=jax.sharding.PartitionSpec(),
        check_vma=False,
    )(),
}


def arguments():
    """Every function and record of the public API with the name of each argument."""
    found = dict.fromkeys([*public_api.functions().values(), *RECORDS])
    return [
        (function, name)
        for function in found
        for name, parameter in inspect.signature(function).parameters.items()
        if name != 'self' and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        if function not in ASKED and (function, name) not in INTERNAL
    ]


def wrong(function, name):
    """A wrong value of that argument, its error and its message, if there is one in the tables."""
    if (function, name) in SPECIAL:
        return SPECIAL[function, name]
    if name in RULES:
        value, error, message = RULES[name]
        return value, error, f'^{name}{"" if message.startswith(chr(92)) else " "}{message}'
    return None


def test_every_argument_has_a_wrong_value():
    assert not [(f.__qualname__, name) for f, name in arguments() if wrong(f, name) is None]
    assert SPECIAL.keys() <= set(arguments())
    assert {name for _, name in arguments()} >= RULES.keys()


def called(function, given):
    """Calls it with arguments by position or by name."""
    by_place = [given[place] for place in sorted(key for key in given if isinstance(key, int))]
    by_name = {name: x for name, x in given.items() if isinstance(name, str)}
    result = CALLS.get(function, function)(*by_place, **by_name)
    if isinstance(result, optax.GradientTransformation):
        # A mask is looked at where the parameters are known.
        result.update(PARAMS, result.init(PARAMS), PARAMS)


def is_arrays(value):
    try:
        leaves = jax.tree.leaves(value)
    except ValueError:
        return False
    return bool(leaves) and all(isinstance(x, jax.Array) for x in leaves)


def in_jit(function, given):
    """Calls it while tracing, with all that consists of arrays as arguments of the program."""
    arrays = {key: x for key, x in given.items() if is_arrays(x)}
    rest = {key: x for key, x in given.items() if key not in arrays}
    jax.eval_shape(lambda arrays: called(function, rest | arrays), arrays)


def is_same(x, y):
    """Whether two values are the same down to the entries of arrays, which may be NaN."""
    if isinstance(x, dict):
        return [*x] == [*y] and all(is_same(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(is_same, x, y))
    if isinstance(x, np.ndarray):
        return x.dtype == y.dtype and x.tobytes() == y.tobytes()
    return x is y or x == y


def copied(x):
    """A copy that a function which writes into `x` does not reach."""
    if isinstance(x, dict):
        return {key: copied(value) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(map(copied, x))
    return x.copy() if isinstance(x, np.ndarray) else x


def check_refusal(run, function, given, error, message):
    before = copied(given)
    with pytest.raises(error, match=message):
        run(function, given)
    assert is_same(given, before), 'half-written'


either_way = pytest.mark.parametrize('run', [called, in_jit], ids=['eager', 'jit'])
# What reads or writes others' files, or compiles, takes arrays and not what stands for them.
CONCRETE = ('interchange', 'identify', 'aot', 'Layout', 'Pair')
ARGUMENTS = [
    pytest.param(run, function, name, id=f'{function.__qualname__}-{name}-{label}')
    for function, name in arguments()
    for run, label in ((called, 'eager'), (in_jit, 'jit'))
    if run is called or not any(x in f'{function.__module__}.{function}' for x in CONCRETE)
]


@pytest.mark.parametrize(('run', 'function', 'name'), ARGUMENTS)
def test_each_argument(run, function, name):
    found = wrong(function, name)
    assert found is not None
    value, error, message = found
    check_refusal(run, function, VALID.get(function, {}) | {name: value}, error, message)


@either_way
@pytest.mark.parametrize(('function', 'arguments', 'error', 'message'), WRONG)
def test_wrong_arguments(function, arguments, error, message, run):
    given = arguments if isinstance(arguments, dict) else dict(enumerate(arguments))
    check_refusal(run, function, given, error, message)


@pytest.mark.parametrize(('function', 'arguments', 'error', 'message'), WRONG_FILES)
def test_wrong_files(function, arguments, error, message):
    given = arguments if isinstance(arguments, dict) else dict(enumerate(arguments))
    check_refusal(called, function, given, error, message)


# It takes ten seconds to find nothing in a trace of two steps, and some to write a port to restore:
# these have tests of their own.
@pytest.mark.parametrize(
    'function',
    [f for f in VALID if f not in (identify_dialect, interchange.restore_port)],
    ids=lambda function: function.__qualname__,
)
def test_the_others_are_right(function):
    """So that it is the wrong argument that is refused."""
    called(function, VALID[function])


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
    with pytest.raises(ValueError, match='trace.npz is (damaged|not an .npz file)'):
        identify_dialect(path)


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


def test_optax_injection_into_bfloat16_parameters():
    """Optax would hold 0.999 as 1 and freeze the average; ours says so, and how to mend it."""
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(TypeError, match='hyperparam_dtype=jnp.float32'):
        optax.inject_hyperparams(rmsprop)(0.1, decay=0.999).init(narrow)
    optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(0.1, decay=0.999).init(narrow)
    inject_hyperparams(rmsprop)(0.1, decay=0.999).init(narrow)


def test_schedule_as_the_value_of_a_traced_flag():
    with pytest.raises(TypeError, match='centered must be True or False'):
        jax.jit(lambda flag: rmsprop(0.1, centered=flag).init(PARAMS))(True)
