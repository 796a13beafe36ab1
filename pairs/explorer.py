"""The explorer page of finished runs: one HTML file without network that answers every click (`explorer.html` is its frame).

Where the backbone is a plain ViT of a few million weights, the file holds the model and the probes, and the page runs them on
any picture. Otherwise it holds the images asked for with factors of every score: the logits of all pairs of patches of an
image are G M G' + ends with G [N, H]; with G = Q R they are Q (R M R') Q', whose largest eigenvalues give the best factors of
each rank. Factors are stored as 16-bit integers; what they miss is measured and printed on the page.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.layers import Mlp
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from backbones.contract import Backbone
from files import ROOT
from pairs.encode import EncodedScene, FittedRun
from pairs.pair_form import PairForm
from patches.geometry import Geometry
from patches.windows import scaled_image
from show.style import scale_colors

TEMPLATE = Path(__file__).parent / "explorer.html"
WEIGHTS_MB = 6  # float16 weights up to this size go into the page
IMAGE_MB = 15  # per image of a backbone that does not
DISPLAY_SIDE = 1200  # longest side of a picture in the page, in pixels
SHARES = {"probe": 0.6, "cosine": 0.2, "attention": 0.2}  # of the bytes of an image


# ----------------------------------------------------------------------------------------------------------- arrays


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _half(x: Tensor | None) -> dict[str, str] | None:
    """A tensor as little-endian float16 in base64."""
    return None if x is None else {"type": "f2", "data": _text(x.detach().cpu().numpy().astype("<f2").tobytes())}


def _single(x: Tensor | None) -> dict[str, str] | None:
    """A tensor as little-endian float32 in base64."""
    return None if x is None else {"type": "f4", "data": _text(x.detach().cpu().numpy().astype("<f4").tobytes())}


def quantise(z: Tensor) -> tuple[Tensor, Tensor]:
    """16-bit integers [N, r] and the step [r] of each column, so that integer times step is z up to half a step."""
    step = z.abs().amax(0).clamp_min(1e-12) / 32767
    return (z / step).round().to(torch.int16), step


def _matrix(z: Tensor) -> tuple[dict[str, Any], Tensor]:
    """A matrix of factors for the page, and what the page will read."""
    values, step = quantise(z.float())
    data = {"values": {"type": "i2", "data": _text(values.numpy().astype("<i2").tobytes())}, "columns": _single(step)}
    return data, values.float() * step


def _picture(array: np.ndarray, kind: str = "PNG", **options: Any) -> str:
    """A picture [H, W, 3] uint8 as a data address."""
    data = io.BytesIO()
    Image.fromarray(array).save(data, kind, **options)
    return f"data:image/{kind.lower()};base64,{_text(data.getvalue())}"


def _label_picture(labels: Tensor) -> str:
    """A label map [H, W] as a picture: low byte in red, high byte in green; ignored pixels are 65535."""
    ids = torch.where(labels < 0, 65535, labels).numpy().astype(np.uint16)
    return _picture(np.stack([ids & 255, ids >> 8, np.zeros_like(ids)], -1).astype(np.uint8), optimize=True)


# -------------------------------------------------------------------------------------------------------- the model


def plain_vit(backbone: Backbone) -> bool:
    """Whether the page can compute this backbone: timm's ViT without anything the page's few lines leave out, and small."""
    model = getattr(backbone, "model", None)
    if type(model) is not VisionTransformer or model.pos_embed is None or model.reg_token is not None or model.no_embed_class:
        return False
    nothing = [model.norm_pre, model.patch_embed.norm]
    for block in model.blocks:
        if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
            return False
        if block.attn.qkv.bias is None or not isinstance(block.mlp.act, nn.GELU) or block.mlp.act.approximate != "none":
            return False
        nothing += [block.ls1, block.ls2, block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm]
    same_grid = model.pos_embed.shape[1] == backbone.facts.num_prefix_tokens + _grid(backbone)[0] * _grid(backbone)[1]
    size = 2 * sum(p.numel() for p in model.parameters())
    return same_grid and size <= WEIGHTS_MB * 1e6 and all(isinstance(module, nn.Identity) for module in nothing)


def _grid(backbone: Backbone) -> tuple[int, int]:
    facts = backbone.facts
    return facts.image_size[0] // facts.patch_size, facts.image_size[1] // facts.patch_size


def _backbone(backbone: Backbone, live: bool) -> dict[str, Any]:
    facts = backbone.facts
    found: dict[str, Any] = {
        "name": facts.name, "dim": facts.dim, "depth": facts.depth, "heads": facts.heads, "patch": facts.patch_size,
        "prefix": facts.num_prefix_tokens, "size": list(facts.image_size), "grid": list(_grid(backbone)),
        "mean": list(facts.mean), "std": list(facts.std), "interpolation": facts.interpolation, "weights": None,
    }  # fmt: skip
    if live:
        model = backbone.model
        found |= {"eps": model.blocks[0].norm1.eps, "norm": not isinstance(backbone.norm, nn.Identity)}
        state = {name: value for name, value in model.state_dict().items() if not name.startswith(("norm.", "fc_norm."))}
        if found["norm"]:
            state |= {f"norm.{name}": value for name, value in backbone.norm.state_dict().items()}
        found["weights"] = {name: _half(value) for name, value in state.items()}
    return found


def _form(form: PairForm) -> dict[str, Any]:
    arrays = {name: _half(getattr(form, name)) for name in ("form", "encoder")}
    exact = ("shift", "scale", "encoder_bias", "gain", "left", "right", "bias")
    arrays |= {name: _single(getattr(form, name)) for name in exact}
    return {"features": form.features, "link": form.link, "width": form.left.shape[1], **arrays}


# -------------------------------------------------------------------------------------------------- stored factors


def symmetric_factors(g: Tensor, form: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors Z [N, r] and signs [r] with Z diag(signs) Z' the best rank-r approximation of G form G'; form symmetric."""
    q, r = torch.linalg.qr(g.double())
    values, vectors = torch.linalg.eigh(r @ form.double() @ r.mT)
    top = values.abs().argsort(descending=True)[:rank]
    return (q @ vectors[:, top] * values[top].abs().sqrt()).float(), values[top].sign().float()


