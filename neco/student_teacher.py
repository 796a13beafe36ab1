"""Student and teacher: projection head, moving average, reference queue, schedules, optimiser groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from errors import UserError

# ---------------------------------------------------------------------------------------------------- schedules


def cosine(step: int, total: int, start: float, end: float) -> float:
    """A value that falls or rises along half a cosine from `start` (step 0) to `end` (step `total` and ever after)."""
    place = min(max(step, 0), total) / total if total > 0 else 1.0
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * place))


# ---------------------------------------------------------------------------------------------------- networks


class ProjectionHead(nn.Sequential):
    """Maps patch tokens [..., D] to [..., `out`] of length 1: linear layers with GELU between, then L2.

    Weights are truncated normals of standard deviation 0.02, biases 0. Student and teacher start from different ones.
    """

    def __init__(self, dim: int, hidden: int = 2048, out: int = 256, layers: int = 3) -> None:
        widths = [dim, *[hidden] * (layers - 1), out]
        modules: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            modules += [nn.Linear(before, after), nn.GELU()]
        super().__init__(*modules[:-1])  # so the linear layers are 0, 2, 4, as in published files
        for module in self:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., D] -> [..., out]; the length is taken in float32."""
        return nn.functional.normalize(super().forward(tokens).float(), dim=-1)


class PatchEncoder(nn.Module):
    """A ViT of timm and a projection head: images to maps of projected patch tokens.

    Patch tokens are those behind the final norm; class and register tokens are left out.
    """

    def __init__(self, vit: nn.Module, head: ProjectionHead) -> None:
        super().__init__()
        self.vit, self.projection_head = vit, head

    def tokens(self, images: Tensor) -> Tensor:
        """Final-norm patch tokens [B, N, D] of images [B, 3, H, W]."""
        (patches,) = self.vit.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return patches

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> maps [B, out, h, w]."""
        height, width = self.vit.patch_embed.patch_size
        projected = self.projection_head(self.tokens(images))
        return projected.mT.unflatten(2, (images.shape[-2] // height, images.shape[-1] // width))

    def class_attention(self, images: Tensor) -> Tensor:
        """The class token's attention to the patches in the last block, mean over heads, [B, h, w]; without gradient.

        Raises:
            UserError: a model without a class token, or whose attention has no joint query-key-value projection.
        """
        block = self.vit.blocks[-1]
        attention = getattr(block, "attn", None)
        if getattr(self.vit, "cls_token", None) is None or getattr(attention, "qkv", None) is None:
            raise UserError("neco.loss_mask fg and bg need a model with a class token and plain attention, take all")
        caught: list[Tensor] = []
        hook = attention.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            with torch.no_grad():
                self.tokens(images)
                x = caught[0]
                batch, n, _ = x.shape
                q, k, _ = attention.qkv(x).reshape(batch, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
                q, k = attention.q_norm(q), attention.k_norm(k)
                weights = (q[:, :, :1] @ k.mT).float().mul(attention.scale).softmax(-1)  # [B, heads, 1, n]
        finally:
            hook.remove()
        size = self.vit.patch_embed.patch_size[0]
        patches = weights[:, :, 0, self.vit.num_prefix_tokens :].mean(1)
        return patches.unflatten(1, (images.shape[-2] // size, images.shape[-1] // size))


def encode(encoder: nn.Module, crops: Sequence[Tensor]) -> list[Tensor]:
    """Maps [B, out, h, w] of every crop [B, 3, H, W]; neighbours of one size go through in one pass."""
    maps: list[Tensor] = []
    start = 0
    while start < len(crops):
        end = start + 1
        while end < len(crops) and crops[end].shape == crops[start].shape:
            end += 1
        maps += encoder(torch.cat(list(crops[start:end]))).chunk(end - start)
        start = end
    return maps


@torch.no_grad()
def move_average(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Moving average, teacher <- momentum teacher + (1 - momentum) student, every parameter, in place (arXiv 2104.14294)."""
    mine, others = list(teacher.parameters()), [p.detach() for p in student.parameters()]
    torch._foreach_lerp_(mine, others, 1 - momentum)


# ---------------------------------------------------------------------------------------------------- references


