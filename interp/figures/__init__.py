"""Figures for papers. Each function draws on the axes it is given, or on a new figure, and returns the axes.

Nothing here touches matplotlib's global state: the style holds only while a function draws, and new figures
are unknown to pyplot. To see one in a notebook, run ``%matplotlib inline`` once and end a cell with
``figures.accuracy_by_layer(...).figure``.
Sizes are in inches; a column of most proceedings is 3.3 wide.
"""

from interp.figures.correspondence import layer_timestep_map, matched_points, pck_bars, warp_panel
from interp.figures.curves import accuracy_by_layer, lens_phases, sample_efficiency
from interp.figures.drawing import COLOURS, COLUMN, panels, style
from interp.figures.film import film_strip
from interp.figures.images import image_strip
from interp.figures.maps import embedding_scatter
from interp.figures.patching import agreement_scatter, effect_line, effect_map, image_heat
from interp.figures.readouts import head_errors, readout_map, readout_panels, training_curves
from interp.figures.tables import condition_bars, similarity_matrix, transfer_table
from interp.figures.trials import trial_dots

__all__ = [
    "COLOURS",
    "COLUMN",
    "accuracy_by_layer",
    "agreement_scatter",
    "condition_bars",
    "effect_line",
    "effect_map",
    "embedding_scatter",
    "film_strip",
    "head_errors",
    "image_heat",
    "image_strip",
    "layer_timestep_map",
    "lens_phases",
    "matched_points",
    "panels",
    "pck_bars",
    "readout_map",
    "readout_panels",
    "sample_efficiency",
    "similarity_matrix",
    "style",
    "training_curves",
    "transfer_table",
    "trial_dots",
    "warp_panel",
]
