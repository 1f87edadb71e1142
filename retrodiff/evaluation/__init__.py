"""Measures generated images: distance to real ones, diversity, and copies."""

from retrodiff.evaluation.comparison import evaluate
from retrodiff.evaluation.copying import Copying, copying, neighbor_echo
from retrodiff.evaluation.extractors import (
    FidelityExtractor,
    features_from_string,
    register_extractor,
)
from retrodiff.evaluation.fidelity import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from retrodiff.evaluation.judges import Judge, class_accuracy, judged_accuracy, timm_judge
from retrodiff.evaluation.metrics import (
    Score,
    authenticity,
    clip_score,
    density_coverage,
    mind,
    vendi,
)
from retrodiff.evaluation.recall import text_recall
from retrodiff.evaluation.reconstruction import Reconstruction, psnr, reconstruction, ssim
from retrodiff.evaluation.report import Report

__all__ = [
    "Copying",
    "FidelityExtractor",
    "Judge",
    "Reconstruction",
    "Report",
    "Score",
    "authenticity",
    "class_accuracy",
    "clip_score",
    "copying",
    "density_coverage",
    "evaluate",
    "features_from_string",
    "frechet_distance",
    "inception_score",
    "judged_accuracy",
    "kernel_distance",
    "mind",
    "neighbor_echo",
    "precision_recall",
    "psnr",
    "reconstruction",
    "register_extractor",
    "ssim",
    "text_recall",
    "timm_judge",
    "vendi",
]
