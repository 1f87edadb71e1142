"""What a visitor of the page has set, in one value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from retrodiff.interfaces import Mode


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """Everything that the page asks a model with.

    Args:
        prompt: a text; taken if there is no picture.
        picture: the embedding (1, d) of a picture that is asked with in place of the prompt.
        names: databases that are open.
        shares: how many of the neighbors each of them gives, relative to the others; None: the
            nearest are taken, wherever they lie.
        where: condition on the columns, as `Searchable.where` takes it; empty: none.
        mode: how prompt or picture are asked.
        k: tokens that condition an image; None: the model's.
        guidance: classifier-free scale; None: the model's.
        sampler: its name; None: the model's.
        steps: of the sampler; None: the model's.
        seed: of everything random.
        n: images.
        pinned: rows of the chosen databases that are always taken.
        dropped: rows that never are.

    Examples:
        >>> from retrodiff.ui import Question
        >>> asked = Question(prompt="a bell", names=("noto",), where="license == 'CC0'", n=2)
        >>> asked.mode
        'text+neighbors'
    """

    prompt: str = ""
    picture: Tensor | None = None
    names: tuple[str, ...] = ()
    shares: tuple[float, ...] | None = None
    where: str = ""
    mode: Mode = "text+neighbors"
    k: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    steps: int | None = None
    seed: int = 0
    n: int = 4
    pinned: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        """Neither words nor a picture."""
        return self.picture is None and not self.prompt.strip()


def read_shares(text: str) -> tuple[float, ...] | None:
    """Numbers with commas between them, such as ``3, 1``; None for an empty text.

    Raises:
        ValueError: something else is in it.
    """
    parts = [part.strip() for part in text.replace(":", ",").split(",") if part.strip()]
    try:
        return tuple(map(float, parts)) or None
    except ValueError:
        raise ValueError(
            f"shares {text!r:.60} are no numbers: write one for each chosen database, such as 3, 1"
        ) from None
