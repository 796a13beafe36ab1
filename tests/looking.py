"""Small scenes, runs and maps for tests of what looks at fitted probes."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from program import configured
from toys import toy_config

from backbones.load import load_backbone
from datasets.scene import Scene
from pairs.encode import EncodedScene, FittedRun, encode_scene
from pairs.maps import Anchor, MapRow, ScoreMaps
from patches.anchor import anchor_at, patch_box
from patches.geometry import Geometry, plan_geometry
from probes import Probe, build_probe

ROOT = Path(__file__).parent.parent
SHAPES = [(32, 32), (32, 128), (128, 32), (40, 56), (97, 61)]  # square, 1:4, 4:1, odd
RULES = OmegaConf.load(ROOT / "cfgs/protocol/clean.yaml").protocol
VIS = {
    "split": "test", "image": 1, "anchor": "patch", "pixel": None, "patch": None, "anchors": 1,
    "rows": ["probe", "cosine", "attention"], "beside": [], "smooth": True, "gif": True, "page": False, "out": None,
}  # fmt: skip


def geometry_of(shape: tuple[int, int]) -> Geometry:
    return plan_geometry(shape, geometry=RULES.geometry, patch_size=8, image_size=(32, 32))


def scene_of(shape: tuple[int, int]) -> Scene:
    """Noise with two objects, 2 and 5, of one class."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (3, *shape), generator=generator, dtype=torch.uint8)
    identity = torch.zeros(shape, dtype=torch.int32)
    identity[shape[0] // 4 : shape[0] // 2, shape[1] // 3 : shape[1]] = 2
    identity[shape[0] // 2 :, : shape[1] // 2] = 5
    return Scene(image, {"identity": identity, "class": (identity > 0).int()}, f"toy {shape}")


def probe_stack(mode: str, layers: Sequence, dim: int, seeds: int = 2, variants: int = 2, **given: Any) -> Probe:
    probe = build_probe({"mode": mode}, seeds=list(range(seeds)) * variants, layers=list(layers), dim=dim, **given)
    return probe.eval()


def fitted_run(folder: Path, probes: Sequence[Probe], *overrides: str, task: str = "pairwise") -> FittedRun:
    """A run of the toy configuration that holds these probes, with its two-block backbone."""
    cfg = toy_config(folder, *overrides)
    cfg.update(task=task, probe={"mode": "any"})
    return FittedRun(folder / "toy-run", cfg, list(probes), load_backbone(cfg.model, torch.device("cpu")))


def encoded(run: FittedRun, scene: Scene, attention: bool = True) -> EncodedScene:
    return encode_scene(scene, run.layers, run.cfg, run.backbone, attention=attention)


def painted(shape: tuple[int, int], n_layers: int, object_id: int = 5, views: Sequence[str] = ("probe",)) -> ScoreMaps:
    """Maps of one value per layer, from 0 to 1."""
    scene, geometry = scene_of(shape), geometry_of(shape)
    layers = ["embed", *range(n_layers - 1)]
    maps = torch.linspace(0, 1, n_layers)[:, None, None].expand(-1, *shape)
    place = anchor_at([shape[0] - 1, 0], geometry, shape)
    scores = torch.rand(n_layers, len(geometry.starts), *geometry.grid)
    members = torch.zeros(len(geometry.starts), *geometry.grid, dtype=torch.bool)
    anchor = Anchor("patch", place, patch_box(place, geometry, shape), object_id, members)
    rows = [MapRow("run", view, "P(same object)", layers, scores, maps, [0.75] * n_layers) for view in views]
    return ScoreMaps(scene.key, scene.image, scene.labels["identity"], anchor, 2 if object_id == 5 else 0, rows)


class FakeRun:
    """What an entry needs of its run."""

    def __init__(self, directory: Path, source: Path | None) -> None:
        self.dir, self.source, self.said, self.facts = directory, source, [], {}
        directory.mkdir(parents=True)

    def say(self, text: str) -> None:
        self.said.append(text)


def finished_run(folder: Path, name: str = "toy-1", seed_offset: int = 0) -> SimpleNamespace:
    """A finished training run as the trainer leaves it, in two chunks: its configuration and directory."""
    cfg: DictConfig = toy_config(folder, "dataset.n=3", "dataset.widths=[32,80]")
    cfg.output_dir = str(folder / "outputs")
    cfg.update(task="pairwise", mode="train", probe={"mode": "quadratic"}, trainer={"n_boot": 10})
    directory = folder / "outputs/train" / name
    (directory / "checkpoints/probe").mkdir(parents=True)
    with configured("mode=train") as whole:  # a run keeps every option
        stored = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(whole)), cfg)
    stored.dataset, stored.model.kwargs = cfg.dataset, cfg.model.kwargs
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(stored))
    (directory / "run.json").write_text(json.dumps({"status": "finished"}))
    probe_stack("quadratic", ["embed", 0], 16).save(directory / "checkpoints/probe/best.00.safetensors")
    probe_stack("quadratic", [1], 16).save(directory / "checkpoints/probe/best.01.safetensors")
    cfg.vis = dict(VIS)
    return SimpleNamespace(cfg=cfg, directory=directory)
