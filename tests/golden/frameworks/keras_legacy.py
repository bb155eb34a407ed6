"""The Keras of TensorFlow 2.0 to 2.10: what the golden traces record."""

from typing import Any

from golden.configurations import DROPS, in_both_precisions, nearly_constant, one

FLOAT32 = {'keras_legacy': {'learning_rate', 'rho', 'momentum', 'decay'}}


def configurations() -> list[dict[str, Any]]:
    name = 'keras_legacy'
    return [
        *in_both_precisions(name, momentum=0.9, centered=True, decay=1e-3),
        one(name, 'defaults', 1000),
        one(name, 'eps 0.01 plain', epsilon=0.01, centered=True),
        one(name, 'eps 0.01 momentum', epsilon=0.01, momentum=0.5),
        one(name, 'eps 0', epsilon=0.0),
        one(name, 'decay', decay=0.1, learning_rate=0.1),
        one(name, 'decay of schedule', decay=0.1, schedule=DROPS, momentum=0.9),
        one(name, 'clipnorm', clipnorm=0.5),
        one(name, 'global_clipnorm', global_clipnorm=0.5, momentum=0.9),
        one(name, 'clipvalue and clipnorm', clipvalue=0.1, clipnorm=0.2),
        one(name, 'clipvalue and global_clipnorm', clipvalue=0.1, global_clipnorm=0.2),
        one(name, 'sparse', problem='sparse', momentum=0.9),
        one(name, 'sparse centered', problem='sparse', momentum=0.9, centered=True, decay=0.1),
        one(name, 'sparse plain', problem='sparse'),
        one(name, 'sparse plain centered', problem='sparse', centered=True),
        # It clips the values of repeated indices one by one, unlike their sum when dense.
        one(
            name,
            'sparse clipped',
            problem='sparse without repetitions',
            momentum=0.9,
            clipvalue=0.5,
            global_clipnorm=1.0,
        ),
        nearly_constant(name),
    ]
