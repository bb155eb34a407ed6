"""Ways to break the mathematics, each with the tests of the fast suite that must notice.

A mutant is a file, what stands there once, what is put in its place, and names of `SELECTIONS`.
"""

_OPTAX, _STABLE = 'tests/test_optax_equality.py', 'tests/test_stability.py'
_STORAGE, _CONTRACT = 'tests/test_storage.py', 'tests/test_contract.py'
_DIALECTS, _ERRORS = 'tests/test_dialects.py', 'tests/test_errors.py'
_FAULTS, _INTERCHANGE = 'tests/test_faults.py', 'tests/test_interchange.py'
_SHARDING, _DIAGNOSTICS = 'tests/test_sharding.py', 'tests/test_diagnostics.py'
_RECIPES = 'tests/test_recipes.py'


def _golden(*names: str) -> list[str]:
    return [f'tests/test_golden.py::test_float64[{name}]' for name in names]


# Tests by node, the cheapest that are enough.
SELECTIONS: dict[str, list[str]] = {
    'plain': [f'{_OPTAX}::test_rmsprop[True-False-1.0-True-nesterov-schedule]'],
    'outside': [f'{_OPTAX}::test_rmsprop[False-False-0.0-False-momentum-float]'],
    'centered': [f'{_OPTAX}::test_rmsprop[True-True-1.0-False-none-array]'],
    'corrected': [f'{_OPTAX}::test_rmsprop[False-True-0.0-True-none-float]'],
    'schedules': [f'{_OPTAX}::test_schedules_of_decay_eps_and_momentum[True-2.0-True]'],
    'complex': [f'{_OPTAX}::test_complex_gradients_share_one_magnitude[True-True]'],
    'decay': [f'{_OPTAX}::test_weight_decay_is_decoupled_and_follows_the_schedule'],
    'complement': [f'{_OPTAX}::test_python_decay_is_complemented_in_double_precision'],
    'zero': [f'{_STABLE}::test_zero_gradient_gives_zero_update_and_finite_derivative'],
    'finite': [f'{_STABLE}::test_updates_are_finite_and_within_the_formula'],
    'formulas': ['tests/test_formulas.py'],
    'moments': ['tests/test_moments.py'],
    'narrow': [f'{_STABLE}::test_narrow_parameters_keep_float32_accumulators'],
    'counts': [
        f'{_CONTRACT}::test_count_saturates',
        f'{_CONTRACT}::test_schedules_see_the_zero_based_count',
    ],
    'loop': [f'{_CONTRACT}::test_scan_equals_loop[scale_by_rms]'],
    'dtypes': [f'{_CONTRACT}::test_dtypes', f'{_CONTRACT}::test_float64_and_strict_promotion'],
    'injected': [
        f'{_CONTRACT}::test_injected_hyperparameters_can_be_changed_between_steps',
        f'{_CONTRACT}::test_inject_hyperparams_needs_no_params_unless_weights_decay',
        f'{_ERRORS}::test_optax_injection_into_bfloat16_parameters',
    ],
    'errors': [_ERRORS],
    'equations': [f'{_DIALECTS}::test_equations'],
    'arguments': [f'{_DIALECTS}::test_every_argument_matters'],
    'rows': [
        f'{_DIALECTS}::test_rows_without_gradient_keep_all_their_statistics',
        *_golden('tensorflow: sparse', 'keras_legacy: sparse'),
    ],
    'accumulation': [
        f'{_DIALECTS}::test_accumulation_takes_a_mean_and_its_schedule_the_calls',
        f'{_DIALECTS}::test_accumulation_keeps_every_dtype',
    ],
    'infinite norm': [f'{_DIALECTS}::test_an_infinite_norm_makes_all_gradients_nan'],
    'torch': _golden('torch: defaults', 'torch: schedule', 'torch: maximize'),
    'torch complex': _golden('torch: complex'),
    'torch clip': _golden(
        'torch: clip max_norm 1.0 normal', 'torch: clip max_norm 1000000.0 normal'
    ),
    'keras clips': _golden('keras: clipnorm', 'keras: global_clipnorm', 'keras: loss scale'),
    'keras averages': _golden('keras: ema', 'keras: ema overwriting', 'tf_keras: ema overwriting'),
    'legacy': _golden(
        'keras_legacy: eps 0.01 plain',
        'keras_legacy: eps 0',
        'keras_legacy: decay',
        'keras_legacy: clipvalue and clipnorm',
    ),
    'tensorflow': _golden('tensorflow: defaults'),
    'timm': _golden('timm: schedule', 'timm: lr outside', 'timm: corrected'),
    'cautious': _golden('timm: caution', 'timm: caution outside'),
    'sb3': _golden('stable_baselines3: schedule'),
    'rounding': [
        f'{_STORAGE}::test_every_platform_rounds_alike',
        f'{_STORAGE}::test_ends',
        f'{_STORAGE}::test_what_is_on_the_grid_stays',
        f'{_STORAGE}::test_bfloat16_keeps_signs',
        f'{_STORAGE}::test_rounding_goes_to_a_neighbour_and_is_right_on_average',
    ],
    'bits': [
        f'{_STORAGE}::test_random_bits_look_random',
        f'{_STORAGE}::test_bits_come_from_paths_not_from_positions',
    ],
    'average': [f'{_STORAGE}::test_the_average_neither_stalls_nor_drifts'],
    'silent': [f'{_STORAGE}::test_a_silent_entry_is_not_rounded'],
    'guard': [f'{_STORAGE}::test_the_guard_at_the_upper_end_matters'],
    'small variance': [
        f'{_STORAGE}::test_a_centered_step_divides_by_no_variance_that_the_format_made_small'
    ],
    'factored': [f'{_STORAGE}::test_factored_is_exact_for_products'],
    'large': [f'{_STORAGE}::test_small_leaves_stay_float32_by_a_rule_that_can_be_changed'],
    'converted': [
        f'{_STORAGE}::test_convert_goes_on_in_another_format',
        f'{_STORAGE}::test_saturation_counts_entries_at_the_ends',
    ],
    'skipped': [
        f'{_FAULTS}::test_a_skipped_coordinate_goes_on_as_if_the_step_had_not_been[momentum]'
    ],
    'skipped leaf': [
        f'{_FAULTS}::test_a_skipped_leaf_goes_on_as_if_the_step_had_not_been[float32]'
    ],
    'standing': [
        f'{_FAULTS}::test_a_bias_corrected_average_stands_still_while_its_weight_grows[False]'
    ],
    'skips counted': [f'{_FAULTS}::test_the_count_saturates'],
    'mended': [
        f'{_FAULTS}::test_an_overflow_stops_its_coordinate_until_it_is_mended[float32-momentum]'
    ],
    'mended corrected': [
        f'{_FAULTS}::test_an_overflow_stops_its_coordinate_until_it_is_mended[float32-corrected]'
    ],
    'mended complex': [f'{_FAULTS}::test_complex_numbers_are_mended_whole[plain-pairs]'],
    'without entries': [f'{_FAULTS}::test_statistics_without_entries_mark_the_whole_parameter'],
    'reset': [
        f'{_INTERCHANGE}::'
        'test_reset_gives_start_values_to_what_is_selected_and_leaves_the_rest[chain]'
    ],
    'reset weight': [
        f'{_INTERCHANGE}::test_reset_starts_the_weights_again_where_all_that_share_them_do'
    ],
    'reset average': [
        f'{_INTERCHANGE}::test_reset_starts_an_average_of_parameters_from_the_new_ones'
    ],
    'reset unit': [f'{_STORAGE}::test_reset_in_units_of_a_running_state'],
    'branch': [f'{_SHARDING}::test_a_mask_may_leave_out_a_whole_branch[factored]'],
    'factors': [f'{_SHARDING}::test_factors_have_the_axes_that_are_left'],
    'split': [f'{_SHARDING}::test_zero1_splits_the_first_axis_that_can_be_split'],
    'zero1': [f'{_SHARDING}::test_zero1_splits_state_and_changes_no_number[float32-auto]'],
    'scattered': [f'{_SHARDING}::test_reduce_scatter_is_the_sum_over_devices[unchecked]'],
    'summed before': [f'{_SHARDING}::test_gradients_that_are_summed_already_are_refused'],
    'step sizes': [
        f'{_DIAGNOSTICS}::test_step_sizes_are_quantiles[float32-10]',
        f'{_DIAGNOSTICS}::test_step_sizes_of_what_is_no_number',
    ],
    'counted': [f'{_DIAGNOSTICS}::test_counts_are_exact_beyond_the_integers_of_float32'],
    'ratios': [f'{_DIAGNOSTICS}::test_ratios_at_zero'],
    'epsilon shares': [f'{_DIAGNOSTICS}::test_epsilon_shares[True-True-False]'],
    'compact shares': [f'{_DIAGNOSTICS}::test_compact_shares'],
    'every': [f'{_DIAGNOSTICS}::test_every_so_many_steps'],
    'rates': [f'{_RECIPES}::test_learning_rates'],
    'decayed weights': [f'{_RECIPES}::test_updates_are_those_of_the_source'],
    'weight average': [f'{_RECIPES}::test_average[True-0.995]'],
    'critic': [f'{_RECIPES}::test_critic_is_clamped_before_each_step_there_and_after_it_here'],
    'means': [
        f'{_RECIPES}::test_dqn_takes_the_same_steps_on_a_mean',
        f'{_RECIPES}::test_impala_takes_the_same_steps_on_a_mean[1000.0-impala_atari]',
    ],
}

