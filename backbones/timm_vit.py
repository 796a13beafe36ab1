"""Every ViT of timm as a `Backbone`: block outputs through timm, other places through hooks. Names of timm 1.0.31."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.architecture import find_architecture
from backbones.attention import XformersAttention, check_attention
from backbones.build import hub_model, random_model
from backbones.contract import Backbone, BackboneFacts, Layer, Options, by_pixels
from backbones.positions import check_convention, resize_as_hub
from backbones.speed import compile_blocks, tune_for_cpu
from backbones.weights import file_digest, find_file, load_weights
from errors import UserError
from machine import resolve_dtype

# Where tokens are read beside the block outputs: name -> (module, "input" or "output").
TAPS: dict[str, Callable[[nn.Module], tuple[nn.Module, str]]] = {"embed": lambda model: (model.blocks[0], "input")}


class TimmViT(Backbone):
    """Any model of timm whose blocks keep one width and one grid."""

    def __init__(self, facts: BackboneFacts, model: nn.Module, options: Options) -> None:
        super().__init__(facts)
        self.model = model
        self.norm = getattr(model, facts.final_norm) if options.norm else nn.Identity()
        self.around = XformersAttention if options.attention == "xformers" else contextlib.nullcontext
        self.splits_prefix = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters

    @classmethod
    def describe(cls, options: Options, remembered: Path | None = None) -> BackboneFacts:
        """Facts of the architecture, from a skeleton or remembered; of a local weight file its digest."""
        seen = find_architecture(options.name, options.kwargs, options.image_size, remembered)
        if options.norm and not seen.norms:
            raise UserError(f"model.norm=true and {options.name} has no norm after its last block, set model.norm=false")
        (patch_size, patch_width), image_size = seen.patch_size, options.image_size or seen.image_size
        if patch_size != patch_width:
            raise UserError(f"{options.name} has patches of {patch_size} x {patch_width}, only square ones are supported")
        if any(side < patch_size or side % patch_size for side in image_size):
            raise UserError(
                f"model.image_size={by_pixels(image_size)} does not fit {options.name}, expected multiples of its patch size "
                f"{patch_size}, such as {max(1, round(image_size[0] / patch_size)) * patch_size}"
            )
        check_convention(options.position_embedding, options.name, seen.dynamic_size)
        hub = options.position_embedding == "hub"
        return BackboneFacts(
            name=options.name,
            source=options.source,
            patch_size=patch_size,
            depth=seen.depth,
            dim=seen.dim,
            heads=seen.heads,
            num_prefix_tokens=seen.num_prefix_tokens,
            has_class_token=seen.has_class_token,
            image_size=image_size,
            dynamic_size=seen.dynamic_size and not hub,  # resized once, to one size
            mean=options.mean or seen.mean,
            std=options.std or seen.std,
            interpolation=options.interpolation or seen.interpolation,
            final_norm=seen.norms[0] if seen.norms else "none",
            weights=_weights_id(options, seen.hub) + ":positions=hub" * hub,
            kwargs=options.kwargs,
        )

    @classmethod
    def load(cls, options: Options, device: torch.device, say: Callable[[str], None]) -> TimmViT:
        """Built on the CPU, so that random weights do not depend on the device, then moved."""
        facts = cls.describe(options)
        dtype = resolve_dtype(options.dtype, device)
        check_attention(options, device)
        hub = options.position_embedding == "hub"
        architecture, dynamic = (options.name, options.kwargs, options.image_size), facts.dynamic_size or hub
        if options.pretrained and not options.weights:
            model = hub_model(*architecture, facts.weights.removesuffix(":positions=hub"), say)
        else:
            model = random_model(*architecture, options.seed)
        if options.pretrained and options.weights:
            file = find_file(options.weights, options.rebuild)
            load_weights(model, file, part=options.weights_part, dynamic=dynamic, say=say)
        if hub:
            resize_as_hub(model, facts.image_size)
        model = _cast(model.eval().requires_grad_(False), dtype).to(device)
        if device.type == "cpu":
            tune_for_cpu(model, fuse=not options.compile)
        if options.compile:
            compile_blocks(model)
        return cls(facts, model, options).eval()

    def read(self, images: Tensor, layers: Sequence[Layer], grid: tuple[int, int]) -> list[Tensor]:
        """Block outputs through timm, everything else through hooks; stops after the last block that is read."""
        images = images.to(next(self.model.parameters()).dtype)
        caught: dict[Layer, Tensor] = {}
        blocks = sorted({layer for layer in layers if isinstance(layer, int)})
        with contextlib.ExitStack() as stack:
            for name in dict.fromkeys(layer for layer in layers if isinstance(layer, str)):
                stack.callback(_hook(*TAPS[name](self.model), functools.partial(caught.__setitem__, name)).remove)
            stack.enter_context(self.around())
            options = {"indices": blocks or [0], "stop_early": True, "intermediates_only": True}
            if self.splits_prefix:
                options |= {"output_fmt": "NLC", "return_prefix_tokens": self.facts.num_prefix_tokens > 0}
            outputs = self.model.forward_intermediates(images, **options)
        for block, x in zip(blocks, outputs, strict=False):  # without blocks, the output of block 0 is left over
            if isinstance(x, tuple):
                x = torch.cat([x[1], x[0]], dim=1)
            caught[block] = x
        return [self.norm(_flat(caught[layer], layer, self.splits_prefix)) for layer in layers]


def _weights_id(options: Options, hub: str | None) -> str:
    """Where the weights come from, in words that differ where the weights do; checks the digest of a local file."""
    if not options.pretrained:
        return f"random:{options.seed}"
    if options.weights:
        file = find_file(options.weights, options.rebuild)
        digest, expected = file_digest(file), (options.digest or "").lower().removeprefix("sha256:")
        if expected and digest != expected:
            remedy = f"rebuild it with: {options.rebuild}" if options.rebuild else "fetch it again"
            raise UserError(
                f"{file} is not the file that model.digest describes (sha256 {digest[:12]}…, expected {expected[:12]}…), "
                f"{remedy}, or take it as it is with model.digest=null"
            )
        return f"sha256:{digest}" + (f":{options.weights_part}" if options.weights_part else "")
    if options.digest or options.weights_part:
        raise UserError("model.digest and model.weights_part describe a local file, set model.weights too")
    if hub:
        return hub
    raise UserError(
        f"timm has no pretrained weights for {options.name}, set model.weights=<file>, or take random ones with "
        "model.pretrained=false"
    )


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights in the compute dtype; rotary positions stay in float32, where bfloat16 would move the patches."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return model.to(dtype)
    model.rope = None
    model.to(dtype)
    model.rope = rope
    return model


def _hook(module: nn.Module, side: str, catch: Callable[[Tensor], Any]) -> Any:
    if side == "input":
        return module.register_forward_pre_hook(lambda _, inputs: catch(inputs[0]) and None)
    return module.register_forward_hook(lambda _, inputs, output: catch(output) and None)


def _flat(x: Tensor, layer: Layer, tokens_last: bool) -> Tensor:
    """Maps as tokens [B, N, D]: SAM keeps [B, h, w, D] between blocks and returns [B, D, h, w]."""
    if x.ndim == 4:
        return x.flatten(1, 2) if isinstance(layer, str) else x.flatten(2).mT
    return x
