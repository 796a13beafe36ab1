"""The baselines every score is shown beside: a score that stands alone means nothing.

    position      the task's own probe on where a patch lies, nothing else
    pixels        the task's own probe on the raw pixels of each patch
    pixels_position  the same on pixels and position side by side: all there is before any backbone
    random        the task's own probe on the same architecture with random weights
    class_oracle  no probe: two patches are "the same object" when their true classes agree
    cosine        cosine similarity of the tokens, only a threshold is fitted
    dot_product   dot product of the tokens, only a threshold is fitted

The majority rate is part of every metric block. A control is fitted, selected and scored by the very code that handles
the probe, on the same images and patches.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional as F

from activation import PatchSample, open_sample
from errors import UserError


class Control(NamedTuple):
    """Something to be fitted and scored: a probe settings block and the samples it reads.

    `probe` None means that the score comes from the labels alone. `seeds` are those of the fits where they are not the
    configuration's: a fit that starts from nothing random is made once.
    """

    name: str
    probe: Mapping[str, Any] | None
    samples: dict[str, PatchSample]
    seeds: list[int] | None = None


class MadeTokens:
    """Tokens of one pretended layer that are made as they are read; to a probe the same as `StackedTokens`.

    Args:
        read: images [B] -> tokens [1, B, T, D] float32.
        layer: what the layer is called.
        n_images: M.
    """

    def __init__(self, read: Callable[[Tensor], Tensor], layer: str, n_images: int) -> None:
        self.read, self.layers = read, [layer]
        self.shape = (1, n_images, *read(torch.arange(1)).shape[2:])

    def gather(self, images: Tensor, layers: list[int] | None = None) -> Tensor:
        """The tokens [1, B, T, D] of some images."""
        return self.read(images)


def position(cfg: DictConfig, samples: dict[str, PatchSample]) -> Control | None:
    """The probe on sine-cosine codes of window, row and column; None for a probe that needs a backbone's blocks.

    Row and column are those in the whole image: how far apart two patches lie, also in two windows, is then all there.
    """
    if cfg.probe.mode == "attention":
        return None
    coded = {}
    for split, sample in samples.items():
        at = sample.position
        if "place" in sample.labels:
            at = torch.cat([at[..., :1].float(), sample.labels["place"]], -1)
        read = lambda images, at=at: position_code(at[images])[None]
        coded[split] = sample._replace(tokens=MadeTokens(read, "position", len(sample.keys)))
    return Control("position", cfg.probe, coded)


def position_code(positions: Tensor, n_frequencies: int = 16) -> Tensor:
    """Sine-cosine code of patch positions.

    Args:
        positions: [M, T, 3] window, row, column.
        n_frequencies: wave lengths from 2 to 200 patches, geometrically spaced (our choice).

    Returns:
        [M, T, 6 * n_frequencies] float32.
    """
    waves = 2 * torch.pi / torch.logspace(0.30103, 2.30103, n_frequencies)  # 2 … 200 patches
    angle = positions[..., None].float() * waves  # [M, T, 3, n]
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


def pixels(cfg: DictConfig, samples: dict[str, PatchSample]) -> Control | None:
    """The probe on the normalised pixels of each patch; None for a probe that needs a backbone's blocks or class token."""
    modes = {cfg.probe.mode, (cfg.probe.get("F") or {}).get("mode")}  # binding may read features with a probe of its own
    if modes & {"attention", "attention_quadratic"} or cfg.model.output_mode in ("cls", "cls_mean"):
        return None
    return Control("pixels", cfg.probe, _with_model(cfg, samples, source="pixels", layers=["embed"], norm=False))


def pixels_position(cfg: DictConfig, samples: dict[str, PatchSample]) -> Control | None:
    """The probe on pixels and position side by side; None for a probe that needs a backbone's blocks."""
    parts = [pixels(cfg, samples), position(cfg, samples)]
    if None in parts:
        return None
    joined = {}
    for split, sample in samples.items():
        sources = [part.samples[split].tokens for part in parts]
        read = lambda images, sources=sources: torch.cat([tokens.gather(images, None) for tokens in sources], -1)
        joined[split] = sample._replace(tokens=MadeTokens(read, "pixels_position", len(sample.keys)))
    return Control("pixels_position", cfg.probe, joined)


def random(cfg: DictConfig, samples: dict[str, PatchSample]) -> Control | None:
    """The probe on the same architecture with random weights; None when the backbone itself is random."""
    if not cfg.model.pretrained:
        return None
    return Control("random", cfg.probe, _with_model(cfg, samples, pretrained=False, weights=None, digest=None))


