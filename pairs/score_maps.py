"""mode=vis: how a finished run sees images: strip, GIF, numbers, a sheet of several, and the explorer page."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

from activation import open_sample
from datasets.pictures import read_image
from datasets.scene import Scene
from errors import UserError
from files import write_atomically
from pairs.encode import EncodedScene, FittedRun, encode_scene, open_fitted_run
from pairs.explorer import explorer_page, plain_vit
from pairs.map_figures import PALETTE, draw_score_maps, draw_sheet, gif_bytes
from pairs.maps import VIEWS, ScoreMaps, auroc, choose_anchor, map_row, nearest_of_class
from runs.finished import read_facts
from runs.progress import stage, stages, track
from runs.run import Run
from runs.states import pack
from show.style import png_bytes
from store.index import build_dataset

PAGE_IMAGES = 6  # on a page that runs the model itself: the images asked for, filled up with others of the split
NO_NUMBER = -1.0  # in the file of numbers, where a map has none


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """mode=vis: figures, numbers and the explorer page of some images, into `vis.out` or the run directory.

    Raises:
        UserError: no such run, image, anchor or row.
    """
    vis = cfg.vis
    if unknown := [row for row in vis.rows if row not in VIEWS]:
        raise UserError(f"unknown row '{unknown[0]}' in vis.rows; valid: {', '.join(VIEWS)}")
    if not vis.rows:
        raise UserError(f"vis.rows is empty, name at least one of {', '.join(VIEWS)}")
    runs = open_runs([run.source, *map(Path, vis.beside)], cfg)
    first, split = runs[0], str(vis.split)
    folder = _folder(vis.out, run.dir)
    dataset, several, scenes = None, [], []
    stages(("run and images", 2), ("maps", 3), *(["explorer page"] if vis.page else []))
    stage("run and images", parts=3)
    if any(not _is_file(name) for name in _names(vis.image)):
        dataset = build_dataset(first.cfg, split)
    for name in _names(vis.image):
        scenes.append(find_scene(name, first, dataset, split, run.say))
    seen = [encode_all(scene, runs) for scene in track(scenes, "backbone", "image")]
    if "attention" in vis.rows and all(weights is None for weights in seen[0][0].attention):
        run.say(f"note: the attention of {first.backbone.facts.name} cannot be read, its row is left out")
    for of_scene in seen:
        for nth in range(int(vis.anchors)):
            several.append(maps_of(of_scene, runs, vis, nth))
    stage("maps")
    for maps in track(several, "drawing", "anchor"):
        about = f"{describe(runs)} · image {maps.key}"
        facts = {"run": str(first.directory), "split": split}
        for path in write_score_maps(maps, folder, gif=bool(vis.gif), facts=facts, about=about):
            run.say(str(path))
    if len(several) > 1:
        write_atomically(folder / "sheet.png", png_bytes(draw_sheet(several, describe(runs[:1]))))
        run.say(str(folder / "sheet.png"))
    if vis.page:
        stage("explorer page")
        write_atomically(folder / "explorer.html", _page(seen, several, runs, dataset))
        run.say(f"{folder / 'explorer.html'} (open it in a browser)")
    probe = next((row for row in several[0].rows if row.view == "probe"), several[0].rows[0])
    place = several[0].anchor.place
    return {"own_score": None if place is None else [float(scores[place]) for scores in probe.patch_scores]}


def open_runs(directories: Sequence[Path], cfg: DictConfig) -> list[FittedRun]:
    """The runs that are shown together; those of one configured backbone share it.

    Raises:
        UserError: one of them is no finished run, or they were fitted on patches that do not lie alike.
    """
    runs: list[FittedRun] = []
    for directory in directories:
        fitted = open_fitted_run(directory, cfg, [r.backbone for r in runs], [r.cfg.model for r in runs])
        if runs and fitted.cfg.protocol.geometry != runs[0].cfg.protocol.geometry:
            raise UserError(
                f"{directory} and {runs[0].directory} cut images in different ways (protocol.geometry), so their maps have "
                "different patches; show them one by one"
            )
        facts, base = fitted.backbone.facts, runs[0].backbone.facts if runs else fitted.backbone.facts
        if (facts.patch_size, facts.image_size) != (base.patch_size, base.image_size):
            raise UserError(
                f"{directory} has patches of {facts.patch_size} px in images of {facts.image_size}, {runs[0].directory} of "
                f"{base.patch_size} px in {base.image_size}; show them one by one"
            )
        runs.append(fitted)
    return runs


def model_name(run: FittedRun) -> str:
    """The backbone as its run calls it: the file of the config group, else the architecture."""
    return str(read_facts(run.directory).get("identity", {}).get("model") or run.backbone.facts.name)


def describe(runs: Sequence[FittedRun]) -> str:
    """Model, probe and directory of a run for the line above a figure; of several, their numbers and directories."""
    if len(runs) == 1:
        return f"{model_name(runs[0])} · {runs[0].cfg.probe.mode} probe · run {runs[0].directory.name}"
    return " · ".join(f"run {number}: {run.directory.name}" for number, run in enumerate(runs, 1))


def encode_all(scene: Scene, runs: Sequence[FittedRun]) -> list[EncodedScene]:
    """A scene as every run sees it, with attention."""
    return [encode_scene(scene, run.layers, run.cfg, run.backbone, attention=True) for run in runs]


def maps_of(of_scene: Sequence[EncodedScene], runs: Sequence[FittedRun], vis: Any, nth: int = 0) -> ScoreMaps:
    """The maps of one anchor in a scene: per run its probe, then the other rows that are asked for.

    Args:
        of_scene: the scene as each of the runs sees it.
        vis: anchor, pixel, patch, rows and smooth as in the configuration.
        nth: where neither pixel nor patch is named: 0 takes the largest object, 1 the second largest, …
    """
    scene = of_scene[0].scene
    anchor = choose_anchor(of_scene[0], str(vis.anchor), vis.pixel, vis.patch, nth)
    rows = []
    for run, encoded in zip(runs, of_scene, strict=True):
        for view in vis.rows:
            if view == "attention" and all(weights is None for weights in encoded.attention):
                continue
            rows.append(map_row(run, encoded, anchor, view, smooth=bool(vis.smooth)))
    if not rows:
        raise UserError(f"the attention of {runs[0].backbone.facts.name} cannot be read; name another row in vis.rows")
    neighbour = nearest_of_class(scene, anchor.object_id)
    return ScoreMaps(scene.key, scene.image, scene.labels.get("identity"), anchor, neighbour, rows)


# ------------------------------------------------------------------------------------------------- which images


def _names(image: Any) -> list[Any]:
    """`vis.image` as a list."""
    names = list(image) if isinstance(image, list | tuple | ListConfig) else [image]
    if not names:
        raise UserError("vis.image is an empty list, name an index, a key, a file, best or worst")
    return names


def _is_file(name: Any) -> bool:
    return isinstance(name, str) and name not in ("best", "worst") and Path(name).expanduser().is_file()


def find_scene(name: Any, run: FittedRun, dataset: Any, split: str, say: Any) -> Scene:
    """The scene behind an entry of `vis.image`.

    Args:
        name: index in the split; file of a picture (no labels are known of it); key of an image; "best" or "worst" by the
            image's own AUROC over its kept patches, at the layer that is best over the split.

    Raises:
        UserError: there is no such image, the file is no picture, or the scene has no identity map.
    """
    if _is_file(name):
        path = Path(name).expanduser()
        return Scene(read_image(path, path.name, upright=True), {}, path.stem)
    if isinstance(name, int) and not isinstance(name, bool):
        if not 0 <= name < len(dataset):
            raise UserError(f"vis.image={name}, expected 0 … {len(dataset) - 1} (images of split {split})")
        return _labelled(dataset[name])
    if not isinstance(name, str):
        raise UserError(f"vis.image={name!r} is not understood, expected an index, a key, a file, best or worst")
    sample = open_sample(run.cfg, split, say=say)
    if name in ("best", "worst"):
        scores, layer = image_scores(run, sample)
        known = [i for i, score in enumerate(scores) if score is not None]
        if not known:
            raise UserError(f"no image of split {split} has pairs of one object and pairs of two; name an image by its index")
        at = (max if name == "best" else min)(known, key=lambda i: scores[i])
        say(f"{name} of {len(known)} images at layer {layer}: {sample.keys[at]}, AUROC {scores[at]:.3f}")
    elif name in sample.keys:
        at = sample.keys.index(name)
    else:
        near = [key for key in sample.keys if name in key][:3]
        hint = f"keys that hold it: {', '.join(near)}" if near else f"keys look like {sample.keys[0]}"
        raise UserError(f"vis.image={name} is no file and no image of split {split}; {hint}")
    for number in range(at, len(dataset)):  # images that were left out stand between, so it is never before `at`
        if (scene := dataset[number]).key == sample.keys[at]:
            return _labelled(scene)
    raise UserError(f"{sample.keys[at]} is no longer in split {split}; delete the cache or name another image")


def _labelled(scene: Scene) -> Scene:
    if "identity" not in scene.labels:
        raise UserError(f"{scene.key} has no identity map, score maps need one; name another dataset, or a picture by its file")
    return scene


@torch.inference_mode()
def image_scores(run: FittedRun, sample: Any) -> tuple[list[float | None], int | str]:
    """AUROC of the pairs i < j of every image of a sample, at the layer where the mean over images is highest."""
    identity, valid = sample.labels["identity"], sample.labels["identity_valid"]
    n_images, n_tokens = identity.shape
    first, second = torch.triu_indices(n_tokens, n_tokens, 1)
    best: tuple[float, list[float | None], int | str] = (-1.0, [], "")
    for at, form in enumerate(run.forms()):
        found: list[float | None] = []
        tokens = sample.tokens.gather(torch.arange(n_images), [sample.tokens.layers.index(run.layers[at])])[0]
        for image in range(n_images):
            used = valid[image][first] & valid[image][second]
            scores = form.scores(tokens[image].float(), tokens[image].float())[first, second]
            same = identity[image][first] == identity[image][second]
            found.append(auroc(scores[used].numpy(), same[used].numpy()))
        known = [score for score in found if score is not None]
        mean = sum(known) / max(len(known), 1)
        if mean > best[0]:
            best = (mean, found, run.layers[at])
    return best[1], best[2]


# ------------------------------------------------------------------------------------------------------- writing


def _folder(out: str | None, default: Path) -> Path:
    folder = Path(out) if out else default
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder vis.out={folder}: {error.strerror}; name another") from error
    return folder


def file_stem(maps: ScoreMaps) -> str:
    """Name of the files of a strip: from the image and the anchor alone."""
    anchor = maps.anchor
    place = "_cls" if anchor.place is None else "_w{}_r{}_c{}".format(*anchor.place)
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in maps.key) + place + "_object" * (anchor.kind == "object")


def write_score_maps(maps: ScoreMaps, folder: Path, *, gif: bool, facts: dict[str, Any], about: str = "") -> list[Path]:
    """Write strip (PNG), GIF, numbers (safetensors, -1 where there is no number) and facts (JSON) of one anchor."""
    stem, anchor = file_stem(maps), maps.anchor
    place = None if anchor.place is None else dict(zip(("window", "row", "column"), anchor.place, strict=True))
    written = {
        **facts, "key": maps.key, "image_hw": list(maps.image.shape[-2:]), "layers": maps.rows[0].layers,
        "anchor": {"kind": anchor.kind, **(place or {})}, "box": anchor.box and list(anchor.box), "object": anchor.object_id,
        "neighbour": maps.neighbour, "rows": [dict(_row_facts(maps, row)) for row in maps.rows],
    }  # fmt: skip
    numbers = {} if maps.identity is None else {"identity": maps.identity}
    for index, row in enumerate(maps.rows):
        numbers[f"{index}.patch_scores"] = row.patch_scores.nan_to_num(NO_NUMBER)
        numbers[f"{index}.maps"] = row.maps.nan_to_num(NO_NUMBER).half()
    files = {
        f"{stem}.png": png_bytes(draw_score_maps(maps, about)),
        f"{stem}.safetensors": pack(numbers, {"rows": [[row.run, row.view] for row in maps.rows]}, stem),
        f"{stem}.json": (json.dumps(written, indent=2) + "\n").encode(),
    }
    if gif:
        files[f"{stem}.gif"] = gif_bytes(maps, about)
    for name, data in files.items():
        write_atomically(folder / name, data)
    return [folder / name for name in files]


def _row_facts(maps: ScoreMaps, row: Any) -> Iterator[tuple[str, Any]]:
    """What the JSON keeps of a row of maps: per layer the anchor's own score, the AUROC, and means on and off its object."""
    yield from {"run": row.run, "view": row.view, "name": row.name, "auroc": row.auroc}.items()
    number = lambda x: None if x.numel() == 0 or bool(x.isnan().all()) else float(x.nanmean())
    yield "own_score", None if maps.anchor.place is None else [number(s[maps.anchor.place]) for s in row.patch_scores]
    if maps.identity is not None and maps.anchor.place is not None:
        inside = maps.identity == maps.anchor.object_id
        yield "mean_on_object", [number(m[inside]) for m in row.maps]
        yield "mean_elsewhere", [number(m[~inside]) for m in row.maps]


def _page(
    seen: Sequence[Sequence[EncodedScene]], several: Sequence[ScoreMaps], runs: Sequence[FittedRun], dataset: Any
) -> bytes:
    """The explorer page of the images asked for, and of others where the page can run the model on them anyway."""
    seen, first = list(seen), runs[0]
    anchors = {maps.key: maps.anchor.place for maps in reversed(several) if maps.anchor.place is not None}
    if dataset is not None and len(runs) == 1 and plain_vit(first.backbone):
        number = 0
        while len(seen) < min(PAGE_IMAGES, len(dataset)) and number < 2 * PAGE_IMAGES and number < len(dataset):
            if dataset[number].key not in {of_scene[0].scene.key for of_scene in seen}:
                seen.append(encode_all(_labelled(dataset[number]), runs))
            number += 1
    places = [anchors.get(of_scene[0].scene.key) or choose_anchor(of_scene[0], "patch").place for of_scene in seen]
    names = " beside ".join(run.directory.name for run in runs)
    about = f"{model_name(first)} · {first.cfg.probe.mode} probe · {names}"
    classes = [] if dataset is None else dataset.classes
    return explorer_page(about, runs, seen, places, classes, [(tone * 255).round().astype(int).tolist() for tone in PALETTE])