MUTANTS: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    '_types': [
        ('return 1 - decay', 'return 1 - jnp.float32(decay)', ('complement',)),
        ('jnp.finfo(dtype).bits < 32 else', 'jnp.finfo(dtype).bits < 16 else', ('narrow',)),
        ('below=1.0, exact=True)', 'below=1.0)', ('errors',)),
        ('callable(self.value) else self.value', 'False else self.value', ('schedules',)),
    ],
    '_moments': [
        ('decay * nu + complement', 'decay * nu - complement', ('equations',)),
        ('complement * squared_magnitude(g)', 'decay * squared_magnitude(g)', ('equations',)),
        ('decay * weight + complement', 'decay * weight + decay', ('plain',)),
        (
            'mu + componentwise(operator.mul, g - mu',
            'mu + componentwise(operator.mul, g',
            ('centered',),
        ),
        ('return decay * var + _real_product', 'return var + _real_product', ('centered',)),
        ('operator.truediv, mu, jnp.where', 'operator.mul, mu, jnp.where', ('corrected',)),
        ('jnp.where(weight == 0, 1, weight)', 'weight', ('moments',)),
        ('deviation = g - centre', 'deviation = g + centre', ('centered',)),
        ('share), deviation)', 'share), g)', ('centered',)),
        ('return 1 / x if x else 0.0', 'return 1 / x if x else 1.0', ('moments',)),
        ('jnp.where(vanishes, 0, 1 / jnp', 'jnp.where(vanishes, 1, 1 / jnp', ('moments',)),
        (
            'root = _apart(jnp.sqrt(moment + eps), rounds) if eps_in_sqrt else _sqrt(moment) + eps',
            'root = _apart(jnp.sqrt(moment), rounds) + eps if eps_in_sqrt else _sqrt(moment + eps)',
            ('equations',),
        ),
        (
            'root = _sqrt(moment + eps) if eps_in_sqrt else _sqrt(moment) + eps\n    vanishes',
            'root = _sqrt(moment) + eps if eps_in_sqrt else _sqrt(moment + eps)\n    vanishes',
            ('schedules', 'moments'),
        ),
        ('return jnp.where(vanishes, 0, quotient)', 'return quotient', ('moments',)),
        ('return jnp.maximum(root, _smallest_normal(root))', 'return root', ('loop',)),
        ('x.real * y.real + x.imag', 'x.real * y.real - x.imag', ('complex',)),
        ('return _real_product(x, x)', 'return jnp.abs(x)', ('equations',)),
        ('op(x.real, real), op(x.imag, real)', 'op(x.real, real), x.imag', ('complex',)),
        (
            'return jnp.where(vanishes, 0, jnp.sqrt(jnp.where(vanishes, 1, x)))',
            'return jnp.sqrt(x)',
            ('zero',),
        ),
    ],
    '_precondition': [
        ('rest = complement(decay)', 'rest = decay', ('equations',)),
        ('eps_.at(state.count)', 'eps_.at(0)', ('schedules',)),
        ('decay_.at(state.count)', 'decay_.at(state.count + 1)', ('schedules',)),
        ('nu if c is None else nu / c[1]', 'nu if c is None else nu / c[0]', ('plain',)),
        ('d, d * r * ratio', 'd, r * ratio', ('moments',)),
        ('reciprocal_or_zero(d * ratio)', 'reciprocal_or_zero(d)', ('corrected',)),
        ('g, new_mu, after, d, share', 'g, mu, after, d, share', ('centered',)),
        ('moment = var if c is None else var / c[1]', 'moment = var', ('corrected',)),
        ('squared_magnitude(centre), 0)', 'squared_magnitude(0 * centre), 0)', ('guard',)),
        ('optax.safe_increment(state.count)', '(state.count + 1)', ('counts',)),
        ('weights is None else weights[1]', 'weights is None else weights[0]', ('plain',)),
        ('init(params, 0.0) if centered', 'init(params, start_value) if centered', ('centered',)),
        ('jnp.zeros([], widest)', 'jnp.ones([], widest)', ('plain',)),
        ('jnp.zeros([], widest)', 'jnp.zeros([], jnp.float32)', ('plain',)),
        ('first.init(params, start_value)', 'first.init(params, 0.0)', ('plain',)),
        (
            'initial_scale, eps_in_sqrt, bias_correction, centered=True',
            'initial_scale, bias_correction, eps_in_sqrt, centered=True',
            ('moments',),
        ),
        ("(name, name != 'mu', storage)", '(name, True, storage)', ('complex',)),
    ],
    '_lift': [
        (
            'wide = np.result_type(*[real_dtype(x.dtype) for x in decoded])',
            "wide = np.dtype('float32')",
            ('equations',),
        ),
        (
            'return update.astype(jnp.result_type(g)), *encoded',
            'return update, *encoded',
            ('dtypes',),
        ),
        ('for unit in units)', 'for unit in reversed(units))', ('silent', 'average')),
        (
            "kept.key(f'{statistic.name}{keystr(path)}')",
            "kept.key(f'{statistic.name}')",
            ('moments',),
        ),
        (
            "kept.key(f'{statistic.name}{keystr(path)}')",
            "kept.key(f'{keystr(path)}')",
            ('moments',),
        ),
        ('x.astype(jnp.result_type(y)), tree', 'x, tree', ('dtypes',)),
        ('jnp.asarray(x, wide_dtype(dtype))', 'x', ('moments',)),
        ('if jnp.iscomplexobj(other) !=', 'if False !=', ('errors',)),
        ('for path, node in nodes if is_masked(node)}', 'for path, _ in nodes[:0]}', ('branch',)),
        ('return new if mark else old', 'return old if mark else new', ('reset',)),
    ],
    '_momentum': [
        (
            'velocity = g + componentwise(operator.mul, velocity, d)\n',
            'velocity = g - componentwise(operator.mul, velocity, d)\n',
            ('plain',),
        ),
        ('velocity, d) if nesterov', 'velocity, d) if not nesterov', ('plain',)),
        ('return ahead, velocity', 'return ahead, ahead', ('plain',)),
        ('decay_.at(state.count)', 'decay_.at(0)', ('schedules',)),
        ('init(params, 0.0)', 'init(params, 1.0)', ('plain',)),
        ('optax.safe_increment(state.count)', '(state.count + 1)', ('moments',)),
    ],
    '_optimizer': [
        ('lambda count: -rate.at(count)', 'lambda count: rate.at(count)', ('plain',)),
        ('u, -cast(rate.value', 'u, cast(rate.value', ('outside',)),
        ('p, lr * wd)', 'p, wd)', ('decay',)),
        ('return u - componentwise', 'return u + componentwise', ('decay',)),
        ('guarded(masked, optax.MaskedState, user)', 'decay', ('decay',)),
        ('now = rate.at(state.count)', 'now = rate.at(state.count + 1)', ('decay',)),
        ('inner_.update(wide_updates, state', 'inner_.update(updates, state', ('moments',)),
        ("{'momentum', 'wd', 'weight_decay'}", '{}', ('injected',)),
        ('jax.dtypes.canonicalize_dtype(jnp.float64)', 'None', ('injected',)),
        (
            'scale_by_learning_rate(learning_rate),\n    ]\n    if momentum is not None:\n        steps.append(',
            'scale_by_learning_rate(learning_rate),\n    ]\n    if momentum is not None:\n        steps.insert(1, ',
            ('plain',),
        ),
    ],
    '_transforms': [
        (
            'lax.complex(x[..., 0], x[..., 1])',
            'lax.complex(x[..., 1], x[..., 0])',
            ('torch complex',),
        ),
        ('operator.mul, p, 1 - w)', 'operator.mul, p, w)', ('keras averages',)),
        ('0 if from_start else 1', '0 if from_start else 2', ('keras averages',)),
        ('0 if from_start else 1', '1', ('keras averages',)),
        ('step == 0, p, a)', 'step == 1, p, a)', ('keras averages',)),
        ('(step + 1) % overwrite', '(step + 2) % overwrite', ('keras averages',)),
        ('cast(bound, p.dtype)) - p', 'cast(bound, p.dtype))', ('equations',)),
        ('u * g < 0', 'u * g > 0', ('cautious',)),
        ('jnp.maximum(agrees.mean(), 1e-3)', 'jnp.maximum(agrees.mean(), 0.9)', ('cautious',)),
        ('scaled(total, 1 / every)', 'scaled(total, 1.0)', ('accumulation',)),
        ('state.mini_step == every - 1', 'state.mini_step == every', ('accumulation',)),
        ('bound / jnp.maximum(norm, bound)', 'bound / norm', ('keras clips',)),
        ('g, jnp.nan)', 'g, 0.0)', ('infinite norm',)),
        ('operator.truediv, g, cast(number', 'operator.mul, g, cast(number', ('keras clips',)),
        ('jnp.where(h, b, a)', 'jnp.where(h, a, b)', ('rows',)),
        ('range(1, jnp.ndim(g))', 'range(0, jnp.ndim(g))', ('rows',)),
        ('-cast(bound, g.dtype), cast(bound', 'cast(bound, g.dtype), cast(bound', ('equations',)),
    ],
    'dialects': [
        ('alpha, eps, eps_in_sqrt=False', 'alpha, eps, eps_in_sqrt=True', ('torch',)),
        (
            '            _momentum(momentum, storage),\n            scale_by_learning_rate(lr),\n',
            '            scale_by_learning_rate(lr),\n            _momentum(momentum, storage),\n',
            ('torch',),
        ),
        ('optax.scale(-1.0)', 'optax.scale(1.0)', ('torch',)),
        ('limit / (norm + 1e-6)', 'limit / norm', ('torch clip',)),
        ('jnp.minimum(1.0, limit', 'jnp.minimum(2.0, limit', ('torch clip',)),
        ('last) * every + (every - 1)', 'last) * every', ('accumulation',)),
        ('eps_in_sqrt=not plain', 'eps_in_sqrt=plain', ('legacy',)),
        ('1e-7 if epsilon is None', '1e-8 if epsilon is None', ('legacy',)),
        ('(1.0 + cast(slope', '(2.0 + cast(slope', ('legacy',)),
        (
            '_clipping(clipvalue=clipvalue),\n        _clipping(clipnorm=clipnorm, global_clipnorm=global_clipnorm),',
            '_clipping(clipnorm=clipnorm, global_clipnorm=global_clipnorm),\n        _clipping(clipvalue=clipvalue),',
            ('legacy',),
        ),
        (
            'initial_scale=1.0,\n        centered=centered,\n        momentum',
            'centered=centered,\n        momentum',
            ('tensorflow',),
        ),
        ("if checked_flag('lr_in_momentum'", "if not checked_flag('lr_in_momentum'", ('timm',)),
        ('(rate.at(count) / top)', '(rate.at(count) * top)', ('timm',)),
        (
            '_coupled_decay(weight_decay, mask),\n        scale_by_rms(alpha, eps, initial_scale=1.0',
            '_coupled_decay(weight_decay, mask),\n        scale_by_rms(alpha, eps, initial_scale=0.0',
            ('sb3',),
        ),
        ('eps_in_sqrt=centered,', 'eps_in_sqrt=not centered,', ('equations',)),
        (
            "_clipping_unless_zero(clip_gradient=clip_gradient),\n        _coupled_decay(wd, mask, 'wd'),",
            "_coupled_decay(wd, mask, 'wd'),\n        _clipping_unless_zero(clip_gradient=clip_gradient),",
            ('equations',),
        ),
        ('eps, centered=True, momentum=momentum', 'eps, momentum=momentum', ('equations',)),
        ('decay, eps=0.0,', 'decay, eps=1e-8,', ('equations',)),
    ],
    'storage/_rounding': [
        ('shrunk = unit * cast(decay, unit.dtype)', 'shrunk = unit', ('silent', 'average')),
        ('jnp.where(power > x, power * 0.5, power)', 'power', ('rounding', 'silent')),
        ('jnp.asarray(count, jnp.uint32) * ', '0 * jnp.asarray(count, jnp.uint32) * ', ('bits',)),
        ("f'{seed} {label}'", "f'{label}'", ('bits',)),
        ('_hashed(index ^ salt)', '_hashed(index) ^ salt', ('bits',)),
        ('return x ^ (x >> 15)', 'return x << 8', ('moments',)),
        ('x = (x ^ (x >> 16))', 'x = (x ^ (x >> 31))', ('moments',)),
    ],
    'storage/_choice': [
        ('len(shape) >= self.min_ndim', 'len(shape) > self.min_ndim', ('large',)),
        ('math.prod(shape) >= self.min_size', 'math.prod(shape) > self.min_size', ('large',)),
    ],
    'storage/_formats': [
        ('else 1 / unit)', 'else unit)', ('silent', 'converted')),
        (
            'return self.widened(stored) * (1.0 if unit is None else unit)',
            'return self.widened(stored)',
            ('silent', 'average'),
        ),
        (
            'jnp.clip(magnitude, low, high) + (bits >> 16)',
            'jnp.clip(magnitude, low, high)',
            ('rounding',),
        ),
        ('jnp.copysign(whole * (power * 2.0**-6), x)', 'whole * (power * 2.0**-6)', ('rounding',)),
        ('noise = bits >> 11', 'noise = bits >> 12', ('rounding',)),
        ('(46, 307, -74)', '(45, 307, -74)', ('rounding',)),
        ('x * (1 / window.scale)', 'x * window.scale', ('moments', 'converted')),
        ('jnp.float32) * self.scale', 'jnp.float32)', ('moments', 'converted')),
        ('jnp.where(below, 80.0', 'jnp.where(below, 79.0', ('rounding',)),
        (
            'row=jnp.mean(x, axis=-1), col=jnp.mean(x, axis=-2)',
            'row=jnp.mean(x, axis=-1), col=jnp.sum(x, axis=-2)',
            ('factored',),
        ),
        ('stored.row / jnp.where(vanishes, 1, total)', 'stored.row', ('factored',)),
        ('return jnp.where(code == 0, 0.0, value)', 'return value', ('rounding',)),
        (
            'HALF if bits is None else bits)',
            'np.uint32(0) if bits is None else bits)',
            ('moments', 'converted'),
        ),
    ],
    '_nonfinite': [
        ("bad.any() if per == 'leaf' else bad", 'bad', ('skipped leaf',)),
        ("bad.any() if per == 'leaf' else bad", 'bad.any()', ('skipped',)),
        ('jnp.where(b, 0, x)', 'jnp.where(b, 1, x)', ('skipped',)),
        ('return _zeroed(bad, new), Skip', 'return new, Skip', ('skipped',)),
        ('bad, False), standing, after)', 'bad, False), before, after)', ('standing',)),
        ('total > _MOST - more', 'total > _MOST', ('skips counted',)),
        ('~jnp.isfinite(x), jnp.shape', 'jnp.isnan(x), jnp.shape', ('mended',)),
        ('marks[number] |= _entries', 'marks[number] = _entries', ('mended',)),
        ('bad.any(-1) if', 'bad.all(-1) if', ('mended complex',)),
        ('else bad.any()\n', 'else jnp.broadcast_to(bad, shape)\n', ('without entries',)),
    ],
    '_reset': [
        ('else mark.all() for mark', 'else mark.any() for mark', ('mended corrected',)),
        ('operator.and_, marks, True', 'operator.or_, marks, False', ('reset weight',)),
        ('_with_average(tx.init(params), params)', 'tx.init(params)', ('reset average',)),
        ('_replace(unit=running.unit)', '_replace(unit=2 * running.unit)', ('reset unit',)),
        ('(select, marks, start, state)', '(select, marks, state, start)', ('reset',)),
    ],
    'sharding': [
        ('key=lambda dim: bool(entries[dim])', 'key=lambda dim: 0', ('split',)),
        ('own = math.prod(sizes[name] for name in entries[dim])', 'own = 1', ('split',)),
        ('if set(names) & {name for entry in entries for name in entry}:', 'if 0:', ('split',)),
        ('if shape[dim] and shape', 'if shape', ('split',)),
        ('return place(new, whole), place_state', 'return new, place_state', ('zero1',)),
        ('found(params, split))', 'found(params, whole))', ('zero1',)),
        ('stored.row.ndim + 1)', 'stored.row.ndim)', ('factors',)),
        (
            'rest = tuple(name for name in names if',
            'rest = tuple(name for name in () if',
            ('scattered',),
        ),
        ('for name, dim in owners:', 'for name, dim in reversed(owners):', ('scattered',)),
        ('- _varies(g):', '- {name}:', ('summed before',)),
    ],
    'diagnostics': [
        ('math.ceil(share * size)', 'math.floor(share * size)', ('step sizes',)),
        (
            'jnp.where(below < jnp.array(ranks',
            'jnp.where(below <= jnp.array(ranks',
            ('step sizes',),
        ),
        ('return jnp.abs(x).astype(jnp.float32)', 'return x.astype(jnp.float32)', ('step sizes',)),
        ('< 2**24 else', '< 2**26 else', ('counted',)),
        ('jnp.where(step == 0, 0, step', 'jnp.where(size == 0, 0, step', ('ratios',)),
        ('moment / node.weight.astype', 'moment * node.weight.astype', ('epsilon shares',)),
        ('eps_.at(node.count - 1)', 'eps_.at(node.count)', ('epsilon shares',)),
        (
            'moment if eps_in_sqrt else jnp.sqrt',
            'moment if not eps_in_sqrt else jnp.sqrt',
            ('epsilon shares',),
        ),
        ('same & driven', 'same', ('compact shares',)),
        ('leaf.ends()[end]', 'leaf.ends()[1 - end]', ('compact shares',)),
        ('count % every == 0', 'count % every == 1', ('every',)),
    ],
    'recipes/_schedules': [
        ('jnp.where(count < warm', 'jnp.where(count <= warm', ('rates',)),
        ('int(between) if stairs.truncated else between', 'between', ('rates',)),
        ('// between.numerator', '/ between.numerator', ('rates',)),
        ('start + _real(passed) * (', '_real(passed) * (', ('rates',)),
        ('if last_of_share else 0.0', 'if 0 else 0.0', ('rates',)),
        ('/ recipe.per_batch', '/ 256', ('rates',)),
    ],
    'recipes/_average': [
        ('9.0 / (10.0 + taken)', '10.0 / (10.0 + taken)', ('weight average',)),
        ('jnp.maximum(cast(rest', 'jnp.minimum(cast(rest', ('weight average',)),
    ],
    'recipes/_agents': [
        ('r.eps / terms**2, centered', 'r.eps / terms, centered', ('means',)),
        ('initial_scale=1.0 / terms**2', 'initial_scale=1.0', ('means',)),
        ('r.max_norm / terms)', 'r.max_norm)', ('means',)),
    ],
    'recipes/_networks': [
        (
            "chain(step, clip_parameters('clamp', r.clamp))",
            'chain(step)',
            ('critic',),
        ),
        ('r.weight_decay, mask', 'r.weight_decay', ('decayed weights',)),
    ],
}
