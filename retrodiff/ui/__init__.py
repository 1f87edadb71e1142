"""A web page on which a model is asked: its neighbors are seen, chosen by hand, and paint.

Needs Gradio (``pip install retrodiff[ui]``), which is loaded when the page is made.
"""

from retrodiff.ui.question import Question
from retrodiff.ui.shelves import Shelf, Shelves
from retrodiff.ui.studio import LIMITS, Forming, Neighborhood, Studio
from retrodiff.ui.web import serve_page, shown

__all__ = [
    "LIMITS",
    "Forming",
    "Neighborhood",
    "Question",
    "Shelf",
    "Shelves",
    "Studio",
    "serve_page",
    "shown",
]
