"""A search server for one's own database: text, pictures or rows in, rows with licenses out.

Needs FastAPI and uvicorn (``pip install retrodiff[serve]``), which are loaded when a server starts.
"""

from retrodiff.serving.answering import NotFound, Refused, SearchService
from retrodiff.serving.launching import running, serve
from retrodiff.serving.server_limits import ServerLimits

__all__ = ["NotFound", "Refused", "SearchService", "ServerLimits", "running", "serve"]
