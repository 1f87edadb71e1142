"""Training: the loop, the data, the average, and small encoders from scratch."""

from retrodiff.training.augment import Augmentation, Mirrored, Moved
from retrodiff.training.contrastive import fit_clip, fit_views
from retrodiff.training.data import TrainingSet
from retrodiff.training.ema import NamedEMA
from retrodiff.training.fit import FitResult, fit, from_checkpoint
from retrodiff.training.folder_images import FolderImages
from retrodiff.training.objective import Objective
from retrodiff.training.occasion import Occasion
from retrodiff.training.optimize import optimize
from retrodiff.training.overlap import own_rows
from retrodiff.training.pairing import Pairing
from retrodiff.training.parts import trainable_modules
from retrodiff.training.rates import LearningRate, constant, cosine
from retrodiff.training.source_images import SourceImages

__all__ = [
    "Augmentation",
    "FitResult",
    "FolderImages",
    "LearningRate",
    "Mirrored",
    "Moved",
    "NamedEMA",
    "Objective",
    "Occasion",
    "Pairing",
    "SourceImages",
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
