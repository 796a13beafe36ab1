"""Backbones: geometry of every config file's family, layers, weight files of every layout, refusals."""

import argparse
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from backbones.attention import XformersAttention, next_block_query_key
from backbones.build import skeleton
from backbones.contract import Backbone, Tokens
from backbones.load import backbone_facts, load_backbone, resolve_layers
from backbones.weights import ANCHOR, backbone_state
from errors import UserError
from machine import resolve_dtype

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "cfgs" / "model").glob("*.yaml") if not path.stem.startswith("_"))
SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 2}
CLASS, REGISTERS, PATCHES = (1, True), (5, True), (0, False)  # prefix tokens, class token first
PREFIX = {"dinov2": CLASS, "dinov3": REGISTERS, "dino": CLASS, "mae": CLASS, "clip": CLASS, "augreg": CLASS}
PREFIX |= {"deit3": CLASS, "siglip": PATCHES, "siglip2": PATCHES, "demo": CLASS, "pixels": PATCHES}
# Families without a config file: fixed sizes, two special tokens, registers without class token, maps, gap models.
OTHERS = {
    "beit_base_patch16_224": (CLASS, "fc_norm"),
    "deit_base_distilled_patch16_224": ((2, True), "norm"),
    "eva02_base_patch14_224.mim_in22k": (CLASS, "fc_norm"),
    "eva02_base_patch16_clip_224": (CLASS, "norm"),
    "samvit_base_patch16": (PATCHES, "none"),
    "vit_pe_spatial_base_patch16_512": (CLASS, "none"),
    "vit_base_patch16_radio_v3": ((8, True), "none"),
    "vit_base_patch14_reg1_tipsv2": ((2, True), "norm"),
    "vit_betwixt_patch16_reg4_gap_256": ((4, False), "fc_norm"),
    "vit_huge_patch14_gap_224.in1k_ijepa": (PATCHES, "norm"),
    "aimv2_large_patch14_224": (PATCHES, "norm"),
}


@functools.cache
def read_config(file: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        cfg = compose(f"model/{file}").model
    OmegaConf.set_struct(cfg, False)
    return cfg


def composed(file: str, /, **changes: Any) -> DictConfig:
    """A model config file as it is, with changes."""
    return OmegaConf.merge(read_config(file), changes)


def config(name: str = "vit_small_patch16_224", **changes: Any) -> DictConfig:
    """A reduced random model of a family of timm."""
    return composed("timm", **({"name": name, "pretrained": False, "kwargs": SMALL} | changes))


def quiet(cfg: DictConfig) -> Backbone:
    return load_backbone(cfg, "cpu", say=lambda text: None)


def assert_lights_one_cell(read: Callable[[Tensor], Tokens], patch_size: int) -> None:
    """An image whose one bright patch is at row 1, column 3 of a 2 x 5 grid must change token 8 and no other."""
    dark = torch.zeros(1, 3, 2 * patch_size, 5 * patch_size)
    bright = dark.clone()
    bright[:, :, patch_size:, 3 * patch_size : 4 * patch_size] = 1.0
    before, after = read(dark), read(bright)
    assert before.grid == (2, 5)
    assert before.patch.shape[1] == 10
    assert (before.patch != after.patch).any(-1).nonzero().tolist() == [[0, 8]]
    assert torch.equal(before.prefix, after.prefix)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("timm", "module")])
def test_geometry_of_every_config(name: str) -> None:
    cfg = composed(name, pretrained=False)
    full = backbone_facts(cfg)
    backbone = quiet(OmegaConf.merge(cfg, {"kwargs": SMALL}))
    facts = backbone.facts
    kept = ("patch_size", "num_prefix_tokens", "has_class_token", "image_size", "mean", "std", "interpolation")
    assert all(getattr(full, key) == getattr(facts, key) for key in kept), "the reduced model is of the same family"
    expected = REGISTERS if name.endswith("_reg") else PREFIX[name.split("_")[0]]
    assert (facts.num_prefix_tokens, facts.has_class_token) == expected
    assert facts.dynamic_size and facts.final_norm == ("none" if name == "pixels" else "norm")
    layers = resolve_layers("all", facts.depth)
    tokens = backbone(torch.randn(2, 3, 3 * facts.patch_size, 2 * facts.patch_size), layers)
    assert [t.patch.shape for t in tokens] == [(2, 6, facts.dim)] * len(layers)
    assert [t.prefix.shape for t in tokens] == [(2, facts.num_prefix_tokens, facts.dim)] * len(layers)
    assert_lights_one_cell(lambda images: backbone(images, ["embed"])[0], facts.patch_size)


