"""Objects out of pairs, scene by scene: every method has a setting chosen on validation images, scores on others, and masks.

Every method has one thing to choose, because the number of objects is unknown: the offset that is taken from the log-odds
before correlation clustering; how many groups the spectral methods and k-means make (`SETTINGS`). It is the setting of the
highest mean of FG-ARI and mBO over validation images, so that methods with and without the probe have the same budget.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from analysis import objects
from errors import UserError
from files import write_atomically
from metrics.bootstrap import Estimate, difference, interval, mean_estimate, resample
from pairs.encode import EncodedScene
from pairs.pair_form import PairForm
from patches.anchor import patch_box
from patches.selection import owned_patches
from runs.progress import track
from runs.run import Run

Setting = tuple[str, float]  # what is set, and its value


class Patches(NamedTuple):
    """The n patches of a scene that are grouped: those that stand for an area.

    key: of the scene. tokens: [n, D]. logits: [n, n] of the probe, mean over seeds. place: int64 [H, W], which patch stands
    for a pixel. true: [H, W], identity of the pixels. ceiling: [H, W], the true labels of the patches.
    """

    key: str
    tokens: Tensor
    logits: Tensor
    place: Tensor
    true: np.ndarray
    ceiling: np.ndarray


class Choice(NamedTuple):
    """The setting of a method, and the mean of FG-ARI and mBO it reached on validation images."""

    setting: Setting
    score: float


class Method(NamedTuple):
    """A way to group: what it needs of a scene, and the groups [n] it makes of that with a setting."""

    prepare: Callable[[Patches], Any]
    group: Callable[[Any, Setting], Tensor]
    settings: tuple[Setting, ...]
    reads_probe: bool


_GROUPS = tuple(("groups", float(n)) for n in (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16))
_SPECTRAL = (("largest gap", 0.0), *(("eigenvalues above", t) for t in (0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)), *_GROUPS)
_OFFSETS = tuple(("log-odds minus", v) for v in (-3.0, -2.5, -2.0, -1.5, -1.25, -1.0, -0.75, -0.5, -0.25, 0.0, 0.5, 1.0))


def _unit(patches: Patches) -> Tensor:
    return torch.nn.functional.normalize(patches.tokens, dim=-1)


def _cut(spectrum: objects.Spectrum, setting: Setting) -> Tensor:
    rule, value = setting
    match rule:
        case "largest gap":
            n_groups = objects.count_by_gap(spectrum)
        case "eigenvalues above":
            n_groups = objects.count_above(spectrum, value)
        case _:
            n_groups = min(int(value), len(spectrum.values))
    return objects.normalised_cut(spectrum, n_groups)


METHODS = {
    "spectral": Method(lambda p: objects.spectrum(p.logits.sigmoid()), _cut, _SPECTRAL, True),
    "correlation": Method(lambda p: p.logits, lambda x, s: objects.correlation_clustering(x - s[1]), _OFFSETS, True),
    "k-means": Method(_unit, lambda x, s: objects.k_means(x, min(int(s[1]), len(x))), _GROUPS, False),
    "normalised cut": Method(lambda p: objects.spectrum((_unit(p) @ _unit(p).mT).clamp_min(0)), _cut, _SPECTRAL, False),
}
CEILING = "true patches (ceiling)"


def patches_of(encoded: EncodedScene, form: PairForm, at: int) -> Patches:
    """What is grouped of a scene at one layer (its position in the run) by one probe."""
    owned = owned_patches(encoded.geometry).flatten()
    x = encoded.tokens[at].flatten(0, 1)[owned]  # [n, D]
    logits = form.logits(x, x).mean(0)
    number = torch.zeros(len(owned), dtype=torch.long)
    number[owned] = torch.arange(len(x))
    ceiling = paint(encoded, encoded.labels["identity"].label.flatten().long())
    true = encoded.scene.labels["identity"].numpy()
    return Patches(encoded.scene.key, x, (logits + logits.mT) / 2, paint(encoded, number), true, ceiling.numpy())


def paint(encoded: EncodedScene, values: Tensor) -> Tensor:
    """A map of the image from one value per patch: values [n N, ...] -> [H, W, ...], of the patches that stand for areas."""
    image_hw = encoded.scene.image.shape[-2:]
    picture = torch.zeros(*image_hw, *values.shape[1:], dtype=values.dtype)
    numbers = torch.arange(len(values)).view(len(encoded.geometry.starts), *encoded.geometry.grid)
    for place in owned_patches(encoded.geometry).nonzero().tolist():
        top, left, bottom, right = (round(v) for v in patch_box(place, encoded.geometry, image_hw))
        picture[top:bottom, left:right] = values[numbers[tuple(place)]]
    return picture


def score(true: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """FG-ARI, mBO and number of groups of a mask [H, W]; None where a scene has no objects."""
    ari, mbo = objects.foreground_ari(true, mask), objects.mean_best_overlap(true, mask)
    return {"fg_ari": ari, "mbo": mbo, "n_groups": len(np.unique(mask))}


def choose_settings(val: Sequence[Patches]) -> tuple[dict[str, Choice], list[dict[str, Any]]]:
    """The setting of every method that is best on validation scenes, and the rows of all that were tried.

    Raises:
        UserError: no validation scene has an object.
    """
    val = [patches for patches in val if (patches.true > 0).any()]
    if not val:
        raise UserError(
            "none of the validation images has an object, so no grouping can be chosen; set analyze.val_images higher"
        )
    chosen: dict[str, Choice] = {}
    rows = []
    for name, method in track(METHODS.items(), "choosing settings", "method"):
        prepared = [method.prepare(patches) for patches in val]
        for setting in method.settings:
            masks = (method.group(x, setting)[p.place].numpy() for x, p in zip(prepared, val, strict=True))
            scores = [score(p.true, mask) for p, mask in zip(val, masks, strict=True)]
            means = {key: float(np.mean([s[key] for s in scores])) for key in ("fg_ari", "mbo", "n_groups")}
            rows.append({"method": name, "setting": setting[0], "value": setting[1], **means})
            choice = Choice(setting, (means["fg_ari"] + means["mbo"]) / 2)
            if name not in chosen or choice.score > chosen[name].score:
                chosen[name] = choice
    return chosen, rows


def group_scenes(scenes: Iterable[Patches], chosen: dict[str, Choice]) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """Rows of scores per scene and method, and per scene the masks [H, W] of every method, background 0."""
    rows, masks = [], []
    for patches in scenes:
        of_scene = {}
        for name, method in METHODS.items():
            mask = method.group(method.prepare(patches), chosen[name].setting)[patches.place]
            rows.append({"key": patches.key, "method": name, **score(patches.true, mask.numpy())})
            of_scene[name] = background_first(mask)
        rows.append({"key": patches.key, "method": CEILING, **score(patches.true, patches.ceiling)})
        masks.append(of_scene)
    return rows, masks


def background_first(mask: Tensor) -> Tensor:
    """Groups [H, W] numbered from 1, and 0 for the group that holds most of the border: it is taken for the background."""
    border = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    rest = torch.where(mask == border.mode().values, -1, mask)
    return rest.unique(return_inverse=True)[1]


def estimates(rows: Sequence[dict[str, Any]], method: str) -> dict[str, Estimate]:
    """Mean over scenes of FG-ARI and mBO of a method."""
    of_method = [row for row in rows if row["method"] == method and row["mbo"] is not None]
    return {key: mean_estimate(torch.tensor([[row[key] for row in of_method]])) for key in ("fg_ari", "mbo")}


def summary(rows: Sequence[dict[str, Any]], chosen: dict[str, Choice], seed: int) -> tuple[list[dict], dict[str, Any]]:
    """Per method its scores with 95 % intervals over scenes; and the best method that reads the probe minus the best without.

    Which of them is best is decided by validation scenes (`chosen`); both see the same resamples.

    Raises:
        UserError: no scene has an object.
    """
    n_scenes = sum(row["method"] == CEILING and row["mbo"] is not None for row in rows)
    if not n_scenes:
        raise UserError("none of the images that are grouped has an object; set analyze.object_images higher")
    draws, records = resample(n_scenes, seed=seed), []
    for name in [*METHODS, CEILING]:
        groups = float(np.mean([row["n_groups"] for row in rows if row["method"] == name]))
        setting = "{} {:g}".format(*chosen[name].setting) if name in chosen else "–"
        record = {"method": name, "chosen_on_val": setting, "n_groups": groups, "images": n_scenes}
        records.append(record | _with_intervals(estimates(rows, name), draws))
    first, second = (
        max((name for name, method in METHODS.items() if method.reads_probe == with_probe), key=lambda n: chosen[n].score)
        for with_probe in (True, False)
    )
    a, b = estimates(rows, first), estimates(rows, second)
    gain = {"method": f"{first} minus {second}"} | _with_intervals({key: difference(a[key], b[key]) for key in a}, draws)
    return records, gain


def _with_intervals(means: dict[str, Estimate], draws: Tensor) -> dict[str, float]:
    record = {}
    for key, estimate in means.items():
        low, high = interval(estimate, draws, bounds=(-1.0, 1.0))
        record |= {key: float(estimate.value), f"{key}_low": float(low), f"{key}_high": float(high)}
    return record


def shown(record: dict[str, Any], key: str) -> str:
    """A score and its interval as a cell of a table."""
    return f"{record[key]:.3f} [{record[f'{key}_low']:.3f}, {record[f'{key}_high']:.3f}]"


def write_masks(encoded: EncodedScene, mask: Tensor, run: Run) -> None:
    """Image and mask (0 background) of a scene as `dataset=folder dataset.root=…/objects` reads them."""
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in encoded.scene.key)
    image = encoded.scene.image.permute(1, 2, 0).numpy()
    for folder, array in (("images", image), ("identity", mask.numpy().astype(np.uint16))):
        path = run.dir / "objects" / folder / "test" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        Image.fromarray(array).save(data, "png")
        write_atomically(path, data.getvalue())
