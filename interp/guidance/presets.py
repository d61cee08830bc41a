"""The published settings of guidance. All of them: 100 steps by the convention ``rg``, the first half of them guided by
signed steps of 0.02.

Each gives a `Guide`; ``dataclasses.replace`` changes it, and so do keyword arguments here.

Source: Readout Guidance, official code and configurations.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from interp.guidance.appearance import Appearance
from interp.guidance.drag import Drag
from interp.guidance.guide import Guide
from interp.guidance.reference import Twin
from interp.guidance.spatial import Spatial
from interp.hyperfeatures.presets import NEGATIVE_PROMPT

Points = Tensor | Sequence[Tensor]


def spatial(readout: Any, target: Tensor, **changes: Any) -> Guide:
    """Control by a picture of a property: fresh noise in every step (eta 1), guidance 7.5.

    Args:
        readout: of pose, depth or edges.
        target: see `Spatial`.
        changes: other fields of `Guide`.
    """
    return _guide([Spatial(readout, target)], {"eta": 1.0}, changes)


def drag_generated(
    appearance: Any, correspondence: Any, sources: Points, targets: Points, size: tuple[int, int], **changes: Any
) -> Guide:
    """Drag parts of a generated image: no fresh noise, guidance 7.5.

    Args:
        appearance, correspondence: readouts.
        sources, targets, size: see `Drag`.
        changes: other fields of `Guide`.
    """
    return _guide([Appearance(appearance), Drag(correspondence, sources, targets, size)], {}, changes)


def drag_real(
    appearance: Any, correspondence: Any, sources: Points, targets: Points, size: tuple[int, int], **changes: Any
) -> Guide:
    """Drag parts of a real image, from the noise that its inversion ends in (`edit_real`): guidance 3.5, and 1 for the
    twin, which so reconstructs the image.

    Args:
        appearance, correspondence: readouts.
        sources, targets, size: see `Drag`.
        changes: other fields of `Guide`.
    """
    settings = {"guidance_scale": 3.5, "reference": Twin(guidance_scale=1.0)}
    return _guide([Appearance(appearance), Drag(correspondence, sources, targets, size)], settings, changes)


def _guide(terms: Sequence[Any], settings: dict[str, Any], changes: dict[str, Any]) -> Guide:
    return Guide(terms, **{"negative_prompt": NEGATIVE_PROMPT} | settings | changes)
