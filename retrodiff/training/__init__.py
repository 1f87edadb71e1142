"""Training: the loop, the data, the average, and small encoders from scratch."""

from retrodiff.training.augmenting import ShiftScaleColor
from retrodiff.training.contrastive import fit_clip, fit_views
from retrodiff.training.data import TrainingSet, own_rows
from retrodiff.training.distillation import Teachers
from retrodiff.training.ema import NamedEMA
from retrodiff.training.fit import FitResult, fit, from_checkpoint
from retrodiff.training.folder_images import FolderImages
from retrodiff.training.objective import Objective
from retrodiff.training.optimize import optimize
from retrodiff.training.pairing import Pairing
from retrodiff.training.parts import trainable_modules
from retrodiff.training.rates import LearningRate, constant, cosine

__all__ = [
    "FitResult",
    "FolderImages",
    "LearningRate",
    "NamedEMA",
    "Objective",
    "Pairing",
    "ShiftScaleColor",
    "Teachers",
    "TrainingSet",
    "constant",
    "cosine",
    "fit",
    "fit_clip",
    "fit_views",
    "from_checkpoint",
    "optimize",
    "own_rows",
    "trainable_modules",
]
