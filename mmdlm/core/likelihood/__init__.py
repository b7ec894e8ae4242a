"""Estimators of log p(target given context) for reinforcement learning and evaluation.

The package imports every estimator, so that a recipe can name one by its class name only.
"""

from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.coupled import Coupled
from mmdlm.core.likelihood.elbo import Elbo, Nelbo
from mmdlm.core.likelihood.enumeration import EnumeratedElbo
from mmdlm.core.likelihood.mean_field import OneStepMeanField
from mmdlm.core.likelihood.structured import StructuredNoise
from mmdlm.core.likelihood.trajectory import TrajectoryReplay

__all__ = [
    "Coupled",
    "Elbo",
    "EnumeratedElbo",
    "LikelihoodEstimator",
    "Nelbo",
    "OneStepMeanField",
    "StructuredNoise",
    "TrajectoryReplay",
]
