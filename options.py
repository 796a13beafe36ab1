"""What may be asked on the command line: values of the right kind, options that somebody reads, mistakes in one sentence.

The schema is the configuration itself: `cfgs/config.yaml` has every option with a default of the kind it takes.
"""

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from errors import UserError

CONFIGS = Path(__file__).parent / "cfgs"
# Blocks whose reader refuses by name what it does not know: only there a key may be added.
OPEN = ("dataset", "model.kwargs")
# Numbers that may also be given as a list, and what else is taken where a number stands; names that may be lists.
LISTS = ("trainer.seeds",)
ALSO: dict[str, tuple] = {"protocol.selection.patches": ("all",), "protocol.selection.per_visit": (None,)}
NAMES = ("controls", "model.layers", "vis.image")
LIMIT = 2**31  # of whole numbers
# Keys of the last release and what they are called now: a command that still uses one is told the new name, the stored
# configuration of a finished run is read with the new names. An entry goes one release after the renaming.
RENAMED = {
    "cache.max_gb": "cache.disk_gb",
    "cache.batch_size": "cache.batch_windows",
    "trainer.max_gb": "trainer.stack_gb",
    "trainer.batch_size": "trainer.batch_images",
    "eval.run": "run",
    "vis.run": "run",
}
# Options of data sets that name or start programs, and write: of a finished run's file they are not believed.
FROM_COMMAND_LINE = {"blender_path": None, "clevr_gen_dir": None, "use_cache_only": True}


def check(cfg: DictConfig) -> None:
    """Refuse what nobody would read and values of another kind than their default.

    A whole default takes whole numbers (of at least 1 if it is itself), a decimal one numbers of at least 0, true or
    false only these two, a list a list, a text a text. Which text is checked where it is looked up; a data set checks
    its options itself.

    Raises:
        UserError: the first option that does not fit.
    """
    for old in RENAMED:  # in a file of the user's, where Hydra takes any key
        if OmegaConf.select(cfg, old) is not None:
            raise UserError(renamed(old))
    for override in HydraConfig.get().overrides.task if HydraConfig.initialized() else ():
        key = re.split("=|$", override.lstrip("+~"), maxsplit=1)[0].partition("@")[0]
        if override.startswith("~"):
            raise UserError(f"{override} takes an option away, and all of them are needed; set {key}=… instead")
        if override.startswith("+") and not key.startswith(tuple(f"{block}." for block in OPEN)):
            raise UserError(f"{override} adds an option that nothing reads; {valid_keys(key.rpartition('.')[0])}")
    for key, default in _defaults():
        block, _, _ = key.rpartition(".")
        if block and not isinstance(OmegaConf.select(cfg, block), DictConfig):
            raise UserError(f"{block} is a block of options, got {cfg[block]}; set them one by one, such as {key}={default}")
        default = 1 if default is None and key in ALSO else default
        given, listed = OmegaConf.select(cfg, key), key in LISTS
        if key in NAMES:
            continue
        kind, fits = _kind(default, least=0 if listed and isinstance(given, ListConfig) else 1)
        values = list(given) if listed and isinstance(given, ListConfig) else [given]
        also = ALSO.get(key, ())
        if not all(fits(value) or value in also for value in values):
            other = " or a list of them" if listed else "".join(f" or {'null' if v is None else v}" for v in also)
            other += f", below {LIMIT}" if isinstance(given, int) and given >= LIMIT else ""
            raise UserError(f"{key}: got {given!r}, expected {kind}{other}")


