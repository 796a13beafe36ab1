"""What the command line may say: values of the right kind, options that something reads, mistakes in one sentence.

The schema is the configuration itself: `cfgs/config.yaml` has every option with a default of the kind it takes; the files
of the chosen mode and protocol add theirs.

    check           refuse what does not fit, before torch is imported
    name_protocol   a protocol that differs from its file says so in its name
    explain         what Hydra raised, in one sentence
"""

import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from errors import UserError

CONFIGS = Path(__file__).parent / "cfgs"
# Sections whose reader refuses by name what it does not know: only there a key may be added.
OPEN = ("dataset", "model.kwargs", "dense.published")
# Numbers that may also be a list of numbers.
NUMBER_OR_LIST = (
    "trainer.seeds", "patch_class.seeds", "linear_seg.seeds", "overcluster.seeds", "dense_retrieval.seeds", "cbfe_cd.seeds",
)  # fmt: skip
# What else may stand in place of a number.
ALSO: dict[str, tuple] = {
    "protocol.selection.patches": ("all",),
    "protocol.selection.per_visit": (None,),
    "trainer.patience": (None,),
    "trainer.lr_width": (None,),
    "trainer.averaging": (None,),
    "neco.teacher_steepness": (None,),
    "probe.whiten": (None,),
    "neco.evaluate.every": (0,),
    "overcluster.pca": (None,),
    "dense_retrieval.memory_size": (None,),
    "dense.grid": (None,),
    "dense.input_size": (None,),
    "logistic_seg.per_image": (None,),
}
# A name, a number or a list: read by `controls.control_names` and `resolve_layers`, `pairs.score_maps`, and the dense
# evaluations (a share, a number of pixels or a name of a size).
NAMES = (
    "controls", "model.layers", "vis.image", "dense_retrieval.fraction", "dense.reference_size", "overcluster.size",
    "dense_retrieval.size", "attention_maps.size", "overcluster.n_clusters", "patch_class.score_sizes",
    "linear_seg.score_sizes", "logistic_seg.score_sizes", "runs",
)  # fmt: skip
# Texts whose default is null.
TEXTS = (
    "model.weights", "model.weights_part", "model.digest", "model.rebuild", "model.interpolation", "vis.out",
    "protocol.geometry.interpolation", "probe.F.mode", "probe.F.readout", "wandb.entity", "wandb.group",
    "cache.prune",
)  # fmt: skip
# Lists that may not be empty.
NEEDED_LISTS = ("protocol.pairs.fit", "export.splits")
FOLDED = ("pairwise", "class", "identity")  # tasks that take trainer.folds; codes of whole images are split by code
LIMIT = 2**31  # of whole numbers
FOLLOWING = ("mode_and_model", "mode_and_protocol")  # config groups whose file follows from the choice of others
# Keys of the last release and what they are called now: a command that still uses one is answered with the new name, the
# stored configuration of a finished run is read with the new names. An entry goes one release after the renaming.
RENAMED = {
    "cache.max_gb": "cache.disk_gb",
    "cache.batch_size": "cache.batch_windows",
    "trainer.max_gb": "trainer.stack_gb",
    "trainer.batch_size": "trainer.batch_images",
    "eval.run": "run",
    "vis.run": "run",
}


def check(cfg: DictConfig) -> None:
    """Refuse what nothing reads and values of another kind than their default.

    A whole default takes whole numbers (of at least 1 if it is itself), a decimal one numbers of at least 0, true or
    false only these two, a list a list, a text a text. Which text is checked where it is looked up; a data set checks
    its options itself.

    Raises:
        UserError: the first option that does not fit.
    """
    for old in RENAMED:  # in a file of the user's, where Hydra takes any key
        if OmegaConf.select(cfg, old) is not None:
            raise UserError(renamed(old))
    _check_overrides()
    mode, schema = _chosen("mode", cfg), _schema(cfg)
    if not isinstance(cfg.mode, str):
        raise UserError(f"mode: got {_shown(cfg.mode)}, expected the name of one; modes are the files of cfgs/mode")
    if cfg.get("task") != schema.get("task"):
        raise UserError(f"task: got {_shown(cfg.get('task'))} and mode={mode} has its own task; leave task out and set mode=…")
    for key, default in schema.items():
        section, _, name = key.rpartition(".")
        if section and not isinstance(value := _value(cfg, section), DictConfig):
            raise UserError(f"{section} is a section of options, got {_shown(value)}; set them one by one, such as {key}=…")
        _check_value(key, _value(cfg, key), default)
    for key, value in leaves(_plain(cfg), ""):
        if key not in schema and not key.startswith(tuple(f"{section}." for section in OPEN)):
            raise UserError(f"{key} stands in a file of cfgs and nothing reads it; {valid_keys(key.rpartition('.')[0])}")
        if key.startswith("dataset.") and isinstance(value, int) and value >= LIMIT:
            raise UserError(f"{key}: got {value}, expected a whole number below {LIMIT}")
    if cfg.trainer.folds > 1 and cfg.task not in FOLDED:
        raise UserError(f"trainer.folds={cfg.trainer.folds} and mode={cfg.mode} fits no probe on patches; leave it out")
    _check_controls(cfg.controls)
    cores = os.cpu_count() or 1
    if cfg.threads > cores:
        raise UserError(f"threads={cfg.threads} and this machine has {cores} processor cores; set threads={cores} or less")
    _check_sweep()


