"""How far a stored moment, and the steps taken with it, are from the truth. NumPy only, so that the
peer's environment can import it."""

from collections.abc import Iterable, Iterator

import numpy as np

# Before this step a running average has seen too little to be compared.
WARM_UP = 20


def exact_steps(gradients: Iterable[np.ndarray], decay: float, eps: float) -> Iterator[np.ndarray]:
    """The directions `g / (sqrt(nu) + eps)` of uncompressed RMSProp in float64."""
    nu = 0.0
    for gradient in gradients:
        g = np.asarray(gradient, np.float64)
        nu = decay * nu + (1 - decay) * g * g
        yield g / (np.sqrt(nu) + eps)


def ratio_errors(ratio: np.ndarray) -> dict[str, float]:
    """Quantiles of |ratio - 1|."""
    error = np.abs(np.ravel(ratio) - 1)
    median, p99 = np.percentile(error, [50, 99])
    return {'median': float(median), 'p99': float(p99), 'max': float(error.max())}


def moment_errors(stored: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Errors of the root, and the mean of stored / truth less 1, where the truth is positive."""
    stored, truth = (np.asarray(x, np.float64) for x in (stored, truth))
    ratio = stored[truth > 0] / truth[truth > 0]
    bias = {'bias': float(ratio.mean() - 1), 'bias_se': float(ratio.std() / ratio.size**0.5)}
    return ratio_errors(np.sqrt(ratio)) | bias


def signed_errors(stored: np.ndarray, truth: np.ndarray, unit: np.ndarray) -> dict[str, float]:
    """Errors of a mean or velocity, which may be zero, in a unit of each entry's own; `bias` is the
    slope of the stored values over the true ones, less 1."""
    known = unit > 0
    stored, truth = (np.asarray(x, np.float64)[known] / unit[known] for x in (stored, truth))
    slope = np.sum(stored * truth) / np.sum(truth**2)
    spread = np.sqrt(np.sum(((stored - slope * truth) * truth) ** 2)) / np.sum(truth**2)
    errors = ratio_errors(1 + stored - truth)
    return errors | {'bias': float(slope - 1), 'bias_se': float(spread)}


def step_errors(steps: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Relative errors of steps of shape (time, ...), where the true step is not zero.

    `mean` is that of the steps over their true sizes, `worst` the largest of these ratios, and
    `worst_large` the largest among the steps over 1, the size of a root mean square step.
    """
    steps, truth = steps[WARM_UP:], truth[WARM_UP:]
    moved = truth != 0
    ratio, size = np.abs(steps[moved] / truth[moved]), np.abs(steps[moved])
    worst_large = float(np.max(ratio, where=size > 1, initial=0.0))
    mean = {'mean': float(ratio.mean())}
    return ratio_errors(ratio) | mean | {'worst': float(ratio.max()), 'worst_large': worst_large}


def paired(values: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Mean difference over seeds, and its standard error."""
    difference = np.asarray(values) - np.asarray(reference)
    return {
        'difference': float(difference.mean()),
        'se': float(difference.std(ddof=1) / difference.size**0.5),
    }
