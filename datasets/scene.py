"""The item every data set yields, the contract of a data set, and the one door that builds it.

A data set is a class named by `_target_` in a configuration. Configurations are data that people hand on (`mode=eval`
reads the one of a finished run), so the door imports nothing but this folder's modules and packages that the command
line names (`dataset.allow=my_package`), calls nothing but a class that meets the contract, and looks at no nested target.
"""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import os
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from errors import UserError

# Former names of `_target_`, as they stand in config.yaml of finished runs.
MOVED = {"datasets.scenes.Scenes": "datasets.procedural.Scenes"}
LIMIT = 2**31  # of whole numbers
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null", str: "a text"}


class Scene(NamedTuple):
    """One item of any data set.

    image: [3, H, W] uint8, as on disk; normalising is the backbone's business.
    labels: pixel maps "identity" (which object) and "class", [H, W] int32, either or both: 0 background, -1 pixels that
        nobody labelled and that are left out of everything. Or codes: "object_code" [n_Y] uint8, "feature_code" [n_F]
        uint8 and "H_Y_given_F" [1] float32 in bits. A data set whose classes are a summary of finer ones adds
        "raw_class" [H, W] int32 (0 unlabelled) and "class_of_raw" [C] int32, the class of each. All items of a data
        set have the same labels.
    key: stable name of the item (file stem, or split, seed and index): part of the cache fingerprint.
    """

    image: Tensor
    labels: dict[str, Tensor]
    key: str


class DataSet(Protocol):
    """All that the program asks of a data set, beside being built as `Class(split=…, **options of its config file)`.

    classes: names of the values of the class map, 0 first; with codes the names of the values, a list per feature group.
    on_error: "raise" or "skip": what the caller does when an item raises `UnreadableScene`.
    """

    classes: Sequence[str] | Sequence[Sequence[str]]
    on_error: str

    def __len__(self) -> int:
        """Items of the split."""

    def __getitem__(self, i: int) -> Scene:
        """Item i, from 0, the same at every call; raises `UnreadableScene`."""

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the items, JSON-able, without opening an image: another value means another cache entry."""

    def info(self) -> dict[str, float]:
        """Constants that tasks read, such as H_Y_given_F in bits."""

    def report(self) -> dict[str, Any]:
        """Facts for a reader, JSON-able."""


METHODS = ("__len__", "__getitem__", "fingerprint", "info", "report")


class UnreadableScene(UserError):
    """A scene whose files are missing, damaged or do not fit together; the caller raises, or counts and skips it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableScene], tuple[str, str]]:
        return type(self), (self.key, self.reason)  # so that it survives the way back from a worker process


# --------------------------------------------------------------------------------------------------------- the door

_allowed: set[str] = set()


def allow(package: str) -> None:
    """Let `_target_` name classes of a package of the caller's own, for programs that call this one from Python."""
    _allowed.add(package)


def build(cfg: Any, split: str) -> DataSet:
    """The split of the data set that a configuration names.

    Args:
        cfg: `_target_` (a class) and the options it takes; `allow` is read from the command line, never from here.
        split: "train", "val" or "test".

    Raises:
        UserError: `_target_` is no data set, an option it does not take, a value of another kind, what the class reports.
    """
    options = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    target = options.pop("_target_", None)
    options.pop("allow", None)
    if special := next(_special_keys(options, "dataset"), None):
        raise UserError(f"{special}: a data set is built from plain values only; take this key out of its configuration")
    cls = find_class(target)
    _check_options(cls, options)
    dataset = cls(split=split, **options)
    if lacking := [name for name in DataSet.__annotations__ if not hasattr(dataset, name)]:
        raise UserError(f"dataset._target_={target}: its objects have no {lacking[0]} (DataSet in datasets/scene.py says what)")
    return dataset


def find_class(target: Any) -> type:
    """The class that `_target_` names, checked: the name before anything is imported, the class before it is called.

    Raises:
        UserError: it names no data set of this program and none of a package that the command line allows.
    """
    target = MOVED.get(target, target) if isinstance(target, str) else target
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", target, re.ASCII):
        raise UserError(f"dataset._target_: got {target!r}, expected module and class, such as datasets.procedural.Scenes")
    module, _, name = target.rpartition(".")
    package = module.partition(".")[0]
    if package == "datasets":
        if not (Path(__file__).parent / f"{module.removeprefix('datasets.')}.py").is_file():
            raise UserError(f"dataset._target_: there is no {module.replace('.', '/')}.py; {_choices()}")
    elif package not in _allowed | _allowed_on_command_line():
        raise UserError(
            f"dataset._target_: got {target}, which is no data set of this program; {_choices()}, or allow a package of your "
            f"own on the command line: dataset.allow={package}"
        )
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"dataset._target_={target}: {module} cannot be imported ({error})") from error
    ours = isinstance(cls, type) and cls is not DataSet and cls.__module__.partition(".")[0] == package
    lacking = [method for method in METHODS if not callable(getattr(cls, method, None))]
    if not ours or lacking:
        why = f"it has no {lacking[0]}" if ours else f"{module} defines no class of that name"
        raise UserError(f"dataset._target_={target} is no data set: {why} (DataSet in datasets/scene.py says what it needs)")
    return cls


