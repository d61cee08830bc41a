"""Controls of guidance: heads that know nothing, gradients that point the other way."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from interp.guidance.guide import Guide
from interp.readouts.readout import Readout


def shuffled(readout: Readout, seed: int) -> Readout:
    """The same readout with the numbers in each of its head's weights in another order.

    Every weight keeps its distribution; what the head learned is gone. Its gradients are another size, mostly smaller,
    which counts wherever steps are no signed ones: `Trials.gradients` has both.

    Args:
        readout: nothing of it changes.
        seed: of the order.
    """
    head = copy.deepcopy(readout.head)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for weight in head.parameters():
            order = torch.from_numpy(rng.permutation(weight.numel())).to(weight.device)
            weight.copy_(weight.flatten()[order].reshape(weight.shape))
    return replace(readout, head=head)


def reversed_guide(guide: Guide) -> Guide:
    """The same guide with the opposite of every step: away from what is asked.

    Args:
        guide: nothing of it changes.
    """
    size: Any = guide.step_size
    return replace(guide, step_size=[-one for one in size] if isinstance(size, (list, tuple)) else -size)
