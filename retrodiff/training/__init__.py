"""Training: the loop, the data, the average, what shows it, and small encoders from scratch."""

from retrodiff.training.augment import Augmentation, Mirrored, Moved, ShiftScaleColor
from retrodiff.training.contrastive import fit_clip, fit_views
from retrodiff.training.data import TrainingSet
from retrodiff.training.distillation import Teachers
from retrodiff.training.ema import NamedEMA
from retrodiff.training.fit import FitResult, fit, from_checkpoint
from retrodiff.training.folder_images import FolderImages
from retrodiff.training.grids import Grids
from retrodiff.training.held_out import Held, HeldOut
from retrodiff.training.log import Log
from retrodiff.training.objective import Objective
from retrodiff.training.occasion import Occasion
from retrodiff.training.optimize import optimize
from retrodiff.training.outlook import Outlook
from retrodiff.training.overlap import own_rows
from retrodiff.training.pace import Pace, measure_pace
from retrodiff.training.pairing import Pairing
from retrodiff.training.parts import trainable_modules
from retrodiff.training.rates import LearningRate, constant, cosine
from retrodiff.training.source_images import SourceImages
from retrodiff.training.splitting import split
from retrodiff.training.stages import (
    Adversarial,
    CachedLatents,
    CodeUse,
    FeatureDistance,
    StageResult,
    encode_latents,
    fit_autoencoder,
    lpips_distance,
    open_latents,
)
from retrodiff.training.watching import Moment, Watcher

__all__ = [
    "Adversarial",
    "Augmentation",
    "CachedLatents",
    "CodeUse",
    "FeatureDistance",
    "FitResult",
    "FolderImages",
    "Grids",
    "Held",
    "HeldOut",
    "LearningRate",
    "Log",
    "Mirrored",
    "Moment",
    "Moved",
    "NamedEMA",
    "Objective",
    "Occasion",
    "Outlook",
    "Pace",
    "Pairing",
    "ShiftScaleColor",
    "SourceImages",
    "StageResult",
    "Teachers",
    "TrainingSet",
    "Watcher",
    "constant",
    "cosine",
    "encode_latents",
    "fit",
    "fit_autoencoder",
    "fit_clip",
    "fit_views",
    "from_checkpoint",
    "lpips_distance",
    "measure_pace",
    "open_latents",
    "optimize",
    "own_rows",
    "split",
    "trainable_modules",
]