def _choices() -> str:
    names = sorted(path.stem for path in (Path(__file__).parent.parent / "cfgs" / "dataset").glob("*.yaml"))
    return f"choose with dataset=…: {', '.join(names)}"


def _allowed_on_command_line() -> set[str]:
    """Packages named by dataset.allow=…; the composed configuration is not asked, a file could have put them there."""
    if not HydraConfig.initialized():
        return set()
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    values = [override.value() for override in overrides if override.key_or_group == "dataset.allow"]
    return {str(name) for value in values for name in (value if isinstance(value, list) else [value])}


def _special_keys(node: Any, place: str) -> Iterable[str]:
    """Keys such as _target_ or _partial_ at any depth, with their place."""
    if isinstance(node, dict):
        for key, value in node.items():
            if isinstance(key, str) and re.fullmatch(r"_\w+_", key):
                yield f"{place}.{key}"
            yield from _special_keys(value, f"{place}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _special_keys(value, f"{place}[{i}]")


def _check_options(cls: type, options: dict[str, Any]) -> None:
    """Refuse options that the class does not take, and values that its annotations do not take."""
    hints, needed = _options_of(cls)
    for name, value in options.items():
        if name not in hints and hints:
            raise UserError(f"dataset.{name}: {cls.__name__} takes no such option; it takes {', '.join(sorted(hints))}")
        if not _fits(value, hints.get(name, Any)):
            raise UserError(f"dataset.{name}: got {_short(value)}, expected {_in_words(hints[name])}")
        if isinstance(value, int | float) and not abs(value) < LIMIT:
            raise UserError(f"dataset.{name}: got {value}, expected a number below {LIMIT}")
    if lacking := sorted(needed - set(options)):
        raise UserError(f"dataset.{lacking[0]} has no value; give it one on the command line: dataset.{lacking[0]}=…")


def _options_of(cls: type) -> tuple[dict[str, Any], set[str]]:
    """Annotation of every option a class takes, base classes included where it hands options on; those without default."""
    hints: dict[str, Any] = {}
    needed: set[str] = set()
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if not inspect.isfunction(init):
            continue
        try:
            annotations = typing.get_type_hints(init)
        except (NameError, TypeError):  # of a user's class: names that exist for a type checker only
            annotations = {}
        parameters = [p for p in list(inspect.signature(init).parameters.values())[1:] if p.name != "split"]
        for p in parameters:
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in hints:
                hints[p.name] = annotations.get(p.name, Any)
                needed |= {p.name} if p.default is p.empty else set()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return hints, needed


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated kind; annotations other than those of configurations take anything."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind is float or isinstance(value, int) or value.is_integer())
    if kind in (bool, str, type(None)):
        return isinstance(value, kind)
    if kind is os.PathLike:
        return isinstance(value, str | os.PathLike)
    if kind in (collections.abc.Sequence, list, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value if arguments)
    return True


def _in_words(hint: Any) -> str:
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(argument) for argument in arguments))
    if kind in (collections.abc.Sequence, list, tuple):
        return "a list"
    return "a text" if kind is os.PathLike else _KINDS.get(kind, getattr(kind, "__name__", str(kind)))


# -------------------------------------------------------------------------------------- checks of a data set's options


def check_choice(name: str, value: Any, valid: Iterable[str]) -> None:
    """Refuse an option's value that is not among the valid ones.

    Raises:
        UserError: naming the option and the valid values.
    """
    if value not in (valid := list(valid)):
        raise UserError(f"dataset.{name}: got {_short(value)}, expected {'one of ' * (len(valid) > 2)}{_listed(valid)}")


def check_whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """The value as a whole number of the range.

    Raises:
        UserError: naming the option and its range.
    """
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not is_whole or isinstance(value, bool) or value < least or (most is not None and value > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"dataset.{name}: got {value!r}, expected a whole number {span}")
    return int(value)


def _listed(valid: Sequence[str]) -> str:
    return " or ".join(valid) if len(valid) < 3 else ", ".join(valid)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
