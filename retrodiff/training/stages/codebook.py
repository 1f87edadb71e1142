"""How a codebook is used, and codes that nothing falls to any more put where latents are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CodeUse:
    """How the codes of a VQ autoencoder are used.

    Args:
        perplexity: exp of the entropy of the codes' frequencies: how many codes would be in use if
            all were used equally often.
        used: share of the codes that occur at all.
        codes: of the codebook.
        positions: that were coded; with fewer positions than codes some cannot occur.

    Examples:
        >>> import torch
        >>> from retrodiff.training import CodeUse
        >>> CodeUse.of(torch.tensor([5, 5, 0, 0]))
        CodeUse(perplexity=2.0, used=0.5, codes=4, positions=10)
    """

    perplexity: float
    used: float
    codes: int
    positions: int

    @classmethod
    def of(cls, counts: Tensor) -> CodeUse:
        """From how often each code occurs (codes,)."""
        total = counts.sum().clamp_min(1)
        shares = counts.double() / total
        entropy = -torch.special.xlogy(shares, shares).sum()
        return cls(
            float(entropy.exp()),
            float((counts > 0).double().mean()),
            len(counts),
            int(counts.sum()),
        )

    def __str__(self) -> str:
        return (
            f"{self.used:.1%} of {self.codes} codes used, perplexity {self.perplexity:.1f} "
            f"({self.positions} positions)"
        )


@torch.no_grad()
def restart_dead(
    codebook: Tensor, age: Tensor, latents: Tensor, patience: int, generator: torch.Generator
) -> int:
    """Moves codes that were not used for long to latents of the batch, in place.

    As in Dhariwal et al. 2020 (arXiv 2005.00341); without it a codebook that once collapsed stays
    so, since only codes that are used have a gradient.

    Args:
        codebook: (codes, c).
        age: (codes,) steps since each was used; set to 0 where a code is moved.
        latents: (n, c) before quantization.
        patience: steps without use after which a code is dead.
        generator: chooses the latents.

    Returns:
        How many were moved.
    """
    dead = (age >= patience).nonzero()[:, 0]
    if len(dead) == 0:
        return 0
    # No more than the batch has positions: the others are moved in the next steps.
    dead = dead[: len(latents)]
    chosen = torch.randperm(len(latents), generator=generator)[: len(dead)]
    codebook[dead] = latents[chosen.to(latents.device)].to(codebook.dtype)
    age[dead] = 0
    return len(dead)
