"""Diffusion Hyperfeatures: one descriptor per pixel out of all layers and many timesteps of a diffusion model.

A `FeatureSpec` says which feature maps; `presets` has those of the published methods. `extract` runs the model and
aggregates as it goes, `stack` gives the maps themselves, `train` fits an `AggregationNetwork` to keypoints, and
`save`, `load` and `load_official` keep networks on disk.
"""

from interp.hyperfeatures import presets
from interp.hyperfeatures.baselines import concatenate, single, singles
from interp.hyperfeatures.bottleneck import Bottleneck
from interp.hyperfeatures.cache import CachedStacks, cache
from interp.hyperfeatures.checkpoints import About, Checkpoint, load, save
from interp.hyperfeatures.features import add_noise, check_fit, extract, joined, layer_maps, stack, stream
from interp.hyperfeatures.fitting import Training
from interp.hyperfeatures.images import prepare
from interp.hyperfeatures.loss import cell_index, scale_points, symmetric_cross_entropy
from interp.hyperfeatures.network import (
    LOGIT_SCALE,
    Accumulator,
    AggregationNetwork,
    shape_of,
    without_wrapper,
)
from interp.hyperfeatures.official import load_official
from interp.hyperfeatures.spec import FeatureSpec, calls, saved_indices
from interp.hyperfeatures.training import Pair, describe_stacks, train

__all__ = [
    "LOGIT_SCALE",
    "About",
    "Accumulator",
    "AggregationNetwork",
    "Bottleneck",
    "CachedStacks",
    "Checkpoint",
    "FeatureSpec",
    "Pair",
    "Training",
    "add_noise",
    "cache",
    "calls",
    "cell_index",
    "check_fit",
    "concatenate",
    "describe_stacks",
    "extract",
    "joined",
    "layer_maps",
    "load",
    "load_official",
    "prepare",
    "presets",
    "save",
    "saved_indices",
    "scale_points",
    "shape_of",
    "single",
    "singles",
    "stack",
    "stream",
    "symmetric_cross_entropy",
    "train",
    "without_wrapper",
]
