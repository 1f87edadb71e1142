"""Cross-attention on retrieved neighbors: absorbed into thin tables, computed once, fused.

``NeighborAttention`` is the block; ``AttentionTables`` is what its ``prepare`` returns for one
sampling run; ``explain`` says which path a call takes and why.
"""

from retrodiff.attention.absorbed import AttentionTables
from retrodiff.attention.module import NeighborAttention

__all__ = ["AttentionTables", "NeighborAttention"]
