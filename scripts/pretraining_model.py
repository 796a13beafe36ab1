"""What is pretrained and how: the recipe, the network, and its two losses (`pretrain_demo_vit.py` tells what they are)."""

from __future__ import annotations

import dataclasses

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from errors import UserError

MEAN, STD = 0.5, 0.25  # of the pixels, every channel; the model config says the same


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; each field is an option of the command line."""

    seed: int = 0
    steps: int = 4000  # of the published file: under an hour of one busy core
    batch_size: int = 64  # scenes per step, over all processes
    image_size: int = 96
    patch_size: int = 8
    dim: int = 128
    depth: int = 8
    heads: int = 4
    visible: float = 0.5  # share of the patches that is encoded
    queries: int = 48  # hidden patches predicted per scene
    decoder_dim: int = 96
    decoder_depth: int = 2
    decoder_heads: int = 4
    fate: float = 2.0  # weight of the common-fate loss; 0: masked prediction alone
    fate_rank: int = 32
    episodes: int = 4  # of motion per scene
    lr: float = 1.5e-3  # AdamW: embeddings, norms, biases, first and last linear maps
    muon_lr: float = 0.02  # Muon (Jordan et al. 2024): matrices inside the blocks, scaled to the size of AdamW's updates
    weight_decay: float = 0.05
    warmup: int = 200  # steps
    decay: float = 0.5  # share of the steps, at the end, over which the rates fall linearly to zero
    clip: float = 1.0  # largest norm of the gradient
    pool: int = 4096  # scenes at hand at any time, over all processes
    fresh: int = 4  # new scenes per step, over all processes; each replaces the oldest
    dtype: str = "auto"  # of the products: float32 | bfloat16 | auto (bfloat16 where the machine multiplies it natively)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def architecture(self) -> dict[str, int]:
        """Keyword arguments of timm's VisionTransformer."""
        return {
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "embed_dim": self.dim,
            "depth": self.depth,
            "num_heads": self.heads,
            "num_classes": 0,
        }

    def rate(self, step: int) -> float:
        """Factor of the learning rates at a step: warm-up, constant, linear decay.

        Until the decay begins it does not depend on `steps`, so a run may be resumed with another budget.
        """
        return min((step + 1) / self.warmup, 1.0, (self.steps - step) / max(self.steps - self.decay_start, 1))

    @property
    def decay_start(self) -> int:
        """First step of the decay."""
        return int(self.steps * (1 - self.decay))

    def check(self, world: int) -> None:
        """Raise UserError for values that do not fit together."""
        for name in ("steps", "batch_size", "warmup", "pool", "queries", "depth", "episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected at least 1")
        if self.image_size % self.patch_size or self.dim % (4 * self.heads) or self.decoder_dim % (4 * self.decoder_heads):
            raise UserError(
                f"--image-size {self.image_size} must be a multiple of --patch-size {self.patch_size}, and --dim "
                f"{self.dim} and --decoder-dim {self.decoder_dim} multiples of 4 x their heads"
            )
        kept = int(self.grid**2 * self.visible)
        if not 1 <= kept <= self.grid**2 - self.queries:
            raise UserError(
                f"--visible {self.visible} leaves {self.grid**2 - kept} hidden of {self.grid**2} patches, expected at least "
                f"--queries ({self.queries}) and one visible"
            )
        for name in ("batch_size", "pool", "fresh"):
            if getattr(self, name) % world:
                value, option = getattr(self, name), name.replace("_", "-")
                raise UserError(f"--{option}: got {value}, expected a multiple of {world} processes")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"--dtype: got {self.dtype}, expected auto, float32 or bfloat16")


