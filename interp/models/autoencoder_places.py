"""Where the sites of an autoencoder are, and the feature maps and residual blocks that it shares with UNets."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import nn

from interp.sites import SPATIAL, Place, Side

Found = Iterator[tuple[Place, str | None]]
Modules = dict[str, nn.Module]


def spatial(site: str, path: str, side: Side, width: Any) -> tuple[Place, None]:
    """A feature map."""
    return Place(site, path, side, SPATIAL, layout="grid", width=width), None


def resnet_places(modules: Modules, name: str, path: str) -> Found:
    """The residual blocks of one level: in, branch (before the skip is added), out."""
    for j, resnet in enumerate(children_of(modules, f"{path}.resnets")):
        site, inner = f"{name}.resnets.{j}", f"{path}.resnets.{j}"
        yield spatial(f"{site}.hook_in", inner, "input", resnet.in_channels)
        yield spatial(f"{site}.hook_branch", f"{inner}.conv2", "output", channels_out(modules, f"{inner}.conv2"))
        yield spatial(f"{site}.hook_out", inner, "output", channels_out(modules, f"{inner}.conv2"))


def children_of(modules: Modules, path: str) -> list[Any]:
    """The modules directly inside one; none where there is no such module."""
    return list(modules[path].children()) if path in modules else []


def channels_out(modules: Modules, path: str) -> int | None:
    """Channels that a convolution gives; None where there is no such module."""
    return getattr(modules.get(path), "out_channels", None)


def autoencoder_places(modules: Modules) -> Found:
    """The levels of an AutoencoderKL or an AutoencoderTiny; other autoencoders have raw sites only."""
    if "vae.encoder.layers" in modules and "vae.decoder.layers" in modules:
        yield from _tiny_places(modules)
        return
    if "vae.encoder.conv_in" not in modules or "vae.decoder.conv_in" not in modules:
        return
    for half, levels in (("encoder", "down"), ("decoder", "up")):
        path = f"vae.{half}"
        if half == "decoder":
            yield spatial(f"{path}.hook_in", path, "input", modules[f"{path}.conv_in"].in_channels)
            yield from _level(modules, f"{path}.mid", f"{path}.mid_block")
        for i in range(len(children_of(modules, f"{path}.{levels}_blocks"))):
            yield from _level(modules, f"{path}.{levels}.{i}", f"{path}.{levels}_blocks.{i}")
        if half == "encoder":
            yield from _level(modules, f"{path}.mid", f"{path}.mid_block")
        yield spatial(f"{path}.hook_out", path, "output", channels_out(modules, f"{path}.conv_out"))


def _level(modules: Modules, name: str, path: str) -> Found:
    yield from resnet_places(modules, name, path)
    yield spatial(f"{name}.hook_out", path, "output", channels_out(modules, f"{path}.resnets.0.conv2"))


def _tiny_places(modules: Modules) -> Found:
    """An AutoencoderTiny, whose levels lie one after the other in a single list of layers.

    A level of the encoder begins with the convolution that halves the sides, one of the decoder ends with the
    convolution after the sides are doubled (in its last level, that of the image).
    """
    for half, level in (("encoder", "down"), ("decoder", "up")):
        path = f"vae.{half}"
        layers = children_of(modules, f"{path}.layers")
        convolutions = [n for n, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
        if half == "decoder":
            yield spatial(f"{path}.hook_in", path, "input", layers[convolutions[0]].in_channels)
        for i, (start, stop) in enumerate(pairwise(convolutions)):
            name, end = f"{path}.{level}.{i}", stop - 1 if half == "encoder" else stop
            blocks = [n for n in range(start, stop) if hasattr(layers[n], "fuse")]
            for j, n in enumerate(blocks):
                site, inner = f"{name}.resnets.{j}", f"{path}.layers.{n}"
                yield spatial(f"{site}.hook_in", inner, "input", layers[n].conv[0].in_channels)
                yield spatial(f"{site}.hook_branch", f"{inner}.conv", "output", layers[n].conv[-1].out_channels)
                yield spatial(f"{site}.hook_out", inner, "output", layers[n].conv[-1].out_channels)
            width = layers[end if half == "decoder" else start].out_channels
            yield spatial(f"{name}.hook_out", f"{path}.layers.{end}", "output", width)
        yield Place(f"{path}.mid.hook_out", path, "output", SPATIAL), "this autoencoder has no middle block"
        yield spatial(f"{path}.hook_out", path, "output", layers[-1].out_channels)
