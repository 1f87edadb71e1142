"""Tokenizers for small CLIPs: the first words of open_clip's own vocabulary.

Byte-pair encoding learns its merges in the order of their use (Sennrich et al. 2016), so that the
first of them are a vocabulary by themselves: 6,000 tokens hold the common English words, and spell
the rest from pieces. The size alone says which tokens there are, and nothing else has to be saved.
"""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path
from typing import Any

LARGEST = 49408
"""Tokens of CLIP's vocabulary."""

SMALLEST = 514
"""Bytes inside and at the end of a word, start and end of a text: what spells everything."""


def clip_tokenizer(vocab_size: int, length: int) -> Any:
    """open_clip's tokenizer with the first ``vocab_size`` tokens of its vocabulary.

    Args:
        vocab_size: 514 (single bytes) to 49408 (all of CLIP's); start and end of a text are the
            last two.
        length: tokens of a text.

    Raises:
        ValueError: a size that does not fit.
    """
    import open_clip

    if not SMALLEST <= vocab_size:
        raise ValueError(
            f"text_cfg.vocab_size={vocab_size} is less than the {SMALLEST} tokens that spell any "
            "text byte by byte"
        )
    if vocab_size >= LARGEST:
        return open_clip.SimpleTokenizer(context_length=length)
    from open_clip.tokenizer import default_bpe

    with gzip.open(default_bpe()) as file:
        lines = file.read().decode().split("\n")
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "merges.txt.gz"
        kept.write_bytes(gzip.compress("\n".join(lines[: 1 + vocab_size - SMALLEST]).encode()))
        return open_clip.SimpleTokenizer(bpe_path=str(kept), context_length=length)
