"""Measures generated images: distance to real ones, diversity, and copies."""

from retrodiff.evaluation.comparison import evaluate
from retrodiff.evaluation.copying import Copying, copying
from retrodiff.evaluation.metrics import (
    Score,
    authenticity,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    mind,
    precision_recall,
    vendi,
)
from retrodiff.evaluation.reconstruction import Reconstruction, psnr, reconstruction, ssim
from retrodiff.evaluation.report import Report

__all__ = [
    "Copying",
    "Reconstruction",
    "Report",
    "Score",
    "authenticity",
    "copying",
    "density_coverage",
    "evaluate",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "mind",
    "precision_recall",
    "psnr",
    "reconstruction",
    "ssim",
    "vendi",
]
