"""Readout guidance: steer sampling by the gradient of losses over what a frozen model's activations show.

A `Guide` holds terms (`Spatial`, `Drag`, `Appearance`, `Identity`, or any function of activations:
`Term.from_function`) and says how their gradient steers a run. ``sd.generate(prompt, guidance=guide)`` runs it,
`presets` has the published settings, `edit_real` starts from real images, and a `Reference` keeps what terms compare
with, in place of the `Twin` that runs beside each sample. `controlled` adds a ControlNet or a T2I-adapter to all of it.
"""

from interp.guidance import presets
from interp.guidance.appearance import Appearance
from interp.guidance.checkpointing import checkpointed, without_weight_gradients
from interp.guidance.drag import Drag
from interp.guidance.guide import Guide
from interp.guidance.identity import Identity
from interp.guidance.real import edit_real
from interp.guidance.reference import Reference, Twin
from interp.guidance.residuals import controlled
from interp.guidance.spatial import Spatial
from interp.guidance.terms import TOTAL, FunctionTerm, Term

__all__ = [
    "TOTAL",
    "Appearance",
    "Drag",
    "FunctionTerm",
    "Guide",
    "Identity",
    "Reference",
    "Spatial",
    "Term",
    "Twin",
    "checkpointed",
    "controlled",
    "edit_real",
    "presets",
    "without_weight_gradients",
]