@pytest.mark.parametrize("name", OTHERS)
def test_geometry_of_families_without_config(name: str) -> None:
    prefix, final_norm = OTHERS[name]
    size = backbone_facts(config(name)).patch_size
    backbone = quiet(config(name, image_size=[2 * size, 5 * size]))
    facts = backbone.facts
    assert (facts.num_prefix_tokens, facts.has_class_token, facts.final_norm) == (*prefix, final_norm)
    assert_lights_one_cell(lambda images: backbone(images, ["embed"])[0], size)
    assert [t.patch.shape for t in backbone(torch.randn(2, 3, 2 * size, 5 * size), [1, "embed"])] == [(2, 10, 96)] * 2


def test_the_geometry_test_notices_a_shift() -> None:
    backbone = quiet(config("vit_small_patch14_reg4_dinov2"))

    def shifted(images: Tensor) -> Tokens:
        tokens = backbone(images, ["embed"])[0]
        return tokens._replace(patch=tokens.patch.roll(1, dims=1))

    def prefix_as_patches(images: Tensor) -> Tokens:
        prefix, patch, grid = backbone(images, ["embed"])[0]
        return Tokens(prefix[:, :1], torch.cat([prefix[:, 1:], patch], 1)[:, : patch.shape[1]], grid)

    def transposed(images: Tensor) -> Tokens:
        tokens = backbone(images, ["embed"])[0]
        return tokens._replace(patch=tokens.patch.unflatten(1, (2, 5)).transpose(1, 2).flatten(1, 2))

    for wrong in (shifted, prefix_as_patches, transposed):
        with pytest.raises(AssertionError):
            assert_lights_one_cell(wrong, 14)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"])
def test_layers_are_the_block_outputs_in_the_order_asked(name: str) -> None:
    backbone = quiet(config(name))
    size, seen = backbone.facts.patch_size, {}
    for i, block in enumerate(backbone.model.blocks):
        block.register_forward_hook(lambda _, inputs, output, i=i: seen.update({i: output, ("in", i): inputs[0]}))
    images = torch.randn(2, 3, 3 * size, 2 * size)
    tokens = backbone(images, [1, "embed", 0])
    for found, expected in zip(tokens, (seen[1], seen["in", 0], seen[0]), strict=True):
        assert torch.equal(torch.cat([found.prefix, found.patch], 1), expected)
    assert torch.equal(backbone(images, ["embed"])[0].patch, tokens[1].patch)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"])
def test_the_last_layer_with_norm_is_what_timm_calls_features(name: str) -> None:
    backbone = quiet(config(name, norm=True))
    images = torch.randn(2, 3, 4 * backbone.facts.patch_size, 2 * backbone.facts.patch_size)
    last = backbone(images, [1])[0]
    assert torch.equal(torch.cat([last.prefix, last.patch], 1), backbone.model.forward_features(images))


def test_the_norm_of_pooled_models_is_taken_token_by_token() -> None:
    plain, normed = (quiet(config("beit_base_patch16_224", image_size=32, norm=norm)) for norm in (False, True))
    images = torch.randn(1, 3, 32, 32)
    raw = plain(images, [1])[0].patch
    torch.testing.assert_close(normed(images, [1])[0].patch, normed.model.fc_norm(raw))
    with pytest.raises(UserError, match="no norm after its last block"):
        backbone_facts(config("vit_pe_spatial_base_patch16_512", norm=True))


def test_pixels_are_the_pixels_of_each_patch() -> None:
    backbone = quiet(composed("pixels"))
    image = torch.randn(1, 3, 16, 24)
    tokens = backbone(image, resolve_layers("all", backbone.facts.depth))[0]
    assert (tokens.grid, tokens.patch.shape, tokens.prefix.shape) == ((2, 3), (1, 6, 192), (1, 0, 192))
    assert torch.equal(tokens.patch[0, 4].view(3, 8, 8), image[0, :, 8:, 8:16])
    ours = dataclasses.replace(backbone_facts(composed("demo_vit", source="pixels")), name="")
    assert ours == dataclasses.replace(backbone.facts, name=""), "models of one preprocessing share the control"


