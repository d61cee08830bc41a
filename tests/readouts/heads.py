"""Small readouts on the small random Stable Diffusion, and section 1 of the specification written out."""

import math

import torch
import torch.nn.functional as F

from interp import Diffusion
from interp.readouts import Readout, ReadoutHead, fingerprint
from tests.tiny_diffusion import stable_diffusion

SITES = ("up.0.resnets.1.hook_branch", "up.1.resnets.0.hook_branch", "up.3.resnets.2.hook_branch")
MODULES = ("up_blocks.0.resnets.1.conv2", "up_blocks.1.resnets.0.conv2", "up_blocks.3.resnets.2.conv2")
TIME = 64  # four times the first level's channels
SIZE = (8, 8)


def model(seed=0):
    return Diffusion(stable_diffusion(seed=seed))


def perturbed(head, seed=3):
    """Norm gains, biases and mixing weights start at ones and zeros, which hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in head.named_parameters():
        if "norm" in name or name == "mixing_weights" or name.endswith("bias"):
            parameter.data += 0.7 * torch.randn(parameter.shape, generator=generator)
    return head


def readout(sd, out_channels=3, kind="spatial", **options):
    head = ReadoutHead(
        sd.channels(list(SITES)), 16, 8, out_channels=out_channels, time_dim=TIME, output_widths=(12, 10), n_groups=4,
        sites=SITES, **options,
    )  # fmt: skip
    return Readout(
        perturbed(head), SITES, SIZE, kind, "pose", (-0.5, 0.5) if kind == "spatial" else None, sd.name,
        head.time_convention, fingerprint(sd),
    )  # fmt: skip


def group_norm(x, gain, bias, groups=4):
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(-1, keepdim=True)
    normal = ((grouped - mean) / torch.sqrt(variance + 1e-5)).reshape(x.shape)
    return normal * gain.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


def closed_form(state, maps, embedding=None, squash=False):
    """The head in float64 from the state dict alone."""
    state = {key: tensor.double() for key, tensor in state.items()}
    shares = torch.exp(state["mixing_weights"]) / torch.exp(state["mixing_weights"]).sum()
    total = 0
    for n, x in enumerate(maps):
        x = x.double()

        def conv(x, part, n=n):
            key = f"bottleneck_layers.{n}.{part}"
            weight = state[f"{key}.weight"]
            out = F.conv2d(x, weight, padding=1 if weight.shape[-1] == 3 else 0)
            return group_norm(out, state[f"{key}.norm.weight"], state[f"{key}.norm.bias"])

        h = conv(x, "conv1").clamp(min=0)
        if embedding is not None:
            key = f"bottleneck_layers.{n}.emb_layers"
            added = embedding.double() @ state[f"{key}.weight"].T + state[f"{key}.bias"]
            h = h + added.clamp(min=0)[:, :, None, None]
        h = conv(conv(h, "conv2").clamp(min=0), "conv3")
        side = conv(x, "shortcut") if f"bottleneck_layers.{n}.shortcut.weight" in state else x
        total = total + shares[n] * (h + side).clamp(min=0)
    if "output_head.0.weight" in state:
        for place in (0, 2, 4):
            weight = state[f"output_head.{place}.weight"]
            total = F.conv2d(total, weight, state[f"output_head.{place}.bias"], padding=weight.shape[-1] // 2)
            total = total / (1 + torch.exp(-total)) if place < 4 else total
    return torch.tanh(total) if squash else total


def sinusoids(times, width):
    """The timestep projection of Stable Diffusion: cosines, then sines, of falling frequencies."""
    frequencies = torch.tensor([math.exp(-math.log(10000) * i / (width // 2)) for i in range(width // 2)])
    angles = times.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def embedding_of(sd, times):
    """The UNet's own embedding of timesteps, from its weights."""
    state = {key: t for key, t in sd.denoiser.state_dict().items() if key.startswith("time_embedding")}
    x = sinusoids(times, state["time_embedding.linear_1.weight"].shape[1])
    x = x @ state["time_embedding.linear_1.weight"].T + state["time_embedding.linear_1.bias"]
    x = x / (1 + torch.exp(-x))
    return x @ state["time_embedding.linear_2.weight"].T + state["time_embedding.linear_2.bias"]
