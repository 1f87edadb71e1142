"""Training: the loop, the data, the average, and small encoders from scratch."""

from retrodiff.training.contrastive import fit_clip, fit_views
from retrodiff.training.data import TrainingSet
from retrodiff.training.ema import NamedEMA
from retrodiff.training.fit import Fitted, fit
from retrodiff.training.folder import FolderImages
from retrodiff.training.objective import Objective
from retrodiff.training.optimize import constant, cosine, optimize

__all__ = [
    "Fitted",
    "FolderImages",
    "NamedEMA",
    "Objective",
    "TrainingSet",
    "constant",
    "cosine",
    "fit",
    "fit_clip",
    "fit_views",
    "optimize",
]
