"""Frozen backbones: every model becomes tokens of a grid, checked; nothing downstream asks which family it is from.

A layer is the 0-based block whose output is read (timm's convention), before any final norm unless `model.norm`;
`embed` is the input of block 0, after position embedding and, where there is one, the norm before the blocks (CLIP).
Model names and families: timm 1.0.31. A new source is a subclass of `Backbone` and one line in `SOURCES`; another place
to read tokens from (attention or MLP output, q/k/v) is one line in `TAPS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backbone_weights import (
    compile_blocks,
    file_digest,
    find_file,
    hub_model,
    load_weights,
    random_model,
    skeleton,
    tune_for_cpu,
)
from errors import UserError

Layer = int | str
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Where tokens are read beside the block outputs: name -> (module, "input" or "output").
TAPS: dict[str, Callable[[nn.Module], tuple[nn.Module, str]]] = {"embed": lambda model: (model.blocks[0], "input")}


class Tokens(NamedTuple):
    """One layer of one forward pass, in the compute dtype.

    prefix: [B, P, D] class token first, then registers; P may be 0.
    patch: [B, N, D] in raster order, N = h * w.
    grid: (h, w).
    """

    prefix: Tensor
    patch: Tensor
    grid: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class BackboneFacts:
    """What is known of a backbone without its weights.

    name, source: as in the configuration; kwargs: the extra architecture arguments as JSON.
    patch_size: pixels; depth: blocks; dim: width D; heads: of one attention block (0: none).
    num_prefix_tokens: tokens before the patches; has_class_token: whether the first of them is one.
    image_size: (height, width) in pixels; dynamic_size: whether other multiples of the patch size are taken too.
    mean, std: per channel, for pixels in 0…1; interpolation: for resizing.
    final_norm: the module after the last block: "norm", "fc_norm" (sits after pooling) or "none".
    weights: where the numbers come from: "sha256:…" of a file, "hub:…", "url:…", "random:<seed>" or "none".
    """

    name: str
    source: str
    patch_size: int
    depth: int
    dim: int
    heads: int
    num_prefix_tokens: int
    has_class_token: bool
    image_size: tuple[int, int]
    dynamic_size: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    final_norm: str
    weights: str
    kwargs: str = "{}"

    def as_dict(self) -> dict[str, Any]:
        """The facts as JSON-able values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of `cfg.model` this module reads; see `cfgs/model/_defaults.yaml` for their meaning."""

    source: str
    name: str
    pretrained: bool = True
    weights: str | None = None
    weights_part: str | None = None
    digest: str | None = None
    rebuild: str | None = None
    image_size: tuple[int, int] | None = None
    norm: bool = False
    dtype: str = "float32"
    attention: str = "sdpa"
    compile: bool = False
    seed: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    kwargs: str = "{}"  # JSON: hashable

    @classmethod
    def read(cls, cfg: Mapping[str, Any]) -> Options:
        """Take the keys from a configuration block; a number as image size means a square."""
        given = {field.name: cfg.get(field.name) for field in dataclasses.fields(cls) if field.name in cfg}
        for key in ("image_size", "mean", "std"):
            value, n = given.get(key), 2 if key == "image_size" else 3
            if value is not None:
                value = tuple(value) if isinstance(value, Sequence) else (value,) * n
                if len(value) != n or not all(isinstance(v, int if n == 2 else int | float) and v >= 0 for v in value):
                    raise UserError(f"model.{key}={given[key]} is not understood, expected a number or a list of {n}")
                given[key] = value
        kwargs = (given.get("kwargs") or {}).items()
        given["kwargs"] = json.dumps(
            {k: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for k, v in kwargs}, sort_keys=True
        )
        if not given.get("name"):
            raise UserError("model.name is missing, set it to the name of a ViT in timm (timm.list_models lists them)")
        if given["source"] not in SOURCES:
            raise UserError(f"model.source={given['source']} is unknown, expected one of {', '.join(SOURCES)}")
        if given.get("attention", "sdpa") not in ("sdpa", "xformers"):
            raise UserError(f"model.attention={given['attention']} is unknown, expected sdpa or xformers")
        if given.get("dtype", "float32") not in (*DTYPES, "auto"):
            raise UserError(f"model.dtype={given['dtype']} is unknown, expected one of {', '.join(DTYPES)}, auto")
        return cls(**given)


class Backbone(nn.Module):
    """A frozen ViT in eval mode. `facts` says what it is; `forward(images, layers)` gives the tokens of each layer."""

    def __init__(self, facts: BackboneFacts) -> None:
        super().__init__()
        self.facts = facts

    @classmethod
    def describe(cls, options: Options) -> BackboneFacts:
        """The facts, from the configuration alone."""
        raise NotImplementedError

    @classmethod
    def load(cls, options: Options, device: torch.device, say: Callable[[str], None]) -> Backbone:
        """The backbone with its weights on `device`."""
        raise NotImplementedError

    def read(self, images: Tensor, layers: Sequence[Layer], grid: tuple[int, int]) -> list[Tensor]:
        """Tokens [B, P + N, D] of each layer, prefix first."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor, layers: Sequence[Layer]) -> list[Tokens]:
        """Run the images once and read layers on the way.

        Args:
            images: [B, 3, H, W] float32, normalised with `facts.mean`, `facts.std`.
            layers: block numbers 0…depth-1 and "embed", as `resolve_layers` gives them; the answer keeps their order.

        Raises:
            UserError: an image size the family refuses; a model whose tokens are not prefix + grid.
        """
        facts, (height, width) = self.facts, tuple(images.shape[-2:])
        if height % facts.patch_size or width % facts.patch_size:
            raise UserError(
                f"{facts.name} takes multiples of its patch size {facts.patch_size}, got images of {height} x {width}"
            )
        if not facts.dynamic_size and (height, width) != facts.image_size:
            raise UserError(
                f"{facts.name} takes images of one size, {_by(facts.image_size)}, got {height} x {width}; "
                f"set model.image_size=[{height},{width}] or windows of its size"
            )
        grid = (height // facts.patch_size, width // facts.patch_size)
        found = []
        for layer, x in zip(layers, self.read(images, layers, grid), strict=True):
            prefix = facts.num_prefix_tokens
            if x.shape[1] != prefix + grid[0] * grid[1]:
                raise UserError(
                    f"{facts.name} gives {x.shape[1]} tokens at layer {layer} for a grid of {_by(grid)} patches and "
                    f"{prefix} prefix tokens, its tokens cannot be placed in the image"
                )
            found.append(Tokens(x[:, :prefix], x[:, prefix:], grid))
        return found


class TimmViT(Backbone):
    """Any model of timm whose blocks keep one width and one grid."""

    def __init__(self, facts: BackboneFacts, model: nn.Module, options: Options) -> None:
        super().__init__(facts)
        self.model = model
        self.norm = getattr(model, facts.final_norm) if options.norm else nn.Identity()
        self.around = _XformersAttention if options.attention == "xformers" else contextlib.nullcontext
        self.splits_prefix = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters

    @classmethod
    def describe(cls, options: Options) -> BackboneFacts:
        """Facts from a skeleton without memory; only the digest of a local weight file reads anything."""
        model, dynamic = skeleton(options.name, options.kwargs, options.image_size)
        norms = [name for name in ("norm", "fc_norm") if _is_norm(getattr(model, name, None))]
        if options.norm and not norms:
            raise UserError(f"model.norm=true and {options.name} has no norm after its last block, set model.norm=false")
        native = json.loads(options.kwargs).get("img_size") or model.pretrained_cfg["input_size"][1:]
        native = (native, native) if isinstance(native, int) else tuple(native)
        (patch_size, patch_width), image_size = model.patch_embed.patch_size, options.image_size or native
        if patch_size != patch_width:
            raise UserError(f"{options.name} has patches of {patch_size} x {patch_width}, only square ones are supported")
        if any(side < patch_size or side % patch_size for side in image_size):
            raise UserError(
                f"model.image_size={_by(image_size)} does not fit {options.name}, expected multiples of its patch size "
                f"{patch_size}, such as {max(1, round(image_size[0] / patch_size)) * patch_size}"
            )
        prefix = getattr(model, "num_prefix_tokens", 0)
        return BackboneFacts(
            name=options.name,
            source=options.source,
            patch_size=patch_size,
            depth=len(model.blocks),
            dim=model.embed_dim,
            heads=getattr(getattr(model.blocks[0], "attn", None), "num_heads", 0),
            num_prefix_tokens=prefix,
            has_class_token=prefix > 0 and getattr(model, "cls_token", None) is not None,
            image_size=image_size,
            dynamic_size=dynamic,
            mean=tuple(options.mean or model.pretrained_cfg["mean"]),
            std=tuple(options.std or model.pretrained_cfg["std"]),
            interpolation=options.interpolation or model.pretrained_cfg["interpolation"],
            final_norm=norms[0] if norms else "none",
            weights=_weights_id(options, model.pretrained_cfg),
            kwargs=options.kwargs,
        )

    @classmethod
    def load(cls, options: Options, device: torch.device, say: Callable[[str], None]) -> TimmViT:
        """Built on the CPU, so that random weights do not depend on the device, then moved."""
        facts = cls.describe(options)
        dtype = resolve_dtype(options.dtype, device)
        check_attention(options, device)
        architecture = (options.name, options.kwargs, options.image_size)
        if options.pretrained and not options.weights:
            model = hub_model(*architecture, facts.weights, say)
        else:
            model = random_model(*architecture, options.seed)
        if options.pretrained and options.weights:
            file = find_file(options.weights, options.rebuild)
            load_weights(model, file, part=options.weights_part, dynamic=facts.dynamic_size, say=say)
        model = _cast(model.eval().requires_grad_(False), dtype).to(device)
        if device.type == "cpu":
            tune_for_cpu(model, fuse=not options.compile)
        if options.compile:
            compile_blocks(model)
        return cls(facts, model, options).eval()

    def read(self, images: Tensor, layers: Sequence[Layer], grid: tuple[int, int]) -> list[Tensor]:
        """Block outputs through timm, everything else through hooks; stops after the last block asked for."""
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


class Pixels(Backbone):
    """Control: the normalised pixels of each patch [3 p p], cut as the named model would see them; only "embed"."""

    @classmethod
    def describe(cls, options: Options) -> BackboneFacts:
        """Sizes and preprocessing of the named model, nothing else of it: all models that share them share a cache."""
        if options.norm:
            raise UserError("model.norm=true and pixels have no norm, set model.norm=false")
        seen = TimmViT.describe(dataclasses.replace(options, pretrained=False))
        changes = {"depth": 0, "dim": 3 * seen.patch_size**2, "heads": 0, "num_prefix_tokens": 0, "kwargs": "{}"}
        changes |= {"has_class_token": False, "final_norm": "none", "weights": "none", "dynamic_size": True}
        return dataclasses.replace(seen, name="pixels", source="pixels", **changes)

    @classmethod
    def load(cls, options: Options, device: torch.device, say: Callable[[str], None]) -> Pixels:
        """Nothing to load."""
        return cls(cls.describe(options)).eval()

    def read(self, images: Tensor, layers: Sequence[Layer], grid: tuple[int, int]) -> list[Tensor]:
        """Pixels by channel, row, column of each patch."""
        size = self.facts.patch_size
        return [F.unfold(images, size, stride=size).mT for _ in layers]


SOURCES: dict[str, type[Backbone]] = {"timm": TimmViT, "pixels": Pixels}


def backbone_facts(model_cfg: Mapping[str, Any]) -> BackboneFacts:
    """What `load_backbone` would give, from a skeleton that holds no weights.

    Raises:
        UserError: unknown model, a size it refuses, no pretrained weights, a weight file that is missing or altered.
    """
    options = Options.read(model_cfg)
    return SOURCES[options.source].describe(options)


def load_backbone(model_cfg: Mapping[str, Any], device: torch.device | str, say: Callable[[str], None] = print) -> Backbone:
    """The frozen backbone on a device; `say` hears what was left out of or resampled in a weight file.

    Raises:
        UserError: as `backbone_facts`; weights that do not fit or cannot be downloaded; dtype or attention the device
            does not have.
    """
    options = Options.read(model_cfg)
    return SOURCES[options.source].load(options, torch.device(device), say)


def resolve_layers(spec: Any, depth: int) -> list[Layer]:
    """Layer names as canonical layers, "embed" first, then rising block numbers, each once.

    Args:
        spec: "all" (embed and every block), one layer or a list; negative numbers count from the last block.
        depth: blocks of the model.

    Raises:
        UserError: no such layer.
    """
    asked = list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    found: set[int] = set()  # -1 stands for embed
    for layer in asked:
        if layer == "all":
            found |= set(range(-1, depth))
        elif layer == "embed":
            found.add(-1)
        elif isinstance(layer, int) and not isinstance(layer, bool) and -depth <= layer < depth:
            found.add(layer % depth)
        else:
            numbers = f", {-depth}…{depth - 1}" if depth else ""
            raise UserError(f"model.layers: there is no layer {layer!r}, expected all, embed{numbers} or a list of these")
    if not found:
        raise UserError("model.layers is empty, name at least one layer or all")
    return ["embed" if layer < 0 else layer for layer in sorted(found)]


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype `model.dtype` means on a device.

    auto: bfloat16 where the hardware multiplies it at a higher rate than float32, as the device itself reports (CUDA
    with bfloat16 units; x86 with AMX or AVX512-BF16), else float32. Not measured, so that a machine always decides alike.
    """
    if name != "auto":
        return DTYPES[name]
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


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


def _weights_id(options: Options, pretrained_cfg: Mapping[str, Any]) -> str:
    """Where the weights come from, in words that tell two of them apart; checks the digest of a local file."""
    if not options.pretrained:
        return f"random:{options.seed}"
    if options.weights:
        file = find_file(options.weights, options.rebuild)
        found, expected = file_digest(file), (options.digest or "").lower().removeprefix("sha256:")
        if expected and found != expected:
            mend = f"rebuild it with: {options.rebuild}" if options.rebuild else "fetch it again"
            raise UserError(
                f"{file} is not the file that model.digest describes (sha256 {found[:12]}…, expected {expected[:12]}…), "
                f"{mend}, or take it as it is with model.digest=null"
            )
        return f"sha256:{found}" + (f":{options.weights_part}" if options.weights_part else "")
    if options.digest or options.weights_part:
        raise UserError("model.digest and model.weights_part describe a local file, set model.weights too")
    if pretrained_cfg.get("hf_hub_id"):
        return f"hub:{pretrained_cfg['hf_hub_id']}/{pretrained_cfg.get('hf_hub_filename') or 'model.safetensors'}"
    if pretrained_cfg.get("url"):
        return f"url:{pretrained_cfg['url']}"
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


class _XformersAttention(TorchFunctionMode):
    """Send the fused attention of every family to xformers instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("attn_mask") is not None:
            return func(*args, **kwargs)
        query, key, value = (x.transpose(1, 2) for x in args[:3])  # [B, heads, N, d] -> [B, N, heads, d]
        return xformers_attention()(query, key, value).transpose(1, 2)


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


def _hook(module: nn.Module, side: str, catch: Callable[[Tensor], Any]) -> Any:
    if side == "input":
        return module.register_forward_pre_hook(lambda _, inputs: catch(inputs[0]) and None)
    return module.register_forward_hook(lambda _, inputs, output: catch(output) and None)


def _flat(x: Tensor, layer: Layer, tokens_last: bool) -> Tensor:
    """Maps as tokens [B, N, D]: SAM keeps [B, h, w, D] between blocks and returns [B, D, h, w]."""
    if x.ndim == 4:
        return x.flatten(1, 2) if isinstance(layer, str) else x.flatten(2).mT
    return x


def _is_norm(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _by(size: tuple[int, ...] | None) -> str:
    return " x ".join(map(str, size)) if size else "null"
