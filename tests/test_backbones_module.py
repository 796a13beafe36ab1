"""A model of the user's own: what is accepted, what is refused and in which words, and who may name it."""

import functools
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from program import configured
from torch import nn

from backbones import module
from backbones.contract import Options, Tokens
from backbones.load import backbone_facts, layers_of, load_backbone
from backbones.statement import Statement
from errors import UserError

SIZE, PATCH, GRID = (32, 48), 8, (4, 6)
STATED = Statement(patch_size=PATCH, image_size=SIZE, mean=0.5, std=0.25)


@functools.cache
def vit(registers: int = 0, width: int = 24) -> nn.Module:
    """A small ViT of random weights: a class token, registers, 4 x 6 patches."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=PATCH, embed_dim=width, depth=2, num_heads=2, reg_tokens=registers
    )
    del model.pretrained_cfg, model.default_cfg
    return model.eval()


def tokens(x: torch.Tensor, registers: int = 0) -> torch.Tensor:
    return vit(registers).forward_features(x)


def patches(x: torch.Tensor) -> torch.Tensor:
    """[B, 24, D], as it should be."""
    return tokens(x)[:, 1:]


def as_map(x: torch.Tensor) -> torch.Tensor:
    return patches(x).unflatten(1, GRID)  # [B, h, w, D]


def accept(call, stated: Statement = STATED, **changes) -> module.ModuleBackbone:
    name = module.hand_over(call, stated._replace(**changes))
    return load_backbone({"source": "module", "name": name}, "cpu")


class Wrapped(nn.Module):
    """The ViT with something around it."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.vit = vit()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vit.forward_features(x)[:, 1:]


class Normalize(nn.Module):
    """As in torchvision and kornia."""


def with_config(**pretrained_cfg) -> nn.Module:
    model = Wrapped()
    model.pretrained_cfg = pretrained_cfg
    return model


def windows(x: torch.Tensor) -> torch.Tensor:
    return as_map(x).unflatten(1, (2, 2)).unflatten(3, (3, 2)).transpose(2, 3).flatten(1, 4)