def test_facts_hold_no_weights_and_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *a, **k: pytest.fail("loaded weights"))
    facts = backbone_facts(composed("dinov2_giant_reg"))
    assert (facts.depth, facts.dim, facts.heads, facts.patch_size) == (40, 1536, 24, 14)
    assert (facts.image_size, facts.weights) == (
        (518, 518),
        "hub:timm/vit_giant_patch14_reg4_dinov2.lvd142m/model.safetensors",
    )
    assert json.loads(json.dumps(facts.as_dict())) == facts.as_dict()
    bare, _ = skeleton(facts.name, "{}", None)
    assert all(parameter.is_meta for parameter in bare.parameters())
    changed = backbone_facts(config(mean=0.5, std=[0.1, 0.2, 0.3], interpolation="nearest", image_size=64))
    assert (changed.mean, changed.std, changed.interpolation) == ((0.5,) * 3, (0.1, 0.2, 0.3), "nearest")
    assert changed.image_size == (64, 64)


def test_random_weights_depend_on_the_seed_alone() -> None:
    cfg = config("vit_small_patch14_dinov2")
    first = quiet(cfg).state_dict()
    state = torch.random.get_rng_state()
    again = quiet(cfg).state_dict()
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state is left alone"
    other = quiet(OmegaConf.merge(cfg, {"seed": 1})).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["model.blocks.0.attn.qkv.weight"], other["model.blocks.0.attn.qkv.weight"])
    assert backbone_facts(cfg).weights == "random:0"
    scales = [value for key, value in first.items() if key.endswith("gamma")]
    assert scales and all(bool((value == 1).all()) for value in scales), "a random block does something"


def test_a_frozen_backbone_in_eval_mode() -> None:
    backbone = quiet(config(dtype="bfloat16"))
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    tokens = backbone(torch.randn(1, 3, 32, 32, requires_grad=True), ["embed", 1])
    assert all(t.patch.dtype == torch.bfloat16 and not t.patch.requires_grad for t in tokens)


def test_low_precision_keeps_rotary_positions_exact() -> None:
    exact, rough = (quiet(config("vit_small_patch16_dinov3", dtype=dtype)) for dtype in ("float32", "bfloat16"))
    images = torch.randn(1, 3, 64, 96)
    a, b = exact(images, [1])[0].patch, rough(images, [1])[0].patch.float()
    assert (a - b).norm() / a.norm() < 0.02
    assert rough.model.rope.periods.dtype == torch.float32


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_base_patch16_clip_quickgelu_224", "vit_small_patch16_dinov3"])
def test_the_fast_path_of_a_cpu_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = quiet(config(name, dtype="bfloat16"))
    monkeypatch.setattr("backbones.timm_vit.tune_for_cpu", lambda model, fuse: None)
    plain, exact = quiet(config(name, dtype="bfloat16")), quiet(config(name))
    images = torch.randn(2, 3, 48, 32)
    a, b, c = (backbone(images, [1])[0].patch.float() for backbone in (tuned, plain, exact))
    assert (a - c).norm() < 1.2 * (b - c).norm(), "no further from float32 than without it"
    assert all(torch.equal(x, y) for x, y in zip(tuned.parameters(), plain.parameters(), strict=True))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="compiling for a CPU needs a C++ compiler")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_compiled_blocks_compute_the_same(dtype: str, tolerance: float) -> None:
    compiled, plain = (quiet(config("vit_small_patch16_224", dtype=dtype, compile=on)) for on in (True, False))
    images = torch.randn(2, 3, 48, 32)
    for a, b in zip(compiled(images, ["embed", 0, 1]), plain(images, ["embed", 0, 1]), strict=True):
        assert (a.patch - b.patch).float().norm() < tolerance * b.patch.float().norm()


def test_a_machine_that_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(forward: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any) -> None:
            raise TorchDynamoException("InvalidCxxCompiler: none found\n\nSet TORCHDYNAMO_VERBOSE=1")

        return refuse

    monkeypatch.setattr(torch, "compile", lacking)
    backbone = quiet(config("vit_small_patch16_224", compile=True))
    with pytest.raises(UserError, match=r"compile the backbone \(InvalidCxxCompiler: none found\): set model.compile="):
        backbone(torch.randn(1, 3, 32, 32), [0])


