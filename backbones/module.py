"""A model of the user's own as a backbone: any torch module or function that returns patch tokens.

    python main.py model=module model.name=my_package.my_file:build        build(**model.kwargs) gives the model
    vit_probing.probe(module, images, identity_maps, patch_size=16)        the model itself, from Python

It takes normalised images [B, 3, H, W] float32 and returns tokens in one of the forms of `answers.token_layers`; before its
tokens are used, `proof.check_tokens` proves that they are those of the patches. What cannot be seen in it is stated: by
Python, or by attributes of what `build` returns (patch_size, image_size, prefix_tokens, class_token, mean, std).

Code is called, so its name counts on the command line only: nothing that stands in a file of a run is ever called.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import Tensor

from backbones.answers import token_layers
from backbones.contract import Backbone, BackboneFacts, Layer, Options
from backbones.proof import Size, check_tokens, proof_image
from backbones.statement import Statement, complete, modules_of, read_statement
from errors import UserError
from files import digest, read_sealed, sealed, write_atomically

FORMAT = 1  # raise it when the proof changes: models are then proved again
PYTHON = "python:"  # how the names of models begin that were handed over from Python


class Handed(NamedTuple):
    """A model from Python, what is stated of it, and the same architecture with random weights, if there is one."""

    call: Callable[[Tensor], Any]
    stated: Statement
    random: Callable[[Tensor], Any] | None


_handed: dict[str, Handed] = {}
_proved: set[str] = set()


def hand_over(call: Callable[[Tensor], Any], stated: Statement, random: Callable[[Tensor], Any] | None = None) -> str:
    """Make a model of this process known; returns the name for `model.name`."""
    if not callable(call):
        raise UserError(f"module: got {type(call).__name__}, expected a torch module or a function of images [B, 3, H, W]")
    name = getattr(call, "__name__", type(call).__name__)
    base = f"{PYTHON}{re.sub(r'[^A-Za-z0-9_]+', '', name) or 'function'}"
    handle = f"{base}-{digest({'state': state_digest(call), 'stated': list(map(str, stated))})[:8]}"
    _handed[handle] = Handed(call, stated, random)
    _build.cache_clear()
    return handle


class Built(NamedTuple):
    """A model with all that is known of it.

    weights: digest of its state. answers: of its tokens of the proof image, to the last bit. scale: size of these tokens by
    layer, which is the same on every machine.
    """

    call: Callable[[Tensor], Any]
    size: Size
    depth: int
    dim: int
    class_token: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: str
    answers: str
    scale: list[float]


class ModuleBackbone(Backbone):
    """Tokens of a model of the user's own; its layers are what it returns, numbered from 0."""

    def __init__(self, facts: BackboneFacts, model: Built) -> None:
        super().__init__(facts)
        self.built = model

    @classmethod
    def describe(cls, options: Options, remembered: Path | None = None) -> BackboneFacts:
        """Facts of a model, which has to be built and answer once for them; its proof is remembered."""
        taken = {"weights": None, "weights_part": None, "digest": None, "norm": False, "attention": "sdpa", "compile": False}
        for key, value in taken.items():
            if getattr(options, key) != value:
                raise UserError(
                    f"model.{key} is for models of timm; a module of your own does it itself, leave model.{key} out"
                )
        model = built(options)
        prove(model, remembered)
        return BackboneFacts(
            name=options.name, source=options.source, patch_size=model.size.patch, depth=model.depth, dim=model.dim, heads=0,
            num_prefix_tokens=model.size.prefix, has_class_token=model.class_token, image_size=model.size.image,
            dynamic_size=False, mean=model.mean, std=model.std, interpolation=options.interpolation or "bicubic",
            final_norm="none", weights=model.weights,
            kwargs=json.dumps({"answers": model.answers, "scale": model.scale, "kwargs": json.loads(options.kwargs)}),
        )  # fmt: skip

    @classmethod
    def load(cls, options: Options, device: torch.device, say: Callable[[str], None]) -> ModuleBackbone:
        """The model where it is, if it came from Python; one that was built goes to the device."""
        model = built(options)
        if not options.name.startswith(PYTHON):
            for part in modules_of(model.call):
                part.to(device)
        return cls(cls.describe(options), model)

    def read(self, images: Tensor, layers: Sequence[Layer], grid: tuple[int, int]) -> list[Tensor]:
        """What the model returns for these layers."""
        found = answer(self.built.call, images, self.built.size)
        return [found[layer] for layer in layers]


def answer(call: Callable[[Tensor], Any], images: Tensor, size: Size) -> list[Tensor]:
    """The layers a model returns for normalised images, [B, P + N, D] each, where its weights are; nothing of it changes."""
    weight = next((p for part in modules_of(call) for p in part.parameters()), None)
    if weight is not None:
        images = images.to(weight.device, weight.dtype if weight.is_floating_point() else images.dtype)
    with frozen(call):
        try:
            found = call(images)
        except UserError:
            raise
        except Exception as error:  # code of the user's own may raise anything
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise UserError(
                f"the module fails on images of shape {list(images.shape)} ({type(error).__name__}: {reason}); state the "
                "image_size it takes"
            ) from error
    return token_layers(found, len(images), size.grid, size.prefix, size.patch)


@contextlib.contextmanager
def frozen(call: Callable) -> Iterator[None]:
    """Evaluation without gradients; afterwards every part is in the mode it was in."""
    parts = {part: part.training for module in modules_of(call) for part in module.modules()}
    try:
        for part in parts:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part, training in parts.items():
            part.training = training


