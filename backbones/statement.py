"""What is stated of a model of the user's own, and what is seen in it: sizes, prefix tokens, normalisation of pixels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from backbones.proof import Size
from errors import UserError

# Where known libraries keep what can also be stated.
SEEN = {
    "patch_size": ("patch_embed.patch_size", "config.patch_size"),
    "image_size": ("patch_embed.img_size", "config.image_size"),
    "mean": ("pretrained_cfg.mean",),
    "std": ("pretrained_cfg.std",),
}
Channels = tuple[float, ...]


class Statement(NamedTuple):
    """What is said of a model beside the model itself; None: not stated, it is looked for in the model.

    patch_size, image_size: pixels. prefix_tokens: tokens before the patches in what it returns; class_token: whether the
    first of them is one. mean, std: per channel, for pixels in 0…1; mean=0, std=1: it takes pixels in 0…1.
    """

    patch_size: Any = None
    image_size: Any = None
    prefix_tokens: int | None = None
    class_token: bool | None = None
    mean: Any = None
    std: Any = None


def modules_of(call: Callable) -> list[nn.Module]:
    """The torch modules a model consists of: itself, or those its function uses by name."""
    if isinstance(call, nn.Module):
        return [call]
    if isinstance(call, functools.partial):
        used = [call.func, *call.args, *call.keywords.values()]
    elif inspect.ismethod(call):
        used = [call.__self__]
    elif inspect.isfunction(call):
        names = inspect.getclosurevars(call)
        used = [*names.nonlocals.values(), *names.globals.values()]
    else:
        used = list(vars(call).values()) if hasattr(call, "__dict__") else []
    parts = [part for thing in used for part in (modules_of(thing) if inspect.isroutine(thing) else [thing])]
    return [part for part in parts if isinstance(part, nn.Module)]


def complete(call: Callable, stated: Statement) -> Statement:
    """The statement with the attributes of the model in place of what it leaves out."""
    attributes = {name: getattr(call, name, None) for name in Statement._fields}
    seen = {name: value for name, value in attributes.items() if not callable(value)}
    return Statement(**{name: seen.get(name) if value is None else value for name, value in stated._asdict().items()})


def read_statement(call: Callable, stated: Statement) -> tuple[Size, tuple[Channels, Channels], bool]:
    """Sizes, mean and std, and whether there is a class token: as stated, else as the model itself has them.

    Raises:
        UserError: something is missing, impossible, or contradicts the model.
    """
    patch, image = (_known(call, name, getattr(stated, name)) for name in ("patch_size", "image_size"))
    if patch is None:
        raise UserError("patch_size is not stated and the module does not say it; state patch_size=16 or what it is")
    if image is None:
        raise UserError("image_size is not stated and the module does not say it; state image_size=224 or what it takes")
    patch, image = _pair(patch, "patch_size"), _pair(image, "image_size")
    if patch[0] != patch[1]:
        raise UserError(f"patch_size={list(patch)}: only square patches are supported")
    if any(side < patch[0] or side % patch[0] for side in image):
        raise UserError(f"image_size={list(image)} is no multiple of patch_size={patch[0]}; state an image_size that is")
    prefix = stated.prefix_tokens or 0
    if not isinstance(prefix, int) or isinstance(prefix, bool) or prefix < 0:
        raise UserError(f"prefix_tokens={stated.prefix_tokens}: expected how many tokens precede the patches, 0 or more")
    class_token = bool(stated.class_token)
    if class_token and not prefix:
        raise UserError(
            "class_token=True and prefix_tokens=0: the class token is one of the prefix tokens, state how many there are"
        )
    return Size(image, patch[0], prefix), _normalisation(call, stated), class_token


def _known(call: Callable, name: str, value: Any) -> Any:
    """A value as stated, else as one part of the model has it."""
    if value is not None:
        return value
    for place in modules_of(call):
        for path in SEEN[name]:
            found: Any = place
            for part in path.split("."):
                found = found.get(part) if isinstance(found, Mapping) else getattr(found, part, None)
            if found is not None:
                return found
    return None


def _pair(value: Any, name: str) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(values) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values):
        raise UserError(f"{name}={value} is not understood, expected a number of pixels or (height, width)")
    return values[0], values[1]


def _normalisation(call: Callable, stated: Statement) -> tuple[Channels, Channels]:
    """Mean and std of the pixels the model takes."""
    (mean, std), (own_mean, own_std) = (
        tuple(_channels(value, name) for value, name in zip(pair, ("mean", "std"), strict=True))
        for pair in ((stated.mean, stated.std), tuple(_known(call, name, None) for name in ("mean", "std")))
    )
    if mean is None and std is None and own_mean is None:
        raise UserError(
            "the normalisation of the pixels is left out: state mean and std as the module was trained with, "
            "such as mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), or mean=0, std=1 if it takes pixels in 0…1"
        )
    if (mean is None) != (std is None):
        stated_one, absent = ("mean", "std") if std is None else ("std", "mean")
        raise UserError(f"{stated_one} is stated and {absent} is not; state both")
    if mean is None:
        mean, std = own_mean, own_std
    if max(mean) > 1.5 or max(std) > 1.5:
        raise UserError(f"mean={mean}, std={std} are for pixels in 0…255, expected for 0…1; divide both by 255")
    if min(std) <= 0:
        raise UserError(f"std={std}: expected numbers above 0")
    far = own_mean is not None and max(abs(a - b) for a, b in zip((*mean, *std), (*own_mean, *own_std), strict=True)) > 0.02
    if far:
        raise UserError(
            f"the normalisation stated, mean={mean}, std={std}, is not that of the module, mean={own_mean}, std={own_std} in "
            "its pretrained_cfg; state that one and normalise nowhere else, or delete this attribute if its weights are others"
        )
    inside = next((type(p).__name__ for m in modules_of(call) for p in m.modules() if type(p).__name__ == "Normalize"), None)
    buffers = {name.rpartition(".")[2] for m in modules_of(call) for name, _ in m.named_buffers()} & {"pixel_mean", "pixel_std"}
    if (inside or buffers) and (mean, std) != ((0.0,) * 3, (1.0,) * 3):
        raise UserError(
            f"the module normalises its pixels itself ({inside or ' and '.join(sorted(buffers))}), and a second time with "
            f"mean={mean}, std={std}; state mean=0, std=1"
        )
    return mean, std


def _channels(value: Any, name: str) -> Channels | None:
    if value is None:
        return None
    value = value.flatten().tolist() if isinstance(value, Tensor) else value
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * 3
    values = values * 3 if len(values) == 1 else values
    if len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise UserError(f"{name}={value} is not understood, expected a number or three")
    return tuple(float(v) for v in values)
