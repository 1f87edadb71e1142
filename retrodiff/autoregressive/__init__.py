"""Generation code by code, in place of diffusion: the paper's autoregressive sibling (RARM)."""

from retrodiff.autoregressive.gray_levels import GrayLevels
from retrodiff.autoregressive.token_generator import AutoregressiveGenerator, Tokenizer

__all__ = ["AutoregressiveGenerator", "GrayLevels", "Tokenizer"]