def test_resolve_layers() -> None:
    assert resolve_layers("all", 3) == ["embed", 0, 1, 2]
    assert resolve_layers([-1, 0, "embed", 2], 3) == ["embed", 0, 2]
    assert resolve_layers(-2, 3) == [1]
    assert resolve_layers(OmegaConf.create([1, "embed"]), 3) == ["embed", 1]
    assert resolve_layers("all", 0) == ["embed"]
    for wrong in (3, [-4], "last", [True], 1.0):
        with pytest.raises(UserError, match=r"expected all, embed, -3…2"):
            resolve_layers(wrong, 3)
    with pytest.raises(UserError, match="empty"):
        resolve_layers([], 3)


# ---------------------------------------------------------------------------------------------------- q, k of the next block


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224", "eva02_base_patch16_clip_224"],
)
def test_query_and_key_are_those_the_next_block_computes(name: str) -> None:
    backbone = quiet(config(name, image_size=32, seed=3))
    with torch.no_grad():
        for parameter in backbone.parameters():  # biases start at 0
            parameter.add_(0.02 * torch.randn_like(parameter))
    for layer, block in (("embed", backbone.model.blocks[0]), (0, backbone.model.blocks[1])):
        query, query_bias, key, key_bias = next_block_query_key(backbone, layer)
        x = torch.randn(1, 5, 96)
        seen = {}
        names = ("qkv",) if getattr(block.attn, "qkv", None) is not None else ("q_proj", "k_proj")
        if len(names) == 2:
            expected = [getattr(block.attn, name)(x) for name in names]
        elif getattr(block.attn, "q_bias", None) is not None:
            bias = torch.cat([block.attn.q_bias, torch.zeros(96), block.attn.v_bias])
            expected = F.linear(x, block.attn.qkv.weight, bias).chunk(3, -1)
        else:
            expected = block.attn.qkv(x).chunk(3, -1)
        torch.testing.assert_close(x @ query.T + query_bias, expected[0])
        torch.testing.assert_close(x @ key.T + key_bias, expected[1])
        assert not seen and query.dtype == torch.float32 and not query.requires_grad
    with pytest.raises(UserError, match="no block of .* reads layer 1"):
        next_block_query_key(backbone, 1)
    with pytest.raises(UserError, match="no block"):
        next_block_query_key(quiet(composed("pixels")), "embed")


# ---------------------------------------------------------------------------------------------------- weight files


def saved(path: Path, content: Any) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def features(cfg: DictConfig) -> Tensor:
    size = backbone_facts(cfg).patch_size
    images = torch.randn(2, 3, 4 * size, 3 * size, generator=torch.Generator().manual_seed(0))
    return quiet(cfg)(images, [1])[0].patch