def class_oracle(cfg: DictConfig, samples: dict[str, PatchSample]) -> Control:
    """Same object if and only if same true class: what class alone can tell."""
    return Control("class_oracle", None, samples, seeds=[0])


def oracle_scores(class_: Tensor, n_stack: int) -> Tensor:
    """Pair scores of the class oracle.

    Args:
        class_: [B, T] true classes, 0 where none is known.

    Returns:
        [S, 1, B, T, T] float32: 1 where the classes agree, -1 where they do not (right for thresholds 0 and 0.5 alike).
    """
    same = class_[:, :, None] == class_[:, None, :]
    return (2.0 * same.float() - 1.0).expand(n_stack, 1, -1, -1, -1)


def cosine(cfg: DictConfig, samples: dict[str, PatchSample]) -> Control | None:
    """Cosine similarity of two tokens."""
    return _similarity("cosine", cfg, samples)


def dot_product(cfg: DictConfig, samples: dict[str, PatchSample]) -> Control | None:
    """Dot product of two tokens."""
    return _similarity("dot_product", cfg, samples)


CONTROLS: dict[str, Callable[[DictConfig, dict[str, PatchSample]], Control | None]] = {
    "position": position,
    "pixels": pixels,
    "pixels_position": pixels_position,
    "random": random,
    "class_oracle": class_oracle,
    "cosine": cosine,
    "dot_product": dot_product,
}


def control_names(cfg: DictConfig) -> list[str]:
    """The names behind `controls=all`, `none`, one name or a list.

    Raises:
        UserError: an unknown name.
    """
    asked = cfg.controls
    names = list(CONTROLS) if asked == "all" else [] if asked in ("none", None) else asked
    names = [names] if isinstance(names, str) else list(names)
    unknown = sorted(set(names) - set(CONTROLS))
    if unknown:
        raise UserError(f"unknown control '{unknown[0]}'; valid for controls=: all, none or a list of {', '.join(CONTROLS)}")
    return names


def build_controls(
    cfg: DictConfig, samples: dict[str, PatchSample], fitting: Collection[str], say: Callable[[str], None]
) -> list[Control]:
    """The controls the configuration asks for.

    Args:
        fitting: those that mean something for the task.

    Raises:
        UserError: an unknown name.
    """
    names, asked = control_names(cfg), cfg.controls
    built = []
    for name in names:
        control = CONTROLS[name](cfg, samples) if name in fitting else None
        if control is not None:
            built.append(control if control.seeds else control._replace(seeds=control_seeds(cfg)))
        elif asked != "all":
            say(f"note: control {name} does not apply to this run and is left out")
    return built


def control_seeds(cfg: DictConfig) -> list[int]:
    """The first `trainer.control_seeds` seeds of the probe."""
    seeds = cfg.trainer.seeds
    return list(range(seeds) if isinstance(seeds, int) else seeds)[: cfg.trainer.control_seeds]


def _similarity(mode: str, cfg: DictConfig, samples: dict[str, PatchSample]) -> Control | None:
    if cfg.task != "pairwise" or cfg.probe.mode == mode:
        return None
    return Control(mode, OmegaConf.merge(cfg.probe, {"mode": mode}), samples, seeds=[0])


def _with_model(cfg: DictConfig, samples: dict[str, PatchSample], **changes: Any) -> dict[str, PatchSample]:
    """The same images and patches through another model; position and labels are checked to be the same."""
    other = cfg.copy()
    OmegaConf.update(other, "model", OmegaConf.merge(cfg.model, changes), merge=False)
    opened = {split: open_sample(other, split, say=lambda text: None) for split in samples}
    for split, sample in samples.items():
        other_position, n_more = opened[split].position, sample.position.shape[1] - opened[split].position.shape[1]
        if n_more == 1 and cfg.model.output_mode == "all":  # pixels have no class token: zeros, which no task asks about
            read = lambda images, x=opened[split].tokens: F.pad(x.gather(images), (0, 0, 1, 0))
            made = MadeTokens(read, "embed", len(sample.keys))
            opened[split] = opened[split]._replace(tokens=made, position=sample.position, labels=sample.labels)
            other_position = torch.cat([sample.position[:, :1], other_position], 1)
        if not torch.equal(other_position, sample.position):
            raise UserError(f"a control drew other patches than the probe on {split}; empty the cache folder {cfg.cache.dir}")
    return opened
