"""Published NeCo checkpoints, of their layouts but tiny: every path leads to the right weights, a mismatch names its keys."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from program import configured
from torch import Tensor, nn

from backbones.contract import Backbone
from backbones.load import load_backbone
from errors import UserError

SIZES = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2}
KWARGS = "{img_size: 28, patch_size: 14, embed_dim: 16, depth: 2, num_heads: 2}"


def vit(name: str, seed: int, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=0, **{**SIZES, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def hub(model: nn.Module) -> dict[str, Tensor]:
    """timm's weights in the layout of DINOv2's hub: the class token's position apart, other names, a mask token."""
    state = dict(model.state_dict())
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        place = torch.randn(1, 1, SIZES["embed_dim"])
        state["pos_embed"] = torch.cat([place, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - place
    state["mask_token"] = torch.zeros(1, SIZES["embed_dim"])
    return state | {"projection_head.0.weight": torch.randn(4, SIZES["embed_dim"])}


def lightning(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Any]:
    both = {f"model.{k}": v for k, v in student.items()} | {f"teacher.{k}": v for k, v in teacher.items()}
    return {"state_dict": both, "epoch": 24, "pytorch-lightning_version": "1.6.5"}


def loaded(file: Path, name: str, *more: str) -> Backbone:
    settings = [f"model.name={name}", f"model.kwargs={KWARGS}", f"model.weights={file}", "model.digest=null", *more]
    with configured(*settings) as cfg:
        return load_backbone(cfg.model, "cpu", lambda text: None)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_224"])
@pytest.mark.parametrize("layout", ["model", "teacher", "lightning", "safetensors"])
def test_every_layout_of_every_family(tmp_path: Path, name: str, layout: str) -> None:
    student, teacher = vit(name, 1), vit(name, 2)
    states = {"student": hub(student), "teacher": hub(teacher)}
    if name == "vit_small_patch16_224":  # the DINO family has timm's own layout and no mask token
        states = {role: {k: v for k, v in state.items() if k != "mask_token"} for role, state in states.items()}
    file = tmp_path / f"neco_on_it_{layout}.{'safetensors' if layout == 'safetensors' else 'ckpt'}"
    more = []
    if layout == "lightning":
        torch.save(lightning(states["student"], states["teacher"]), file)
        more = ["model.weights_part=teacher"]
    elif layout == "safetensors":
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in states["teacher"].items()}, file)
    else:
        torch.save(states["student" if layout == "model" else "teacher"], file)
    images = torch.randn(1, 3, 28, 28)
    expected = student if layout == "model" else teacher
    (tokens,) = loaded(file, name, *more)(images, [1])
    (patches,) = expected.forward_intermediates(images, indices=[1], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(tokens.patch, patches, rtol=1e-4, atol=1e-4)
    if layout == "lightning":
        (tokens,) = loaded(file, name)(images, [1])  # what its authors evaluate
        (patches,) = student.forward_intermediates(images, indices=[1], output_fmt="NLC", intermediates_only=True)
        torch.testing.assert_close(tokens.patch, patches, rtol=1e-4, atol=1e-4)


def test_registers_may_be_dropped_on_import(tmp_path: Path) -> None:
    torch.save(hub(vit("vit_small_patch14_reg4_dinov2", 1)), tmp_path / "xr.ckpt")
    backbone = loaded(tmp_path / "xr.ckpt", "vit_small_patch14_dinov2")
    assert backbone.facts.num_prefix_tokens == 1


def test_a_mismatch_names_the_first_keys(tmp_path: Path) -> None:
    torch.save(hub(vit("vit_small_patch14_dinov2", 1, depth=1)), tmp_path / "short.ckpt")
    with pytest.raises(UserError, match=r"lacks 14 of .*blocks\.1\."):
        loaded(tmp_path / "short.ckpt", "vit_small_patch14_dinov2")


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "callback": Path}, tmp_path / "code.ckpt")
    with pytest.raises(UserError, match="not loaded for safety"):
        loaded(tmp_path / "code.ckpt", "vit_small_patch14_dinov2")
