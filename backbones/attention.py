"""Attention of a backbone: what its class token looks at, frozen query and key projections, and the xformers kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backbones.contract import Backbone, BackboneFacts, Layer, Options
from errors import UserError


def next_block_query_key(backbone: Backbone, layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query and key projections of the block that reads a layer, all heads side by side.

    For the frozen self-attention probe (arXiv 2510.24709): q = Wq x + bq and k = Wk x + bk, taken as they are, without
    the block's input LayerNorm; q/k norms and rotary positions inside the attention are left out too.

    Returns:
        Wq [D, D], bq [D], Wk [D, D], bk [D] in float32.

    Raises:
        UserError: the last layer, which no block reads; a model without such projections.
    """
    depth, name = backbone.facts.depth, backbone.facts.name
    number = 0 if layer == "embed" else int(layer) + 1
    if number >= depth:
        raise UserError(f"no block of {name} reads layer {layer}, the attention probe takes embed and 0…{depth - 2}")
    attention = getattr(backbone.model.blocks[number], "attn", None)
    if getattr(attention, "qkv", None) is not None:
        query, key, _ = attention.qkv.weight.float().chunk(3)
        if attention.qkv.bias is not None:
            query_bias, key_bias, _ = attention.qkv.bias.float().chunk(3)
        else:  # Eva and BEiT keep the biases beside the projection, that of the keys is 0
            query_bias, key_bias = getattr(attention, "q_bias", None), None
    elif getattr(attention, "q_proj", None) is not None:
        query, query_bias = attention.q_proj.weight.float(), attention.q_proj.bias
        key, key_bias = attention.k_proj.weight.float(), attention.k_proj.bias
    else:
        raise UserError(f"{name} has no query and key projections the attention probe knows, take another probe")
    if query.shape != key.shape:
        raise UserError(f"{name} shares keys between heads, the attention probe needs one key per query head")
    biases = [
        weight.new_zeros(len(weight)) if bias is None else bias.float()
        for weight, bias in ((query, query_bias), (key, key_bias))
    ]
    return query.clone(), biases[0].clone(), key.clone(), biases[1].clone()


def check_class_attention(facts: BackboneFacts) -> None:
    """Refuse a model whose class token has no attention to ask for, from its facts alone.

    Raises:
        UserError: no class token, or no blocks.
    """
    if not facts.has_class_token or not facts.depth:
        raise UserError(
            f"{facts.name} has no class token, so there is no attention of one; choose a model with a class token, or leave "
            "out what reads its attention"
        )


@torch.no_grad()
def class_attention(backbone: Backbone, images: Tensor) -> Tensor:
    """The softmax attention of the class token to the patches in the last block, float32 [B, heads, h, w].

    The very probabilities the block multiplies the values with: softmax(q k / sqrt(d)), norms of queries and keys and
    rotary positions included. The mass on the prefix tokens is left out, so a map sums to less than 1.

    Args:
        images: [B, 3, H, W] float32, normalised.

    Raises:
        UserError: a model without a class token, or one whose attention keeps its probabilities to itself.
    """
    facts = backbone.facts
    check_class_attention(facts)
    module = getattr(backbone.model.blocks[-1], "attn", None)
    if not isinstance(getattr(module, "attn_drop", None), nn.Module) or not hasattr(module, "fused_attn"):
        raise UserError(f"the attention of {facts.name} cannot be read, its blocks do not keep it; choose another model")
    caught: list[Tensor] = []
    hook = module.attn_drop.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    fused, module.fused_attn = module.fused_attn, False  # the fused kernel never holds the probabilities
    try:
        backbone.model.forward_features(images.to(next(backbone.model.parameters()).dtype))
    finally:
        module.fused_attn = fused
        hook.remove()
    (probabilities,) = caught  # [B, heads, P + N, P + N]
    h, w = (side // facts.patch_size for side in images.shape[-2:])
    return probabilities[:, :, 0, facts.num_prefix_tokens :].float().unflatten(-1, (h, w))


class XformersAttention(TorchFunctionMode):
    """Send the fused attention of every family to xformers instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("attn_mask") is not None:
            return func(*args, **kwargs)
        query, key, value = (x.transpose(1, 2) for x in args[:3])  # [B, heads, N, d] -> [B, N, heads, d]
        return xformers_attention()(query, key, value).transpose(1, 2)


def attention_weights(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k' * scale) [..., heads, N, N] float32 of queries and keys [..., heads, N, d]; scale None: 1 / sqrt(d)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return (query.float() @ key.float().mT * scale).softmax(-1)


class RecordAttention(TorchFunctionMode):
    """Keep the attention weights of the blocks that run inside, in their order; what they compute stays the same.

    Args:
        keep: what is kept of the weights [B, heads, N, N] of each block; by default their mean over heads.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor] = lambda weights: weights.mean(1)) -> None:
        super().__init__()
        self.keep, self.weights = keep, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            if key.shape[1] != query.shape[1]:  # keys shared between heads
                key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            self.weights.append(self.keep(attention_weights(query, key, kwargs.get("scale"))))
        return func(*args, **kwargs)


def xformers_attention() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """softmax(q k / sqrt(d)) v of xformers, tensors [B, N, heads, d]; imported on first use."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def check_attention(model_cfg: Mapping[str, Any] | Options, device: torch.device) -> None:
    """Refuse an attention the device does not have; cached activations need no backbone, and are asked this too."""
    options = model_cfg if isinstance(model_cfg, Options) else Options.read(model_cfg)
    if options.attention == "sdpa":
        return
    if device.type != "cuda":
        raise UserError(f"model.attention=xformers needs a CUDA device, got {device.type}; set model.attention=sdpa")
    if options.compile:
        raise UserError("model.attention=xformers cannot be compiled, set model.compile=false or model.attention=sdpa")
    try:
        xformers_attention()
    except ImportError as error:
        raise UserError(f"model.attention=xformers and xformers cannot be used here: {error}") from error