def state_digest(call: Callable) -> str:
    """Digest of all weights and buffers of a model; the same for every model without any."""
    found = hashlib.sha256()
    for part in modules_of(call):
        for name, value in sorted(part.state_dict().items()):
            if isinstance(value, Tensor):
                found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def has_random_weights(name: str) -> bool:
    """Whether there is a variant with random weights: `build` takes `pretrained`, or Python handed one over."""
    if name.startswith(PYTHON):
        return name in _handed and _handed[name].random is not None
    return "pretrained" in inspect.signature(_find(name)).parameters


def built(options: Options) -> Built:
    """The model an option names, built once in this process; `prove` it before its tokens are used.

    Raises:
        UserError: see `check_named` and `read_statement`; what the model returns cannot be understood.
    """
    if not options.name.startswith(PYTHON):
        check_named(options.name)  # each time: another command may have named it before
    return _build(options)


@functools.lru_cache(maxsize=4)
def _build(options: Options) -> Built:
    call, stated = _open(options)
    stated = complete(call, stated)
    stated = stated._replace(
        image_size=options.image_size or stated.image_size, mean=options.mean or stated.mean, std=options.std or stated.std
    )
    size, (mean, std), class_token = read_statement(call, stated)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the digest of the answer does not depend on the number of threads then
    try:
        layers = answer(call, proof_image(size), size)
    finally:
        torch.set_num_threads(n_threads)
    numbers = b"".join(layer.detach().float().cpu().contiguous().numpy().tobytes() for layer in layers)
    answers = hashlib.sha256(numbers).hexdigest()[:16]
    weights, scale = f"module:{state_digest(call)}", [float(f"{layer.float().square().mean().sqrt():.4g}") for layer in layers]
    return Built(call, size, len(layers), layers[0].shape[-1], class_token, mean, std, weights, answers, scale)


def prove(model: Built, remembered: Path | None) -> None:
    """Refuse a model whose answers are not patch tokens in raster order; asked once, the answer is kept in a folder.

    Raises:
        UserError: as `proof.check_tokens`.
    """
    size = [*model.size.image, model.size.patch, model.size.prefix]
    made_from = {"format": FORMAT, "weights": model.weights, "answers": model.answers, "size": size}
    name = digest(made_from)
    file = remembered / f"module-{name}.json" if remembered is not None else None
    if name not in _proved and not (file is not None and _is_proved(file, made_from)):
        check_tokens(lambda images: answer(model.call, images, model.size), model.size)
        if file is not None:
            with contextlib.suppress(UserError):  # a cache that is only read: it is proved again next time
                write_atomically(file, sealed(made_from))
    _proved.add(name)


def _is_proved(file: Path, made_from: Mapping[str, Any]) -> bool:
    with contextlib.suppress(FileNotFoundError, UserError):  # damaged: proved again
        return read_sealed(file, "delete it") == made_from
    return False


def _open(options: Options) -> tuple[Callable[[Tensor], Any], Statement]:
    """The model and what is stated of it."""
    none_random = (
        f"{options.name} has no variant with random weights; leave the control random out, or give the function that builds "
        "it an argument `pretrained`"
    )
    if options.name.startswith(PYTHON):
        if options.name not in _handed:
            raise UserError(
                f"model.name={options.name} was handed over in another Python process; hand the module over again with "
                "vit_probing.probe"
            )
        handed = _handed[options.name]
        if not options.pretrained and handed.random is None:
            raise UserError(none_random)
        return (handed.call if options.pretrained else handed.random), handed.stated
    build, kwargs = _find(options.name), json.loads(options.kwargs)
    if "pretrained" in inspect.signature(build).parameters:
        kwargs = {"pretrained": options.pretrained, **kwargs}
    elif not options.pretrained:
        raise UserError(none_random)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        try:
            call = build(**kwargs)
        except UserError:
            raise
        except Exception as error:  # code of the user's own may raise anything
            raise UserError(
                f"{options.name} fails ({type(error).__name__}: {error}); model.kwargs={kwargs} was given"
            ) from error
    if not callable(call):
        raise UserError(f"{options.name} returns a {type(call).__name__}, expected a torch module or a function")
    return call, Statement()


def check_named(name: str) -> None:
    """Refuse a name of code that the command line does not name itself.

    Raises:
        UserError: the name stands in a file only, or is no name of a function.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", name, re.ASCII):
        raise UserError(f"model.name={name} names no function, expected package.module:function, such as my_file:build")
    if name not in _named_on_command_line():
        raise UserError(
            f"model.name={name} is code of somebody's own, which only the command line may name; add model.name={name} to the "
            "command if you trust it"
        )


def _find(name: str) -> Callable[..., Any]:
    """The function that `model.name` names.

    Raises:
        UserError: the command line does not name it, or it cannot be imported.
    """
    check_named(name)
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"model.name={name}: {module} cannot be imported ({error}); put its folder on PYTHONPATH") from error
    if not callable(found):
        raise UserError(f"model.name={name}: {module} has no function {function}")
    return found


def _named_on_command_line() -> set[str]:
    """Values of model.name=…; the composed configuration is not asked, a file could have put them there."""
    if not HydraConfig.initialized():
        return set()
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return {str(override.value()) for override in overrides if override.key_or_group == "model.name"}