def source_state(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Weights of a model of another seed, perturbed where they start constant, and what it computes."""
    cfg = config(name, seed=7)
    backbone = quiet(cfg)
    state = {key: value + 0.01 * torch.randn_like(value) for key, value in backbone.model.state_dict().items()}
    backbone.model.load_state_dict(state)
    size = backbone.facts.patch_size
    images = torch.randn(2, 3, 4 * size, 3 * size, generator=torch.Generator().manual_seed(0))
    return state, backbone(images, [1])[0].patch


def hub_layout(state: dict[str, Tensor], registers: bool) -> dict[str, Tensor]:
    """A timm DINOv2 state in the layout of the DINOv2 hub, blocks in chunks."""
    out = {
        key.replace("blocks.", "blocks.0.", 1) if "blocks.0" in key else key.replace("blocks.", "blocks.1.", 1): value
        for key, value in state.items()
    }
    if registers:
        position = torch.randn(1, 1, 96)
        out["register_tokens"] = out.pop("reg_token")
        out["cls_token"] = out["cls_token"] - position
        out["pos_embed"] = torch.cat([position, out["pos_embed"]], 1)
    return out | {"mask_token": torch.zeros(1, 96)}


HEAD = {"projection_head.0.weight": torch.zeros(4, 96), "head.weight": torch.zeros(4, 96)}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


LAYOUTS: dict[str, tuple[str, Callable[[dict, dict], Any], dict]] = {
    "timm.safetensors": ("vit_small_patch16_224", lambda a, b: a, {}),
    "timm.pth": ("vit_small_patch16_224", lambda a, b: a | HEAD, {}),
    "wrapped.pth": ("vit_small_patch16_224", lambda a, b: prefixed("module.backbone.", a | HEAD), {}),
    "lightning.ckpt": (
        "vit_small_patch16_224",
        lambda a, b: {"state_dict": prefixed("model.", a | HEAD) | prefixed("teacher.", b | HEAD), "epoch": 3},
        {},
    ),
    "lightning_teacher.ckpt": (
        "vit_small_patch16_224",
        lambda a, b: {"state_dict": prefixed("model.", b) | prefixed("teacher.", a | HEAD)},
        {"weights_part": "teacher"},
    ),
    "mae_full.pth": (
        "vit_base_patch16_224.mae",
        lambda a, b: {
            "model": a | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 96)},
            "optimizer": {"state": {0: {"step": 1}}},
            "args": argparse.Namespace(lr=1.0),
        },
        {},
    ),
    "dino_full.pth": (
        "vit_small_patch16_224.dino",
        lambda a, b: {"student": prefixed("module.backbone.", b), "teacher": prefixed("backbone.", a | HEAD)},
        {},
    ),
    "dinov2_training.pth": (
        "vit_small_patch14_dinov2",
        lambda a, b: {"model": prefixed("student.backbone.", b) | prefixed("teacher.backbone.", hub_layout(a, False))},
        {},
    ),
    "dinov2_hub.pth": ("vit_small_patch14_dinov2", lambda a, b: hub_layout(a, False), {}),
    "dinov2_hub_reg.pth": ("vit_small_patch14_reg4_dinov2", lambda a, b: hub_layout(a, True), {}),
    "deit3_full.pth": (
        "deit3_small_patch16_224",
        lambda a, b: {"model": {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): a[key] for key in a}},
        {},
    ),
    "dinov3.safetensors": ("vit_small_patch16_dinov3", lambda a, b: a, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_weight_files(layout: str, tmp_path: Path) -> None:
    name, pack, options = LAYOUTS[layout]
    wanted, expected = source_state(name)
    other = {key: torch.zeros_like(value) for key, value in wanted.items()}
    file = saved(tmp_path / layout, pack(wanted, other))
    cfg = config(name, pretrained=True, weights=str(file), **options)
    torch.testing.assert_close(features(cfg), expected, rtol=1e-5, atol=1e-5)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert backbone_facts(cfg).weights.startswith(f"sha256:{digest}")


def test_register_weights_in_a_model_without_registers(tmp_path: Path) -> None:
    state, _ = source_state("vit_small_patch14_reg4_dinov2")
    hub = hub_layout(state, True)
    said: list[str] = []
    cfg = config("vit_small_patch14_dinov2", pretrained=True, weights=str(saved(tmp_path / "xr.pth", hub)))
    loaded = load_backbone(cfg, "cpu", say=said.append).model.state_dict()
    assert torch.equal(loaded["pos_embed"], hub["pos_embed"]) and torch.equal(loaded["cls_token"], hub["cls_token"])
    assert any("left out: mask_token (1), register_tokens (1)" in text for text in said)


def test_prefixes_match_the_reference_rule() -> None:
    golden = json.loads((ROOT / "tests" / "golden" / "neco" / "checkpoint_keys.json").read_text())

    def bare(name: str, part: str | None = None) -> list[str]:
        return sorted(backbone_state({key: torch.zeros(1) for key in golden[name]}, part))

    def with_prefix(keys: list[str], prefix: str) -> list[str]:
        return sorted(prefix + key for key in keys)

    out = golden["output"]
    assert bare("input_lightning_state_dict") == out["lightning_ours_prefix_empty"]
    assert bare("input_lightning_state_dict", "teacher") == out["lightning_ours_prefix_empty"]
    assert with_prefix(bare("input_lightning_state_dict"), "model.") == out["lightning_ours_prefix_model"]
    assert bare("input_bare") == out["bare_custom_prefix_none"]
    assert with_prefix(bare("input_bare"), "model.") == out["bare_custom_prefix_model"]
    assert bare("input_prefixed") == out["prefixed_custom"]


def test_a_position_grid_of_another_size_is_resampled_once(tmp_path: Path) -> None:
    """The file's grid is kept as it is; images of its own size then see its positions unchanged."""
    state, expected = source_state("vit_small_patch16_224")
    small = state | {"pos_embed": torch.randn(1, 1 + 3 * 3, 96)}
    said: list[str] = []
    cfg = config("vit_small_patch16_224", pretrained=True, weights=str(saved(tmp_path / "a.safetensors", small)))
    backbone = load_backbone(cfg, "cpu", say=said.append)
    assert said == [
        "a.safetensors: position embeddings of a 3 x 3 grid where the model has 14 x 14: resampled (bicubic, antialiased)"
    ]
    images = torch.zeros(1, 3, 48, 48)
    plain = backbone.model.patch_embed(images).flatten(1, 2)
    assert torch.equal(backbone(images, ["embed"])[0].patch, plain + small["pos_embed"][:, 1:])
    assert backbone(torch.zeros(1, 3, 64, 32), [1])[0].grid == (4, 2)
    with pytest.raises(UserError, match="no square grid"):
        saved(tmp_path / "b.safetensors", state | {"pos_embed": torch.randn(1, 12, 96)})
        quiet(OmegaConf.merge(cfg, {"weights": str(tmp_path / "b.safetensors")}))


def test_what_a_file_lacks_or_has_too_much(tmp_path: Path) -> None:
    state, _ = source_state("vit_base_patch16_siglip_224")
    said: list[str] = []
    pooling = [key for key in state if key.startswith("attn_pool")]
    more = {key: value for key, value in state.items() if key not in pooling} | {"logit_scale": torch.zeros(1)}
    cfg = config("vit_base_patch16_siglip_224", pretrained=True, weights=str(saved(tmp_path / "a.pth", more)))
    load_backbone(cfg, "cpu", say=said.append)
    assert said == [
        "a.pth: not part of the backbone, left out: logit_scale (1)",
        f"a.pth: absent and not used, left random: attn_pool ({len(pooling)})",
    ]
    lacking = {key: value for key, value in state.items() if "blocks.1.mlp" not in key}
    saved(tmp_path / "b.pth", lacking)
    with pytest.raises(UserError, match=r"b\.pth lacks 4 of .*blocks\.1\.mlp\.fc1\.weight"):
        quiet(OmegaConf.merge(cfg, {"weights": str(tmp_path / "b.pth")}))
    with pytest.raises(UserError, match=r"a\.pth holds .* of shape .* choose the model config"):
        quiet(OmegaConf.merge(cfg, {"kwargs": {"embed_dim": 64}}))


def test_damaged_foreign_and_missing_files(tmp_path: Path) -> None:
    def refusal(content: bytes | object, name: str = "w.pth", **changes: Any) -> str:
        file = tmp_path / name
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        with pytest.raises(UserError) as caught:
            quiet(config(pretrained=True, weights=str(file), **changes))
        return str(caught.value)

    assert "damaged or no weight file" in refusal(b"not a zip file")
    assert "damaged or no weight file" in refusal(b"root:x:0:0:root:/root:/bin/bash\nbin:x:1:1::/:/bin/sh\n")
    assert "damaged or no weight file" in refusal(b"\x10\0\0\0\0\0\0\0{", "w.safetensors")
    assert "not loaded for safety" in refusal({"model": Path("x")})
    assert "expected a dictionary" in refusal([torch.zeros(1)])
    assert "none that are recognised" in refusal({"epoch": 3})
    assert "holds no teacher, it has student" in refusal({ANCHOR: torch.zeros(1)}, weights_part="teacher")
    assert "model.weights_part=both is unknown" in refusal({}, weights_part="both")
    with pytest.raises(UserError, match="there is no weight file none.pth, make it with: python make.py,"):
        backbone_facts(config(pretrained=True, weights="none.pth", rebuild="python make.py"))
    with pytest.raises(UserError, match="set model.weights too"):
        backbone_facts(config(pretrained=True, digest="00"))


def test_digest(tmp_path: Path) -> None:
    state, expected = source_state("vit_small_patch16_224")
    file = saved(tmp_path / "w.safetensors", state)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    cfg = config(pretrained=True, weights=str(file), digest=digest, rebuild="python scripts/make.py")
    torch.testing.assert_close(features(cfg), expected)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"w\.safetensors is not the file .* rebuild it with: python scripts/make\.py"):
        backbone_facts(cfg)
    random = OmegaConf.merge(cfg, {"pretrained": False})
    assert backbone_facts(random).weights == "random:0", "random weights are asked for, the file does not matter"


