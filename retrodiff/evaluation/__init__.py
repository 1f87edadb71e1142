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
from retrodiff.evaluation.recall import text_recall
from retrodiff.evaluation.report import Report

__all__ = [
    "Copying",
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
    "text_recall",
    "vendi",
]
