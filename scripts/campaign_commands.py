"""The careless commands of `campaign.py`: those that people typed, and for every option values that it does not take."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from options import ALSO, NAMES, NUMBER_OR_LIST, TEXTS, leaves

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "model.pretrained=false", "model.weights=null", "model.digest=null", "model.layers=[embed,0]", "controls=[position,cosine]",
    "model.kwargs={img_size: 96, patch_size: 16, embed_dim: 32, depth: 2, num_heads: 2}", "wandb.mode=disabled", "threads=1",
    "dataset.n_train=16", "dataset.n_val=8", "dataset.n_test=8", "cache.shard_images=4", "trainer.epochs=4", "trainer.seeds=2",
    "trainer.n_boot=20", "trainer.lr=1e-2", "trainer.checkpoint_seconds=0",
]  # fmt: skip
COMMANDS = [
    "controls=5", "controls=[position,position]", "controls=nonsense", "protocol.pairs.fit=[]", "model.kwargs=5", "task=foo",
    "task=null", "entry=os.system", "entry=foo.bar", "entry=nodots", "entry=", "mode=null", "mode=nonsense", "=5", "run=here",
    "mode=export_data export.splits=5", "mode=train_binding binding.ladder=5", "dataset._target_=os.system",
    "dataset._target_=foo.bar", "dataset._target_=datasets.procedural.Nope", "dataset._target_=datasets.scenes.Nope",
    "+dataset._partial_=true", "+dataset._args_=[1]", "+dataset.size._target_=os.system", "cache.dir=", "output_dir=a=b",
    "output_dir=a,b", "output_dir=~", "~", "~probe", "output_dir='", 'output_dir="', "output_dir=[", "output_dir=a#b",
    "probe.mode=nonsense", "probe.rank=text", "trainer.seeds=0", "trainer.seeds=[1,1]", "trainer.seeds=[]", "trainer.epochs=-1",
    "trainer.lr=nan", "trainer.schedule=nonsense", "trainer.optimizer=nonsense", "device=tpu", "device=cuda:99", "device=cpu:1",
    "model.layers=[9]", "model.layers=[]", "model.layers=[embed,embed]", "model.layers=nonsense", "model.name=nonsense",
    "model.output_mode=cls", "model.output_mode=nonsense", "model.dtype=int8", "model.source=nonsense", "protocol=nonsense",
    "dataset=folder", "dataset=nonsense", "dataset.n_train=text", "dataset.n_train=0", "dataset.nonsense=1",
    "dataset.on_error=nonsense", "dataset.n_train=99999999999", "cache.dtype=float8", "cache.disk_gb=1e-9", "cache.workers=-1",
    "+nonsense=1", "nonsense=1", "eval.run=x", "cache.max_gb=1", "model.weights=/nonexistent", "model.weights=.",
    "mode=eval run=/nonexistent", "mode=eval run=.", "mode=eval eval.split=nonsense", "mode=eval eval.checkpoint=nonsense",
    "mode=vis vis.image=99", "mode=vis vis.image=nonsense", "mode=vis vis.pixel=[1]", "mode=vis vis.patch=[0,99,99]",
    "mode=vis vis.rows=[nonsense]", "mode=vis vis.anchor=nonsense", "mode=vis vis.split=nonsense", "mode=vis vis.beside=[here]",
    "mode=train_binding dataset=scenes", "mode=train_binding", "mode=dense_suite dense.evaluations=[nonsense]", "mode=analyze",
    "mode=train_class dataset=colorshape", "mode=neco neco.nonsense=1", "threads=20000", "threads=100000", "threads=-1",
    "trainer.seeds=100000", "probe.mode=quadratic_fixed_rank probe.rank=99999", "model.image_size=100000", "model.image_size=7",
    "protocol.selection.patches=100000", "trainer.batch_images=0", "debug=maybe", "seed=text", "probe=5", "probe=null",
    "protocol.geometry.kind=nonsense", "protocol.selection.by=nonsense", "protocol.labels.kind=nonsense",
    "protocol.geometry=null", "experiment=nonsense", "mode_and_model=nonsense", "hydra.run.dir=", "wandb.mode=nonsense",
    "cache.dir=/dev/null", "cache.dir=/proc/nothing", "output_dir=/dev/null", "output_dir=/proc/nothing", "mode=eval,vis",
]  # fmt: skip
# Careless, but what they say can be done.
HARMLESS = ("model.layers=[embed,embed]",)
MODES = ("train", "train_binding", "eval", "vis", "dense_suite", "analyze", "neco", "export_data")
# Values no option of a kind takes; those with an infinite or negative number, a list, a section, a word in its place.
WRONG = {
    bool: ("maybe", "5", "null", "[true]", "{a: 1}", "1.5"),
    int: ("text", "-7", "1.5", "null", "[x]", "true", "99999999999", "nan", "{a: 1}", "''"),
    float: ("text", "-7", "nan", "inf", "null", "[x]", "true", "{a: 1}", "''"),
    str: ("5", "[]", "[a]", "{a: 1}", "true", "1.5", "''"),
    list: ("5", "text", "null", "{a: 1}", "true", "1.5"),
    dict: ("5", "text", "null", "[a]", "true"),
}
# Options with a few valid words, looked up by what reads them.
WORDS = (
    "device", "controls", "probe.mode", "probe.matmul_dtype", "trainer.optimizer", "trainer.schedule", "cache.dtype",
    "model.layers", "model.output_mode", "model.dtype", "model.name", "model.source", "wandb.mode", "protocol.geometry.kind",
    "protocol.selection.kind", "protocol.selection.by", "protocol.labels.kind", "dataset.on_error",
)  # fmt: skip


def careless(draw: random.Random) -> list[tuple[list[str], tuple[str, ...]]]:
    """Different commands in a random order: for every option of every mode what it does not take, and names that are none.

    Returns:
        arguments, and names one of which the answer has to mention.
    """
    commands: dict[tuple[str, ...], tuple[str, ...]] = {}
    seen: set[str] = set()
    for mode in MODES:
        with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
            cfg = compose("config", [f"mode={mode}"])
        for key, default in leaves(OmegaConf.to_container(cfg), ""):
            for wrong in _wrong(key, default) if key not in seen else ():
                commands[(f"mode={mode}", wrong)] = (key, key.rpartition(".")[2], key.partition(".")[0])
            seen.add(key)
    found = [(list(arguments), names) for arguments, names in commands.items()]
    draw.shuffle(found)
    return found


def _wrong(key: str, default: Any) -> Iterator[str]:
    """Overrides of an option that cannot be meant."""
    kind = dict if isinstance(default, dict) else list if isinstance(default, list) else type(default)
    if key in ("mode", "entry", "task", "dataset.allow", "looks_at"):
        return  # typed ones are among COMMANDS
    yield f"{key}_={_text(default)}"  # a name that is none
    yield f"~{key}"
    yield f"+{key}.inside=1"
    if key in NAMES:
        return
    if key in TEXTS:
        kind = str
    for value in WRONG.get(kind, ()):
        if value == "[x]" and key in NUMBER_OR_LIST or value == "null" and None in ALSO.get(key, ()) or key.startswith("hydra"):
            continue
        yield f"{key}={value}"
    if key in WORDS:
        yield f"{key}=nonsense"


def _text(value: Any) -> str:
    return "1" if isinstance(value, str | list | dict) or value is None else str(value).lower()