def test_no_network_and_no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        quiet(composed("dino_small"))
    text = str(caught.value)
    assert "timm/vit_small_patch16_224.dino/model.safetensors" in text and "model.weights=<file>" in text
    assert "no network" in text and "\n" not in text
    with pytest.raises(UserError, match="timm has no pretrained weights for vit_tiny_patch8_224|timm has no model"):
        backbone_facts(composed("timm", name="vit_tiny_patch8_224"))


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"name": "vit_smal_patch16_224"},
            "timm has no model vit_smal_patch16_224, did you mean vit_small_patch16_224",
        ),
        ({"name": "vit_small_patch16_224.nope"}, "those of vit_small_patch16_224 are: .*vit_small_patch16_224.dino"),
        ({"name": "resnet50", "kwargs": {}}, "resnet50 is no plain ViT"),
        ({"name": "hiera_tiny_224", "kwargs": {}}, "hiera_tiny_224 is no plain ViT"),
        ({"kwargs": {"deep": 3}}, "does not take model.kwargs=.*deep"),
        ({"kwargs": {"global_pool": "avg"}}, "model.kwargs.global_pool"),
        ({"image_size": 100}, "expected multiples of its patch size 16, such as 96"),
        ({"image_size": 8}, "expected multiples of its patch size 16, such as 16"),
        ({"image_size": [1, 2, 3]}, "model.image_size=.* is not understood"),
        ({"source": "hub"}, "model.source=hub is unknown, expected one of timm, module, pixels"),
        ({"attention": "flash"}, "model.attention=flash is unknown"),
        ({"dtype": "float8"}, "model.dtype=float8 is unknown"),
    ],
)
def test_refused_configurations(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        backbone_facts(config(**changes))


def test_the_name_must_be_given() -> None:
    with pytest.raises(UserError, match="model.name is missing"):
        backbone_facts(composed("timm"))


def test_refused_images() -> None:
    with pytest.raises(UserError, match="multiples of its patch size 16, got images of 40 x 32"):
        quiet(config())(torch.zeros(1, 3, 40, 32), [0])
    fixed = quiet(config("beit_base_patch16_224", image_size=[32, 48]))
    assert fixed(torch.zeros(1, 3, 32, 48), [0])[0].grid == (2, 3)
    with pytest.raises(UserError, match=r"images of one size, 32 x 48, got 48 x 32"):
        fixed(torch.zeros(1, 3, 48, 32), [0])


def test_xformers_is_refused_without_cuda() -> None:
    with pytest.raises(UserError, match="model.attention=xformers needs a CUDA device, got cpu"):
        quiet(config(attention="xformers"))


def test_xformers_takes_over_the_attention_of_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of the same interface, [B, N, heads, d]: same tokens, one call per block."""
    calls: list[tuple] = []

    def stand_in(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(tuple(query.shape))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)

    monkeypatch.setattr("backbones.attention.xformers_attention", lambda: stand_in)
    for name in ("vit_small_patch16_224", "vit_small_patch16_dinov3"):
        backbone = quiet(config(name))
        for module in backbone.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = True
        images = torch.randn(2, 3, 32, 48)
        expected = backbone(images, [1])[0].patch
        calls.clear()
        backbone.around = XformersAttention
        torch.testing.assert_close(backbone(images, [1])[0].patch, expected, rtol=1e-4, atol=1e-5)
        assert calls == [(2, 6 + backbone.facts.num_prefix_tokens, 2, 48)] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["sdpa", "xformers"])
def test_cuda_gives_the_tokens_of_the_cpu(attention: str) -> None:
    cfg = config(attention=attention)
    images = torch.randn(2, 3, 48, 64)
    there = load_backbone(cfg, "cuda")(images.cuda(), ["embed", 1])
    here = quiet(OmegaConf.merge(cfg, {"attention": "sdpa"}))(images, ["embed", 1])
    for a, b in zip(there, here, strict=True):
        torch.testing.assert_close(a.patch.cpu(), b.patch, rtol=1e-3, atol=1e-3)


def test_auto_dtype_follows_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, avx, expected in (
        (True, True, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert resolve_dtype("auto", "cpu") == expected
    assert resolve_dtype("float16", "cpu") == torch.float16
