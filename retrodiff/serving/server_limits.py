"""What a search server takes from one request, and from all of them together."""

from __future__ import annotations

from dataclasses import dataclass, fields

from retrodiff.numbers import whole


@dataclass(frozen=True)
class ServerLimits:
    """Bounds on what clients may ask; what is beyond them is refused in one line.

    Together they bound the memory that uploads may take: ``requests`` times ``upload``, and one
    decoded picture.

    Args:
        k: neighbors of a search.
        upload: bytes of a picture.
        body: bytes of any other request.
        text: characters of a text, and of a filter.
        side: of a small copy, in pixels.
        requests: requests that are worked on or wait; the next one is told to come again.
        seconds: until a request must have arrived.
        samples: images of one request, where a model is served.
        steps: of the sampler.

    Examples:
        >>> from retrodiff.serving import ServerLimits
        >>> ServerLimits(k=50, upload=8 * 1024**2).k
        50
    """

    k: int = 100
    upload: int = 16 * 2**20
    body: int = 2**20
    text: int = 4096
    side: int = 1024
    requests: int = 32
    seconds: int = 30
    samples: int = 8
    steps: int = 250

    def __post_init__(self) -> None:
        for field in fields(self):
            whole(field.name, getattr(self, field.name))
