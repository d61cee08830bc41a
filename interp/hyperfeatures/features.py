"""Feature maps of a diffusion model as a spec describes them: streamed, stacked, or aggregated on the way."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp.correspondence.points import Size
from interp.errors import InputError, ShapeError
from interp.hyperfeatures import presets
from interp.hyperfeatures.bottleneck import resized
from interp.hyperfeatures.images import prepare
from interp.hyperfeatures.network import Accumulator, AggregationNetwork
from interp.hyperfeatures.spec import GENERATION, INVERSION, NOISE, FeatureSpec
from interp.models.diffusion import Diffusion

Consumer = Callable[[int, int, Tensor], None]
"""Takes the step of the stack, the index of the layer, and the map ``[batch, channel, height, width]``."""


def stream(
    sd: Diffusion, images: Any, spec: FeatureSpec, consume: Consumer, *, resize: bool = True, progress: bool = True
) -> Float[Tensor, "batch channel h w"]:
    """Run the process of a spec and hand over each map as it is made; none is kept.

    Args:
        sd: the model.
        images: PIL images, files, or a tensor in -1 .. 1. For generation instead: a prompt for each image (the spec's
            prompt is then not used), or the noise ``[batch, channel, h, w]`` to start from.
        spec: which maps, of what process.
        consume: gets every map once, in float32, without a graph.
        resize: bring the maps to the spec's size; otherwise they come as the model makes them.
        progress: show a bar.

    Returns:
        The latents at the clean end: the encoded images, or what was generated.

    Raises:
        InputError: maps of several sizes without an ``output_size``, or a run whose timesteps are not those of the
            spec; also what `Diffusion.invert` and `Diffusion.generate` refuse.
        UnknownNameError: the model lacks a site.

    Source: Diffusion Hyperfeatures, section 3.1.
    """
    check_maps(sd, spec.sites)
    if spec.mode == GENERATION:
        return _generate(sd, images, spec, consume, resize, progress)
    latents = encoded(sd, prepare(images, spec.load_size, spec.image_size), spec)
    if spec.mode == INVERSION:
        sd.invert(
            latents,
            spec.prompt,
            steps=spec.steps,
            convention=spec.convention,
            guidance_scale=spec.guidance_scale,
            capture=list(spec.sites),
            save_steps=list(spec.saved),
            half="cond",
            seed=spec.seed,
            consume=_receiver(spec, latents.shape, consume, resize),
            stop=True,
            keep_latents=False,
            progress=progress,
        )
    if spec.mode == NOISE:
        _noise(sd, latents, spec, consume, resize)
    return latents


def encoded(
    sd: Diffusion, pixels: Float[Tensor, "batch 3 image_height image_width"], spec: FeatureSpec
) -> Float[Tensor, "batch channel h w"]:
    """Latents as a spec says; an image's do not depend on what else is in the batch.

    Args:
        sd: the model.
        pixels: in -1 .. 1.
        spec: says which latent stands for an image, and the seed where it is drawn.
    """
    if spec.vae != "sample":
        return sd.encode(pixels, vae=spec.vae, seed=spec.seed)
    # Every image gets the draw that it would get alone.
    return torch.cat([sd.encode(one[None], vae=spec.vae, seed=spec.seed) for one in pixels])


def check_maps(sd: Diffusion, sites: Sequence[str]) -> None:
    """Refuse sites that hold no map of the image.

    Args:
        sd: the model.
        sites: names.

    Raises:
        InputError: attention heads or patterns, or tokens of the text.
        UnknownNameError: the model lacks a site.
    """
    for site in sites:
        place = sd.place(site)
        tokens = place.axes[:2] == ("batch", "pos") and len(place.axes) == 3 and place.image_tokens is not None
        if not (tokens or place.axes == ("batch", "channel", "height", "width")):
            raise InputError(
                f"{site} is [{', '.join(place.axes)}], which is no map of the image: take a resnet, a block, or a "
                "residual stream of image tokens, such as 'up.1.resnets.0.hook_branch' or 'blocks.3.hook_resid_post'"
            )


def stack(
    sd: Diffusion, images: Any, spec: FeatureSpec, *, dtype: torch.dtype = torch.float32, progress: bool = True
) -> Float[Tensor, "batch step channels height width"]:
    """All maps of a spec at once: what an `AggregationNetwork` takes, and what caches hold.

    Args:
        sd: the model.
        images: as for `stream`.
        spec: which maps; each is resized first and then joined to the others.
        dtype: of the stack; float16 halves a cache.
        progress: show a bar.

    Returns:
        For every step, clean first, the maps of all sites one after another on the channel axis.

    Raises:
        InputError, UnknownNameError: as `stream`.

    Source: Diffusion Hyperfeatures, section 3.2 and official code.
    """
    maps: dict[tuple[int, int], Tensor] = {}

    def keep(step: int, layer: int, found: Tensor) -> None:
        maps[step, layer] = found.to(dtype)

    stream(sd, images, spec, keep, progress=progress)
    layers = range(len(spec.sites))
    steps = [torch.cat([maps.pop((step, layer)) for layer in layers], dim=1) for step in range(spec.n_steps)]
    return torch.stack(steps, dim=1)


def layer_maps(
    sd: Diffusion, images: Any, spec: FeatureSpec, *, dtype: torch.dtype = torch.float32, progress: bool = True
) -> tuple[list[Float[Tensor, "batch step _ _ _"]], Float[Tensor, "batch _ _ _"]]:
    """All maps of a spec in the sizes that the model makes them: what `stack` resizes and joins, in less memory.

    Args:
        sd: the model.
        images: as for `stream`.
        spec: which maps.
        dtype: of the maps.
        progress: show a bar.

    Returns:
        For every site its maps, ``[batch, step, channel, height, width]``, clean step first: what an
        `AggregationNetwork` takes together with the spec's ``output_size``. And the latents at the clean end.

    Raises:
        InputError, UnknownNameError: as `stream`.

    Source: Diffusion Hyperfeatures, section 3.1.
    """
    found: dict[tuple[int, int], Tensor] = {}

    def keep(step: int, layer: int, tensor: Tensor) -> None:
        found[step, layer] = tensor.to(dtype)

    clean = stream(sd, images, spec, keep, resize=False, progress=progress)
    steps, layers = range(spec.n_steps), range(len(spec.sites))
    return [torch.stack([found.pop((step, layer)) for step in steps], dim=1) for layer in layers], clean


def joined(
    layers: Sequence[Float[Tensor, "batch step _ _ _"]], size: Size | None
) -> Float[Tensor, "batch step channels height width"]:
    """The stack of maps that `layer_maps` found.

    Args:
        layers: one tensor for each site.
        size: (height, width) to resize to, bilinearly; None: all are of one size.

    Raises:
        InputError: maps of several sizes with no size to bring them to.

    Source: Diffusion Hyperfeatures, section 3.2 and official code (resized first, then joined).
    """
    sizes = [tuple(maps.shape[-2:]) for maps in layers]
    if size is None and len(set(sizes)) > 1:
        raise InputError(f"the layers' maps are of several sizes, {sizes}: give the spec an output_size")
    flat = [resized(rearrange(maps, "b s c h w -> (b s) c h w"), size) for maps in layers]
    return rearrange(torch.cat(flat, dim=1), "(b s) c h w -> b s c h w", b=layers[0].shape[0])


def extract(
    sd: Diffusion,
    images: Any,
    net: AggregationNetwork,
    spec: FeatureSpec | None = None,
    *,
    grad: bool = False,
    progress: bool = True,
) -> Float[Tensor, "batch dim height width"]:
    """Descriptor maps of images; each feature map is aggregated as it is made, so that their stack never exists.

    Equal to ``net(stack(sd, images, spec))`` up to the rounding of float32 sums. It takes less arithmetic: the
    pointwise convolutions of the network run on maps of the model's own sizes, and what they give is resized.

    Args:
        sd: the model.
        images: as for `stream`.
        net: the aggregation network.
        spec: which maps; by default those of `presets.hyperfeatures` at the network's sites.
        grad: keep a graph from the descriptors to the network's weights. The diffusion model gets no gradients.
        progress: show a bar.

    Returns:
        Descriptors in the dtype of the network.

    Raises:
        InputError: the spec has other numbers of layers, channels or steps than the network; also as `stream`.
        UnknownNameError: the model lacks a site.

    Source: Diffusion Hyperfeatures, section 3.
    """
    if spec is None:
        spec = presets.hyperfeatures(sd, sites=net.sites or presets.BRANCHES)
        if net.timesteps is not None and net.timesteps != spec.timesteps:
            raise InputError(
                f"this network is for timesteps {net.timesteps}, not the default ones {spec.timesteps}: give the spec"
            )
    check_fit(sd, net, spec)

    with torch.set_grad_enabled(grad):
        total = Accumulator(net, spec.output_size)

    def add(step: int, layer: int, found: Tensor) -> None:
        # The process runs without gradients around this call; only the network's own part needs them.
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            total.add(step, layer, found)

    stream(sd, images, spec, add, resize=False, progress=progress)
    return total.result()


def check_fit(sd: Diffusion, net: AggregationNetwork, spec: FeatureSpec) -> None:
    """Refuse a spec whose stack the network cannot take.

    Timesteps and processes may differ, so that a network trained on maps of inversion can take those of generation.

    Raises:
        InputError: naming the first difference: the number of steps or layers, channels, or a site.
        UnknownNameError: the model lacks a site.
    """
    if spec.n_steps != net.n_steps:
        raise InputError(f"this network mixes {net.n_steps} steps, the spec has {spec.n_steps}: {spec.timesteps}")
    if len(spec.sites) != net.n_layers:
        raise InputError(f"this network mixes {net.n_layers} layers, the spec has {len(spec.sites)} sites")
    for layer, (site, channels) in enumerate(zip(spec.sites, sd.channels(list(spec.sites)), strict=True)):
        if channels != net.channels[layer]:
            raise InputError(
                f"{net.layer_name(layer)} of the network has {net.channels[layer]} channels, but {site} has {channels}"
            )
        # Other sites of as many channels fit by shape, and would be mixed with weights that are not theirs.
        if net.sites is not None and net.sites[layer] != site:
            raise InputError(f"layer {layer} of the network is {net.sites[layer]}, but the spec has {site} there")


def _generate(sd: Diffusion, source: Any, spec: FeatureSpec, consume: Consumer, resize: bool, progress: bool) -> Tensor:
    prompts: str | list[str] = spec.prompt
    noise: Tensor | None = None
    if isinstance(source, Tensor):
        noise = source
    elif isinstance(source, str):
        prompts = [source]
    else:
        prompts = list(source)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("generation takes a prompt for each image, or the noise to start from, and no images")
    trajectory = sd.generate(
        prompts,
        negative_prompt=spec.negative_prompt,
        steps=spec.steps,
        guidance_scale=1.0 if spec.guidance_scale is None else spec.guidance_scale,
        seed=spec.seed,
        latents=noise,
        convention=spec.convention,
        capture=list(spec.sites),
        save_steps=list(spec.saved),
        half="cond",
        consume=_receiver(spec, _cells(sd) if noise is None else noise.shape, consume, resize),
        decode=False,
        keep_latents=False,
        progress=progress,
    )
    return trajectory.clean


def _cells(sd: Diffusion) -> torch.Size | None:
    """The shape of the latents that a model starts from by itself, where it says so."""
    side = getattr(sd.denoiser.config, "sample_size", None)
    if side is None:
        return None
    height, width = (side, side) if isinstance(side, int) else side
    return torch.Size((1, 1, height, width))


def _noise(sd: Diffusion, latents: Tensor, spec: FeatureSpec, consume: Consumer, resize: bool) -> None:
    generator = torch.Generator("cpu").manual_seed(spec.seed)
    context = sd.prompt([spec.prompt] * latents.shape[0])
    deliver = _delivery(spec, latents.shape, consume, resize)
    for step, timestep in enumerate(spec.timesteps):
        means: dict[str, Tensor] = {}
        for _ in range(spec.n_noises):
            # One draw for all images, so that a map does not depend on what else is in the batch.
            drawn = torch.randn(latents.shape[1:], generator=generator, dtype=torch.float32)
            noisy = add_noise(sd, latents, drawn.to(latents), timestep)
            found = sd.capture(noisy, timestep, context, list(spec.sites), stop=True)
            for site in spec.sites:
                part = found[site].float() / spec.n_noises
                means[site] = part if site not in means else means[site] + part
        for layer, site in enumerate(spec.sites):
            deliver(step, layer, means.pop(site))


def add_noise(
    sd: Diffusion,
    latents: Float[Tensor, "batch channel height width"],
    noise: Float[Tensor, "channel height width"] | Float[Tensor, "batch channel height width"],
    timestep: float,
) -> Float[Tensor, "batch channel height width"]:
    """Latents at a timestep of the model's forward process.

    Args:
        sd: the model, whose scheduler knows the noise schedule.
        latents: clean.
        noise: normal.
        timestep: from 0 to the number trained with, exclusive; of a flow, its time times that number.

    Raises:
        InputError: a timestep out of range, or not whole where the schedule is a table.

    Source: DDPM, eq. 4; flow matching, linear path.
    """
    scheduler = sd.pipeline.scheduler
    trained = int(scheduler.config["num_train_timesteps"])
    if not 0 <= timestep <= (trained if sd.prediction == "flow" else trained - 1):
        raise InputError(f"timestep {timestep} is out of range: noise is added at 0 to {trained - 1}")
    if sd.prediction == "flow":
        sigma = timestep / trained
        return (1 - sigma) * latents + sigma * noise
    if timestep != int(timestep):
        raise InputError(f"timestep {timestep} is not whole, and this model's noise schedule is a table")
    alpha = float(scheduler.alphas_cumprod[int(timestep)])
    return math.sqrt(alpha) * latents + math.sqrt(1 - alpha) * noise


def _receiver(
    spec: FeatureSpec, latent_shape: torch.Size | None, consume: Consumer, resize: bool
) -> Callable[[str, int, float, Tensor], None]:
    """What a run calls: knows calls and sites, where a consumer knows steps of the stack and layers."""
    steps = {call: step for step, call in enumerate(spec.saved)}
    layers = {site: layer for layer, site in enumerate(spec.sites)}
    deliver = _delivery(spec, latent_shape, consume, resize)

    def receive(site: str, call: int, timestep: float, tensor: Tensor) -> None:
        step = steps[call]
        if spec.timesteps and float(timestep) != float(spec.timesteps[step]):
            raise InputError(
                f"the model saw timestep {timestep:g} at step {step} of the stack, but the spec says "
                f"{spec.timesteps[step]:g}: another noise schedule or convention"
            )
        deliver(step, layers[site], tensor)

    return receive


def _delivery(spec: FeatureSpec, latent_shape: torch.Size | None, consume: Consumer, resize: bool) -> Consumer:
    """Bring every map to one size before it is consumed, or see that it is a map at all."""
    sizes: dict[str, torch.Size] = {}

    def deliver(step: int, layer: int, tensor: Tensor) -> None:
        site = spec.sites[layer]
        maps = as_maps(tensor.detach().float(), latent_shape, site)
        if spec.output_size is not None:
            maps = resized(maps, spec.output_size) if resize else maps
        else:
            sizes[site] = maps.shape[-2:]
            first, size = next(iter(sizes.items()))
            if size != maps.shape[-2:]:
                raise InputError(
                    f"maps of {first} are {tuple(size)}, those of {site} {tuple(maps.shape[-2:])}: give the spec an "
                    "output_size"
                )
        consume(step, layer, maps)

    return deliver


def as_maps(tensor: Tensor, latent_shape: torch.Size | None, site: str) -> Tensor:
    """Tokens of a diffusion transformer as the map they came from; maps pass through.

    Args:
        tensor: ``[batch, token, channel]``, or maps.
        latent_shape: of the latents, whose last two sides count; None: they are square.
        site: for messages.

    Raises:
        ShapeError: a tensor that is neither, or tokens that are no square patches of the latents.
    """
    if tensor.ndim == 4:
        return tensor
    if tensor.ndim != 3:
        raise ShapeError(f"{site} gives a tensor of shape {list(tensor.shape)}, which is no map of an image")
    n_tokens = tensor.shape[1]
    # Without latents to go by, a run started from the model's own noise, which is square.
    height, width = (n_tokens, n_tokens) if latent_shape is None else tuple(latent_shape[-2:])
    patch = math.isqrt(height * width // n_tokens)
    if patch == 0 or (height // patch) * (width // patch) != n_tokens:
        raise ShapeError(f"{site} gives {n_tokens} tokens, which are no square patches of the {height}×{width} latents")
    return rearrange(tensor, "batch (h w) channel -> batch channel h w", h=height // patch)