def position_code(dim: int, grid: int) -> Tensor:
    """Sine and cosine code of the patch positions (Vaswani et al. 2017, in 2-D), raster order. [grid * grid, dim] float32."""
    rate = 1 / 10_000 ** (torch.arange(dim // 4) / (dim / 4))
    y, x = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    return torch.cat([wave(along.reshape(-1, 1) * rate) for along in (x, y) for wave in (torch.sin, torch.cos)], 1)


def build_backbone(recipe: Recipe) -> VisionTransformer:
    """The network that is published; its learned positions start from 0.3 x the sine code, which trains faster than noise."""
    model = VisionTransformer(**recipe.architecture)
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0.3 * position_code(recipe.dim, recipe.grid)
    return model


class CrossBlock(nn.Module):
    """Queries attend to encoded patches, then an MLP; no attention among queries, so each is predicted by itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_context, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """X [B, Q, D], context [B, T, D] → [B, Q, D]."""
        b, n, d = x.shape
        q = self.query(self.norm_query(x)).view(b, n, self.heads, -1).transpose(1, 2)  # [B, h, Q, D/h]
        k, v = self.key_value(self.norm_context(context)).view(b, -1, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weight = (q * (d // self.heads) ** -0.5 @ k.mT).softmax(-1)  # [B, h, Q, T]
        x = x + self.out((weight @ v).transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm_mlp(x))


class Pretraining(nn.Module):
    """The backbone with the two read-outs that are thrown away afterwards."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.backbone = build_backbone(recipe)
        dim, pixels = recipe.decoder_dim, 3 * recipe.patch_size**2
        self.context = nn.Linear(recipe.dim, dim)
        self.mask = nn.Parameter(0.02 * torch.randn(dim))
        self.register_buffer("position", position_code(dim, recipe.grid), persistent=False)
        self.decoder = nn.ModuleList([CrossBlock(dim, recipe.decoder_heads) for _ in range(recipe.decoder_depth)])
        self.pixels = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, pixels))
        self.fate = nn.Linear(recipe.dim, 2 * recipe.fate_rank) if recipe.fate else None
        self.fate_bias = nn.Parameter(torch.zeros(())) if recipe.fate else None

    def forward(self, images: Tensor, moved: Tensor, order: Tensor) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            images: [B, 3, H, W] uint8.
            moved: [B, N, E] bool, raster: in each of E episodes.
            order: [B, N] int64, the patches of each image in random order.
        """
        recipe = self.recipe
        patches = patchify((images.float() / 255 - MEAN) / STD, recipe.patch_size)  # [B, N, 3pp]
        kept = int(order.shape[1] * recipe.visible)
        visible, hidden = order[:, :kept], order[:, kept : kept + recipe.queries]
        encoded = self.encode(take(patches, visible), visible)  # [B, T, D]
        losses = {"pixels": self.pixel_loss(encoded, hidden, take(patches, hidden))}
        if self.fate is not None:
            losses["fate"] = self.fate_loss(encoded, take(moved, visible))
        return losses

    def encode(self, patches: Tensor, where: Tensor) -> Tensor:
        """Pixels of some patches [B, T, 3pp] and their positions [B, T] → tokens after the last norm [B, T, D]."""
        vit = self.backbone
        x = F.linear(patches, vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias)
        x = x + vit.pos_embed[0, 1:][where]
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        return vit.norm(vit.blocks(torch.cat([cls.to(x.dtype), x], 1)))[:, 1:]

    def pixel_loss(self, encoded: Tensor, hidden: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of normalised pixels of the hidden patches [B, Q]."""
        context = self.context(encoded)
        x = self.mask + self.position[hidden]  # [B, Q, D]
        for block in self.decoder:
            x = block(x, context)
        return (self.pixels(x).float() - target).square().mean()

    def fate_loss(self, encoded: Tensor, moved: Tensor) -> Tensor:
        """Cross-entropy of "these two patches share their fate", mean over pairs of encoded patches and episodes.

        Two weights are our choice. An episode in which neither patch moved tells little and is the common case: 1/4. Two
        patches that both moved at some time are two places on things, the pairs in which one thing differs from another and
        no more than a tenth of all: x 4.

        Args:
            encoded: [B, T, D].
            moved: [B, T, E] bool.
        """
        left, right = self.fate(encoded).chunk(2, -1)  # [B, T, r]
        logit = (left @ right.mT).float() / (2 * self.recipe.fate_rank**0.5)
        logit = logit + logit.mT + self.fate_bias  # [B, T, T]
        both = moved.float() @ moved.float().mT  # episodes in which both moved
        neither = (~moved).float() @ (~moved).float().mT
        weight = moved.shape[-1] - 0.75 * neither
        shared = both + 0.25 * neither
        thing = moved.any(-1)
        focus = torch.where(thing[:, :, None] & thing[:, None], 4.0, 1.0)
        return (focus * (weight * F.softplus(logit) - shared * logit)).sum() / (focus * weight).sum()


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] → [B, N, C * patch * patch], raster; within a patch in the order of a convolution's weight."""
    b, c, height, width = images.shape
    x = images.view(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def take(x: Tensor, where: Tensor) -> Tensor:
    """Rows `where` [B, T] of x [B, N, D] → [B, T, D]."""
    return x.gather(1, where[..., None].expand(-1, -1, x.shape[-1]))