def drop(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(patches(x), 0.2, training=True)


def batch_norm(x: torch.Tensor) -> torch.Tensor:
    y = patches(x)
    return (y - y.mean((0, 1))) / y.std((0, 1))


SHUFFLED = torch.randperm(24, generator=torch.Generator().manual_seed(3))
BROKEN = {
    "column-major": (lambda x: as_map(x).transpose(1, 2).flatten(1, 2), {}, "in column-major order.*the grid is transposed"),
    "transposed map": (lambda x: as_map(x).permute(0, 3, 2, 1), {}, r"transposed map .*6 x 4 where the images have 4 x 6"),
    "missing prefix": (tokens, {}, "25 tokens .* = 24 patches: 1 more.*state prefix_tokens=1"),
    "registers not counted": (lambda x: tokens(x, 4), {"prefix_tokens": 1}, "29 tokens .* 5 more.*state prefix_tokens=5"),
    "prefix that is not there": (patches, {"prefix_tokens": 1}, "prefix_tokens=1 is stated: .*state prefix_tokens=0"),
    "class token in the grid": (lambda x: tokens(x)[:, :-1], {}, "shifted by 1.*prefix tokens stand before the patches"),
    "registers in the grid": (lambda x: tokens(x, 4)[:, 1:25], {}, "shifted by 4.*leave the prefix out"),
    "cut off twice": (lambda x: tokens(x)[:, 2:], {}, "23 tokens .*1 patches are missing.*cut off twice"),
    "pooled output": (lambda x: patches(x).mean(1), {}, r"pooled output \[1, 24\], one vector per image"),
    "pooled and repeated": (lambda x: patches(x).mean(1, keepdim=True).expand(-1, 24, -1), {}, "all the same: pooled output"),
    "upside down": (lambda x: as_map(x).flip(1).flatten(1, 2), {}, "upside down.*return the upper row first"),
    "mirrored": (lambda x: as_map(x).flip(2).flatten(1, 2), {}, "mirrored left to right"),
    "reversed": (lambda x: patches(x).flip(1), {}, "in reverse order"),
    "turned": (lambda x: as_map(x).rot90(-1, (1, 2)).flatten(1, 2), {}, "turned by a quarter"),
    "windows": (windows, {}, "in the order of windows by 2.*window_reverse"),
    "shuffled": (lambda x: patches(x)[:, SHUFFLED], {}, "no order this program knows"),
    "channels before patches": (lambda x: vit(0, 48).forward_features(x)[:, 1:].mT, {}, "channels before patches.*with x.mT"),
    "patches before images": (lambda x: patches(x).transpose(0, 1), {}, r"patches before images.*x.transpose\(0, 1\)"),
    "dropout": (drop, {}, "differently to the same image twice.*dropout"),
    "batch norm in training": (batch_norm, {}, "depends on the other images of its batch"),
    "not finite": (lambda x: patches(x) / 0, {}, "not finite"),
    "no image": (lambda x: vit().pos_embed[:, 1:].expand(len(x), -1, -1), {}, "do not depend on the image"),
    "no normalisation": (patches, {"mean": None, "std": None}, "normalisation of the pixels is left out: state mean and std"),
    "half a normalisation": (patches, {"std": None}, "mean is stated and std is not"),
    "pixels of 0…255": (patches, {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "in 0…255.*divide both by 255"),
    "another normalisation": (with_config(mean=(0.48,) * 3, std=(0.23,) * 3), {"mean": 0, "std": 1}, "not that of the module"),
    "normalised twice": (Wrapped(first=Normalize()), {}, "normalises its pixels itself.*state mean=0, std=1"),
    "another patch size": (patches, {"patch_size": 4}, r"24 tokens for a grid of 8 x 12.*state patch_size=8"),
    "another image size": (patches, {"image_size": 64}, "fails on images of shape.*state the image_size"),
    "no multiple": (patches, {"image_size": 30}, "no multiple of patch_size=8"),
    "no patch size": (patches, {"patch_size": None}, "patch_size is not stated"),
    "two widths": (lambda x: [patches(x), patches(x)[..., :8]], {}, "layers of different widths"),
    "integers": (lambda x: patches(x).long(), {}, "numbers of type int64"),
    "nothing": (lambda x: None, {}, "returns nothing, expected patch tokens"),
    "a numpy array": (lambda x: patches(x).detach().numpy(), {}, "returns a ndarray, expected patch tokens"),
    "loose class token": (patches, {"class_token": True}, "class_token=True and prefix_tokens=0"),
    "no function": (3, {}, "got int, expected a torch module or a function"),
}  # fmt: skip
CORRECT = {
    "tokens of a function": (patches, {}),
    "a map": (lambda x: as_map(x).permute(0, 3, 1, 2), {}),
    "a map, channels last": (as_map, {}),
    "a prefix of class token and registers": (lambda x: tokens(x, 4), {"prefix_tokens": 5, "class_token": True}),
    "layers": (lambda x: [y for y in vit().forward_intermediates(x, intermediates_only=True, output_fmt="NLC")], {}),
    "transformers' output": (lambda x: SimpleNamespace(last_hidden_state=tokens(x)), {"prefix_tokens": 1}),
    "DINOv2's dictionary": (lambda x: {"x_norm_clstoken": tokens(x)[:, 0], "x_norm_patchtokens": patches(x)}, {}),
    "this program's own": (lambda x: Tokens(tokens(x)[:, :1], patches(x), GRID), {"prefix_tokens": 1}),
    "a module": (Wrapped(), {}),
    "a convolution": (nn.Conv2d(3, 16, PATCH, PATCH), {}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_refused_by_name(case: str) -> None:
    call, changes, sentence = BROKEN[case]
    with pytest.raises(UserError, match=sentence):
        accept(call, **changes)


@pytest.mark.parametrize("case", CORRECT)
def test_a_correct_model_is_accepted(case: str) -> None:
    call, changes = CORRECT[case]
    backbone = accept(call, **changes)
    facts = backbone.facts
    layers = layers_of("all", facts)
    images = torch.randn(2, 3, *SIZE)
    for layer, found in zip(layers, backbone(images, layers), strict=True):
        assert found.grid == GRID and found.patch.shape == (2, 24, facts.dim), layer
        assert found.prefix.shape[1] == facts.num_prefix_tokens == (changes.get("prefix_tokens") or 0)
    if facts.dim == 24 and "layers" not in case:  # the convolution has others
        own = tokens(images, 4)[:, 5:] if "registers" in case else patches(images)
        assert torch.allclose(found.patch, own, atol=1e-5)


def test_deep_layers_of_a_trained_model_pass() -> None:
    """The embedded backbone mixes its patches over eight blocks; its tokens are those of the patches at every layer."""
    cfg = {"source": "timm", "name": "vit_tiny_patch16_224", "weights": "weights/demo_vit.safetensors",
           "kwargs": {"img_size": 96, "patch_size": 8, "embed_dim": 128, "depth": 8, "num_heads": 4}}  # fmt: skip
    trained = load_backbone(cfg, "cpu").model
    del trained.pretrained_cfg  # of other weights
    read = lambda x: [y.flatten(2).mT for y in trained.forward_intermediates(x, intermediates_only=True)]
    facts = accept(read, patch_size=8, image_size=96, mean=0.5, std=0.25).facts
    assert (facts.depth, facts.dim) == (8, 128)
    with pytest.raises(UserError, match="in column-major order"):
        accept(lambda x: [y.transpose(2, 3).flatten(2).mT for y in trained.forward_intermediates(x, intermediates_only=True)],
               patch_size=8, image_size=96, mean=0.5, std=0.25)  # fmt: skip


def test_a_model_in_training_stays_in_training() -> None:
    model = Wrapped(dropped=nn.Dropout(0.5))
    model.forward = lambda x: model.dropped(model.vit.forward_features(x)[:, 1:])
    model.train()
    model.vit.eval()
    accept(model)(torch.randn(1, 3, *SIZE), [0])
    assert model.training and model.dropped.training and not model.vit.training
    assert all(p.requires_grad for p in model.parameters())


def test_facts_tell_weights_and_code_apart() -> None:
    first, second = Wrapped(), Wrapped(extra=nn.Linear(2, 2))
    same, other = accept(first).facts, accept(second).facts
    assert accept(Wrapped()).facts.weights == same.weights != other.weights and same.weights.startswith("module:")
    scaled = accept(lambda x: 2 * patches(x)).facts
    assert scaled.weights == accept(patches).facts.weights, "the same weights"
    assert scaled.kwargs != accept(patches).facts.kwargs, "and other tokens: another entry of the cache"


def test_the_proof_is_remembered(tmp_path, monkeypatch) -> None:
    name = module.hand_over(lambda x: patches(x) + 1, STATED)
    cfg = {"source": "module", "name": name}
    backbone_facts(cfg, tmp_path)
    assert len(list(tmp_path.glob("module-*.json"))) == 1
    monkeypatch.setattr(module, "check_tokens", lambda *_: pytest.fail("proved again"))
    backbone_facts(cfg, tmp_path)
    module._proved.clear()  # as in a new process
    backbone_facts(cfg, tmp_path)


BUILD = """
import torch

called = []

def build(width=16, pretrained=True):
    called.append(pretrained)
    model = torch.nn.Conv2d(3, width, 8, 8)
    model.patch_size, model.image_size, model.mean, model.std = 8, (32, 48), 0.5, 0.25
    return model

def without_random():
    return build()
"""


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    (tmp_path / "strangers_model.py").write_text(BUILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "strangers_model", raising=False)
    module._build.cache_clear()
    yield "strangers_model:build"
    module._build.cache_clear()


def test_the_command_line_names_a_model(strangers) -> None:
    cfg = {"source": "module", "name": strangers, "kwargs": {"width": 12}}
    with configured("model=module", f"model.name={strangers}"):
        facts = backbone_facts(cfg)
        assert (facts.dim, facts.patch_size, facts.image_size, facts.mean) == (12, 8, (32, 48), (0.5,) * 3)
        assert module.has_random_weights(strangers)
        drawn = backbone_facts(cfg | {"pretrained": False}).weights
        assert drawn.startswith("module:")


@pytest.mark.parametrize(
    ("name", "named", "sentence"),
    [
        ("strangers_model:build", "other:build", "which only the command line may name; add model.name=strangers_model:build"),
        ("strangers_model:nothing", "strangers_model:nothing", "strangers_model has no function nothing"),
        ("no_such_file:build", "no_such_file:build", "no_such_file cannot be imported"),
        ("os.system", "os.system", "names no function, expected package.module:function"),
        ("strangers_model:build()", "x", "names no function"),
        ("python:lost-12345678", "x", "handed over in another Python process"),
    ],
)
def test_a_name_that_a_file_brings_is_never_called(strangers, name: str, named: str, sentence: str) -> None:
    import strangers_model

    with configured("model=module", f"model.name='{named}'"), pytest.raises(UserError, match=sentence):
        backbone_facts({"source": "module", "name": name})
    assert not strangers_model.called


def test_what_is_for_timm_alone_is_refused(strangers) -> None:
    with configured("model=module", f"model.name={strangers}"):
        for key, value in {"weights": "a.pt", "norm": True, "compile": True}.items():
            with pytest.raises(UserError, match=f"model.{key} is for models of timm"):
                backbone_facts({"source": "module", "name": strangers, key: value})
        facts = backbone_facts({"source": "module", "name": strangers})
        assert layers_of("all", facts) == [0] == layers_of(-1, facts)
        with pytest.raises(UserError, match="has no layer embed"):
            layers_of("embed", facts)
    assert isinstance(Options.read({"source": "module", "name": strangers}), Options)
