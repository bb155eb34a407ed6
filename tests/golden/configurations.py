"""What the golden traces record: a thousand steps of each dialect, and each of its options."""

from typing import Any

DROPS = {'peak': 0.05, 'warmup': 3, 'every': 7, 'factor': 0.6}


def golden_configurations() -> list[dict[str, Any]]:
    """Every configuration, as JSON has it; names are unique."""
    found = [
        *_torch(),
        *_clip_grad_norm(),
        *_timm(),
        *_stable_baselines3(),
        *_keras(),
        *_keras_legacy(),
        *_tf_keras(),
        *_tensorflow(),
        *_mxnet(),
        *_equivalents(),
    ]
    names = [c['name'] for c in found]
    assert len(set(names)) == len(names)
    return found


def _one(
    framework: str,
    name: str,
    steps: int = 60,
    problem: str = 'normal',
    dtype: str = 'float64',
    schedule: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    return {
        'name': f'{framework}: {name}',
        'framework': framework,
        'problem': problem,
        'dtype': dtype,
        'steps': steps,
        'seed': 7,
        'schedule': schedule,
        'options': options,
    }


def _in_both_precisions(framework: str, **options: Any) -> list[dict[str, Any]]:
    """A thousand steps in float64 and the same in float32, and gradients that hardly change."""
    name = '1000 steps'
    return [
        _one(framework, name, 1000, **options) | {'float32 inputs': True},
        _one(framework, f'{name} in float32', 1000, dtype='float32', **options),
    ]


def _nearly_constant(framework: str, **options: Any) -> dict[str, Any]:
    """Centered, in float32: `nu - mu^2` turns negative by rounding."""
    return _one(
        framework,
        'nearly constant',
        300,
        problem='nearly constant',
        dtype='float32',
        centered=True,
        **options,
    )


def _torch() -> list[dict[str, Any]]:
    name = 'torch'
    return [
        *_in_both_precisions(name, momentum=0.9, weight_decay=1e-2, centered=True),
        _one(name, 'defaults', 1000),
        _one(name, 'large eps', eps=1.0, momentum=0.5),
        _one(name, 'eps 0.01', eps=0.01, alpha=0.9),
        _one(name, 'weight decay', weight_decay=0.1),
        _one(name, 'schedule', schedule=DROPS, momentum=0.9, alpha=0.9),
        _one(name, 'centered', centered=True, alpha=0.95),
        _one(name, 'maximize', maximize=True, weight_decay=0.1, momentum=0.9),
        _one(name, 'complex', problem='complex', momentum=0.9, weight_decay=0.1),
        _one(name, 'complex centered', problem='complex', centered=True, maximize=True),
        _one(name, 'foreach', foreach=True, momentum=0.9, centered=True),
        _nearly_constant(name, alpha=0.9),
    ]


def _clip_grad_norm() -> list[dict[str, Any]]:
    def clipped(problem: str = 'normal', **clip: Any) -> dict[str, Any]:
        label = ', '.join(f'{n} {value}' for n, value in clip.items())
        made = _one('torch', f'clip {label} {problem}', problem=problem, alpha=0.9, momentum=0.5)
        return made | {'clip': clip}

    return [
        clipped(max_norm=1.0),
        clipped(max_norm=1.0, problem='complex'),
        clipped(max_norm=0.5, norm_type='inf'),
        clipped(max_norm=2.0, norm_type=1.0),
        clipped(max_norm=1.0, norm_type=3.0),
        clipped(max_norm=1e6),
    ]


def _timm() -> list[dict[str, Any]]:
    name = 'timm'
    return [
        *_in_both_precisions(name, momentum=0.9, weight_decay=1e-2, centered=True),
        _one(name, 'defaults'),
        _one(name, 'eps 1', eps=1.0, momentum=0.9),
        _one(name, 'decoupled', weight_decay=0.1, decoupled_decay=True, momentum=0.9),
        _one(
            name,
            'corrected',
            schedule=DROPS,
            weight_decay=0.5,
            decoupled_decay=True,
            corrected_weight_decay=True,
        ),
        _one(name, 'corrected but coupled', weight_decay=0.5, corrected_weight_decay=True),
        _one(name, 'schedule', schedule=DROPS, momentum=0.9),
        _one(name, 'lr outside', schedule=DROPS, momentum=0.9, lr_in_momentum=False),
        _one(name, 'caution', momentum=0.9, caution=True, weight_decay=0.1),
        _one(
            name,
            'caution outside',
            schedule=DROPS,
            momentum=0.9,
            caution=True,
            lr_in_momentum=False,
            weight_decay=0.1,
            decoupled_decay=True,
        ),
        _one(name, 'caution without momentum', caution=True),
        _one(name, 'foreach', foreach=True, momentum=0.9, caution=True, centered=True),
        _nearly_constant(name),
    ]


def _stable_baselines3() -> list[dict[str, Any]]:
    name = 'stable_baselines3'
    return [
        *_in_both_precisions(name, momentum=0.9, weight_decay=1e-2, centered=True),
        _one(name, 'defaults'),
        _one(name, 'A2C', eps=1e-5, lr=7e-4),
        _one(name, 'schedule', schedule=DROPS, momentum=0.9, eps=0.01),
        _one(name, 'weight decay', weight_decay=0.1, alpha=0.9),
        _nearly_constant(name, alpha=0.9),
    ]


def _keras() -> list[dict[str, Any]]:
    name = 'keras'
    accumulated = {'gradient_accumulation_steps': 3, 'schedule': DROPS, 'weight_decay': 0.1}
    ema = {'use_ema': True, 'ema_momentum': 0.8}
    return [
        *_in_both_precisions(name, momentum=0.9, weight_decay=1e-2, centered=True),
        _one(name, 'defaults'),
        _one(name, 'eps 1', epsilon=1.0, momentum=0.9),
        _one(name, 'eps 0.01', epsilon=0.01, rho=0.95),
        _one(name, 'schedule', schedule=DROPS, momentum=0.9, weight_decay=0.1),
        _one(name, 'clipnorm', clipnorm=0.5, momentum=0.5),
        _one(name, 'clipvalue', clipvalue=0.1),
        _one(name, 'global_clipnorm', global_clipnorm=0.5, weight_decay=0.1),
        _one(name, 'clips of zero', clipnorm=0.0),
        _one(name, 'loss scale', loss_scale_factor=128.0, clipnorm=0.01),
        _one(name, 'ema', **ema),
        _one(name, 'ema overwriting', ema_overwrite_frequency=4, momentum=0.9, **ema),
        _one(name, 'accumulation', **accumulated, momentum=0.9, centered=True),
        _one(
            name,
            'accumulation with all',
            **accumulated,
            **ema,
            ema_overwrite_frequency=2,
            momentum=0.9,
            global_clipnorm=0.5,
            loss_scale_factor=4.0,
        ),
        _one(name, 'excluded', weight_decay=0.5) | {'exclude': ['vector', 'scalar']},
        # Keras squares the values of repeated indices one by one, unlike their sum when dense.
        _one(name, 'sparse', problem='sparse without repetitions', momentum=0.9),
        _nearly_constant(name),
    ]


def _keras_legacy() -> list[dict[str, Any]]:
    name = 'keras_legacy'
    return [
        *_in_both_precisions(name, momentum=0.9, centered=True, decay=1e-3),
        _one(name, 'defaults', 1000),
        _one(name, 'eps 0.01 plain', epsilon=0.01, centered=True),
        _one(name, 'eps 0.01 momentum', epsilon=0.01, momentum=0.5),
        _one(name, 'eps 0', epsilon=0.0),
        _one(name, 'decay', decay=0.1, learning_rate=0.1),
        _one(name, 'decay of schedule', decay=0.1, schedule=DROPS, momentum=0.9),
        _one(name, 'clipnorm', clipnorm=0.5),
        _one(name, 'global_clipnorm', global_clipnorm=0.5, momentum=0.9),
        _one(name, 'clipvalue and clipnorm', clipvalue=0.1, clipnorm=0.2),
        _one(name, 'clipvalue and global_clipnorm', clipvalue=0.1, global_clipnorm=0.2),
        _one(name, 'sparse', problem='sparse', momentum=0.9),
        _one(name, 'sparse centered', problem='sparse', momentum=0.9, centered=True, decay=0.1),
        _one(name, 'sparse plain', problem='sparse'),
        _one(name, 'sparse plain centered', problem='sparse', centered=True),
        # It clips the values of repeated indices one by one, unlike their sum when dense.
        _one(
            name,
            'sparse clipped',
            problem='sparse without repetitions',
            momentum=0.9,
            clipvalue=0.5,
            global_clipnorm=1.0,
        ),
        _nearly_constant(name),
    ]


def _tf_keras() -> list[dict[str, Any]]:
    name = 'tf_keras'
    ema = {'use_ema': True, 'ema_momentum': 0.8}
    return [
        *_in_both_precisions(name, momentum=0.9, weight_decay=1e-2, centered=True),
        _one(name, 'defaults'),
        _one(name, 'eps 0.01', epsilon=0.01, rho=0.95, momentum=0.5),
        _one(name, 'schedule', schedule=DROPS, momentum=0.9, weight_decay=0.1),
        _one(name, 'clipnorm before clipvalue', clipnorm=0.5, clipvalue=0.01),
        _one(name, 'global_clipnorm before clipvalue', global_clipnorm=0.5, clipvalue=0.01),
        _one(name, 'clipvalue', clipvalue=0.1, clipnorm=0.0, weight_decay=0.1),
        _one(name, 'ema', 250, use_ema=True),
        _one(name, 'ema overwriting', ema_overwrite_frequency=2, momentum=0.9, **ema),
        _one(name, 'ema never overwriting', 150, ema_overwrite_frequency=None, **ema),
        _one(
            name, 'ema with all', schedule=DROPS, ema_overwrite_frequency=3, weight_decay=0.1, **ema
        )
        | {'exclude': ['vector', 'scalar']},
        _one(name, 'sparse', problem='sparse', momentum=0.9, centered=True),
        _one(name, 'sparse without momentum', problem='sparse'),
        _nearly_constant(name),
    ]


def _tensorflow() -> list[dict[str, Any]]:
    name, rate = 'tensorflow', {'learning_rate': 0.01}
    return [
        *_in_both_precisions(name, momentum=0.9, centered=True, **rate),
        _one(name, 'defaults', **rate),
        _one(name, 'eps 1', epsilon=1.0, momentum=0.9, **rate),
        _one(name, 'eps 0.01', epsilon=0.01, decay=0.95, centered=True, **rate),
        _one(name, 'schedule', schedule=DROPS, momentum=0.9),
        _one(name, 'sparse', problem='sparse', momentum=0.9, **rate),
        _one(name, 'sparse centered', problem='sparse', momentum=0.9, centered=True, **rate),
        _one(name, 'sparse schedule', problem='sparse', schedule=DROPS, momentum=0.5),
        _nearly_constant(name, **rate),
    ]


def _mxnet() -> list[dict[str, Any]]:
    clips = {'clip_gradient': 0.5, 'wd': 0.5, 'rescale_grad': 0.25, 'clip_weights': 1.0}
    found = []
    for name, momentum in (('mxnet', 'momentum'), ('mxnet1', 'gamma2')):
        found += [
            *_in_both_precisions(name, centered=True, wd=1e-2),
            _one(name, 'defaults', 1000),
            _one(name, 'eps 0.01', epsilon=0.01),
            _one(name, 'eps 0.01 centered', epsilon=0.01, centered=True),
            _one(name, 'clips', **clips),
            _one(name, 'clips centered', **clips, centered=True, **{momentum: 0.5}),
            _one(name, 'clips of zero', clip_weights=0.0),
            _one(name, 'schedule', schedule=DROPS, centered=True),
        ]
    return [*found, _one('mxnet_unfused', 'all', epsilon=0.01, wd=0.1, clip_gradient=0.5)]


def _equivalents() -> list[dict[str, Any]]:
    """The frameworks of the table: as they come, and with what their quirks speak of."""
    rate = {'learning_rate': 0.01}
    return [
        _one('sonnet', 'defaults', 1000, **rate),
        _one('sonnet', 'schedule', schedule=DROPS, momentum=0.9, centered=True),
        _one('sonnet', 'sparse', problem='sparse', momentum=0.9, **rate),
        _one('chainer', 'defaults', 1000),
        _one('chainer', 'inside', eps_inside_sqrt=True, eps=0.01),
        _one('chainer_graves', 'defaults', 1000),
        _one('chainer_graves', 'schedule', schedule=DROPS),
        _one('paddle', 'defaults', 1000, **rate),
        _one('paddle', 'all', momentum=0.9, centered=True, weight_decay=0.1, **rate),
        _one('paddle', 'schedule', schedule=DROPS, momentum=0.9),
        _one('mlx', 'defaults', 1000, **rate),
        _one('bitsandbytes', 'defaults', 1000, dtype='float32'),
        _one('bitsandbytes', 'momentum is ignored', momentum=0.9, dtype='float32'),
        _one('bitsandbytes', 'weight decay', weight_decay=0.1, dtype='float32'),
    ]