def general_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A [N, r], B [M, r] with A B' the best rank-r approximation of a matrix [N, M]."""
    u, values, v = torch.svd_lowrank(matrix.float(), q=min(rank + 8, *matrix.shape), niter=4)
    root = values[:rank].sqrt()
    return u[:, :rank] * root, v[:, :rank] * root


def stored_layer(form: PairForm, encoded: EncodedScene, at: int, ranks: Mapping[str, int]) -> tuple[dict[str, Any], dict]:
    """What the page keeps of one layer of an image, and the largest error of each of its scores.

    Args:
        at: index of the layer in `encoded`; ranks: columns kept for the probe (per seed), cosine and attention.
    """
    tokens = encoded.tokens[at].flatten(0, 1)  # [n N, D]
    g, fits, logits = form.encode(tokens), [], []
    for seed in range(len(form.bias)):
        x = g[seed if len(g) > 1 else 0]
        matrix = torch.eye(x.shape[1]) * form.gain[seed] if form.form is None else form.form[seed]
        fit: dict[str, Any] = {"left": None, "right": None, "signs": None, "bias": float(form.bias[seed])}
        ends = x @ form.left[seed], x @ form.right[seed]
        fit |= {"rows": _single(ends[0]), "columns": _single(ends[1])}
        read = ends[0][:, None] + ends[1] + form.bias[seed]
        if bool(matrix.any()):
            if torch.allclose(matrix, matrix.mT, rtol=1e-4, atol=1e-7):
                left, signs = symmetric_factors(x, matrix, ranks["probe"])
                fit["left"], left = _matrix(left)
                fit["signs"] = _single(signs)
                read = read + left * signs @ left.mT
            else:
                left, right = general_factors(x @ matrix @ x.mT, ranks["probe"] // 2)
                (fit["left"], left), (fit["right"], right) = _matrix(left), _matrix(right)
                read = read + left @ right.mT
        fits.append(fit)
        logits.append(read)
    read = torch.stack(logits)
    read = (read.sigmoid() if form.link == "sigmoid" else read).mean(0)
    error = {"probe": float((read - form.scores(tokens, tokens)).abs().max())}
    norms = tokens.norm(dim=-1)
    unit = tokens / norms.clamp_min(1e-8)[:, None]
    cosine, found = _matrix(symmetric_factors(unit, torch.eye(unit.shape[1]), ranks["cosine"])[0])
    error["cosine"] = float((found @ found.mT - unit @ unit.mT).fill_diagonal_(0).abs().max())
    layer: dict[str, Any] = {"n": len(tokens), "N": encoded.tokens.shape[2], "link": form.link, "probe": fits}
    layer |= {"cosine": cosine, "norms": _single(norms), "attention": None}
    if encoded.attention[at] is not None:
        layer["attention"], errors = [], []
        for weights in encoded.attention[at][:, -encoded.tokens.shape[2] :]:  # of one window, patches to patches [N, N]
            left, right = general_factors(weights, ranks["attention"] // 2)
            (left_data, left), (right_data, right) = _matrix(left), _matrix(right)
            layer["attention"].append({"left": left_data, "right": right_data})
            errors.append(float((left @ right.mT - weights).abs().max() / weights.max()))
        error["attention"] = max(errors)
    return layer, error


def stored_ranks(n_tokens: int, n_seeds: int, n_layers: int, megabytes: float = IMAGE_MB) -> dict[str, int]:
    """Columns of the factors that fit into the bytes of an image (2 bytes each, 4/3 in base64)."""
    columns = megabytes * 1e6 * 0.75 / 2 / (n_tokens * n_layers)
    shares = {"probe": columns * SHARES["probe"] / n_seeds, "cosine": columns * SHARES["cosine"]}
    shares["attention"] = columns * SHARES["attention"]
    return {name: max(4, int(share)) for name, share in shares.items()}


# --------------------------------------------------------------------------------------------------------- the page


def _image(encoded: EncodedScene, anchor: Sequence[int], antialias: bool, interpolation: str, live: bool) -> dict[str, Any]:
    """Picture, labels and geometry of an image; the pixels the model sees where the page runs it."""
    scene, geometry = encoded.scene, encoded.geometry
    height, width = scene.image.shape[-2:]
    pixels, side = scene.image.permute(1, 2, 0).numpy(), max(height, width)
    small = Image.fromarray(pixels)
    small.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE))
    options = {"kind": "JPEG", "quality": 88} if side > 256 else {"optimize": True}
    size = small.size[::-1]
    shrink = lambda x: nn.functional.interpolate(x[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()
    found: dict[str, Any] = {
        "key": scene.key, "hw": [height, width], "picture": _picture(np.asarray(small), **options), "scaled": None,
        "geometry": _geometry(geometry), "anchor": _index(anchor, geometry), "labels": None, "stored": None,
        "identity": None, "class": None,
    }  # fmt: skip
    if live and side > 256 or live and tuple(scene.image.shape[-2:]) != geometry.scaled:
        scaled = scaled_image(scene.image, geometry, interpolation=interpolation, antialias=antialias)
        found["scaled"] = _picture(scaled.permute(1, 2, 0).numpy(), optimize=True)
    for name in ("identity", "class"):
        if name in scene.labels:
            found[name] = _label_picture(shrink(scene.labels[name]))
    if encoded.labels:
        of_patches = {}
        for name, labels in encoded.labels.items():
            of_patches |= {name: labels.label, f"{name}_valid": labels.valid.int()}
            of_patches[f"{name}_share"] = (100 * labels.purity).round().int()
        found["labels"] = {name: _text(x.numpy().astype("<i4").tobytes()) for name, x in of_patches.items()}
    return found


def _geometry(g: Geometry) -> dict[str, Any]:
    return {
        "scaled": g.scaled, "starts": g.starts, "window": g.window, "pad": g.pad, "grid": g.grid, "patch": g.patch,
        "pixel_starts": g.image_starts or g.starts,
    }  # fmt: skip


def _index(anchor: Sequence[int], geometry: Geometry) -> int:
    window, row, column = anchor
    return (window * geometry.grid[0] + row) * geometry.grid[1] + column


def _knows_generated_scenes(backbone: Backbone) -> bool:
    """Whether this is the embedded backbone, by its digest."""
    about = json.loads((ROOT / "weights" / "demo_vit.json").read_text(encoding="utf-8"))
    return backbone.facts.weights == f"sha256:{about['digest']}"


def explorer_page(
    title: str,
    runs: Sequence[FittedRun],
    encoded: Sequence[Sequence[EncodedScene]],
    anchors: Sequence[Sequence[int]],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> bytes:
    """The page of some images seen by some runs.

    Args:
        runs: of one protocol and one data set; runs of one configured backbone share it.
        encoded: [images][runs], with attention. anchors: (window, row, column) per image, by the first run.
        classes: names, background first. palette: colours [n, 3] 0…255 of the true objects.

    Returns:
        the bytes of an HTML file.
    """
    models: list[FittedRun] = []
    for run in runs:
        if all(run.backbone is not other.backbone for other in models):
            models.append(run)
    of_run = [next(i for i, model in enumerate(models) if model.backbone is run.backbone) for run in runs]
    native = all(of_image[0].geometry.grid == _grid(runs[0].backbone) for of_image in encoded)
    live = native and len(models) == 1 and plain_vit(models[0].backbone)
    forms = [run.forms() for run in runs]
    items = []
    rules = runs[0].cfg.protocol.geometry
    for of_image, anchor in zip(encoded, anchors, strict=True):
        interpolation = rules.interpolation or runs[0].backbone.facts.interpolation
        items.append(_image(of_image[0], anchor, rules.antialias, interpolation, live))
    notes = [_scores_note(runs)]
    if live:
        notes.append("The file holds the backbone and its probes: drop any photo onto the page, or draw a scene.")
    else:
        errors: dict[str, float] = {}
        for item, of_image in zip(items, encoded, strict=True):
            n_tokens, n_layers = of_image[0].tokens.shape[1] * of_image[0].tokens.shape[2], sum(len(f) for f in forms)
            ranks = stored_ranks(n_tokens, len(forms[0][0].bias), n_layers)
            item["stored"] = []
            for seen, of_layers in zip(of_image, forms, strict=True):
                layers = [stored_layer(form, seen, at, ranks) for at, form in enumerate(of_layers)]
                item["stored"].append([layer for layer, _ in layers])
                for _, error in layers:
                    errors |= {name: max(value, errors.get(name, 0.0)) for name, value in error.items()}
        notes.append(
            "The file holds factors of the scores, not the backbone. Largest differences to the exact numbers: "
            + ", ".join(f"{name} {value:.4f}" for name, value in errors.items())
            + " (attention: as a share of the largest weight)."
        )
    if any(_knows_generated_scenes(model.backbone) for model in models):
        notes.append(
            "This backbone is a small one that was trained on generated scenes alone: it knows such scenes. "
            "What it shows of a photograph is what a network does outside of what it has learnt."
        )
    notes.append(
        "Where windows overlap, their maps are averaged, each window counting less towards its border. "
        "AUROC: of the map against the patches of the anchor's object, the anchor itself left out."
    )
    data = {
        "subtitle": title, "notes": notes, "classes": list(classes), "palette": [list(color) for color in palette],
        "viridis": _text(scale_colors(256).tobytes()),
        "backbones": [_backbone(model.backbone, live) for model in models],
        "runs": [
            {
                "name": run.directory.name, "backbone": which, "layers": run.layers, "score": run.score_name,
                "forms": [_form(form) for form in of_layers] if live else None,
            }
            for run, which, of_layers in zip(runs, of_run, forms, strict=True)
        ],
        "images": items,
    }  # fmt: skip
    frame = TEMPLATE.read_text(encoding="utf-8")
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    escaped = title.replace("&", "&amp;").replace("<", "&lt;")
    return frame.replace("__TITLE__", escaped).replace("__DATA__", text).encode()


def _scores_note(runs: Sequence[FittedRun]) -> str:
    """What the numbers of the probe are."""
    if runs[0].probes[0].arity == "pairwise":
        return "Score of a pair of patches: the probability that they show one object, by the probe, mean over its seeds."
    return "Score of a pair of patches: inner product of the two distributions the probe reads out, mean over its seeds."
