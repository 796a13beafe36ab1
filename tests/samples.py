"""Small made-up samples for tests: tokens that carry their object in a known way."""

import torch

from activation import PatchSample
from store.shards import StackedTokens


def planted_sample(
    n_images: int = 24, n_tokens: int = 16, dim: int = 12, layers: tuple = ("embed", 0), noise: float = 0.3, seed: int = 0
) -> PatchSample:
    """Tokens = code of the object + noise, a new random code per object; the first layer carries noise only.

    Objects 1–4 per image, two classes, a quarter of the patches is background.
    """
    rng = torch.Generator().manual_seed(seed)
    identity = torch.randint(0, 5, (n_images, n_tokens), generator=rng)
    category = torch.where(identity > 0, 1 + identity % 2, 0)
    codes = torch.randn(n_images, 5, dim, generator=rng)
    signal = codes.gather(1, identity[..., None].expand(-1, -1, dim))
    tokens = torch.stack(
        [(signal if i else 0) + noise * torch.randn(n_images, n_tokens, dim, generator=rng) for i in range(len(layers))]
    )
    side = int(n_tokens**0.5)
    index = torch.arange(n_tokens)
    position = torch.stack([torch.zeros_like(index), index // side, index % side], -1).expand(n_images, -1, -1)
    return PatchSample(
        tokens=StackedTokens.from_tensor(tokens, list(layers)),
        position=position.contiguous(),
        labels={
            "identity": identity,
            "class": category,
            "place": position[..., 1:].float().contiguous(),
            **{f"{name}_purity": torch.ones(n_images, n_tokens) for name in ("identity", "class")},
            **{f"{name}_valid": torch.ones(n_images, n_tokens, dtype=torch.bool) for name in ("identity", "class")},
        },
        info={},
        keys=[f"image{i}" for i in range(n_images)],
        grids=torch.tensor([[side, side]]).expand(n_images, 2),
        meta={"classes": ["background", "cat", "dog"], "selected_by": "identity"},
    )
