"""The fused step is the plain one: same results, same state, everywhere it may run."""

import functools
import importlib.metadata
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rmsprop_jax_fused
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rmsprop_jax_fused import _library, _optimizer

import rmsprop_jax
from rmsprop_jax import storage

FORMS = [
    dict(centered=centered, momentum=momentum, nesterov=nesterov)
    for centered, (momentum, nesterov) in itertools.product(
        [False, True], [(None, False), (0.9, False), (0.9, True)]
    )
]
CHOICES = [
    dict(eps_in_sqrt=eps_in_sqrt, bias_correction=corrected)
    for eps_in_sqrt, corrected in itertools.product([False, True], [False, True])
]
STORAGES = {
    'float32': None,
    'bfloat16': storage.bfloat16(seed=3),
    'mixed': storage.per_statistic(trace=storage.large_leaves(storage.bfloat16(), 64)),
}


def name(config: dict[str, Any]) -> str:
    return '-'.join(f'{key}={value}' for key, value in config.items())


def tree(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Leaves of many sizes, with zeros and with gradients whose squares are subnormal."""
    rng = np.random.default_rng(seed)

    def leaf(*shape: int, size: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * size * rng.standard_normal(shape), jnp.float32)

    return {
        'scalar': leaf(),
        'empty': leaf(0, 3),
        'small': [leaf(7), leaf(3, 5, 2, size=1e-6)],
        'tiny': leaf(33, size=1e-21).at[::2].set(0.0),
        'blocks': leaf(70001),
        'large': leaf(130, 129),
        'many': [leaf(11) for _ in range(40)],
    }


def plain_step(**kwargs: Any) -> Any:
    transformation = rmsprop_jax.rmsprop(**kwargs)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def fused_step(**kwargs: Any) -> Any:
    optimizer = rmsprop_jax_fused.rmsprop(**kwargs)
    return lambda params, state, grads: optimizer.apply(grads, state, params)


def assert_equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(
            np.asarray(x, np.complex128), np.asarray(y, np.complex128), jax.tree_util.keystr(path)
        )


def assert_within_one_ulp(one: Any, other: Any, size: float) -> None:
    """Within one unit in the last place: of the stored number, or of a sum's largest term.

    Args:
      one: Parameters and state.
      other: The same.
      size: The largest term of the sums, a bound of |update|.
    """
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        if not jnp.issubdtype(x.dtype, jnp.floating):
            assert_equal(x, y)
            continue
        ulp = float(jnp.finfo(x.dtype).eps)
        x, y = (np.asarray(a, np.float64) for a in (x, y))
        assert np.all(np.abs(x - y) <= ulp * np.maximum(np.abs(x), size))


@pytest.fixture(autouse=True)
def _compiled(monkeypatch) -> None:
    assert rmsprop_jax_fused.available(), 'The kernel is not compiled: run make fused.'
    # The leaves here are small.
    monkeypatch.setattr(_optimizer, '_WORTH_A_CALL', 0)


def calls(params: Any) -> int:
    optimizer = rmsprop_jax_fused.rmsprop(0.1)
    lowered = jax.jit(optimizer.apply).lower(params, optimizer.init(params), params)
    return lowered.compile().as_text().count('custom-call(')


def test_leaves_are_taken_in_groups():
    assert calls(tree(0)) == 2  # of 47 leaves


def test_many_small_leaves_take_the_plain_path(monkeypatch):
    monkeypatch.undo()
    assert calls([jnp.ones(2047)] * 33) == 0
    assert calls([jnp.ones(2047)] * 32) == 1
    assert calls([jnp.ones(2048)] * 33) == 2


@pytest.mark.parametrize('kept', STORAGES)
@pytest.mark.parametrize('choice', CHOICES, ids=name)
@pytest.mark.parametrize('form', FORMS, ids=name)
def test_equals_the_plain_step(form, choice, kept):
    kwargs = dict(
        learning_rate=0.01, decay=0.95, eps=1e-6, storage=STORAGES[kept], **form, **choice
    )
    plain, fused = jax.jit(plain_step(**kwargs)), jax.jit(fused_step(**kwargs))
    params = tree(0)
    state = rmsprop_jax.rmsprop(**kwargs).init(params)
    for seed in range(1, 5):
        grads = tree(seed, 0.1)
        expected, actual = plain(params, state, grads), fused(params, state, grads)
        assert_equal(actual, expected)
        params, state = expected


def test_runs_the_kernel():
    step = fused_step(learning_rate=0.1)
    params = tree(0)
    state = rmsprop_jax.rmsprop(0.1).init(params)
    assert 'rmsprop_jax_fused_apply' in jax.jit(step).lower(params, state, params).as_text()


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(
            learning_rate=lambda count: 0.1 / (count + 1),
            momentum=lambda count: count / (count + 9),
        ),
        dict(learning_rate=0.1, decay=lambda count: 0.9 + count / 100, eps=lambda count: 1e-3),
    ],
)
def test_schedules(kwargs):
    run_and_compare(kwargs)


def run_and_compare(kwargs: Any) -> None:
    plain, fused = jax.jit(plain_step(**kwargs)), jax.jit(fused_step(**kwargs))
    params = tree(0)
    state = rmsprop_jax.rmsprop(**kwargs).init(params)
    for seed in range(1, 4):
        grads = tree(seed)
        expected = plain(params, state, grads)
        assert_within_one_ulp(fused(params, state, grads), expected, 4.0)
        params, state = expected


def test_injected_hyperparameters():
    def step(fused: bool, rate: jax.Array, params: Any, state: Any) -> Any:
        return (fused_step if fused else plain_step)(learning_rate=rate, momentum=0.9)(
            params, state, params
        )

    params = tree(0)
    state = rmsprop_jax.rmsprop(0.1, momentum=0.9).init(params)
    one, other = (
        jax.jit(functools.partial(step, fused))(jnp.float32(0.3), params, state)
        for fused in (True, False)
    )
    assert_within_one_ulp(one, other, 4.0)


def test_leaves_it_does_not_take():
    params = {**tree(0), 'half': jnp.ones(9, jnp.bfloat16), 'complex': jnp.ones(3, jnp.complex64)}
    kwargs = dict(learning_rate=0.1, centered=True)
    state = rmsprop_jax.rmsprop(**kwargs).init(params)
    one, other = (
        jax.jit(step(**kwargs))(params, state, params) for step in (fused_step, plain_step)
    )
    assert_equal(one, other)


def test_weight_decay_takes_the_plain_path():
    kwargs = dict(learning_rate=0.1, weight_decay=0.1)
    params = tree(0)
    state = rmsprop_jax.rmsprop(**kwargs).init(params)
    one, other = (
        jax.jit(step(**kwargs))(params, state, params) for step in (fused_step, plain_step)
    )
    assert_equal(one, other)


def test_donation_copies_no_leaf():
    optimizer = rmsprop_jax_fused.rmsprop(0.1, momentum=0.9, centered=True)
    params = {'kernel': jnp.ones((512, 512)), 'other': jnp.ones((512, 512))}
    state, grads = optimizer.init(params), jax.tree.map(jnp.copy, params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> Any:
        return optimizer.apply(grads, state, params)

    compiled = step.lower(params, state, grads).compile()
    assert 'f32[512,512]{1,0} copy(' not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 512
    expected = jax.jit(plain_step(learning_rate=0.1, momentum=0.9, centered=True))(
        params, state, grads
    )
    assert_equal(step(params, state, grads), expected)


def test_scan():
    kwargs = dict(learning_rate=0.1, momentum=0.9, storage=storage.bfloat16())
    params = tree(0)
    state = rmsprop_jax.rmsprop(**kwargs).init(params)
    all_grads = jax.tree.map(lambda *x: jnp.stack(x), *[tree(i) for i in range(5)])

    def run(step: Any) -> Any:
        def body(carry: Any, grads: Any) -> Any:
            return step(*carry, grads), None

        return jax.jit(lambda: jax.lax.scan(body, (params, state), all_grads)[0])()

    assert_within_one_ulp(run(fused_step(**kwargs)), run(plain_step(**kwargs)), 4.0)


def test_vmap_falls_back():
    kwargs = dict(learning_rate=0.1, momentum=0.9)
    params, grads = (
        jax.tree.map(lambda *x: jnp.stack(x), *[tree(i + j) for i in range(3)]) for j in (0, 9)
    )
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, rmsprop_jax.rmsprop(**kwargs).init(params))
    state = rmsprop_jax.rmsprop(**kwargs).init(params)
    one, other = (
        jax.jit(jax.vmap(step(**kwargs), (0, axes, 0), (0, axes)))(params, state, grads)
        for step in (fused_step, plain_step)
    )
    assert_equal(one, other)


@pytest.mark.parametrize('check_vma', [False, True])
def test_shards_are_updated_in_place(check_vma):
    assert jax.device_count() == 8
    mesh = Mesh(np.array(jax.devices()), ('data',))
    params, grads = (
        {'w': jnp.asarray(np.random.default_rng(i).standard_normal((64, 33)), jnp.float32)}
        for i in (0, 1)
    )
    kwargs = dict(learning_rate=0.1, momentum=0.9)
    state = rmsprop_jax.rmsprop(**kwargs).init(params)
    specs = jax.tree.map(lambda x: P('data') if x.ndim else P(), (params, state))

    params, state, grads = (
        jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, spec)
        for tree, spec in zip((params, state, grads), (*specs, {'w': P('data')}), strict=True)
    )

    def sharded(step: Any) -> Any:
        inside = jax.shard_map(
            step, mesh=mesh, in_specs=(*specs, P('data')), out_specs=specs, check_vma=check_vma
        )
        return jax.jit(inside)

    step = sharded(fused_step(**kwargs))
    assert 'rmsprop_jax_fused_apply' in step.lower(params, state, grads).as_text()
    assert_equal(step(params, state, grads), jax.jit(plain_step(**kwargs))(params, state, grads))


def test_partitioned_programs_keep_their_sharding():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('data', 'model'))
    sharding = NamedSharding(mesh, P('data', 'model'))
    params = {'w': jax.device_put(jnp.ones((64, 32)), sharding)}
    kwargs = dict(learning_rate=0.1, momentum=0.9, storage=storage.bfloat16())
    state = jax.jit(rmsprop_jax.rmsprop(**kwargs).init)(params)
    one, other = (
        jax.jit(step(**kwargs))(params, state, params) for step in (fused_step, plain_step)
    )
    assert_equal(one, other)
    assert one[0]['w'].sharding.is_equivalent_to(sharding, 2)
    assert one[1][2].trace['w'].sharding.is_equivalent_to(sharding, 2)


def test_errors_are_those_of_the_plain_path():
    optimizer = rmsprop_jax_fused.rmsprop(0.1)
    state = optimizer.init({'a': jnp.ones(3)})
    with pytest.raises(ValueError, match='structure of updates does not match'):
        optimizer.apply({'b': jnp.ones(3)}, state, {'b': jnp.ones(3)})
    with pytest.raises(ValueError, match=r"updates\['a'\] has shape"):
        optimizer.apply({'a': jnp.ones(4)}, state, {'a': jnp.ones(4)})


def test_without_the_library(monkeypatch):
    from rmsprop_jax_fused import _optimizer

    monkeypatch.setattr(_optimizer, 'available', lambda: False)
    params = tree(0)
    step = fused_step(learning_rate=0.1)
    state = rmsprop_jax.rmsprop(0.1).init(params)
    assert 'rmsprop_jax_fused' not in jax.jit(step).lower(params, state, params).as_text()
    assert_equal(
        jax.jit(step)(params, state, params),
        jax.jit(plain_step(learning_rate=0.1))(params, state, params),
    )


def test_without_a_jax_that_can_load_the_library(monkeypatch, tmp_path):
    header = tmp_path / 'xla' / 'ffi' / 'api' / 'c_api.h'
    header.parent.mkdir(parents=True)
    header.write_text('#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 1\n')
    assert _library.available.__wrapped__()
    monkeypatch.setattr(jax.ffi, 'include_dir', lambda: str(tmp_path))
    assert not _library.available.__wrapped__()


def test_the_jax_that_it_needs_is_required():
    assert 'jax>=0.10.0' in importlib.metadata.requires('rmsprop_jax_fused')
    # An attribute that JAX 0.9 does not have.
    assert hasattr(jax.typeof(jnp.ones(2)), 'manual_axis_type')


def test_lowers_for_other_platforms():
    params = tree(0)
    state = rmsprop_jax.rmsprop(0.1).init(params)
    step = jax.jit(fused_step(learning_rate=0.1))
    text = step.trace(params, state, params).lower(lowering_platforms=('tpu',)).as_text()
    assert 'rmsprop_jax_fused_apply' not in text
