"""Contract checks for components of your own: each raises AssertionError with the broken promise.

Every component that this library ships passes them in its own tests. Call one in yours::

    from retrodiff.testing import check_retriever
    check_retriever(MyRetriever())

Checks make their own small data where none is handed in, are deterministic and take well under a
second for a small component.
"""

from retrodiff.testing.generation_checks import (
    check_autoencoder,
    check_conditioner,
    check_denoiser,
    check_generator,
    check_guidance,
    check_sampler,
    check_schedule,
)
from retrodiff.testing.retrieval_checks import (
    check_database,
    check_encoder,
    check_index,
    check_proposal,
    check_retriever,
    small_database,
)

__all__ = [
    "check_autoencoder",
    "check_conditioner",
    "check_database",
    "check_denoiser",
    "check_encoder",
    "check_generator",
    "check_guidance",
    "check_index",
    "check_proposal",
    "check_retriever",
    "check_sampler",
    "check_schedule",
    "small_database",
]
