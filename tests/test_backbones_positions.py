"""Position embeddings on another grid: timm's convention and torch.hub's, each against an interpolation written out here."""

import math

import numpy as np
import pytest
import torch

from backbones.load import backbone_facts, load_backbone
from errors import UserError

TINY = {"patch_size": 16, "img_size": 96, "embed_dim": 8, "depth": 1, "num_heads": 1}
MODEL = {"source": "timm", "name": "vit_tiny_patch16_224", "kwargs": TINY, "pretrained": False, "layers": "all"}


def cubic(x: float, a: float) -> float:
    """The kernel of bicubic interpolation."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resampling(new: int, old: int, convention: str) -> np.ndarray:
    """Weights [new, old] of one axis.

    hub: samples lie old / (new + 0.1) apart, a = -0.75, what lies beyond the edge is the edge.
    timm: samples lie old / new apart, a = -0.5, the kernel grows where the grid shrinks, what lies beyond the edge is left out.
    """
    weights = np.zeros((new, old))
    step = old / (new + 0.1) if convention == "hub" else old / new
    for i in range(new):
        centre = (i + 0.5) * step - 0.5
        if convention == "hub":
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                weights[i, min(max(j, 0), old - 1)] += cubic(j - centre, -0.75)
        else:
            weights[i] = [cubic((j - centre) / max(step, 1.0), -0.5) for j in range(old)]
            weights[i] /= weights[i].sum()
    return weights


def added(convention: str, size: tuple[int, int], **kwargs: bool) -> torch.Tensor:
    """What the backbone adds to the patches of an image: its tokens at `embed` less those without positions, [h, w, D]."""
    cfg = {**MODEL, "kwargs": TINY | kwargs, "image_size": list(size), "position_embedding": convention}
    backbone, image = load_backbone(cfg, "cpu"), torch.rand(1, 3, *size)
    with_positions = backbone(image, ["embed"])[0].patch[0]
    backbone.model.pos_embed.data.zero_()
    h, w = size[0] // 16, size[1] // 16
    return (with_positions - backbone(image, ["embed"])[0].patch[0]).view(h, w, -1)


@pytest.mark.parametrize("convention", ["hub", "timm"])
@pytest.mark.parametrize("size", [(96, 96), (160, 128), (64, 112)])
def test_positions_are_those_of_the_convention(convention, size):
    native = added("timm", (96, 96)).double().numpy()  # [6, 6, D]
    h, w = size[0] // 16, size[1] // 16
    if size == (96, 96):
        expected = native
    else:
        rows, columns = resampling(h, 6, convention), resampling(w, 6, convention)
        expected = np.einsum("ij,kl,jld->ikd", rows, columns, native)
    found = added(convention, size).double().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_conventions_differ_off_the_native_grid_and_agree_with_registers():
    hub, timm = added("hub", (160, 160)), added("timm", (160, 160))
    assert 0.005 < float((hub - timm).norm() / timm.norm()) < 0.5
    registers = {"reg_tokens": 2, "no_embed_class": True}
    torch.testing.assert_close(added("hub", (160, 160), **registers), added("timm", (160, 160), **registers))


def test_what_tells_the_tokens_apart_names_the_convention():
    of = lambda name: backbone_facts({**MODEL, "position_embedding": name})
    assert of("timm").weights == "random:0" and of("hub").weights == "random:0:positions=hub"
    assert of("timm").dynamic_size and not of("hub").dynamic_size
    with pytest.raises(UserError, match="position_embedding=legacy is unknown, expected one of timm, hub"):
        of("legacy")
    with pytest.raises(UserError, match="takes images of one size"):
        backbone_facts({**MODEL, "name": "beit_base_patch16_224", "kwargs": {}, "position_embedding": "hub"})
