"""Measures: how near made videos are to real ones, and to their captions. README.md is the manual.

`distances.py` computes FID, FVD, the Inception Score and CLIPSIM from features; `detectors.py` has
the networks that make these. `python -m tinydance.metrics.protocols` follows the paper's protocols
[paper §4.2.1]. Read `distances.py` first.
Not here: the referee of the toy world, which reads clips by rules (`toy/referee.py`).
"""

from tinydance.metrics.detectors import CLIP, Detector
from tinydance.metrics.distances import clip_similarity, frechet_distance, inception_score

__all__ = ["CLIP", "Detector", "clip_similarity", "frechet_distance", "inception_score"]
