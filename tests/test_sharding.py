"""Where state lives: shardings derived, and results that do not depend on them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rmsprop_jax
from rmsprop_jax import dialects, sharding, storage
from rmsprop_jax.aot._program import Program

pytestmark = pytest.mark.extended

each_case = pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
FORMATS = {
    'float32': None,
    'bfloat16': storage.large_leaves(storage.bfloat16(), 1, 0),
    'uint8': storage.per_statistic(nu=storage.large_leaves(storage.uint8(), 1, 0)),
    'factored': storage.per_statistic(nu=storage.large_leaves(storage.factored(), 1)),
}
SPECS = {'kernel': P('data', 'model'), 'bias': P('model'), 'scale': P()}


def parameters(dtype=jnp.float32):
    return {
        'kernel': jnp.linspace(-2, 3, 96, dtype=dtype).reshape(8, 12),
        'bias': jnp.linspace(-1, 1, 12, dtype=dtype),
        'scale': jnp.array(2.0, dtype),
    }


def mesh_of(shape=(4, 2), names=('data', 'model'), kind=AUTO):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def placed(params, specs, mesh, memory=None):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec, memory_kind=memory)),
        params,
        specs,
    )


def assert_placed(state, expected):
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.sharding, wanted)
        assert leaf.sharding.memory_kind == wanted.memory_kind


@each_case
@pytest.mark.parametrize(
    ('kind', 'memory'),
    [(AUTO, 'device'), (AUTO, 'pinned_host'), (EXPLICIT, 'pinned_host')],
    ids=str,
)
def test_derived_shardings_are_those_that_init_gives(case, kind, memory):
    """The compiler and the rules agree, leaf by leaf; it may leave scalars anywhere."""
    tx = case.tx
    params = placed(parameters(), SPECS, mesh_of(kind=kind), memory)
    derived = sharding.state_shardings(tx, params)
    made = jax.jit(tx.init)(params)
    assert jax.tree.structure(derived) == jax.tree.structure(made)
    pairs = zip(jax.tree.leaves(made), jax.tree.leaves(derived), strict=True)
    for leaf, wanted in pairs:
        if leaf.ndim:
            assert_placed(leaf, wanted)


def wrapped(where, kind):
    """One of our optimizers inside Optax's wrappers."""
    inner = rmsprop_jax.rmsprop(0.1, momentum=0.9, storage=where)
    labels = {'kernel': 'ours', 'bias': 'ours', 'scale': 'theirs'}
    mask = {'kernel': True, 'bias': True, 'scale': False}
    return {
        'chain': lambda: optax.chain(optax.clip_by_global_norm(1.0), inner),
        'partition': lambda: optax.partition({'ours': inner, 'theirs': optax.sgd(0.1)}, labels),
        'masked': lambda: optax.masked(inner, mask),
        'MultiSteps': lambda: optax.MultiSteps(inner, 2),
        'inject_hyperparams': lambda: rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(
            0.1, storage=where
        ),
        'apply_if_finite': lambda: optax.chain(optax.apply_if_finite(optax.masked(inner, mask), 3)),
        'keras': lambda: dialects.keras(use_ema=True, gradient_accumulation_steps=2, storage=where),
    }[kind]()


WRAPPERS = ('chain', 'partition', 'masked', 'MultiSteps', 'inject_hyperparams', 'apply_if_finite')