def _defaults() -> Iterator[tuple[str, Any]]:
    """Dotted keys and defaults of the files whose options are checked here."""
    files = [("", "config"), ("model.", "model/_defaults")]
    if HydraConfig.initialized():
        files.append(("", f"protocol/{HydraConfig.get().runtime.choices['protocol']}"))
    for prefix, name in files:
        yield from _leaves(OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml")), prefix)


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested blocks, without what is Hydra's own; an empty block is open."""
    for key, value in node.items():
        if isinstance(value, Mapping) and key != "hydra":
            yield from _leaves(value, f"{prefix}{key}.")
        elif key not in ("hydra", "defaults"):
            yield f"{prefix}{key}", value


def _kind(default: Any, least: int) -> tuple[str, Callable[[Any], bool]]:
    """What an option with this default takes, in words and as a test; `least` of whole numbers, or 0 if that is the default."""
    if isinstance(default, bool):
        return "true or false", lambda value: isinstance(value, bool)
    if isinstance(default, list):
        return f"a list, such as [{', '.join(map(str, default))}]", lambda value: isinstance(value, ListConfig)
    if isinstance(default, str) and default != "???":
        return f"a text, such as {default}", lambda value: isinstance(value, str) and value != ""
    if not isinstance(default, int | float):
        return "", lambda value: True
    whole, least = isinstance(default, int), min(default, least) if isinstance(default, int) else 0
    numbers = int if whole else int | float

    def fits(value: Any) -> bool:
        return isinstance(value, numbers) and not isinstance(value, bool) and least <= value < (LIMIT if whole else math.inf)

    return f"a {'whole ' if whole else ''}number of at least {least}", fits


def explain(error: Exception) -> str:
    """Turn what Hydra or OmegaConf raised into one sentence that names the valid choices."""
    text = " ".join(str(error).split())
    unknown = re.search(r"Could not find '([\w/]+)/([^'/]*)'", text)
    if unknown:
        group, name = unknown.groups()
        options = re.search(r"Available options in '[\w/]+': (.*?)(?: Config search path:|$)", text)
        names = [name for name in sorted(options[1].split()) if not name.startswith("_")] if options else ["none"]
        return f"unknown {group} '{name}'; valid: {', '.join(names)}"
    added = re.search(r"^(\S+) appears more than once in the final|^Multiple values for (\w+)\.", text)
    if added:
        group = added[1] or added[2]
        return f"{group} is there already; choose with {group}=…, without a +"
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        # A block given as a whole names the block; the key inside it that does not exist is told by the cause.
        inside = re.search(r"full_key: (\S+)", str(error.__cause__))
        name = inside[1] if inside else key[1]
        return renamed(name) if name in RENAMED else f"unknown option '{name}'; {valid_keys(key[1].rpartition('.')[0])}"
    return text.removesuffix(" See https://hydra.cc/docs/1.2/advanced/override_grammar/basic for details")


def renamed(key: str) -> str:
    """The sentence for a key of the last release."""
    return f"{key} is called {RENAMED[key]} now; write {RENAMED[key]}=… instead"


def with_new_names(stored: DictConfig) -> DictConfig:
    """The configuration of a finished run with the keys of this release; changed in place."""
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        if name in (OmegaConf.select(stored, section) or {}):
            OmegaConf.update(stored, new, stored[section].pop(name), force_add=True)
    return stored


def complete(stored: DictConfig, path: Path) -> DictConfig:
    """The configuration of a finished run with the options added since then, at their defaults; changed in place.

    Raises:
        UserError: a section or an option that the run's mode had is missing or of another kind: the file is damaged.
    """
    choices = {"config": "", "model/_defaults": "model.", f"protocol/{stored.protocol.get('name')}": ""}
    for name, prefix in (choices | {f"mode/{stored.mode}": ""}).items():
        file = CONFIGS / f"{name}.yaml"
        if not (re.fullmatch(r"[\w/-]+", name) and file.is_file()):
            continue  # a protocol or mode of the user's own
        for key, default in _leaves(OmegaConf.to_container(OmegaConf.load(file)), prefix):
            section, _, option = key.rpartition(".")
            inside = OmegaConf.select(stored, section) if section else stored
            if not isinstance(inside, DictConfig) and (inside is not None or section.partition(".")[0] in stored):
                raise UserError(f"{path} is damaged (it has no section {section}); name another run with run=…")
            if inside is None or option not in inside:  # added since then
                OmegaConf.update(stored, key, default, force_add=True)
            kind, fits = _kind(default, least=0)
            value = OmegaConf.select(stored, key)
            if not (key in NAMES + LISTS or value in ALSO.get(key, ()) or fits(value)):
                raise UserError(f"{path} is damaged ({key} is {value!r}, expected {kind}); name another run with run=…")
    return stored


def valid_keys(parent: str) -> str:
    """The keys the configuration has at a place, read from the composed defaults and the chosen files."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", _groups_only(sys.argv[1:]))
    node = OmegaConf.select(composed, parent) if parent else composed
    if not isinstance(node, DictConfig):
        return f"{parent} is {'a plain value' if node is not None else 'unknown itself'}"
    keys = ", ".join(sorted(map(str, node))) or "none"
    adding = f"; further ones are added with +{parent}.<key>=…" if parent in OPEN else ""
    return f"valid keys {f'of {parent}' if parent else 'at the top'}: {keys}{adding}"


def _groups_only(arguments: Sequence[str]) -> list[str]:
    """The overrides that choose a file of a config group (they decide which keys exist); the first one of a sweep."""
    chosen = []
    for argument in arguments:
        group, _, value = argument.partition("=")
        value = value.partition(",")[0]
        if (CONFIGS / group / f"{value}.yaml").exists():
            chosen.append(f"{group}={value}")
    return chosen


def named() -> list[str]:
    """The keys the command line sets, in order: "dataset" where a file is chosen, "dataset.root" for one option."""
    if not HydraConfig.initialized():
        return []
    return [re.split("[=@]", override.lstrip("+~"))[0] for override in HydraConfig.get().overrides.task]


def adopt(fitted: DictConfig, cfg: DictConfig, directory: Path) -> DictConfig:
    """The configuration of a finished run, for looking at it again: what the command line names of the data is put in.

    A data set named takes the place of the run's own; single options of it (`dataset.noise=0.5`) are set on top.

    Args:
        fitted: configuration of the run; changed in place.
        cfg: the present one.
        directory: of the run, for the error.

    Raises:
        UserError: the command line names something that was settled when the run was fitted.
    """
    complete(with_new_names(fitted), directory / "config.yaml")
    for key, value in FROM_COMMAND_LINE.items():
        if key in fitted.dataset:
            fitted.dataset[key] = value
    for key in named():
        head, value = key.split(".")[0], OmegaConf.select(cfg, key)
        if head == "dataset" or key in ("trainer.batch_images", "trainer.n_boot"):
            OmegaConf.update(fitted, key, value, merge=False)
        elif head in ("model", "protocol", "probe", "trainer", "seed") and value != OmegaConf.select(fitted, key):
            raise UserError(
                f"{directory} was fitted with another {key} than the one named on the command line; leave {key} out, or fit "
                "a probe with it first"
            )
    fitted.cache = OmegaConf.merge(cfg.cache, {"dtype": fitted.cache.dtype})
    fitted.device, fitted.threads = cfg.device, cfg.threads
    return fitted
