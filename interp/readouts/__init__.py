"""Readouts: small heads that read pose, depth, edges, correspondence or appearance from a frozen model.

A `Readout` is a `ReadoutHead` with the sites, size and time convention that it needs. `train_readout` fits one on
examples (`ImagePairs`, `CocoKeypoints`, `FramePairs`, or `interp.readouts.creatures`), `evaluate` measures it by
timestep, `readout_sweep` asks where and when a property is readable, and `fit_probe` fits a head to activations of any
model. `save`, `load` and `load_official` keep readouts on disk.
"""

from interp.readouts import creatures
from interp.readouts.checkpoints import about, load, save
from interp.readouts.coco import CocoKeypoints
from interp.readouts.data import ImagePairs, listed_pairs
from interp.readouts.drag_files import DragExample, load_drag_example, load_prompts
from interp.readouts.evaluation import evaluate
from interp.readouts.examples import (
    Example,
    InMemory,
    PointPair,
    Source,
    appearance_loss,
    correspondence_loss,
    mse_loss,
    sparse_loss,
)
from interp.readouts.frames import FramePairs, Frames, listed_frames, paired_frames, video_tracks
from interp.readouts.frozen import frozen
from interp.readouts.head import ReadoutHead, head_of
from interp.readouts.keypoints import decode_heatmaps, heatmaps, keypoint_pck, oks, openpose_points
from interp.readouts.losses import aligned_cosine_distance, cosine_hinge, match_size, mse, sparse_mse
from interp.readouts.official import load_official
from interp.readouts.pose_drawing import CREATURE_BONES, OPENPOSE_BONES, draw_pose
from interp.readouts.probes import AttentionProbe, LinearProbe, fit_probe
from interp.readouts.readout import Readout, fingerprint
from interp.readouts.sweep import ReadoutTask, class_task, picture_task, readout_sweep
from interp.readouts.times import embedded_timestep, noise_timestep, time_dim, time_embedding
from interp.readouts.tracks import Tracks, read_tracks
from interp.readouts.training import train_readout

__all__ = [
    "CREATURE_BONES",
    "OPENPOSE_BONES",
    "AttentionProbe",
    "CocoKeypoints",
    "DragExample",
    "Example",
    "FramePairs",
    "Frames",
    "ImagePairs",
    "InMemory",
    "LinearProbe",
    "PointPair",
    "Readout",
    "ReadoutHead",
    "ReadoutTask",
    "Source",
    "Tracks",
    "about",
    "aligned_cosine_distance",
    "appearance_loss",
    "class_task",
    "correspondence_loss",
    "cosine_hinge",
    "creatures",
    "decode_heatmaps",
    "draw_pose",
    "embedded_timestep",
    "evaluate",
    "fingerprint",
    "fit_probe",
    "frozen",
    "head_of",
    "heatmaps",
    "keypoint_pck",
    "listed_frames",
    "listed_pairs",
    "load",
    "load_drag_example",
    "load_official",
    "load_prompts",
    "match_size",
    "mse",
    "mse_loss",
    "noise_timestep",
    "oks",
    "openpose_points",
    "paired_frames",
    "picture_task",
    "read_tracks",
    "readout_sweep",
    "save",
    "sparse_loss",
    "sparse_mse",
    "time_dim",
    "time_embedding",
    "train_readout",
    "video_tracks",
]
