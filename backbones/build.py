"""Architectures of timm without weights, with random weights, or with weights from the hub."""

from __future__ import annotations

import difflib
import functools
import json
import socket
import urllib.request
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from errors import UserError

Size = tuple[int, int] | None
# What `timm.create_model` takes beside the architecture: weights, files and folders come from options of this program.
NOT_ARCHITECTURE = frozenset(
    "pretrained pretrained_cfg pretrained_cfg_overlay checkpoint_path cache_dir scriptable exportable no_jit num_classes "
    "features_only out_indices pretrained_strict pretrained_filter_fn".split()
)


def create(name: str, kwargs: str, image_size: Size, **options: Any) -> tuple[nn.Module, bool]:
    """A timm model without head, of random weights, and whether it takes any image size.

    Where the family cannot, the model is built for `image_size`. `global_pool` is never passed: it would turn the final
    norm into nothing (MAE) or the reverse (BEiT).

    Args:
        name: timm's; kwargs: JSON of further arguments of the model; options: for `timm.create_model`.
    """
    import timm  # here and below: it takes seconds, and what is cached needs none of it

    extra = json.loads(kwargs)
    if "global_pool" in extra:
        raise UserError("model.kwargs.global_pool changes the norms of a model, leave it out: pooling is model.output_mode")
    if refused := sorted(NOT_ARCHITECTURE & extra.keys()):
        raise UserError(f"model.kwargs.{refused[0]} is no argument of an architecture, leave it out (files: model.weights)")
    build = functools.partial(timm.create_model, name, num_classes=0, **options)
    sized = {"img_size": image_size} if image_size else {}
    options_set = " and ".join([f"model.kwargs={extra}"] * bool(extra) + [f"model.image_size={image_size}"] * bool(sized))
    try:
        try:
            return build(**{"dynamic_img_size": True, **extra}), bool(extra.get("dynamic_img_size", True))
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
        return build(**sized, **extra), False
    except (TypeError, AssertionError, ValueError) as error:
        if not options_set:
            raise
        raise UserError(f"{name} does not take {options_set}: {str(error) or 'they contradict each other'}") from error


@functools.lru_cache(maxsize=8)
def skeleton(name: str, kwargs: str, image_size: Size) -> tuple[nn.Module, bool]:
    """What `create` gives, without memory behind the weights where the family allows: to be looked at, not run.

    Raises:
        UserError: a name timm does not have, a model that is no plain ViT, a size or argument it refuses.
    """
    import timm

    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), 4)
        raise UserError(f"timm has no model {name}" + (f", did you mean {' or '.join(near)}?" if near else ""))
    if tag and name not in timm.list_pretrained(f"{bare}.*"):
        tags = ", ".join(timm.list_pretrained(f"{bare}.*")) or "none"
        raise UserError(f"timm has no weights {name}; those of {bare} are: {tags}")
    try:
        with torch.device("meta"):
            model, dynamic = create(name, kwargs, image_size)
    except (NotImplementedError, RuntimeError):  # this one computes with its weights while it is built
        model, dynamic = create(name, kwargs, image_size)
    widths = {info["num_chs"] for info in getattr(model, "feature_info", [])}
    parts = ("blocks", "patch_embed", "forward_intermediates", "embed_dim")
    plain = len(widths) == 1 and all(hasattr(model, part) for part in parts)
    if not plain or not isinstance(getattr(model.patch_embed, "patch_size", None), tuple):
        raise UserError(f"{name} is no plain ViT (blocks of one width on one grid of patches), choose another model")
    return model, dynamic


def random_model(name: str, kwargs: str, image_size: Size, seed: int) -> nn.Module:
    """The model as timm initialises it, on the CPU, from a seed; but every layer scale is 1.

    DINOv2, DINOv3 and DeiT-III start theirs at 1e-5 or 1e-6, where a block changes nothing: the random-weight control
    would be the patch embedding at every depth. Our choice; no paper says how such a control is drawn.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _ = create(name, kwargs, image_size)
    for key, parameter in model.named_parameters():
        if key.rpartition(".")[2] in ("gamma", "gamma_1", "gamma_2"):
            nn.init.ones_(parameter)
    return model


def hub_model(name: str, kwargs: str, image_size: Size, where: str, say: Callable[[str], None]) -> nn.Module:
    """The model with the weights timm has for it; `where` names them, and every failure names it."""
    import huggingface_hub.errors
    import timm

    twin = name.replace("_clip_", "_clip_quickgelu_")
    if twin != name and twin in timm.list_pretrained():
        say(f"note: {name} computes another activation than its weights were trained with, {twin} the same")
    host = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname
    if not urllib.request.getproxies():
        try:
            socket.getaddrinfo(host, 443)
        except OSError:  # the hub client would try for a minute before it looks into its cache
            huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return create(name, kwargs, image_size, pretrained=True)[0]
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, huggingface_hub.errors.GatedRepoError):
            reason = "accept its licence on the hub and log in with `hf auth login`"
        elif isinstance(error, OSError) and huggingface_hub.constants.HF_HUB_OFFLINE:
            reason = "no network, and not in the local cache of the hub"
        else:
            reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"the weights of {name} ({where}) could not be loaded: {reason}; download that file where there is a "
            "network and set model.weights=<file>, or take random weights with model.pretrained=false"
        ) from error
