"""Read documents: fields as checked values with their confidence and place, and what the reading command is made of.

In a clone, `from reading import extract` works in its folder; after `pip install` it is `nemotron_vl.reading`.
"""

import sys

if "nemotron_vl" not in sys.modules:
    import tools  # noqa: F401  (makes the root importable as nemotron_vl)

from .boxes import Box, draw_boxes, parse_boxes
from .engines import ChatServer, InProcess, RayWorkers, Server
from .extraction import Extraction, ExtractionError, PageValues, Value, extract, merge_pages, page_values
from .pages import Task
from .run import Run, read
from .schema import Fields

__all__ = [
    "Box",
    "ChatServer",
    "Extraction",
    "ExtractionError",
    "Fields",
    "InProcess",
    "PageValues",
    "RayWorkers",
    "Run",
    "Server",
    "Task",
    "Value",
    "draw_boxes",
    "extract",
    "merge_pages",
    "page_values",
    "parse_boxes",
    "read",
]
