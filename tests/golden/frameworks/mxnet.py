"""MXNet 2 and 1: what the golden traces record."""

from typing import Any

from golden.configurations import DROPS, in_both_precisions, one

_FLOAT32 = {'learning_rate', 'schedule', 'epsilon', 'wd', 'rescale_grad'}
_FLOAT32 |= {'clip_weights', 'clip_gradient'}
FLOAT32 = {
    'mxnet': _FLOAT32 | {'rho', 'momentum'},
    'mxnet_unfused': {'clip_weights', 'clip_gradient'},
    'mxnet1': _FLOAT32 | {'gamma1', 'gamma2'},
}
_CHANGES = {
    'clip_weights': (0.5, {}),
    'rescale_grad': (1e-3, {'epsilon': 0.1}),
    'clip_gradient': (0.1, {}),
}
CHANGES = {
    'mxnet': {**_CHANGES, 'momentum': (0.5, {'centered': True})},
    'mxnet1': {**_CHANGES, 'gamma2': (0.5, {'centered': True})},
}


def configurations() -> list[dict[str, Any]]:
    clips = {'clip_gradient': 0.5, 'wd': 0.5, 'rescale_grad': 0.25, 'clip_weights': 1.0}
    found = []
    for name, momentum in (('mxnet', 'momentum'), ('mxnet1', 'gamma2')):
        found += [
            *in_both_precisions(name, centered=True, wd=1e-2),
            one(name, 'defaults', 1000),
            one(name, 'eps 0.01', epsilon=0.01),
            one(name, 'eps 0.01 centered', epsilon=0.01, centered=True),
            one(name, 'clips', **clips),
            one(name, 'clips centered', **clips, centered=True, **{momentum: 0.5}),
            one(name, 'clips of zero', clip_weights=0.0),
            one(name, 'schedule', schedule=DROPS, centered=True),
        ]
    return [*found, one('mxnet_unfused', 'all', epsilon=0.01, wd=0.1, clip_gradient=0.5)]