def _check_overrides() -> None:
    """Refuse overrides that add or take away options."""
    for override in HydraConfig.get().overrides.task if HydraConfig.initialized() else ():
        key = _key_of(override)
        if key in FOLLOWING:
            raise UserError(f"{key} follows from the other choices and cannot be set; leave {override} out")
        if override.startswith("~"):
            raise UserError(f"{override} takes an option away, and all of them are needed; set {key}=… instead")
        if override.startswith("+") and not key.startswith(tuple(f"{section}." for section in OPEN)):
            raise UserError(f"{override} adds an option that nothing reads; {valid_keys(key.rpartition('.')[0])}")


def _value(cfg: DictConfig, key: str) -> Any:
    """The value of a key; None where it has none yet."""
    try:
        return OmegaConf.select(cfg, key)
    except OmegaConfBaseException as error:
        raise UserError(f"{key}: {str(error).splitlines()[0]}; ${{…}} stands for another option's value") from error


def _check_value(key: str, value: Any, default: Any) -> None:
    """Refuse a value of another kind than its default."""
    if key in NAMES or (value is None and (default == "???" or key in TEXTS)):
        return
    default = "???" if key in TEXTS else default
    default = 1 if default is None and key in ALSO else default
    listed = key in NUMBER_OR_LIST
    is_list = isinstance(value, ListConfig)
    kind, fits = kind_of(default, least=0 if listed and is_list else 1)
    also = ALSO.get(key, ())
    if not all(fits(item) or item in also for item in (list(value) if listed and is_list else [value])):
        other = " or a list of them" if listed else "".join(f" or {'null' if v is None else v}" for v in also)
        other += f", below {LIMIT}" if isinstance(value, int) and value >= LIMIT else ""
        raise UserError(f"{key}: got {_shown(value)}, expected {kind}{other}")
    if not is_list or not isinstance(default, list):
        return
    if not len(value) and key in NEEDED_LISTS:
        raise UserError(f"{key} is empty, expected at least one of {', '.join(map(str, default))}")
    _check_items(key, value, default)


def _check_items(key: str, values: ListConfig, default: list) -> None:
    """Refuse items of another kind than those of the default, and names that stand in a list twice."""
    kind = type(default[0]) if default else str
    words = {dict: "sections of options", str: "texts", int: "whole numbers"}
    for item in values:
        if kind in words and not isinstance(item, DictConfig if kind is dict else kind):
            raise UserError(f"{key}: got {_shown(item)} in the list, expected {words[kind]}")
        if isinstance(item, str) and list(values).count(item) > 1:
            raise UserError(f"{key} names {item} twice; leave one of them out")


def _check_controls(controls: Any) -> None:
    """Refuse what is no name or list of names; which names there are is checked where they are looked up."""
    if not isinstance(controls, ListConfig | str) or not controls:
        if not isinstance(controls, ListConfig):  # [] means none
            raise UserError(f"controls: got {_shown(controls)}, expected all, none, a name or a list of names")
    if isinstance(controls, ListConfig):
        _check_items("controls", controls, [""])


def _check_sweep() -> None:
    """Refuse to run one job where a file names a sweep: the user did not name that job."""
    if not HydraConfig.initialized() or HydraConfig.get().mode == RunMode.MULTIRUN:
        return
    swept = (HydraConfig.get().sweeper or {}).get("params")
    if swept:
        raise UserError(
            f"a file of the configuration names a sweep over {', '.join(swept)}; add -m to run all its jobs, or set "
            "hydra.sweeper.params=null to run one"
        )