@pytest.mark.parametrize('kind', [*WRAPPERS, 'keras'])
@pytest.mark.parametrize('name', FORMATS)
def test_through_wrappers_and_formats(name, kind):
    where = FORMATS[name]
    if name == 'factored':
        where = storage.per_statistic(nu=storage.large_leaves(storage.factored(), 1, 2))
    tx = wrapped(where, kind)
    params = placed(parameters(), SPECS, mesh_of())
    derived = sharding.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=derived)(params)
    assert_placed(state, derived)
    by_shape = {(8, 12): {P('data', 'model')}, (12,): {P('model')}, (8,): {P('data')}, (): {P()}}
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(derived), strict=True):
        assert place.spec in by_shape[leaf.shape]
        assert max(s.data.size for s in leaf.addressable_shards) <= max(1, leaf.size // 2)
    # A step keeps them where they are.
    after = jax.jit(tx.update, out_shardings=(None, derived))(params, state, params)[1]
    assert_placed(after, derived)
    specs = sharding.state_shardings(tx, params, SPECS)
    assert jax.tree.leaves(specs) == [place.spec for place in jax.tree.leaves(derived)]


@pytest.mark.parametrize(
    ('spec', 'row', 'col'),
    [
        (P('data', 'model'), P('data'), P('model')),
        (P('data'), P('data'), P(None)),
        (P(), P(None), P(None)),
    ],
    ids=str,
)
def test_factors_have_the_axes_that_are_left(spec, row, col):
    """Also where a partition names the first axes only."""
    tx = rmsprop_jax.scale_by_rms(storage=FORMATS['factored'].nu)
    derived = sharding.state_shardings(tx, jax.ShapeDtypeStruct((8, 16), jnp.float32), spec)
    assert derived.nu == storage.Factors(row=row, col=col)


@pytest.mark.parametrize('name', FORMATS)
def test_a_mask_may_leave_out_a_whole_branch(name):
    inner = rmsprop_jax.rmsprop(0.1, storage=FORMATS[name])
    params = {'layer': {'kernel': jnp.ones((8, 16))}, 'rest': {'a': jnp.ones(8), 'b': jnp.ones(3)}}
    specs = {'layer': {'kernel': P('data', 'model')}, 'rest': P()}
    masked = optax.masked(inner, {'layer': True, 'rest': False})
    labels = {'layer': 'ours', 'rest': 'theirs'}
    split = optax.partition({'ours': inner, 'theirs': optax.sgd(0.1)}, labels)
    alone = sharding.state_shardings(inner, {'layer': params['layer']}, {'layer': specs['layer']})
    for tx in (masked, split):
        derived = sharding.state_shardings(tx, params, specs)
        assert jax.tree.structure(derived) == jax.tree.structure(tx.init(params))
        part = derived if tx is masked else derived.inner_states['ours']
        assert part.inner_state[0].nu['layer'] == alone[0].nu['layer']


@pytest.mark.parametrize('name', FORMATS)
def test_no_device_ever_holds_a_full_copy(name):
    """Neither state made by init nor anything in the compiled programs is as large as a leaf."""
    tx = rmsprop_jax.rmsprop(0.1, momentum=0.9, storage=FORMATS[name])
    mesh = mesh_of()
    place = NamedSharding(mesh, P('data', 'model'))
    params = jax.device_put(jnp.ones((256, 256)), place)
    init = jax.jit(tx.init).lower(params).compile()
    state = init(params)
    derived = sharding.state_shardings(tx, params)
    assert_placed(state, derived)
    update = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    for program in (init, update):
        largest = max(a.size for a in arrays_of(program))
        assert largest <= 256 * 256 // 8, program.as_text()
        memory = program.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes <= 2 * params.size


def arrays_of(program):
    """The type of every array in a compiled program, which is that of one device."""
    computations = Program(program.as_text()).computations.values()
    return [a for computation in computations for i in computation.values() for a in i.arrays]


def test_abstract_state_is_restored_into(tmp_path):
    ocp = pytest.importorskip('orbax.checkpoint')
    tx = wrapped(FORMATS['bfloat16'], 'partition')
    params = placed(parameters(), SPECS, mesh_of())
    _, state = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    other = mesh_of((2, 2))
    abstract = sharding.abstract_state(
        tx, params, jax.tree.map(lambda spec: NamedSharding(other, spec), SPECS)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'state', state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / 'state', abstract)
    chex.assert_trees_all_equal(restored, state)
    assert_placed(restored, jax.tree.map(lambda x: x.sharding, abstract))
    assert {s.mesh for s in (x.sharding for x in jax.tree.leaves(restored))} == {other}


@pytest.mark.parametrize('name', FORMATS)
def test_flax_nnx(name):
    """Partition metadata in, shardings of the state out, in the structure that NNX keeps it in."""
    nnx = pytest.importorskip('flax.nnx')
    mesh = mesh_of()
    tx = rmsprop_jax.rmsprop(0.1, momentum=0.9, storage=FORMATS[name])

    def make():
        start = nnx.with_partitioning(nnx.initializers.lecun_normal(), ('data', 'model'))
        return nnx.Linear(16, 8, kernel_init=start, rngs=nnx.Rngs(0))

    with jax.set_mesh(mesh):
        model = make()
        params = nnx.state(model, nnx.Param)
        derived = sharding.state_shardings(tx, params, nnx.get_named_sharding(params, mesh))
        state = jax.jit(tx.init, out_shardings=derived)(params)
        assert_placed(state, derived)
        kernel = jax.tree.leaves(state[0].nu['kernel'])[0]
        assert kernel.sharding.spec == (P('data') if name == 'factored' else P('data', 'model'))
        if name == 'factored':
            # NNX puts the metadata of a parameter on what stands in its place: pure arrays have
            # none.
            init = tx.init
            tx = optax.GradientTransformation(lambda p: init(nnx.as_pure(p)), tx.update)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        pure = nnx.as_pure(optimizer.opt_state)
        for leaf, wanted in zip(jax.tree.leaves(pure), jax.tree.leaves(derived), strict=True):
            if leaf.ndim:
                assert_placed(leaf, wanted)
        if name != 'factored':
            named = nnx.get_named_sharding(nnx.state(optimizer), mesh)
            for x, y in zip(
                jax.tree.leaves(named['opt_state']), jax.tree.leaves(derived), strict=True
            ):
                assert x == y


def test_parameters_without_a_sharding_are_named():
    params = {'w': jax.ShapeDtypeStruct((4,), jnp.float32)}
    with pytest.raises(ValueError, match=r"params\['w'\] has no sharding"):
        sharding.state_shardings(rmsprop_jax.scale_by_rms(), params)


def test_one_device_and_one_sharding_for_all():
    params = jax.device_put(parameters(), jax.devices()[1])
    tx = rmsprop_jax.rmsprop(0.1, storage=FORMATS['factored'].nu)
    state = jax.jit(tx.init, out_shardings=sharding.state_shardings(tx, {'w': params['kernel']}))
    assert {d for x in jax.tree.leaves(state({'w': params['kernel']})) for d in x.devices()} == {
        jax.devices()[1]
    }
    assert sharding.state_shardings(rmsprop_jax.trace(0.9), params, P()).trace['bias'] == P()


# Results


EXAMPLES = 16
# One divides among devices, the other does not.
SHAPES = {'kernel': (8, 16), 'odd': (3, 5)}


def targets():
    """What each example pulls the parameters to."""
    generator = np.random.default_rng(0)
    return {
        name: jnp.asarray(generator.normal(size=(EXAMPLES, *shape)), jnp.float32)
        for name, shape in SHAPES.items()
    }


def pull(params, targets):
    """A mean over examples of gradients that are multiples of 2^-8.

    Float32 holds every sum of them exactly, so that no order of reduction changes it.
    """

    def leaf(p, target):
        each = jnp.clip(p - target, -8, 8)
        return jnp.mean(jnp.round(each * 256) / 256, axis=0)

    return jax.tree.map(leaf, params, targets)


# Optimized, one program rounds a product and a sum once and another one twice.
plainly_compiled = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def training(optimizers):
    """Trains with each optimizer for 200 steps, all in one program."""

    def train(params, targets):
        def step(carry, _):
            def one(tx, params, state):
                updates, state = tx.update(pull(params, targets), state, params)
                return optax.apply_updates(params, updates), state

            return {name: one(tx, *carry[name]) for name, tx in optimizers.items()}, None

        start = {name: (params, tx.init(params)) for name, tx in optimizers.items()}
        return jax.lax.scan(step, start, None, length=200)[0]

    return plainly_compiled(train)


def start():
    return {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


OPTIMIZERS = {case.name: case.tx for case in CASES if case.descends}
# Where the last place of a float32 may differ, and what comes of it in 200 steps: means over rows
# and columns add up in another order, and XLA rewrites long chains in more than one way, which
# division by a small variance amplifies. With an injected decay, JAX 0.12 rounds the product and
# the sum of a bias correction's weight once in one program and twice in another.
NEARLY = {
    'inject_hyperparams': 1e-6,
    'torch-factored': 1e-6,
    'rmsprop-everything': 2e-4,
    'skip_nonfinite-coordinate': 2e-4,
}


@functools.cache
def alone():
    """The results of one device."""
    return training(OPTIMIZERS)(start(), targets())


def assert_results_are_those_of_one_device(got):
    """State bit for bit; parameters too, but for the last place of their addition in JAX 0.12."""
    for name, (params, state) in got.items():
        expected, expected_state = alone()[name]
        chex.assert_trees_all_close(params, expected, rtol=0, atol=NEARLY.get(name, 1e-7))
        if name not in NEARLY:
            chex.assert_trees_all_equal(state, expected_state)


@pytest.mark.parametrize(
    ('shape', 'spec'), [((2,), P()), ((8,), P('data')), ((4, 2), P(None, 'model'))], ids=str
)
def test_results_do_not_depend_on_the_mesh(shape, spec):
    mesh = mesh_of(shape, ('data', 'model')[: len(shape)])
    params = placed(start(), {'kernel': spec, 'odd': P()}, mesh)
    data = jax.device_put(targets(), NamedSharding(mesh, P('data')))
    assert_results_are_those_of_one_device(training(OPTIMIZERS)(params, data))


ROUNDED = {
    'bfloat16': FORMATS['bfloat16'],
    'uint8': storage.per_statistic(var=storage.large_leaves(storage.uint8(), 1, 0)),
}
SPLIT = {'a': P('model', 'data'), 'b': P(None, ('data', 'model')), 'c': P()}


SOME = ('keras', 'rmsprop-bfloat16', 'inject_hyperparams-uint8')


@pytest.mark.parametrize(('shape', 'spec'), [((8,), P()), ((4, 2), P(None, 'model'))], ids=str)
def test_results_of_zero1_are_those_of_one_device(shape, spec):
    mesh = mesh_of(shape, ('data', 'model')[: len(shape)])
    params = placed(start(), {'kernel': spec, 'odd': P()}, mesh)
    data = jax.device_put(targets(), NamedSharding(mesh, P('data')))
    split = {name: sharding.zero1(OPTIMIZERS[name], params) for name in SOME}
    assert_results_are_those_of_one_device(training(split)(params, data))


@pytest.mark.parametrize('name', ROUNDED)
def test_rounding_under_shard_map_is_that_of_the_whole_array(name):
    """Through a chain and a mask, on a mesh whose axes split an axis of the array each, or both."""
    mesh = mesh_of()
    inner = rmsprop_jax.rmsprop(0.1, momentum=0.9, centered=True, storage=ROUNDED[name])
    tx = optax.masked(inner, {'a': True, 'b': True, 'c': False})
    params = {'a': jnp.zeros((4, 8)), 'b': jnp.zeros((3, 16)), 'c': jnp.zeros(())}
    generator = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(generator.normal(size=p.shape), p.dtype), params)

    def run(grads, state, **extra):
        for _ in range(2):
            _, state = tx.update(grads, state, **extra)
        return tx.update(grads, state, **extra)

    of_state = sharding.state_shardings(tx, params, SPLIT)

    def sharded(specs):
        return plainly_compiled(
            jax.shard_map(
                functools.partial(run, partition_specs=specs),
                mesh=mesh,
                in_specs=(SPLIT, of_state),
                out_specs=(SPLIT, of_state),
            )
        )(grads, tx.init(params))

    expected = plainly_compiled(run)(grads, tx.init(params))
    chex.assert_trees_all_equal(sharded(SPLIT), expected)
    # Told nothing of the whole, every device draws the same bits for its share.
    untold = sharded(None)
    chex.assert_trees_all_equal_shapes_and_dtypes(untold, expected)
    with pytest.raises(AssertionError, match='not equal'):
        chex.assert_trees_all_equal(untold, expected)


def test_means_over_split_axes_are_refused_under_shard_map():
    tx = rmsprop_jax.scale_by_rms(storage=FORMATS['factored'].nu)
    params, specs = {'w': jnp.ones((8, 8, 8))}, {'w': P(None, 'data')}
    of_state = sharding.state_shardings(tx, params, specs)
    with pytest.raises(ValueError, match=r"params\['w'\]: storage.factored takes means over axes"):
        jax.shard_map(
            functools.partial(tx.update, partition_specs=specs),
            mesh=mesh_of(),
            in_specs=(specs, of_state),
            out_specs=(specs, of_state),
        )(params, tx.init(params))


# ZeRO-1

SPLIT_OVER_DATA = {
    'kernel': P('data', 'model'),
    'bias': P(('model', 'data')),
    'odd': P(None, 'data'),
    'pair': P(),
}
REPLICATED = {'kernel': P(None, 'model'), 'bias': P('model'), 'odd': P(), 'pair': P()}


def uneven(mesh):
    params = {
        'kernel': jnp.linspace(-2, 3, 128).reshape(8, 16),
        'bias': jnp.linspace(-1, 1, 16),
        'odd': jnp.linspace(-2, 1, 24).reshape(3, 8),
        'pair': jnp.array([1.0, -2.0]),
    }
    return placed(params, REPLICATED, mesh)


@pytest.mark.parametrize('kind', [AUTO, EXPLICIT], ids=['auto', 'explicit'])
@pytest.mark.parametrize('name', FORMATS)
def test_zero1_splits_state_and_changes_no_number(name, kind):
    mesh = mesh_of(kind=kind)
    params = uneven(mesh)
    mask = {'kernel': True, 'bias': False, 'odd': True, 'pair': False}
    ours = rmsprop_jax.rmsprop(0.1, momentum=0.9, storage=FORMATS[name])
    # Factored moments need two axes.
    inner = optax.masked(ours, mask) if name == 'factored' else ours
    inner = optax.chain(optax.clip_by_global_norm(1.0), inner)
    tx = optax.chain(sharding.zero1(inner, params), optax.scale(0.5))
    split = sharding.zero1_shardings(params)
    assert {leaf: place.spec for leaf, place in split.items()} == SPLIT_OVER_DATA
    wanted = (sharding.state_shardings(inner, params, split), optax.EmptyState())
    for init in (tx.init, jax.jit(tx.init)):
        state = init(params)
        for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
            assert leaf.ndim == 0 or leaf.sharding.is_equivalent_to(place, leaf.ndim)
    got, expected = (params, state), (params, optax.chain(inner, optax.scale(0.5)).init(params))

    def steps(tx):
        def step(params, state):
            grads = jax.tree.map(lambda p: jnp.round(64 * p) / 64, params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step)

    for _ in range(3):
        got = steps(tx)(*got)
        expected = steps(optax.chain(inner, optax.scale(0.5)))(*expected)
    chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-6)
    for leaf in got[0]:
        assert got[0][leaf].sharding.is_equivalent_to(params[leaf].sharding, params[leaf].ndim)
    for leaf, place in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted), strict=True):
        assert leaf.ndim == 0 or leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.mark.parametrize(
    ('shape', 'before', 'after'),
    [
        ((16, 4), P('model', None), P('model', 'data')),  # axes that are whole come first
        ((3, 4), P(None, 'model'), P(None, 'model')),  # parts of two are no multiple of four
        ((3, 8), P(None, 'model'), P(None, ('model', 'data'))),
        ((8, 4), P('data'), P('data')),  # split over the data already
        ((8, 4), P(None, ('model', 'data')), P(None, ('model', 'data'))),
        ((0, 4), P(), P(None, 'data')),
        ((), P(), P()),
    ],
)
def test_zero1_splits_the_first_axis_that_can_be_split(shape, before, after):
    param = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert sharding.zero1_shardings(param, NamedSharding(mesh_of(), before)).spec == after


