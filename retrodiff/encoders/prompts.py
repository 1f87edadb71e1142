"""Checks prompts before they are tokenized, and tells of those that are cut."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from retrodiff.text import printable


class PromptCut(UserWarning):
    """The end of a prompt is left out, because an encoder reads no more.

    Examples:
        >>> import warnings
        >>> from retrodiff.encoders import PromptCut
        >>> warnings.simplefilter("error", PromptCut)  # refuse prompts that are too long
        >>> warnings.simplefilter("default", PromptCut)
    """


def prompt_list(prompts: Any, name: str = "prompts") -> list[str]:
    """Prompts as a list of strings.

    Args:
        prompts: a list, tuple or other iterable of strings.
        name: what errors call it.

    Raises:
        ValueError: it is one string, holds something else, or text that is no Unicode.
    """
    if isinstance(prompts, str):
        raise ValueError(f"{name} is one string, expected a list: [{printable(prompts[:80])!r}]")
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | dict | Tensor):
        raise ValueError(f"{name} is {type(prompts).__name__}, expected a list of strings")
    found = list(prompts)
    for i, prompt in enumerate(found):
        if not isinstance(prompt, str):
            raise ValueError(f"{name}[{i}] is {type(prompt).__name__}, expected a string")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{name}[{i}] is no valid Unicode: {printable(prompt[:80])!r}"
            ) from None
    return [str(prompt) for prompt in found]


def tokens_of(tokenizer: Any, prompts: Sequence[str], told: set[str]) -> Tensor:
    """Prompts -> tokens (b, length); warns of each prompt that is cut, once.

    Args:
        tokenizer: of open_clip.
        prompts: to be tokenized.
        told: prompts that a warning named before; grows.

    Raises:
        ValueError: a tokenizer without a length.
    """
    tokens = tokenizer(list(prompts))
    length = tokens.shape[1]
    # A token is a byte at least, beside start and end.
    new = [i for i, p in enumerate(prompts) if len(p.encode()) + 2 > length and p not in told]
    if new:
        wide = tokenizer([*(prompts[i] for i in new), ""], context_length=length + 1)
        more = (wide[:-1, :length] != tokens[new]).any(1) | (wide[:-1, length] != wide[-1, length])
        cut = [prompts[i] for i, longer in zip(new, more.tolist(), strict=True) if longer]
        told.update(cut)
        if cut:
            rest = f" (and {len(cut) - 1} more)" if len(cut) > 1 else ""
            start = cut[0] if len(cut[0]) <= 60 else cut[0][:57] + "..."
            warnings.warn(
                f"the prompt {printable(start)!r}{rest} has more than the {length} tokens that the "
                "encoder reads: the end is left out",
                PromptCut,
                stacklevel=2,
            )
    return tokens
