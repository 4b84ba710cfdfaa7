"""Figures from features: Frechet distances (FID, FVD), Inception Score, CLIPSIM. In float64.

A network turns each picture or clip into a vector (`detectors.py`). FID and FVD compare the vectors
of two sets by their means and covariances alone [FID; FVD]; the Inception Score asks whether each
clip is of a clear class and the classes are many [IS]; CLIPSIM how near frames are to their caption
[CLIPSIM]. All depend on the network, the number of samples and the choice of frames: figures
compare only where these are equal. Not here: what the paper evaluates (`protocols.py`).
"""

import numpy as np
import torch
from torch import Tensor


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """Features (n, d), (m, d) -> the squared distance of two Gaussians that fit them [FID].

        |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

    Raises ValueError for features that are not finite, that do not belong together, or that are too
    few: the covariance of n vectors of d numbers has no more than n - 1 directions.
    """
    (mean_1, cov_1), (mean_2, cov_2) = fit_gaussian(real), fit_gaussian(made)
    if len(mean_1) != len(mean_2):
        raise ValueError(f"features of {len(mean_1)} and {len(mean_2)} numbers: two detectors")
    # The eigenvalues of S_1 S_2 are those of S_1^(1/2) S_2 S_1^(1/2), which is symmetric.
    values, axes = torch.linalg.eigh(cov_1)
    root = axes * values.clamp(min=0).sqrt() @ axes.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return float(((mean_1 - mean_2) ** 2).sum() + cov_1.trace() + cov_2.trace() - 2 * cross)


def fit_gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d) -> mean (d,) and covariance (d, d), over n - 1. Raises ValueError."""
    features = check(features).double()
    n, d = features.shape
    if n <= d:
        raise ValueError(f"{n} samples for features of {d} numbers; measure more than {d}")
    return features.mean(0), features.T.cov()


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """Classes' probabilities (n, k) -> mean and deviation over `splits` parts [IS].

    exp(mean over samples of KL(p(class | sample) || p(class))): from 1, where nothing is clear or
    all are of one class, to k. Raises ValueError for logits.
    """
    p = check(probabilities).double()
    if (p < 0).any() or (abs(p.sum(1) - 1) > 1e-3).any():
        raise ValueError("not probabilities: they must be 0 or more and sum to 1; use a softmax")
    if len(p) < splits:
        raise ValueError(f"{len(p)} samples for {splits} splits; measure more")
    scores = []
    for k in range(splits):
        part = p[k * len(p) // splits : (k + 1) * len(p) // splits]
        kl = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))
        scores.append(kl.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def clip_similarity(frames: Tensor, texts: Tensor) -> float:
    """Unit vectors of frames (n, f, d) and of captions (n, d) -> the mean cosine [CLIPSIM]."""
    if frames.shape[::2] != texts.shape:
        raise ValueError(
            f"frames {[*frames.shape]} and texts {[*texts.shape]}: not one text a clip"
        )
    return float(torch.einsum("nfd,nd->nf", frames.double(), texts.double()).mean())


def check(features: Tensor) -> Tensor:
    """Raises ValueError for what is no (n, d) of finite numbers."""
    if features.ndim != 2 or not torch.isfinite(features).all():
        raise ValueError(f"features {[*features.shape]}: must be (n, d), and finite")
    return features
