"""Where every site of a diffusers pipeline is: UNets, diffusion transformers, text encoders, autoencoders.

Paths start with the pipeline's name of a model: ``unet.up_blocks.1.resnets.0.conv2``, ``text_encoder.encoder...``.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from interp.errors import InputError
from interp.models.autoencoder_places import (
    Found,
    Modules,
    autoencoder_places,
    channels_out,
    children_of,
    resnet_places,
    spatial,
)
from interp.models.families.base import Stack
from interp.models.places import PlaceMap, stack_places, width_of
from interp.sites import HEADS, NEURONS, PATTERN, RESIDUAL, SPATIAL, VECTOR, ImageTokens, Part, Place, Side

# Transformer classes whose blocks attend to text and image together, and which tokens are the image's.
_JOINT: dict[str, ImageTokens] = {"SD3Transformer2DModel": "first", "FluxTransformer2DModel": "last"}
_CROSS = ("PixArtTransformer2DModel",)


def components(pipeline: Any) -> nn.Module:
    """The models of a pipeline under one root, by their names in it; the models themselves are not changed.

    Args:
        pipeline: a diffusers pipeline.

    Raises:
        InputError: a pipeline without a UNet or transformer.
    """
    root = nn.Module()
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            root.add_module(name, part)
    denoiser_name(root, pipeline)
    return root


def denoiser_name(root: nn.Module, pipeline: Any = None) -> str:
    """``"unet"`` or ``"transformer"``: which of a pipeline's models predicts the noise.

    Args:
        root: what `components` gives.
        pipeline: for the error.

    Raises:
        InputError: there is neither.
    """
    names = dict(root.named_children())
    for name in ("unet", "transformer"):
        if name in names:
            return name
    raise InputError(
        f"{type(pipeline).__name__} has no UNet and no transformer; its models are {', '.join(names) or 'none'}"
    )


def diffusion_places(pipeline: Any) -> PlaceMap:
    """All sites of a diffusers pipeline.

    Args:
        pipeline: a diffusers pipeline with a UNet (Stable Diffusion 1, 2, XL) or an SD3, Flux or PixArt transformer.

    Returns:
        The places, in forward order: text encoders, denoiser, autoencoder; and for each site that this pipeline
        lacks though others like it have it, the reason.

    Raises:
        InputError: a pipeline without a denoiser, or with one of another kind.
    """
    root = components(pipeline)
    modules = dict(root.named_modules(remove_duplicate=False))
    children = dict(root.named_children())
    denoiser = denoiser_name(root)
    parts: dict[str, Part] = {denoiser: "denoiser"}
    listed: list[tuple[Place, str | None]] = []
    for name in children:
        if name.startswith("text_encoder"):
            parts[name] = "text_encoder"
            listed += _text_places(modules, name)
    listed += _denoiser_places(modules, denoiser)
    if "vae" in children:
        parts["vae"] = "vae"
        listed += autoencoder_places(modules)
    found: dict[str, Place] = {}
    reasons: dict[str, str] = {}
    for place, reason in listed:
        place = replace(place, positional=False, part=parts[place.path.split(".")[0]])
        if reason is None and place.path not in modules:
            reason = f"this {type(children[place.path.split('.')[0]]).__name__} has no module {place.path!r}"
        if reason is None:
            found[place.site] = place
        else:
            reasons[place.site] = reason
    return PlaceMap(found, reasons, _without_effect(modules, pipeline, found), frozenset(modules), parts)


def _without_effect(modules: Modules, pipeline: Any, found: dict[str, Place]) -> dict[str, str]:
    """Sites that can be read, but whose edits no later module sees."""
    reasons: dict[str, str] = {}
    if type(pipeline).__name__.startswith("StableDiffusionXL") and "text_encoder" in modules:
        layers = [path for path in modules if path.startswith("text_encoder.") and path.endswith("self_attn")]
        last = layers[-1].removesuffix(".self_attn") if layers else "text_encoder"
        why = "SDXL reads this encoder's states before its last block"
        reasons |= {last: why, f"{last.split('encoder.layers')[0]}final_layer_norm": why}
    last_context = [site for site in found if site.endswith("context.hook_resid_post")]
    if "transformer" in modules and type(modules["transformer"]).__name__ == "FluxTransformer2DModel" and last_context:
        reasons[last_context[-1]] = "nothing reads the text stream after the last block"
    return reasons


# ---------------------------------------------------------------- pieces that denoisers share


def _tokens(
    site: str,
    path: str,
    side: Side,
    width: int | None,
    image: ImageTokens | None,
    *,
    axes: tuple[str, ...] = RESIDUAL,
    n_heads: int | None = None,
    element: int | str | None = None,
) -> tuple[Place, None]:
    return Place(site, path, side, axes, n_heads, width=width, element=element, image_tokens=image), None


def _attention_places(
    modules: Modules, name: str, path: str, queries: ImageTokens | None, keys: ImageTokens | None
) -> Found:
    """One attention module: inputs of its projections, q, k, v, pattern, z, out.

    Args:
        modules: all modules.
        name: the sites' name up to the leaf.
        path: of the attention module.
        queries: which of its queries are cells of the image.
        keys: which of its keys are.
    """
    heads, out = _n_heads(modules, path), f"{path}.to_out.0"
    for letter, image in (("q", queries), ("k", keys), ("v", keys)):
        projection = f"{path}.to_{letter}"
        if projection in modules:
            into, width = width_of(modules[projection], "in"), width_of(modules[projection], "out")
            yield _tokens(f"{name}.hook_{letter}_in", projection, "input", into, image)
            yield _heads(f"{name}.hook_{letter}", projection, "output", heads, width, image)
    yield _tokens(f"{name}.hook_pattern", path, "pattern", None, queries, axes=PATTERN, n_heads=heads)
    if out in modules:
        yield _heads(f"{name}.hook_z", out, "input", heads, width_of(modules[out], "in"), queries)
        yield _tokens(f"{name}.hook_out", path, "output", width_of(modules[out], "out"), queries)


def _n_heads(modules: Modules, path: str) -> int:
    attention: Any = modules[path]
    return int(attention.heads)


def _heads(site: str, path: str, side: Side, heads: int, width: int, image: ImageTokens | None) -> tuple[Place, None]:
    return _tokens(site, path, side, width // heads, image, axes=HEADS, n_heads=heads)


def _mlp_places(modules: Modules, name: str, path: str, ff: str, image: ImageTokens | None) -> Found:
    last = f"{path}.{ff}.net.2"
    if last in modules:
        inner, width = width_of(modules[last], "in"), width_of(modules[last], "out")
        yield _tokens(f"{name}.mlp.hook_post", last, "input", inner, image, axes=NEURONS)
        yield _tokens(f"{name}.hook_mlp_out", f"{path}.{ff}", "output", width, image)


def _cross_block(modules: Modules, name: str, path: str, width: Any) -> Found:
    """A block of self-attention, cross-attention and feed-forward, of a UNet or of PixArt."""
    yield _tokens(f"{name}.hook_resid_pre", path, "input", width, "all")
    yield from _attention_places(modules, f"{name}.self", f"{path}.attn1", "all", "all")
    if f"{path}.attn2" in modules:
        yield from _attention_places(modules, f"{name}.cross", f"{path}.attn2", "all", None)
    else:
        leaves = ("q_in", "q", "k_in", "k", "v_in", "v", "pattern", "z", "out")
        for leaf in leaves:
            yield Place(f"{name}.cross.hook_{leaf}", path, "output", RESIDUAL), "this block has no cross-attention"
    yield from _mlp_places(modules, name, path, "ff", "all")
    yield _tokens(f"{name}.hook_resid_post", path, "output", width, "all")


# ---------------------------------------------------------------- denoisers


def _denoiser_places(modules: Modules, name: str) -> Found:
    kind = type(modules[name]).__name__
    if name == "unet":
        return _unet_places(modules, name)
    if kind in _JOINT or kind in _CROSS:
        return _transformer_places(modules, name, _JOINT.get(kind))
    raise InputError(f"no table of sites for a {kind}. Supported: UNets, {', '.join([*_JOINT, *_CROSS])}")


def _unet_places(modules: Modules, unet: str) -> Found:
    model: Any = modules[unet]
    yield spatial("hook_in", unet, "input", model.config.in_channels)
    time = f"{unet}.time_embedding"
    d_time = width_of(modules[f"{time}.linear_2"], "out") if f"{time}.linear_2" in modules else None
    yield Place("hook_time_embed", time, "output", VECTOR, layout="vector", width=d_time), None
    levels = [(f"down.{i}", f"{unet}.down_blocks.{i}") for i in range(len(children_of(modules, f"{unet}.down_blocks")))]
    if f"{unet}.mid_block" in modules:
        levels.append(("mid", f"{unet}.mid_block"))
    levels += [(f"up.{i}", f"{unet}.up_blocks.{i}") for i in range(len(children_of(modules, f"{unet}.up_blocks")))]
    for name, path in levels:
        yield from resnet_places(modules, name, path)
        width = channels_out(modules, f"{path}.resnets.0.conv2")
        for j, attention in enumerate(children_of(modules, f"{path}.attentions")):
            site, inner = f"{name}.attn.{j}", f"{path}.attentions.{j}"
            yield spatial(f"{site}.hook_in", inner, "input", width)
            if hasattr(attention, "to_q"):
                for place, reason in _attention_places(modules, f"{site}.self", inner, "all", "all"):
                    # Attention without a block around it takes and gives feature maps.
                    whole = place.path == inner and place.side == "output"
                    yield (spatial(place.site, inner, "output", place.width) if whole else (place, reason))
            for k, block in enumerate(children_of(modules, f"{inner}.transformer_blocks")):
                d_model = getattr(block, "dim", None)
                yield from _cross_block(modules, f"{site}.blocks.{k}", f"{inner}.transformer_blocks.{k}", d_model)
            yield spatial(f"{site}.hook_out", inner, "output", width)
        if f"{path}.attentions" not in modules:
            for leaf in ("hook_in", "hook_out"):
                reason = f"the {name} block of this UNet has no attention"
                yield Place(f"{name}.attn.0.{leaf}", path, "output", SPATIAL), reason
        yield spatial(f"{name}.hook_out", path, "output", width)
    yield spatial("hook_out", unet, "output", model.config.out_channels)


def _transformer_places(modules: Modules, path: str, order: ImageTokens | None) -> Found:
    model: Any = modules[path]
    config = model.config
    packed = order == "last"  # Flux takes and gives its latents as tokens
    ends: Callable[..., tuple[Place, None]] = _packed if packed else spatial
    yield ends("hook_in", path, "input", config.in_channels)
    time = f"{path}.adaln_single.emb" if order is None else f"{path}.time_text_embed"
    yield Place("hook_time_embed", time, "output", VECTOR, layout="vector", width=model.inner_dim), None
    n_blocks = len(children_of(modules, f"{path}.transformer_blocks"))
    for n in range(n_blocks):
        block = f"{path}.transformer_blocks.{n}"
        if order is None:
            yield from _pixart_block(modules, f"blocks.{n}", block, model.inner_dim)
        else:
            yield from _joint_block(modules, f"blocks.{n}", block, model.inner_dim, order)
    for n in range(len(children_of(modules, f"{path}.single_transformer_blocks"))):
        block = f"{path}.single_transformer_blocks.{n}"
        yield from _single_block(modules, f"blocks.{n_blocks + n}", block, model.inner_dim)
    yield ends("hook_out", path, "output", _final_width(modules, path, packed))


def _packed(site: str, path: str, side: Side, width: int | None) -> tuple[Place, None]:
    return _tokens(site, path, side, width, "all")


def _final_width(modules: Modules, path: str, packed: bool) -> int:
    """Channels of a transformer's prediction: PixArt's holds a variance too, Flux's is packed."""
    model: Any = modules[path]
    patch = int(model.config.patch_size)
    width = width_of(modules[f"{path}.proj_out"], "out")
    return width if packed else width // patch**2


