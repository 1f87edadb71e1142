"""Training: the loop, the data, the average, what shows it, and small encoders from scratch."""

from retrodiff.training.contrastive import fit_clip, fit_views
from retrodiff.training.data import TrainingSet, own_rows
from retrodiff.training.ema import NamedEMA
from retrodiff.training.fit import FitResult, fit, from_checkpoint
from retrodiff.training.folder_images import FolderImages
from retrodiff.training.grids import Grids
from retrodiff.training.held_out import Held, HeldOut
from retrodiff.training.log import Log
from retrodiff.training.objective import Objective
from retrodiff.training.optimize import optimize
from retrodiff.training.outlook import Outlook
from retrodiff.training.pace import Pace, measure_pace
from retrodiff.training.pairing import Pairing
from retrodiff.training.parts import trainable_modules
from retrodiff.training.rates import LearningRate, constant, cosine
from retrodiff.training.splitting import split
from retrodiff.training.watching import Moment, Watcher

__all__ = [
    "FitResult",
    "FolderImages",
    "Grids",
    "Held",
    "HeldOut",
    "LearningRate",
    "Log",
    "Moment",
    "NamedEMA",
    "Objective",
    "Outlook",
    "Pace",
    "Pairing",
    "TrainingSet",
    "Watcher",
    "constant",
    "cosine",
    "fit",
    "fit_clip",
    "fit_views",
    "from_checkpoint",
    "measure_pace",
    "optimize",
    "own_rows",
    "split",
    "trainable_modules",
]
