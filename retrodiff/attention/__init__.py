"""Cross-attention of latent positions to neighbors: reference, standard, absorbed and fused.

`NeighborAttention` is the block; `AttentionTables` is what its ``prepare`` returns where the tables
pay; its ``explain`` says which path a call takes and why, and `use_path` forces one. The fused
kernel is compared with the absorbed path at its first call of each class (`check_kernels`), and
`tune_attention` measures its launch sizes.
"""

from retrodiff.attention.absorbed import AttentionTables, OneNeighbor
from retrodiff.attention.dispatch import Choice, Path
from retrodiff.attention.module import NeighborAttention, Prepared, use_path
from retrodiff.attention.recording import Measure, Recorder, recording
from retrodiff.attention.reference import KeysValues, Weights, reference_attention
from retrodiff.attention.tuned import Tuned
from retrodiff.attention.tuning import tune_attention
from retrodiff.kernel_trials import KernelWarning, check_kernels

__all__ = [
    "AttentionTables",
    "Choice",
    "KernelWarning",
    "KeysValues",
    "Measure",
    "NeighborAttention",
    "OneNeighbor",
    "Path",
    "Prepared",
    "Recorder",
    "Tuned",
    "Weights",
    "check_kernels",
    "recording",
    "reference_attention",
    "tune_attention",
    "use_path",
]