def _pixart_block(modules: Modules, name: str, path: str, width: int) -> Found:
    yield from _cross_block(modules, name, path, width)
    yield _tokens(f"{name}.hook_attn_out", f"{path}.attn1", "output", width, "all")


def _joint_block(modules: Modules, name: str, path: str, width: int, order: ImageTokens) -> Found:
    """A block with a stream of the image and one of the text, which attend together (SD3, Flux)."""
    attention = f"{path}.attn"
    heads = _n_heads(modules, attention)
    text = f"{name}.context"
    yield _tokens(f"{name}.hook_resid_pre", path, "input", width, "all")
    yield _tokens(f"{text}.hook_resid_pre", path, "input", width, None, element="encoder_hidden_states")
    for place, reason in _attention_places(modules, f"{name}.attn", attention, "all", "all"):
        yield (replace(place, image_tokens=order) if place.side == "pattern" else place), reason
    for letter in "qkv":
        projection = f"{attention}.add_{letter}_proj"
        into = width_of(modules[projection], "in")
        yield _tokens(f"{text}.hook_{letter}_in", projection, "input", into, None)
        yield _heads(f"{text}.hook_{letter}", projection, "output", heads, width_of(modules[projection], "out"), None)
    yield _tokens(f"{name}.hook_attn_out", attention, "output", width, "all")
    if f"{path}.attn2" in modules:
        yield from _attention_places(modules, f"{name}.dual", f"{path}.attn2", "all", "all")
    yield from _mlp_places(modules, name, path, "ff", "all")
    ends = f"{attention}.to_add_out" not in modules
    reason = "the text stream ends in this block, which does not compute it further" if ends else None
    last = f"{path}.ff_context.net.2"
    d_mlp = width_of(modules[last], "in") if last in modules else width
    for place, _ in (
        _heads(f"{text}.hook_z", f"{attention}.to_add_out", "input", heads, width, None),
        _tokens(f"{text}.hook_attn_out", attention, "output", width, None, element=1),
        _tokens(f"{text}.mlp.hook_post", last, "input", d_mlp, None, axes=NEURONS),
        _tokens(f"{text}.hook_mlp_out", f"{path}.ff_context", "output", width, None),
        _tokens(f"{text}.hook_resid_post", path, "output", width, None),
    ):
        yield place, reason
    yield _tokens(f"{name}.hook_resid_post", path, "output", width, "all", element=1)