def _chosen(group: str, cfg: DictConfig) -> str | None:
    """The file chosen for a config group."""
    if HydraConfig.initialized():
        return HydraConfig.get().runtime.choices.get(group)
    return cfg.get("mode") if group == "mode" else None


def _content(group: str, name: str) -> dict[str, Any]:
    """What a file of a config group says, with the files of the same group it builds on; {} if there is none.

    Files lie in cfgs and in what the command line adds (`--config-dir`).
    """
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    folders = [CONFIGS, *(Path(source.path) for source in sources if source.schema == "file")]
    file = next((file for folder in folders if (file := folder / group / f"{name}.yaml").is_file()), None)
    if file is None:
        return {}
    content = _plain(OmegaConf.load(file))
    parents = [entry for entry in content.pop("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    return _plain(OmegaConf.merge(*(_content(group, parent) for parent in parents), content))


def _schema(cfg: DictConfig) -> dict[str, Any]:
    """Dotted keys and defaults of every option there is, but those of the data set.

    A mode may bring sections of its own and settings of its probe, a protocol those of `protocol:`; what else they hold
    are values for options of config.yaml.
    """
    schema = dict(leaves(_content("", "config"), "")) | dict(leaves(_content("model", "_defaults"), "model."))
    sections = {key.partition(".")[0] for key in schema} | {"protocol"}
    files = [file.stem for file in (CONFIGS / "protocol").glob("*.yaml")]
    known = {key for name in files for key, _ in leaves(_content("protocol", name), "") if key.startswith("protocol.")}
    stated = dict(leaves(_content("protocol", _chosen("protocol", cfg) or "clean"), ""))
    schema |= {key: stated.get(key) for key in known}
    for key, default in leaves(_content("mode", _chosen("mode", cfg) or "train"), ""):
        if key.startswith("probe.") or key.partition(".")[0] not in sections:
            schema.setdefault(key, default)
    return {key: default for key, default in schema.items() if not key.startswith("dataset.")}


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


def leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested sections, without what is Hydra's own; an empty section is a leaf."""
    for key, value in node.items():
        if key in ("hydra", "defaults") and not prefix:
            continue
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    """A value as the command line writes it."""
    return "null" if value is None else repr(_plain(value))


def kind_of(default: Any, least: int) -> tuple[str, Callable[[Any], bool]]:
    """What an option with this default takes, in words and as a test; `least` of whole numbers, or 0 if that is the default."""
    if isinstance(default, bool):
        return "true or false", lambda value: isinstance(value, bool)
    if isinstance(default, Mapping):
        return "a section of options, such as {key: value}", lambda value: isinstance(value, DictConfig)
    if isinstance(default, list):
        plain = default and not any(isinstance(item, Mapping) for item in default)
        example = f", such as [{', '.join(map(str, default))}]" if plain else ""
        return f"a list{example}", lambda value: isinstance(value, ListConfig)
    if isinstance(default, str):
        example = "" if default == "???" else f", such as {default}"
        return f"a text{example}", lambda value: isinstance(value, str) and value != ""
    if not isinstance(default, int | float):
        return "", lambda value: True
    whole, least = isinstance(default, int), min(default, least) if isinstance(default, int) else 0
    numbers = int if whole else int | float

    def fits(value: Any) -> bool:
        return isinstance(value, numbers) and not isinstance(value, bool) and least <= value < (LIMIT if whole else math.inf)

    return f"a {'whole ' if whole else ''}number of at least {least}", fits


def name_protocol(cfg: DictConfig) -> None:
    """Let a protocol whose content differs from its file say so: "clean, changed: geometry.kind=stretch".

    The content is all that the file sets, of optimiser and probe too. Records, tables and directories carry the name.
    """
    chosen = _chosen("protocol", cfg)
    if chosen is None:
        return
    stated = dict(leaves(_content("protocol", chosen), ""))
    present = dict(leaves({"protocol": OmegaConf.to_container(cfg.protocol, resolve=True)}, ""))
    present |= {key: _plain(OmegaConf.select(cfg, key)) for key in stated}
    changes = [
        f"{key.removeprefix('protocol.')}={_text(value)}"
        for key, value in present.items()
        if key != "protocol.name" and (key not in stated or value != stated[key])
    ]
    if changes:
        cfg.protocol.name = f"{chosen}, changed: {', '.join(changes)}"


def _text(value: Any) -> str:
    """A value as a reader of a table wants it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def explains(error: Exception) -> bool:
    """Whether an exception says that a command cannot be understood (and not that the program is at fault)."""
    return isinstance(error, HydraException | OmegaConfBaseException) or str(error).startswith("Config group override must be")


def explain(error: Exception) -> str:
    """Turn what Hydra or OmegaConf raised into one sentence that names the valid choices."""
    text = " ".join(str(error).split())
    if isinstance(error, OverrideParseException):
        return _explain_quotes(error.override)
    several = re.match(r"Ambiguous value for argument '(.*?)' 1\.", text)
    if several:
        key, _, value = several[1].partition("=")
        return (
            f"{several[1]} gives several values; a list stands in brackets, '{key}=[{value}]', a text with a comma in two "
            f"kinds of quotes, '{key}=\"{value}\"', and a sweep over them needs -m"
        )
    if text.startswith("Interpolation key"):
        return f"{text.partition(' full_key:')[0]}; ${{…}} in a value stands for the value of another option"
    if text.startswith("Config group override must be"):
        return _explain_group()
    unknown = re.search(r"Could not find '([\w/]+)/([^'/]*)'", text)
    if unknown:
        group, name = unknown.groups()
        listed = re.search(r"Available options in '[\w/]+': (.*?)(?: Config search path:|$)", text)
        return _unknown_choice(group, name, listed[1].split() if listed else [])
    added = re.search(r"^(\S+) appears more than once in the final|^Multiple values for (\w+)\.", text)
    if added:
        group = added[1] or added[2]
        return f"{group} is there already; choose with {group}=…, without a +"
    key = re.search(r"Could not (?:override|delete(?: from config\.)?) '([^']*)'", text)
    if key and not key[1]:
        return _explain_quotes("~")
    if key:
        # A section given as a whole names the section; the key inside it that does not exist is named by the cause.
        inside = re.search(r"full_key: (\S+)", str(error.__cause__))
        name = inside[1] if inside and inside[1].startswith(f"{key[1]}.") else key[1]
        known = name if name.startswith(tuple(f"{section}." for section in OPEN)) else key[1]
        return renamed(name) if name in RENAMED else f"unknown option '{name}'; {valid_keys(known.rpartition('.')[0])}"
    return text.partition(" full_key:")[0].partition(" See https://hydra.cc/")[0]


def _explain_quotes(override: str) -> str:
    """The sentence for an override that Hydra cannot read: what is missing, or how to quote."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[+~]*\w[\w./@:-]*", key):
        return f"cannot read {override!r}: options are written name=value, such as trainer.epochs=3"
    if any(value.count(opened) != value.count(closed) for opened, closed in ("[]", "{}")):
        return f"cannot read {override}: a bracket is opened and not closed, or the reverse; a list is written '{key}=[1,2]'"
    quoted = shlex.quote(f'{key}="{value.replace(chr(34), "")}"')
    return f"cannot read {override}: a text with signs such as = , # ( ' in it stands in two kinds of quotes, {quoted}"


def _explain_group() -> str:
    """The sentence for a config group that was given no name of a file, such as mode=null."""
    for argument in sys.argv[1:]:
        key, equals, value = argument.partition("=")
        if not equals or argument.startswith("-"):
            continue
        if not key:
            return _explain_quotes(argument)
        parsed = OverridesParser.create().parse_override(argument).value()
        if (CONFIGS / key).is_dir() and not isinstance(parsed, str | list):
            names = [file.stem for file in (CONFIGS / key).glob("*.yaml")]
            return f"{_unknown_choice(key, value, names)}; leave {key} out for its default"
    return "a config group is chosen with the name of one of its files, such as mode=train"


def _unknown_choice(group: str, name: str, names: Sequence[str]) -> str:
    shown = [name for name in sorted(names) if not name.startswith("_")]
    return f"unknown {group} '{name}'; valid: {', '.join(shown) or 'none'}"


def renamed(key: str) -> str:
    """The sentence for a key of the last release."""
    return f"{key} is called {RENAMED[key]} now; write {RENAMED[key]}=… instead"


def valid_keys(parent: str) -> str:
    """The keys the configuration has at a place (or above it, where it is none), from defaults and chosen files."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", _groups_only(sys.argv[1:]))
    while parent and OmegaConf.select(composed, parent) is None:
        parent = parent.rpartition(".")[0]
    node = OmegaConf.select(composed, parent) if parent else composed
    if not isinstance(node, DictConfig):
        return f"{parent} is a plain value"
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
    return [_key_of(override) for override in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []


def _key_of(override: str) -> str:
    return re.split("[=@]", override.lstrip("+~"), maxsplit=1)[0]
