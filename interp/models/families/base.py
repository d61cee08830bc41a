"""What a family of models is to this library: where its parts are, as module paths. Nothing else differs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """One transformer stack. Paths are relative to ``root``, block parts relative to a block.

    Args:
        root: the module that runs the whole stack.
        blocks: its list of blocks.
        embed: token or patch embedding.
        final_norm: norm after the last block.
        attn: attention module of a block (the module that calls the attention interface).
        q, k, v: projections; a fused projection is named in all three.
        o: output projection; its input is the heads' outputs.
        mlp: feed-forward module of a block.
        mlp_out: last projection of the feed-forward; its input is the neurons' activations.
    """

    root: str
    blocks: str = "layers"
    embed: str = "embed_tokens"
    final_norm: str | None = "norm"
    attn: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    mlp: str = "mlp"
    mlp_out: str = "mlp.down_proj"


@dataclass(frozen=True)
class Family:
    """A family: which configurations belong to it and where its towers are.

    Args:
        name: what ``vlm.family`` says.
        model_types: ``config.model_type`` values.
        text: the language model's stack.
        lm_head: unembedding, from the model's root.
        vision: the vision tower's stack, if there is one.
        projector: the module between vision tower and language model.
    """

    name: str
    model_types: tuple[str, ...]
    text: Stack
    lm_head: str = "lm_head"
    vision: Stack | None = None
    projector: str | None = None