def _single_block(modules: Modules, name: str, path: str, width: int) -> Found:
    """A Flux block that keeps text and image tokens, in this order, in one sequence."""
    attention = f"{path}.attn"
    heads = _n_heads(modules, attention)
    yield _tokens(f"{name}.hook_resid_pre", path, "input", width, "all")
    yield _tokens(f"{name}.context.hook_resid_pre", path, "input", width, None, element="encoder_hidden_states")
    yield from _attention_places(modules, f"{name}.attn", attention, "last", "last")
    yield _heads(f"{name}.attn.hook_z", attention, "output", heads, width, "last")
    d_mlp = width_of(modules[f"{path}.proj_mlp"], "out")
    yield _tokens(f"{name}.mlp.hook_post", f"{path}.act_mlp", "output", d_mlp, "last", axes=NEURONS)
    together = "this block projects attention and feed-forward together"
    for leaf in ("attn.hook_out", "hook_attn_out", "hook_mlp_out"):
        reason = f"{together}: take {name}.attn.hook_z, {name}.mlp.hook_post or {path}.proj_out:output"
        yield _tokens(f"{name}.{leaf}", attention, "output", width, "last")[0], reason
    for leaf in ("q", "k", "v"):
        reason = f"this block has one sequence, of text and then image tokens: take {name}.attn.hook_{leaf}"
        yield _tokens(f"{name}.context.hook_{leaf}", attention, "output", width, None)[0], reason
    yield _tokens(f"{name}.context.hook_resid_post", path, "output", width, None)
    yield _tokens(f"{name}.hook_resid_post", path, "output", width, "all", element=1)


