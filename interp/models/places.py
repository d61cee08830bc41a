"""Where every site of a model is: the family's table, checked against the modules that the model has."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from interp.errors import InputError, SiteUnavailableError, UnknownNameError, nearest
from interp.models.families import Family, Stack
from interp.sites import HEADS, LOGITS, NEURONS, PATTERN, RESIDUAL, SPATIAL, Part, Place, parse_raw, unknown


@dataclass(frozen=True)
class PlaceMap:
    """All sites of one model.

    Args:
        places: place by site name, in forward order.
        reasons: why a site of the grammar is not offered by this model, by name.
        without_effect: why an edit in a module would change nothing, although it can be read, by module path or
            site.
        modules: module paths, for raw sites.
        parts: of a diffusion pipeline, what each of its models is, by its name. Empty for a model with prompts.
    """

    places: dict[str, Place]
    reasons: dict[str, str]
    without_effect: dict[str, str]
    modules: frozenset[str]
    parts: Mapping[str, Part] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Every site that can be used, in forward order."""
        return list(self.places)

    def no_effect(self, place: Place) -> str | None:
        """Why an edit at a place would change nothing; None where it can change something."""
        if place.site in self.without_effect:
            return self.without_effect[place.site]
        inside = (reason for path, reason in self.without_effect.items() if f"{place.path}.".startswith(f"{path}."))
        return next(inside, None)

    def place(self, site: str) -> Place:
        """Find one site.

        Args:
            site: a stable name or a raw ``path:input`` / ``path:output``, with ``.element`` where the module takes
                or returns several tensors: the keyword of an input, the index in an output.

        Raises:
            SiteUnavailableError: this model cannot offer the site; the message says why.
            UnknownNameError: no such site; the message lists the nearest names.
        """
        if site in self.places:
            return self.places[site]
        if site in self.reasons:
            raise SiteUnavailableError(f"site {site!r} is not available in this model: {self.reasons[site]}")
        raw = parse_raw(site)
        if raw is None:
            raise unknown(site, self.places)
        path, side, name = raw
        if path not in self.modules:
            raise UnknownNameError(f"no module {path!r} in this model. {nearest(path, self.modules)}".rstrip())
        if side == "output" and name is not None and not name.isdigit():
            raise UnknownNameError(f"site {site!r}: tensors of an output have numbers, as in {path}:output.1")
        element: int | str | None = int(name) or None if side == "output" and name is not None else name
        if self.parts:
            part = self.parts.get(path.split(".")[0], "denoiser")
            return Place(site, path, side, SPATIAL, positional=False, element=element, layout="auto", part=part)
        positional = not path.startswith(_VISION_PATHS)
        return Place(site, path, side, ("batch", "pos", "feature"), positional=positional, element=element)


# Modules whose second axis counts patches or images, so that positions of the prompt mean nothing in them.
_VISION_PATHS = (
    "model.vision",
    "model.multi_modal_projector",
    "model.connector",
    "vision",
    "multi_modal_projector",
)


def place_map(model: nn.Module, family: Family) -> PlaceMap:
    """Build the sites of a model from its family's table.

    Args:
        model: a transformers model.
        family: the table of its family.

    Returns:
        The places, and for each site of the grammar that this model lacks, the reason.
    """
    modules = dict(model.named_modules())
    stacks = [family.text] if family.vision is None else [family.text, family.vision]
    missing = [path for s in stacks if (path := f"{s.root}.{s.blocks}") not in modules]
    if missing:
        raise InputError(
            f"{type(model).__name__} has no module {missing[0]!r}, which a model of the family {family.name!r} has: "
            "load it with its head (AutoModelForCausalLM, AutoModelForImageTextToText)"
        )
    reasons: dict[str, str] = {}
    found: dict[str, Place] = {}
    towers: list[tuple[str, Stack]] = [("", family.text)]
    if family.vision is not None:
        towers.insert(0, ("vision.", family.vision))
    for prefix, stack in towers:
        norm_used = not prefix or getattr(model.config, "vision_feature_layer", None) is None
        for place, reason in stack_places(modules, prefix, stack, norm_used):
            if reason is None and place.path not in modules:
                reason = f"this {type(model).__name__} has no module {place.path!r}"
            if reason is None:
                found[place.site] = place
            else:
                reasons[place.site] = reason
        if prefix and family.projector in modules:
            path = str(family.projector)
            found["projector.hook_in"] = Place(
                "projector.hook_in", path, "input", ("image", "pos", "d_vision"), positional=False
            )
            found["projector.hook_out"] = Place(
                "projector.hook_out", path, "output", ("image", "pos", "d_model"), positional=False
            )
    if family.lm_head in modules:
        found["unembed.hook_out"] = Place("unembed.hook_out", family.lm_head, "output", LOGITS)
    return PlaceMap(found, reasons, _without_effect(model, family.vision, modules), frozenset(modules))


