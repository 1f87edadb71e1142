"""Prompts that a small encoder cannot know: no word of theirs stands in the database's records.

A published CLIP has read the web. One that was trained on a few thousand captions places a word
that it has never read somewhere, and its neighbors look as if they were an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from retrodiff.interfaces import Neighbors

TEXTS = ("title", "caption", "keywords")
"""Columns whose words are known."""

ROWS = 200_000
"""Larger databases are not looked through."""

COMMON = frozenset("a an the of in on at to for with and or no not is are style picture".split())


def strange(prompts: Sequence[str], database: Any) -> list[str]:
    """Those of the prompts that have no word in common with the records of a database.

    Args:
        prompts: texts. One without a word, such as punctuation, is strange as well.
        database: with records; one without texts, or too large to be looked through, knows all.
    """
    columns = [name for name in TEXTS if name in getattr(database, "columns", ())]
    if not columns or len(database) > ROWS:
        return []
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute
    table = database.table(columns)
    texts = [table[name] for name in columns if pa.types.is_string(table[name].type)]
    if not texts:
        return []

    def known(word: str) -> bool:
        stem = word.rstrip("s") or word
        pattern = rf"(^|\W){re.escape(stem)}"
        return any(
            bool(pc.any(pc.match_substring_regex(text, pattern, ignore_case=True)).as_py())
            for text in texts
        )

    words = {p: set(re.findall(r"\w+", p.lower())) - COMMON for p in dict.fromkeys(prompts)}
    there = {word: known(word) for word in set().union(*words.values())}
    return [prompt for prompt, own in words.items() if not any(there[word] for word in own)]


def warning_of_strange(
    encoder: Any, prompts: Sequence[str], database: Any, found: Neighbors
) -> str | None:
    """One line, if an encoder that was trained on few captions can hardly know a prompt.

    Args:
        encoder: of the prompts; a published one is never doubted.
        prompts: texts.
        database: what was searched.
        found: the neighbors of each prompt, in its order.
    """
    if getattr(encoder, "pretrained", "") is not None or not bool((found.indices >= 0).any()):
        return None
    unknown = strange(prompts, database)
    if not unknown:
        return None
    at = list(prompts).index(unknown[0])
    nearest = float(found.similarity[at][found.indices[at] >= 0].max())
    others = f" and of {len(unknown) - 1} others" if len(unknown) > 1 else ""
    return (
        f"no word of the prompt {unknown[0]!r}{others} is in the records of the database: its "
        f"neighbors are a guess, the nearest of similarity {nearest:.2f}"
    )