def test_zero1_shardings_name_what_is_wrong():
    mesh = mesh_of()
    params = {'w': jnp.ones((8, 8))}
    with pytest.raises(ValueError, match="axis 'fsdp' is not one of"):
        sharding.zero1_shardings(params, NamedSharding(mesh, P()), 'fsdp')
    with pytest.raises(TypeError, match=r"params\['w'\] has sharding P\('data',\), but"):
        sharding.zero1_shardings(params, P('data'))
    tx = sharding.zero1(rmsprop_jax.rmsprop(0.1), params, NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match=r"params\['v'\] is not in the params given to zero1"):
        tx.init({'v': jnp.ones((8, 8))})


@pytest.mark.parametrize('varying', [False, True], ids=['unchecked', 'varying'])
def test_reduce_scatter_is_the_sum_over_devices(varying):
    """Over both axes of a mesh, along one axis of the array or two, or along none."""
    mesh = mesh_of(names=('x', 'y'))
    axis = ('x', 'y')
    specs = {'both': P(None, ('y', 'x')), 'each': P('x', 'y'), 'one': P('y'), 'none': P()}
    # Every entry of a gradient is another whole number, which sums in any order are exact for.
    params = {name: jnp.arange(64.0).reshape(8, 8) for name in specs}
    data = jnp.arange(16.0).reshape(16, 1, 1)

    def loss(params, data):
        return sum(jnp.sum(p * p * data * (i + 1)) for i, p in enumerate(params.values()))

    def mapped(params, data):
        if varying:
            params = jax.lax.pcast(params, axis, to='varying')
        return sharding.reduce_scatter(jax.grad(loss)(params, data), specs, axis)

    split = jax.shard_map(
        mapped, mesh=mesh, in_specs=(P(), P(axis)), out_specs=specs, check_vma=varying
    )
    chex.assert_trees_all_equal(jax.jit(split)(params, data), jax.grad(loss)(params, data))


def test_gradients_that_are_summed_already_are_refused():
    def mapped(w, x):
        gradient = jax.grad(lambda w: jnp.sum(w * x))(w)
        return sharding.reduce_scatter(gradient, P('data'))

    split = jax.shard_map(
        mapped, mesh=mesh_of((8,), ('data',)), in_specs=(P(), P('data')), out_specs=P('data')
    )
    with pytest.raises(ValueError, match="gradients is already summed over 'data'"):
        jax.eval_shape(split, jnp.ones(8), jnp.ones(8))
