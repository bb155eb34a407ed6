"""The recipes as data. Each source is named with the commit at which it was read."""

import dataclasses
import math
from typing import Literal

from rmsprop_jax.dialects._record import as_markdown


@dataclasses.dataclass(frozen=True)
class Staircase:
    """A learning rate that falls by a factor at regular intervals.

    Attributes:
      factor: Multiplies the rate at each drop.
      epochs: Epochs between drops, counted from step 0 even if there is a warm-up.
      warm_up: Epochs of linear warm-up; None if the source leaves it open.
      warm_up_from: The rate at which the warm-up starts.
      floor: The lowest rate, as a share of the initial one.
      truncated: Whether the source truncates the steps between drops to an integer.
      by_epoch: Whether the rate changes only between epochs, also during the warm-up.
    """

    factor: float
    epochs: float
    warm_up: float | None = 0.0
    warm_up_from: float = 0.0
    floor: float = 0.0
    truncated: bool = False
    by_epoch: bool = False

    def __str__(self) -> str:
        """In words, for the table."""
        parts = [f'x {self.factor} every {self.epochs} epochs']
        if self.warm_up != 0:
            length = 'a warm-up' if self.warm_up is None else f'{self.warm_up:g} epochs of warm-up'
            parts.append(f'{length} from {self.warm_up_from:g}')
        parts += [f'at least {self.floor:g} of the first'] * bool(self.floor)
        parts += ['changed between epochs'] * self.by_epoch
        return ', '.join(parts)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings with which a publication trained.

    Attributes:
      name: The function of this module that builds the optimizer.
      citation: The publication.
      source: Where the values were read.
      verified: 'code' if the source is the code that was run, 'second-hand' if it is an account.
      dialect: The RMSProp that it uses, as an expression of this package.
      learning_rate: In the unit of the parameter; for `per_batch` examples, if that is given.
      decay: Weight of the past in the running averages.
      eps: In the unit of the gradient if `dialect` is PyTorch's, else in its squared unit.
      loss: How the loss is reduced; `eps` depends on it.
      per_batch: The batch size for which `learning_rate` holds; it scales in proportion.
      schedule: How the learning rate changes.
      momentum: Decay of the velocity, 0 for none.
      centered: Whether gradients are divided by the standard deviation.
      weight_decay: Coefficient of the parameter in the gradient.
      decayed: The parameters that decay.
      max_norm: The maximum norm of all gradients together.
      clamp: The maximum magnitude of a parameter.
      average: Decay of the weight average that is evaluated; None for no average.
      average_form: 'num_updates' for TensorFlow's form, 'plain' for a constant decay.
      batch: The batch, in words.
      note: Anything else to know.
    """

    name: str
    citation: str
    source: str
    verified: Literal['code', 'second-hand']
    dialect: str
    learning_rate: float
    decay: float
    eps: float
    loss: str
    per_batch: int | None = None
    schedule: Staircase | Literal['constant', 'linear to 0'] = 'constant'
    momentum: float = 0.0
    centered: bool = False
    weight_decay: float = 0.0
    decayed: str = 'nothing'
    max_norm: float = math.inf
    clamp: float = math.inf
    average: float | None = None
    average_form: Literal['num_updates', 'plain'] = 'plain'
    batch: str = 'not given'
    note: str = ''


GRAVES = Recipe(
    name='graves',
    citation='Graves 2013, Generating Sequences With Recurrent Neural Networks, arXiv:1308.0850',
    source='equations 38 to 45, by way of chainer/chainer 0c89f4d: '
    'chainer/optimizers/rmsprop_graves.py',
    verified='second-hand',
    dialect='dialects.graves',
    learning_rate=1e-4,
    decay=0.95,
    momentum=0.9,
    eps=1e-4,
    centered=True,
    loss='not verified',
    note='The paper also clips derivatives inside the network; the bounds are not verified.',
)
DQN_NATURE = Recipe(
    name='dqn_nature',
    citation='Mnih et al. 2015, Human-level control, Nature 518:529',
    source='kuz/DeepMind-Atari-Deep-Q-Learner 54978fa: dqn/NeuralQLearner.lua, qLearnMinibatch; '
    'run_gpu',
    verified='code',
    dialect='rmsprop(centered=True)',
    learning_rate=2.5e-4,
    decay=0.95,
    eps=0.01,
    centered=True,
    loss='sum over 32 of half the squared TD error, linear beyond 1',
    batch='32',
    note="The paper's 'gradient momentum 0.95' is the decay of the mean gradient: no velocity.",
)
DOPAMINE_DQN = Recipe(
    name='dopamine_dqn',
    citation='Castro et al. 2018, Dopamine, arXiv:1812.06110',
    source='google/dopamine a804d3c: dopamine/tf/agents/dqn/configs/dqn_nature.gin, lines 17-23; '
    'dopamine/tf/agents/dqn/dqn_agent.py, _build_train_op',
    verified='code',
    dialect='dialects.tensorflow',
    learning_rate=2.5e-4,
    decay=0.95,
    eps=1e-5,
    centered=True,
    loss='mean over 32 of the Huber loss of the TD error',
    batch='32',
)
A3C = Recipe(
    name='a3c',
    citation='Mnih et al. 2016, Asynchronous Methods for Deep RL, arXiv:1602.01783',
    source="the authors' e-mails, as told in the wiki of muupan/async-rl and in "
    'miyosuda/async_deep_reinforce#1',
    verified='second-hand',
    dialect='rmsprop',
    learning_rate=7e-4,
    schedule='linear to 0',
    decay=0.99,
    eps=0.1,
    loss='not given',
    note='One second moment was shared by all threads. One account clips the norm at 40, the other '
    'does not mention clipping: `max_norm` is required.',
)
BASELINES_A2C = Recipe(
    name='baselines_a2c',
    citation='OpenAI Baselines: A2C',
    source='openai/baselines 015dc21: baselines/a2c/a2c.py, `Model.__init__`; '
    'baselines/a2c/utils.py, Scheduler',
    verified='code',
    dialect='dialects.tensorflow',
    learning_rate=7e-4,
    schedule='linear to 0',
    decay=0.99,
    eps=1e-5,
    max_norm=0.5,
    loss='mean over the batch',
    batch='environments x 5 steps',
)
SB3_A2C = Recipe(
    name='sb3_a2c',
    citation='Raffin et al. 2021, Stable-Baselines3, JMLR 22(268)',
    source='DLR-RM/stable-baselines3 0574e58: stable_baselines3/a2c/a2c.py, `A2C.__init__` and '
    'train',
    verified='code',
    dialect='dialects.torch',
    learning_rate=7e-4,
    decay=0.99,
    eps=1e-5,
    max_norm=0.5,
    loss='mean over the batch',
    batch='environments x 5 steps',
)
SB3_A2C_TF_LIKE = dataclasses.replace(
    SB3_A2C,
    name='sb3_a2c_tf_like',
    source='DLR-RM/stable-baselines3 46449ad: docs/modules/a2c.md, first warning; the rest as '
    '`sb3_a2c`',
    dialect='dialects.stable_baselines3',
    note='Its manual recommends this for matching the TensorFlow results.',
)
IMPALA_DMLAB = Recipe(
    name='impala_dmlab',
    citation='Espeholt et al. 2018, IMPALA, arXiv:1802.01561',
    source='google-deepmind/scalable_agent 103308a: experiment.py, optimizer flags and '
    'build_learner; README.md, single-machine command',
    verified='code',
    dialect='dialects.tensorflow',
    learning_rate=4.8e-4,
    schedule='linear to 0',
    decay=0.99,
    eps=0.1,
    loss='sum over 32 unrolls of 100 steps',
    batch='32 unrolls of 100 steps, 4 frames each',
)
IMPALA_DMLAB30 = dataclasses.replace(
    IMPALA_DMLAB,
    name='impala_dmlab30',
    source='google-deepmind/scalable_agent 1e70452: README.md, DMLab-30 command; the rest as '
    '`impala_dmlab`',
    learning_rate=0.00031866995608948655,
    note='Over 1e10 frames.',
)
IMPALA_ATARI = Recipe(
    name='impala_atari',
    citation='Espeholt et al. 2018, IMPALA, arXiv:1802.01561',
    source="the paper's values for Atari, as repeated in google-deepmind/optax#532",
    verified='second-hand',
    dialect='dialects.tensorflow',
    learning_rate=6e-4,
    schedule='linear to 0',
    decay=0.99,
    eps=0.01,
    max_norm=40.0,
    loss='sum, if it is as for DMLab',
    note='The account does not give the dialect and the schedule; these are from the DMLab code. '
    'Not torchbeast.',
)
IMPALA_TORCHBEAST = Recipe(
    name='impala_torchbeast',
    citation='Kuettler et al. 2019, TorchBeast, arXiv:1910.03552',
    source='facebookresearch/torchbeast 0af07b0: torchbeast/monobeast.py and '
    'polybeast_learner.py, flags, learn and train',
    verified='code',
    dialect='dialects.torch',
    learning_rate=4.8e-4,
    schedule='linear to 0',
    decay=0.99,
    eps=0.01,
    max_norm=40.0,
    loss='sum over 8 unrolls of 80 steps',
    batch='8 unrolls of 80 steps',
    note='The defaults of the code; its README trains Pong with a rate of 0.0004 and 4 unrolls.',
)
INCEPTION_V3 = Recipe(
    name='inception_v3',
    citation='Szegedy et al. 2015, Rethinking the Inception Architecture, arXiv:1512.00567',
    source='tensorflow/tpu 4a4a9e0: models/experimental/inception/inception_v3.py, '
    'inception_model_fn; tensorflow/contrib/slim/python/slim/nets/inception_v3.py, '
    'inception_v3_arg_scope',
    verified='code',
    dialect='dialects.tensorflow',
    learning_rate=0.165,
    per_batch=256,
    schedule=Staircase(0.94, 3, floor=1e-4, truncated=True),
    decay=0.9,
    momentum=0.9,
    eps=1.0,
    weight_decay=4e-5,
    decayed='weights of convolutions and dense layers',
    average=0.995,
    average_form='num_updates',
    loss='mean over the batch',
    batch='1024',
    note='The code for TPUs, not the run of the paper. Its warm-up is off by default.',
)
MNASNET = Recipe(
    name='mnasnet',
    citation='Tan et al. 2019, MnasNet, arXiv:1807.11626',
    source='tensorflow/tpu c08e52a: models/official/mnasnet/mnasnet_main.py, mnasnet_model_fn; '
    'mnasnet_utils.py; configs/mnasnet_config.py',
    verified='code',
    dialect='dialects.tensorflow',
    learning_rate=0.016,
    per_batch=256,
    schedule=Staircase(0.97, 2.4, warm_up=5),
    decay=0.9,
    momentum=0.9,
    eps=1e-3,
    weight_decay=1e-5,
    decayed='all but batch normalisation',
    average=0.9999,
    average_form='num_updates',
    loss='mean over the batch',
    batch='1024',
)
EFFICIENTNET = dataclasses.replace(
    MNASNET,
    name='efficientnet',
    citation='Tan and Le 2019, EfficientNet, arXiv:1905.11946',
    source='tensorflow/tpu 01b6706: models/official/efficientnet/main.py, model_fn; utils.py, '
    'build_learning_rate and build_optimizer',
    batch='2048',
)
MOBILENET_V2 = Recipe(
    name='mobilenet_v2',
    citation='Sandler et al. 2018, MobileNetV2, arXiv:1801.04381',
    source='tensorflow/models 0ba83cf: research/slim/nets/mobilenet/README.md; mobilenet.py, '
    'training_scope; research/slim/train_image_classifier.py, _configure_learning_rate and '
    '_configure_optimizer',
    verified='code',
    dialect='dialects.tensorflow',
    learning_rate=0.045,
    per_batch=96,
    schedule=Staircase(0.98, 2.5, truncated=True),
    decay=0.9,
    momentum=0.9,
    eps=1.0,
    weight_decay=4e-5,
    decayed='weights of dense layers and of convolutions that are not depthwise',
    average=0.9999,
    average_form='num_updates',
    loss='mean over the batch',
    batch='96 on each GPU',
)
_TIMM_STAIRS = Staircase(0.97, 2.4, warm_up=None, warm_up_from=1e-6, by_epoch=True)
EFFICIENTNET_TIMM = Recipe(
    name='efficientnet_timm',
    citation='Wightman, PyTorch Image Models (timm)',
    source='huggingface/pytorch-image-models 3034f27: hfdocs/source/training_script.mdx; '
    'timm/scheduler/step_lr.py; timm/optim/_param_groups.py',
    verified='code',
    dialect='dialects.timm',
    learning_rate=0.016,
    per_batch=256,
    schedule=_TIMM_STAIRS,
    decay=0.9,
    momentum=0.9,
    eps=1e-3,
    weight_decay=1e-5,
    decayed='all but biases and arrays of one axis',
    average=0.9999,
    loss='mean over the batch',
    batch='256 (B2), 768 (B0), 1024 (ES, without averaging)',
    note='The length of the warm-up is a default of its script, which was 3 and is now 5 epochs.',
)
MOBILENET_V3_TIMM = dataclasses.replace(
    EFFICIENTNET_TIMM,
    name='mobilenet_v3_timm',
    learning_rate=0.064,
    per_batch=None,
    schedule=dataclasses.replace(_TIMM_STAIRS, factor=0.973),
    batch='1024',
    note='The source also multiplies the rate by random noise from 42% to 90% of training; the '
    'function does not.',
)
WGAN = Recipe(
    name='wgan',
    citation='Arjovsky et al. 2017, Wasserstein GAN, arXiv:1701.07875',
    source='martinarjovsky/WassersteinGAN 2cf43ba: main.py',
    verified='code',
    dialect='dialects.torch',
    learning_rate=5e-5,
    decay=0.99,
    eps=1e-8,
    clamp=0.01,
    loss='mean over the batch',
    batch='64',
    note='The source clamps before each step of the critic, the function after it.',
)

# All of the above, in this order.
RECIPES = tuple(record for record in globals().values() if isinstance(record, Recipe))


# One table of all columns would be three times as wide as a page.
_TABLES = (
    ('dialect', 'learning rate', 'decay', 'momentum', 'eps', 'centered'),
    ('weight decay', 'clipping', 'average', 'loss', 'batch'),
    ('verified', 'publication', 'source', 'notes'),
)


def table() -> str:
    """All of `RECIPES` as three Markdown tables: the update, what surrounds it, and the sources.

    Example:
      >>> from rmsprop_jax import recipes
      >>> print(recipes.table().splitlines()[2][:32])
      | `graves` | `dialects.graves` |
    """
    rows = [_row(recipe) for recipe in RECIPES]
    return '\n\n'.join(
        as_markdown(('recipe', *columns), [(r['recipe'], *(r[c] for c in columns)) for r in rows])
        for columns in _TABLES
    )


def _row(r: Recipe) -> dict[str, str]:
    place = 'outside' if r.dialect == 'dialects.torch' else 'inside'
    per = '' if r.per_batch is None else f' per {r.per_batch} examples'
    clipping = [f'norm {r.max_norm:g}'] * math.isfinite(r.max_norm)
    clipping += [f'parameters {r.clamp:g}'] * math.isfinite(r.clamp)
    average = '' if r.average is None else f'{r.average:g}, {r.average_form}'
    return {
        'recipe': f'`{r.name}`',
        'dialect': f'`{r.dialect}`',
        'learning rate': f'{_number(r.learning_rate)}{per}, {r.schedule}',
        'decay': _number(r.decay),
        'momentum': _number(r.momentum),
        'eps': f'{_number(r.eps)} {place}',
        'centered': 'yes' if r.centered else 'no',
        'weight decay': f'{r.weight_decay:g}: {r.decayed}' if r.weight_decay else '',
        'clipping': ', '.join(clipping),
        'average': average,
        'loss': r.loss,
        'batch': r.batch,
        'verified': r.verified,
        'publication': r.citation,
        'source': r.source,
        'notes': r.note,
    }


def _number(value: float) -> str:
    """`value` in the shortest form that gives it back."""
    return f'{value:g}' if float(f'{value:g}') == value else repr(value)
