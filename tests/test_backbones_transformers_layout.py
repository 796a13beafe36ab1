"""Folders of the transformers library give the outputs of the timm model whose weights they hold."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_backbones import config, features, source_state
from torch import Tensor

from backbones.load import backbone_facts, load_backbone
from errors import UserError

State = dict[str, Tensor]


def renamed(state: State, names: dict[str, str], prefix: str = "") -> State:
    """A timm state under other names: the first pattern that fits a name is applied; query, key and value are parted."""
    out = {}
    for key, value in state.items():
        for part, piece in parted(key, value).items():
            pattern = next(pattern for pattern in names if re.fullmatch(pattern, part))
            out[prefix + re.sub(pattern, names[pattern], part)] = piece.contiguous()
    return out


def parted(key: str, value: Tensor) -> State:
    if ".qkv." not in key:
        return {key: value}
    return {key.replace("qkv", name): piece for name, piece in zip(("query", "key", "value"), value.chunk(3), strict=True)}


BERT_LIKE = {
    r"cls_token": "embeddings.cls_token",
    r"pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(\w+)": r"embeddings.patch_embeddings.projection.\1",
    r"norm\.(\w+)": r"layernorm.\1",
    r"blocks\.(\d+)\.attn\.(query|key|value)\.(\w+)": r"encoder.layer.\1.attention.attention.\2.\3",
    r"blocks\.(\d+)\.attn\.proj\.(\w+)": r"encoder.layer.\1.attention.output.dense.\2",
}
VIT = BERT_LIKE | {
    r"blocks\.(\d+)\.norm1\.(\w+)": r"encoder.layer.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(\w+)": r"encoder.layer.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(\w+)": r"encoder.layer.\1.intermediate.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(\w+)": r"encoder.layer.\1.output.dense.\2",
}
DINOV2 = BERT_LIKE | {
    r"reg_token": "embeddings.register_tokens",
    r"blocks\.(\d+)\.(norm1|norm2)\.(\w+)": r"encoder.layer.\1.\2.\3",
    r"blocks\.(\d+)\.ls(\d)\.gamma": r"encoder.layer.\1.layer_scale\2.lambda1",
    r"blocks\.(\d+)\.mlp\.(fc1|fc2)\.(\w+)": r"encoder.layer.\1.mlp.\2.\3",
}
GATED = {
    r"blocks\.(\d+)\.mlp\.fc1\.(\w+)": r"encoder.layer.\1.mlp.weights_in.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(\w+)": r"encoder.layer.\1.mlp.weights_out.\2",
} | DINOV2
DINOV3 = {
    r"cls_token": "embeddings.cls_token",
    r"reg_token": "embeddings.register_tokens",
    r"patch_embed\.proj\.(\w+)": r"embeddings.patch_embeddings.\1",
    r"norm\.(\w+)": r"norm.\1",
    r"blocks\.(\d+)\.attn\.(q|k|v)\w*\.(\w+)": r"layer.\1.attention.\2_proj.\3",
    r"blocks\.(\d+)\.attn\.(q|v)_bias": r"layer.\1.attention.\2_proj.bias",
    r"blocks\.(\d+)\.attn\.proj\.(\w+)": r"layer.\1.attention.o_proj.\2",
    r"blocks\.(\d+)\.(norm1|norm2)\.(\w+)": r"layer.\1.\2.\3",
    r"blocks\.(\d+)\.gamma_(\d)": r"layer.\1.layer_scale\2.lambda1",
    r"blocks\.(\d+)\.mlp\.fc1\.(\w+)": r"layer.\1.mlp.up_proj.\2",
    r"blocks\.(\d+)\.mlp\.fc1_g\.(\w+)": r"layer.\1.mlp.gate_proj.\2",
    r"blocks\.(\d+)\.mlp\.fc1_x\.(\w+)": r"layer.\1.mlp.up_proj.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(\w+)": r"layer.\1.mlp.down_proj.\2",
}
CLIP = {
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding.weight",
    r"patch_embed\.proj\.(\w+)": r"embeddings.patch_embedding.\1",
    r"norm_pre\.(\w+)": r"pre_layrnorm.\1",
    r"norm\.(\w+)": r"post_layernorm.\1",
    r"blocks\.(\d+)\.norm(\d)\.(\w+)": r"encoder.layers.\1.layer_norm\2.\3",
    r"blocks\.(\d+)\.attn\.(q|k|v)\w*\.(\w+)": r"encoder.layers.\1.self_attn.\2_proj.\3",
    r"blocks\.(\d+)\.attn\.proj\.(\w+)": r"encoder.layers.\1.self_attn.out_proj.\2",
    r"blocks\.(\d+)\.mlp\.(fc1|fc2)\.(\w+)": r"encoder.layers.\1.mlp.\2.\3",
}


def dinov2_registers(state: State) -> State:
    """transformers adds a position to the class token too."""
    out, position = renamed(state, DINOV2), torch.randn(1, 1, 96)
    out["embeddings.position_embeddings"] = torch.cat([position, out["embeddings.position_embeddings"]], 1)
    out["embeddings.cls_token"] = out["embeddings.cls_token"] - position
    return out | {"embeddings.mask_token": torch.zeros(1, 96)}


def clip(state: State) -> State:
    out = renamed(state, CLIP, "vision_model.")
    for name in ("class_embedding", "position_embedding.weight"):
        out[f"vision_model.embeddings.{name}"] = out[f"vision_model.embeddings.{name}"].flatten(0, -2).squeeze(0)
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(4, 8), "logit_scale": torch.tensor(1.0)}
    return out | text | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}


HEADS = {"num_attention_heads": 2}
QUICK = {"model_type": "clip", "vision_config": {**HEADS, "hidden_act": "quick_gelu"}}
LAYOUTS: dict[str, tuple[str, Callable[[State], State], dict[str, Any]]] = {
    "vit": ("vit_small_patch16_224", lambda s: renamed(s, VIT, "vit.") | {"classifier.weight": torch.zeros(2, 96)}, HEADS),
    "vit without prefix": ("vit_small_patch16_224", lambda s: renamed(s, VIT), HEADS),
    "mae": ("vit_base_patch16_224.mae", lambda s: renamed(s, VIT, "vit.") | {"decoder.mask_token": torch.zeros(1)}, HEADS),
    "dinov2": ("vit_small_patch14_dinov2", lambda s: renamed(s, DINOV2), HEADS),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", dinov2_registers, HEADS),
    "dinov2 giant": ("vit_giant_patch14_dinov2", lambda s: renamed(s, GATED, "dinov2."), HEADS),
    "dinov3": ("vit_small_patch16_dinov3", lambda s: renamed(s, DINOV3), HEADS),
    "dinov3 with biases": ("vit_small_patch16_dinov3_qkvb", lambda s: renamed(s, DINOV3), HEADS),
    "dinov3 plus": ("vit_small_plus_patch16_dinov3", lambda s: renamed(s, DINOV3), HEADS),
    "clip": ("vit_base_patch16_clip_quickgelu_224.openai", clip, QUICK),
}


def write_folder(folder: Path, state: State, about: dict[str, Any], n_files: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about))
    if n_files == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names = {key: f"model-{i % n_files + 1:05d}-of-{n_files:05d}.safetensors" for i, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: state[key] for key in state if names[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.parametrize("n_files", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_those_of_the_timm_model(layout: str, n_files: int, tmp_path: Path) -> None:
    name, pack, about = LAYOUTS[layout]
    state, expected = source_state(name)
    folder = write_folder(tmp_path / "folder", pack(state), about, n_files)
    cfg = config(name, pretrained=True, weights=str(folder))
    torch.testing.assert_close(features(cfg), expected, rtol=1e-5, atol=1e-5)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", backbone_facts(cfg).weights)


def sentence(folder: Path, name: str = "vit_small_patch16_224") -> str:
    with pytest.raises(UserError) as caught:
        load_backbone(config(name, pretrained=True, weights=str(folder)), "cpu", say=lambda text: None)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_left_out_is_reported(tmp_path: Path) -> None:
    name, pack, about = LAYOUTS["clip"]
    folder, said = write_folder(tmp_path / "folder", pack(source_state(name)[0]), about), []
    load_backbone(config(name, pretrained=True, weights=str(folder)), "cpu", say=said.append)
    assert any("left out: " in text and "text_model (1)" in text and "logit_scale (1)" in text for text in said), said


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    name, pack, about = LAYOUTS["vit"]
    state = pack(source_state(name)[0])
    assert "has 4 attention heads and model.name 2" in sentence(write_folder(tmp_path / "a", state, {"num_attention_heads": 4}))
    quick = write_folder(tmp_path / "b", state, {**HEADS, "hidden_act": "quick_gelu"})
    assert "activation quick_gelu where model.name has GELU" in sentence(quick)
    unknown = write_folder(tmp_path / "c", {"encoder.weight": torch.zeros(1)}, {"model_type": "swin"})
    assert "holds a model of type swin, whose weights are not known here" in sentence(unknown)
    biases = renamed(source_state("vit_small_patch16_dinov3_qkvb")[0], DINOV3)
    assert "name has _qkvb" in sentence(write_folder(tmp_path / "d", biases, HEADS), "vit_small_patch16_dinov3")
    short = {key: value for key, value in state.items() if "layer.1" not in key}
    assert "lacks 12 of the" in sentence(write_folder(tmp_path / "e", short, HEADS))


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    name, pack, about = LAYOUTS["vit"]
    folder = write_folder(tmp_path / "folder", pack(source_state(name)[0]), about, 2)
    index = folder / "model.safetensors.index.json"
    outside = {"weight_map": {"a": "../other.safetensors"}}
    reasons = {json.dumps(outside): "no safetensors file of this folder", "{": "is damaged", "{}": "weight_map"}
    for text, reason in reasons.items():
        index.write_text(text)
        assert reason in sentence(folder)
    index.unlink()
    assert "holds neither model.safetensors nor" in sentence(folder)
    (folder / "model.safetensors").write_bytes(b"no")
    assert "is damaged or no weight file" in sentence(folder)
    (folder / "config.json").unlink()
    assert "is a folder without config.json" in sentence(folder)