# ---------------------------------------------------------------- text encoders


def _text_places(modules: Modules, name: str) -> Found:
    """The blocks of a CLIP or T5 text encoder; other encoders have raw sites only."""
    clip = next((p for p in (name, f"{name}.text_model") if f"{p}.encoder.layers" in modules), None)
    if clip is not None:
        stack = Stack(
            clip,
            blocks="encoder.layers",
            embed="embeddings",
            final_norm="final_layer_norm",
            o="self_attn.out_proj",
            mlp_out="mlp.fc2",
        )
    elif f"{name}.encoder.block" in modules:
        attention, mlp = "layer.0.SelfAttention", "layer.1.DenseReluDense"
        stack = Stack(
            f"{name}.encoder",
            blocks="block",
            embed="embed_tokens",
            final_norm="final_layer_norm",
            attn=attention,
            q=f"{attention}.q",
            k=f"{attention}.k",
            v=f"{attention}.v",
            o=f"{attention}.o",
            mlp=mlp,
            mlp_out=f"{mlp}.wo",
        )
    else:
        return
    biased = "T5 adds a bias to its attention logits, which explicit attention patterns do not cover"
    for place, reason in stack_places(modules, f"{name}.", stack, True):
        if clip is None and place.side == "pattern":
            yield place, biased
        elif clip is None and place.site.endswith("hook_resid_mid"):
            # T5 adds attention to the residual stream in a module of its own.
            yield replace(place, path=f"{place.path}.layer.0"), None
        else:
            yield place, reason
