"""Figures for papers. Each function draws on the axes it is given, or on a new figure, and returns the axes.

Nothing here touches matplotlib's global state: the style holds only while a function draws, and new figures
are unknown to pyplot. In a notebook, end a cell with ``figures.accuracy_by_layer(...).figure`` to see one.
Sizes are in inches; a column of most proceedings is 3.3 wide.
"""

from .curves import accuracy_by_layer, lens_phases, sample_efficiency
from .drawing import COLOURS, COLUMN, panels, style
from .images import image_strip
from .maps import embedding_scatter
from .tables import condition_bars, similarity_matrix, transfer_table

__all__ = [
    "COLOURS",
    "COLUMN",
    "accuracy_by_layer",
    "condition_bars",
    "embedding_scatter",
    "image_strip",
    "lens_phases",
    "panels",
    "sample_efficiency",
    "similarity_matrix",
    "style",
    "transfer_table",
]