class ReferenceQueue(nn.Module):
    """The newest patch tokens per global crop, as buffers, so that a saved state holds them.

    filled: [crops] int64, how many places hold tokens; only those are drawn from. (The reference program counts each step
    once per crop, so that for a while half of what it draws are zero vectors.)
    """

    def __init__(self, crops: int, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(crops, length, dim))
        self.register_buffer("filled", torch.zeros(crops, dtype=torch.int64))

    @torch.no_grad()
    def push(self, crop: int, tokens: Tensor) -> None:
        """Put tokens [n, D] in front; the oldest fall out."""
        length = self.tokens.shape[1]
        fresh = tokens[:length].to(self.tokens)
        self.tokens[crop] = torch.cat([fresh, self.tokens[crop, : length - len(fresh)]])
        self.filled[crop] = (self.filled[crop] + len(fresh)).clamp_max(length)

    @torch.no_grad()
    def draw(self, crop: int, count: int, generator: torch.Generator) -> Tensor:
        """[count, D] tokens: places of the whole queue in random order, wrapped around onto those that are filled.

        Raises:
            UserError: fewer places than asked for, or none of them filled.
        """
        length, filled = self.tokens.shape[1], int(self.filled[crop])
        if count > length or not filled:
            raise UserError(
                f"neco.queue_length={length} (filled: {filled}) is too short for {count} reference patches per step; take at "
                f"least {count}, or a smaller batch"
            )
        places = torch.randperm(length, generator=generator)[:count] % filled
        return self.tokens[crop, places.to(self.tokens.device)]


# ---------------------------------------------------------------------------------------------------- what is trained


def trained_blocks(choice: int | Sequence[int] | None, depth: int) -> list[int] | None:
    """Numbers of the blocks to train: null all and everything else too; an int from there on; a list those.

    Raises:
        UserError: no such block.
    """
    if choice is None:
        return None
    chosen = [choice] if isinstance(choice, int) else list(choice)
    if isinstance(choice, bool) or not all(isinstance(b, int) and -depth <= b < depth for b in chosen) or not chosen:
        got = choice if isinstance(choice, int) else chosen
        raise UserError(f"neco.trainable_blocks: got {got}, expected null, a block {-depth}…{depth - 1} or a list of them")
    if isinstance(choice, int):
        return list(range(depth))[choice:]
    return sorted({block % depth for block in chosen})


def freeze_but(vit: nn.Module, blocks: Sequence[int] | None) -> None:
    """Let only these blocks learn; embeddings and the final norm stay frozen with the others. None: everything learns."""
    if blocks is None:
        vit.requires_grad_(True)
        return
    vit.requires_grad_(False)
    for block in blocks:
        vit.blocks[block].requires_grad_(True)


def parameter_groups(encoder: PatchEncoder, lr_backbone: float, lr_head: float) -> list[dict]:
    """AdamW's groups: backbone and head, each with and without weight decay.

    As published: biases and everything one-dimensional (norms, layer scales) are not decayed, position embeddings, class
    and register tokens are. `decays` says which follow the schedule, `peak` is the learning rate it starts from.
    """

    def split(named: Iterable[tuple[str, nn.Parameter]]) -> tuple[list, list]:
        named = [(name, p) for name, p in named if p.requires_grad]
        plain = [p for name, p in named if name.endswith(".bias") or p.ndim == 1]
        return [p for _, p in named if not any(p is q for q in plain)], plain

    groups = []
    for module, lr in ((encoder.vit, lr_backbone), (encoder.projection_head, lr_head)):
        decayed, plain = split(module.named_parameters())
        groups += [{"params": decayed, "decays": True}, {"params": plain, "decays": False}]
        for group in groups[-2:]:
            group |= {"lr": lr, "peak": lr, "weight_decay": 0.0}
    return [group for group in groups if group["params"]]


def set_schedule(optimizer: torch.optim.Optimizer, step: int, total: int, final_lr: float, decay: tuple[float, float]) -> None:
    """Learning rates and weight decays of a step: cosine to `final_lr`, cosine from decay[0] to decay[1]."""
    for group in optimizer.param_groups:
        group["lr"] = cosine(step, total, group["peak"], final_lr)
        group["weight_decay"] = cosine(step, total, *decay) if group["decays"] else 0.0


