"""The roles of components, and the values that flow between them.

A component is any object with the right methods: subclass the Protocol to have forgotten methods
refused at construction, or hand in a foreign object that happens to fit. Methods are named, never
``__call__``. A component holds hyper-parameters (and weights); data, context and randomness come in
as arguments.

Members with a default are optional: a class that does not subclass its protocol may lack them, and
`member` then gives the default.

Axis letters, here and in every docstring::

    b batch    k neighbors (tokens)    d embedding width    r regions of the latent
    c channels    h, w height and width    n positions or rows    m rows of a database

Images are float tensors (b, c, h, w) in [-1, 1]. Similarity is the cosine in [-1, 1]: higher is
nearer. ``sigma`` is the standard deviation of the noise in x = x0 + sigma * noise.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from typing import Any

from retrodiff.interfaces.generation import (
    Autoencoder,
    Callback,
    Conditioner,
    Denoise,
    Denoiser,
    Generator,
    Guidance,
    GuidedGenerator,
    Sampler,
    Schedule,
    TrainableDenoiser,
    TrainableGenerator,
)
from retrodiff.interfaces.retrieval import (
    Database,
    Encoder,
    Index,
    Prior,
    ProposalDistribution,
    Retriever,
    TextEncoder,
)
from retrodiff.interfaces.values import (
    Context,
    Fingerprint,
    Mode,
    Neighbors,
    Query,
    Record,
    Scale,
    Tokens,
    Value,
    unit,
)
from retrodiff.randomness import Randomness

__all__ = [
    "Autoencoder",
    "Callback",
    "Conditioner",
    "Context",
    "Database",
    "Denoise",
    "Denoiser",
    "Encoder",
    "Fingerprint",
    "Generator",
    "Guidance",
    "GuidedGenerator",
    "Index",
    "Mode",
    "Neighbors",
    "Prior",
    "ProposalDistribution",
    "Query",
    "Randomness",
    "Record",
    "Retriever",
    "Sampler",
    "Scale",
    "Schedule",
    "TextEncoder",
    "Tokens",
    "TrainableDenoiser",
    "TrainableGenerator",
    "Value",
    "member",
    "unit",
]


def member(component: Any, protocol: type, name: str) -> Any:
    """An optional member of a component; the protocol's default where the component lacks it.

    Args:
        component: any object in the role.
        protocol: the role.
        name: of the member.
    """
    if hasattr(component, name):
        return getattr(component, name)
    default = vars(protocol)[name]
    return default.__get__(component) if hasattr(default, "__get__") else default
