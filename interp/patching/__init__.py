"""Patching experiments, one file each: functions that build edits, run them as one sweep, and measure."""

from interp.patching.activation import activation, image_map
from interp.patching.attribution import Agreement, agreement, attribution
from interp.patching.contrasts import Contrast, contrasts, task_pairs
from interp.patching.corruption import MeanOver, TokenNoise
from interp.patching.diffusion import diffusion
from interp.patching.function_vectors import FunctionVector, add_by_layer, function_vector
from interp.patching.head_overlap import Correlation, Overlap, overlap, rank_correlation
from interp.patching.head_vectors import HeadOutputs, head_outputs, put_heads, replace_heads, strongest_heads
from interp.patching.heads import Head, by_tower, effect, head_sets, heads, top_heads
from interp.patching.image_metrics import Compared, layout_agreement, option_difference
from interp.patching.knockout import Cut, crossing, cut, drops, knockout, windows_of
from interp.patching.lens import decodes, identity_prompt, lens, patchscope, peaks
from interp.patching.mediation import MediationPrompts, indirect_effects, mediation, mediation_prompts, probability
from interp.patching.metric import log_probability, logit_difference
from interp.patching.override import override, wins
from interp.patching.path import path
from interp.patching.reinforce_heads import HeadSelection, reinforce_heads
from interp.patching.result import Intervals, PatchingResult
from interp.patching.tokens import PatchGrid, TokenGroup, every_token, image_patches, segments

__all__ = [
    "Agreement",
    "Compared",
    "Contrast",
    "Correlation",
    "Cut",
    "FunctionVector",
    "Head",
    "HeadOutputs",
    "HeadSelection",
    "Intervals",
    "MeanOver",
    "MediationPrompts",
    "Overlap",
    "PatchGrid",
    "PatchingResult",
    "TokenGroup",
    "TokenNoise",
    "activation",
    "add_by_layer",
    "agreement",
    "attribution",
    "by_tower",
    "contrasts",
    "crossing",
    "cut",
    "decodes",
    "diffusion",
    "drops",
    "effect",
    "every_token",
    "function_vector",
    "head_outputs",
    "head_sets",
    "heads",
    "identity_prompt",
    "image_map",
    "image_patches",
    "indirect_effects",
    "knockout",
    "layout_agreement",
    "lens",
    "log_probability",
    "logit_difference",
    "mediation",
    "mediation_prompts",
    "option_difference",
    "overlap",
    "override",
    "patchscope",
    "path",
    "peaks",
    "probability",
    "put_heads",
    "rank_correlation",
    "reinforce_heads",
    "replace_heads",
    "segments",
    "strongest_heads",
    "task_pairs",
    "top_heads",
    "windows_of",
    "wins",
]