def _without_effect(model: nn.Module, vision: Stack | None, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Modules of the vision tower after the last block whose features the language model reads."""
    feature_layers = getattr(model.config, "vision_feature_layer", None)
    if feature_layers is None or vision is None:
        return {}
    chosen = [feature_layers] if isinstance(feature_layers, int) else list(feature_layers)
    n_layers = len(stack_blocks(modules, vision))
    # Feature layer k is the output of block k - 1; negative ones count from n_layers + 1 hidden states.
    last = max(layer if layer >= 0 else n_layers + 1 + layer for layer in chosen) - 1
    reason = (
        f"the language model reads the vision tower's features after block {last} "
        f"(vision_feature_layer={feature_layers})"
    )
    blocks = [f"{vision.root}.{vision.blocks}.{layer}" for layer in range(last + 1, n_layers)]
    # SigLIP's pooling head and CLIP's last norm make a summary of the image that the language model is not given.
    after = [f"{vision.root}.{name}" for name in (vision.final_norm, "head")]
    return dict.fromkeys([*blocks, *after], reason)


def stack_blocks(modules: dict[str, nn.Module], stack: Stack) -> list[nn.Module]:
    """The blocks of one stack, in order."""
    return list(modules[f"{stack.root}.{stack.blocks}"].children())


def head_sizes(modules: dict[str, nn.Module], stack: Stack, layer: int) -> tuple[int, int, int]:
    """Heads, key-value heads and head size of one block, read off its projections.

    ``d_head`` is not always ``d_model / n_heads`` and keys may have fewer heads, so neither is computed from
    the configuration's width.

    Returns:
        ``(n_heads, n_key_value_heads, d_head)``.
    """
    block = f"{stack.root}.{stack.blocks}.{layer}"
    attention = modules[f"{block}.{stack.attn}"]
    z_width = width_of(modules[f"{block}.{stack.o}"], "in")
    count: Any = getattr(attention, "num_heads", None) or getattr(attention, "n_heads", None)
    d_head = int(getattr(attention, "head_dim", 0)) or z_width // int(count)
    n_heads = z_width // d_head
    if stack.q == stack.k:
        return n_heads, n_heads, d_head
    return n_heads, width_of(modules[f"{block}.{stack.k}"], "out") // d_head, d_head


def width_of(module: nn.Module, side: str) -> int:
    """Input or output width of a projection; Conv1D has a weight [in, out], Linear says its widths."""
    if hasattr(module, "in_features"):
        return int(module.in_features if side == "in" else module.out_features)  # type: ignore[arg-type]
    weight = module.weight
    return int(weight.shape[0 if side == "in" else 1])  # type: ignore[index]


def stack_places(
    modules: dict[str, nn.Module], prefix: str, stack: Stack, norm_used: bool
) -> Iterator[tuple[Place, str | None]]:
    """The sites of one stack of transformer blocks.

    Args:
        modules: all modules of the model, by path.
        prefix: of the sites' names, such as ``vision.``; empty for the language model.
        stack: where its parts are.
        norm_used: whether what comes after reads the stack's final norm.

    Yields:
        Each place, and why it is not available where that is so.
    """
    positional = prefix == ""
    blocks = stack_blocks(modules, stack)
    d_model = width_of(modules[f"{stack.root}.{stack.blocks}.0.{stack.o}"], "out")

    def place(leaf: str, path: str, side: str, axes: tuple[str, ...], **extra: object) -> Place:
        return Place(prefix + leaf, path, side, axes, positional=positional, **extra)  # type: ignore[arg-type]

    yield place("hook_embed", f"{stack.root}.{stack.embed}", "output", RESIDUAL, width=d_model), None
    for layer in range(len(blocks)):
        block = f"{stack.root}.{stack.blocks}.{layer}"
        name = f"blocks.{layer}"
        n_heads, n_kv, d_head = head_sizes(modules, stack, layer)
        yield place(f"{name}.hook_resid_pre", block, "input", RESIDUAL, width=d_model), None
        fused = stack.q == stack.k
        for index, (letter, path, heads) in enumerate(
            (("q", stack.q, n_heads), ("k", stack.k, n_kv), ("v", stack.v, n_kv))
        ):
            size = heads * d_head
            columns = (index * size, (index + 1) * size) if fused else None
            yield (
                place(
                    f"{name}.attn.hook_{letter}",
                    f"{block}.{path}",
                    "output",
                    HEADS,
                    n_heads=heads,
                    columns=columns,
                    width=d_head,
                ),
                None,
            )
        yield (
            place(f"{name}.attn.hook_pattern", f"{block}.{stack.attn}", "pattern", PATTERN, n_heads=n_heads),
            None,
        )
        yield (
            place(f"{name}.attn.hook_z", f"{block}.{stack.o}", "input", HEADS, n_heads=n_heads, width=d_head),
            None,
        )
        yield place(f"{name}.hook_attn_out", f"{block}.{stack.attn}", "output", RESIDUAL, width=d_model), None
        yield (
            place(f"{name}.hook_resid_mid", block, "output", RESIDUAL, width=d_model),
            "the block keeps the sum of residual and attention output in a local variable, where no hook reaches it; "
            f"read {prefix}{name}.hook_resid_pre plus {prefix}{name}.hook_attn_out, and edit hook_attn_out",
        )
        neurons = f"{block}.{stack.mlp_out}"
        d_mlp = width_of(modules[neurons], "in") if neurons in modules else None
        yield place(f"{name}.mlp.hook_post", neurons, "input", NEURONS, width=d_mlp), None
        yield place(f"{name}.hook_mlp_out", f"{block}.{stack.mlp}", "output", RESIDUAL, width=d_model), None
        yield place(f"{name}.hook_resid_post", block, "output", RESIDUAL, width=d_model), None
    if stack.final_norm is not None:
        yield (
            place("ln_final.hook_out", f"{stack.root}.{stack.final_norm}", "output", RESIDUAL, width=d_model),
            None if norm_used else "the language model reads the tower's features before the norm after its last block",
        )
