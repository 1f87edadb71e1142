"""Cross-attention of latent positions to neighbors: reference, standard, absorbed and fused.

`NeighborAttention` is the block; `AttentionTables` is what its ``prepare`` returns where the tables
pay; its ``explain`` says which path a call takes and why, and `use_path` forces one.
"""

from retrodiff.attention.absorbed import AttentionTables, OneNeighbor
from retrodiff.attention.dispatch import Choice, Path
from retrodiff.attention.module import NeighborAttention, Prepared, use_path
from retrodiff.attention.recording import Measure, Recorder, recording
from retrodiff.attention.reference import KeysValues, Weights, reference_attention

__all__ = [
    "AttentionTables",
    "Choice",
    "KeysValues",
    "Measure",
    "NeighborAttention",
    "OneNeighbor",
    "Path",
    "Prepared",
    "Recorder",
    "Weights",
    "recording",
    "reference_attention",
    "use_path",
]
