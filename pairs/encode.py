"""A scene as the backbone of a finished run sees it: tokens of every layer, attention, where its patches lie, their labels."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from activation import made_by
from backbones.attention import RecordAttention
from backbones.contract import Backbone, Layer
from backbones.load import load_backbone
from datasets.scene import Scene
from errors import UserError
from files import plain
from machine import choose_device
from pairs.pair_form import PairForm, pair_forms
from patches.geometry import DroppedImage, Geometry, plan_geometry
from patches.labels import PatchLabels, label_patches
from patches.windows import cut_windows
from probes import Probe, load_probe
from runs.adopt import adopt
from runs.finished import check_fit
from runs.run import checkpoint_files, read_config
from runs.validity import refuse_other_use


class FittedRun(NamedTuple):
    """A finished run: its directory, configuration, probes (the chunks of one stack) and backbone, ready to look with."""

    directory: Path
    cfg: DictConfig
    probes: list[Probe]
    backbone: Backbone

    @property
    def layers(self) -> list[Layer]:
        """Layers of all chunks, in order."""
        return [layer for probe in self.probes for layer in probe.layers]

    @property
    def score_name(self) -> str:
        """What the score of a pair is called: only a pairwise probe estimates a probability."""
        if self.probes[0].arity == "pairwise":
            return "P(same object)"
        return "class agreement" if self.cfg.task == "class" else "read-out agreement"

    def forms(self) -> list[PairForm]:
        """The formula of the probe at every layer, of the fits that saw all pairs (a map has background)."""
        forms = []
        for probe in self.probes:
            fits = slice(None)
            if probe.arity == "pairwise":
                variants = list(self.cfg.protocol.pairs.fit)
                n_seeds = len(probe.seeds) // len(variants)
                start = variants.index("all") * n_seeds if "all" in variants else 0
                fits = slice(start, start + n_seeds)
            forms += pair_forms(probe, fits)
        return forms


def open_fitted_run(
    directory: Path, cfg: DictConfig, backbones: Sequence[Backbone] = (), models: Sequence[DictConfig] = ()
) -> FittedRun:
    """A finished run with its best probes, on the CPU.

    Args:
        cfg: the present configuration: device, and what it names of the data.
        backbones, models: loaded already, and how they are configured; the run's own is taken from there if it is among them.

    Raises:
        UserError: no run, no checkpoint, or the command line contradicts the run.
    """
    fitted = adopt(read_config(directory), cfg, directory)
    files = checkpoint_files(directory, "probe", "best")
    probes = [load_probe(file).eval() for file in files]
    for file, probe in zip(files, probes, strict=True):
        check_fit(file, probe.facts, directory, "probe")
        probe.matmul_dtype = "float32"  # one picture: nothing to save, and the page computes so too
    device = choose_device(cfg.device)
    same = [backbone for backbone, model in zip(backbones, models, strict=True) if _weights(model) == _weights(fitted.model)]
    backbone = same[0] if same else load_backbone(fitted.model, device)
    here = {"facts": backbone.facts.as_dict(), "norm": bool(fitted.model.norm), "output_mode": fitted.model.output_mode}
    for file, probe in zip(files, probes, strict=True):
        at_hand = made_by(here | {"geometry": plain(fitted.protocol.geometry)})
        refuse_other_use(file, probe.facts.get("made_by"), at_hand)
    return FittedRun(directory, fitted, probes, backbone)


def _weights(model: DictConfig) -> dict:
    """What a model's configuration says beside which of its tokens are read."""
    return {key: value for key, value in model.items() if key not in ("layers", "output_mode")}


class EncodedScene(NamedTuple):
    """A scene seen by a backbone: n windows of N patches.

    labels: of its patches, "identity" and "class" as far as the scene has maps.
    layers: the L layers. tokens: [L, n, N, D] float32. prefix: [L, n, P, D], of every window.
    attention: L tensors [n, P + N, N] float32: the weights, mean over heads, of the block that reads a layer, from every
        token (rows) to every patch; None for the last layer, which no block reads, and everywhere if they were not asked
        for or the backbone computes attention in a way that cannot be recorded.
    """

    scene: Scene
    geometry: Geometry
    labels: dict[str, PatchLabels]
    layers: list[Layer]
    tokens: Tensor
    prefix: Tensor
    attention: list[Tensor | None]


def plan_scene(scene: Scene, cfg: DictConfig, backbone: Backbone) -> Geometry:
    """Where the windows and patches of a scene lie by the protocol of a run.

    Raises:
        UserError: the protocol leaves this image out.
    """
    facts, image_hw = backbone.facts, tuple(scene.image.shape[-2:])
    try:
        return plan_geometry(image_hw, geometry=cfg.protocol.geometry, patch_size=facts.patch_size, image_size=facts.image_size)
    except DroppedImage as error:
        raise UserError(f"protocol {cfg.protocol.name} leaves out {scene.key}: {error}; choose another vis.image") from error


def scene_windows(scene: Scene, geometry: Geometry, cfg: DictConfig, backbone: Backbone) -> Tensor:
    """The windows [n, 3, h * patch, w * patch] of a scene as the backbone takes them."""
    facts = backbone.facts
    return cut_windows(
        scene.image, geometry, mean=facts.mean, std=facts.std, interpolation=facts.interpolation,
        antialias=cfg.protocol.geometry.antialias,
    )  # fmt: skip


@torch.inference_mode()
def encode_scene(
    scene: Scene, layers: Sequence[Layer], cfg: DictConfig, backbone: Backbone, *, attention: bool = False
) -> EncodedScene:
    """Run the backbone over all windows of a scene.

    Args:
        cfg: of the run: protocol, and the number of windows of one pass.
        attention: also keep the attention of the block after each layer.

    Raises:
        UserError: the protocol leaves the image out.
    """
    geometry = plan_scene(scene, cfg, backbone)
    windows = scene_windows(scene, geometry, cfg, backbone)
    device, layers, facts = choose_device(cfg.device), list(layers), backbone.facts
    readers = [0 if layer == "embed" else int(layer) + 1 for layer in layers]  # the block that reads each layer
    last = min(max(readers), facts.depth - 1)
    read = [*layers, last] if attention and last >= 0 else layers  # the reader of the last layer has to run as well
    tokens, prefix, weights = [], [], []
    for part in windows.split(int(cfg.cache.batch_windows)):
        recorder = RecordAttention(lambda w: w.mean(1)[:, :, facts.num_prefix_tokens :].cpu())
        with recorder if attention else contextlib.nullcontext():
            found = backbone(part.to(device), read)[: len(layers)]
        tokens.append([layer.patch.float().cpu() for layer in found])
        prefix.append([layer.prefix.float().cpu() for layer in found])
        weights.append(recorder.weights)
    kept: list[Tensor | None] = [None] * len(layers)
    if attention:
        if all(len(of_part) > last >= 0 for of_part in weights):
            blocks = [torch.cat(of_block) for of_block in zip(*weights, strict=True)]
            kept = [blocks[reader] if reader < facts.depth else None for reader in readers]
    patches, prefixes = (  # [L, n, N, D] and [L, n, P, D]
        torch.stack([torch.cat(of_layer) for of_layer in zip(*parts, strict=True)]) for parts in (tokens, prefix)
    )
    labels = label_patches(scene.labels, geometry, labels=cfg.protocol.labels) if "identity" in scene.labels else {}
    return EncodedScene(scene, geometry, labels, layers, patches, prefixes, kept)
