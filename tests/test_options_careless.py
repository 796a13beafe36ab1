"""Careless commands, in this process as `main.py` treats them: one sentence that names the option and what to do."""

import re
import sys
from pathlib import Path

import pytest
from program import TINY, run

import options


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a command that cannot be run is answered."""
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    try:
        run(folder, *arguments)
    except SystemExit as ended:
        return str(ended)
    except Exception as error:
        if options.explains(error):
            return f"error: {options.explain(error)}"
        raise
    raise AssertionError("the command ran")


QUOTED = r"a text with signs such as .* stands in two kinds of quotes, "
CARELESS = [
    ("controls=5", r"controls: got 5, expected all, none, a name or a list of names"),
    ("controls=[position,5]", r"controls: got 5 in the list, expected texts"),
    ("controls=[position,position]", r"controls names position twice; leave one of them out"),
    ("controls=null", r"controls: got null, expected all, none"),
    ("controls=nonsense", r"unknown control 'nonsense'; valid for controls=: all, none"),
    ("protocol.pairs.fit=[]", r"protocol.pairs.fit is empty, expected at least one of all, foreground"),
    ("protocol.pairs.fit=[all,all]", r"protocol.pairs.fit names all twice"),
    ("protocol.labels.ignore=[x]", r"protocol.labels.ignore: got 'x' in the list, expected whole numbers"),
    ("model.kwargs=5", r"model.kwargs: got 5, expected a section of options"),
    ("model.kwargs={no: 1}", r"unknown option 'model.kwargs.no'; valid keys of model.kwargs: .* with \+model.kwargs.<key>"),
    ("+model.kwargs.no={_target_: os.system}", r"model.kwargs.no: got \{'_target_': 'os.system'\}, expected a number, a text"),
    ("mode=export_data export.splits=5", r"export.splits: got 5, expected a list, such as \[train, val, test\]"),
    ("mode=export_data export.splits=[]", r"export.splits is empty, expected at least one of train, val, test"),
    ("mode=export_data export.splits=[train,train]", r"export.splits names train twice"),
    ("mode=train_binding binding.ladder=5", r"binding.ladder: got 5, expected a list"),
    ("mode=train_binding binding.ladder=[5]", r"binding.ladder: got 5 in the list, expected sections of options"),
    ("mode=train_binding binding.ladder=[]", r"binding.ladder is empty"),
    ("mode=train_binding probe.F=5", r"probe.F is a section of options, got 5"),
    ("task=foo", r"task: got 'foo' and mode=train has its own task; leave task out and set mode=…"),
    ("task=null", r"task: got null and mode=train"),
    ("mode=null", r"unknown mode 'null'; valid: .*check_data, .*; leave mode out for its default"),
    ("mode=5", r"unknown mode '5'; valid: .*check_data"),
    ("mode={a: 1}", r"mode: got \{'a': 1\}, expected the name of one"),
    ("mode=bogus", r"unknown mode 'bogus'; valid: .*check_data"),
    ("model=null", r"unknown model 'null'; valid: augreg_base"),
    ("=5", r"cannot read '=5': options are written name=value"),
    ("foo", r"cannot read 'foo': options are written name=value"),
    ("cache.dir=", r"cache.dir: got '', expected a text, such as cache"),
    ("trainer.lr=", r"trainer.lr: got '', expected a number of at least 0"),
    ("output_dir=a=b", rf"cannot read output_dir=a=b: {QUOTED}'output_dir=\"a=b\"'"),
    ("output_dir=a#b", rf"{QUOTED}'output_dir=\"a#b\"'"),
    ("output_dir=(a)", rf"{QUOTED}'output_dir=\"\(a\)\"'"),
    ("output_dir=a,b", r"output_dir=a,b gives several values; .* brackets, 'output_dir=\[a,b\]', .* 'output_dir=\"a,b\"'.* -m"),
    ("model.layers=[0,1", r"cannot read model.layers=\[0,1: a bracket is opened and not closed"),
    ("output_dir=${foo}", r"Interpolation key 'foo' not found; \$\{…\} in a value stands for the value of another option"),
    ("~", r"cannot read '~': options are written name=value"),
    ("~trainer.lr", r"~trainer.lr takes an option away"),
    ("~trainer.foo", r"unknown option 'trainer.foo'"),
    ("a.b.c=1", r"unknown option 'a.b.c'; valid keys at the top: "),
    ("trainer=null", r"trainer is a section of options, got null; set them one by one"),
    ("dataset=null", r"unknown dataset 'null'; valid: ade20k"),
    ("dataset.n_train=99999999999", r"dataset.n_train: got 99999999999, expected a whole number below 2147483648"),
    ("dataset._target_=os.system", r"dataset._target_"),
    ("dataset._target_=foo.bar", r"dataset._target_"),
    ("dataset._target_=datasets.procedural.Nope", r"dataset._target_"),
    ("+dataset._partial_=true", r"_partial_"),
    ("entry=os.system", r"entry=os.system is not the entry of mode=train \([\w.]+\); leave entry=… out"),
    ("entry=foo.bar", r"entry=foo.bar is not the entry of mode=train \([\w.]+\); leave entry=… out"),
    ("entry=nodots", r"entry=nodots is not the entry of mode=train \([\w.]+\); leave entry=… out"),
    ("entry=", r"entry: got '', expected a text, such as [\w.]+"),
    ("threads=20000", r"threads=20000 and this machine has \d+ processor cores; set threads=\d+ or less"),
    ("threads=100000", r"threads=100000 and this machine has \d+ processor cores"),
    ("trainer.seeds=[]", r"trainer.seeds"),
    ("model.image_size=[1,2,3]", r"model.image_size"),
    ("model.name=5", r"model.name: got 5, expected a text$"),
    ("model.weights=5", r"model.weights: got 5, expected a text$"),
    ("trainer.epochs=3.5", r"trainer.epochs: got 3.5, expected a whole number of at least 1"),
    ("device=5", r"device: got 5, expected a text, such as auto"),
    ("mode=vis vis.split=5", r"vis.split: got 5, expected a text, such as test"),
    ("cache.lock_timeout=null", r"cache.lock_timeout: got null, expected a number of at least 0"),
    ("protocol=clean protocol.selection=5", r"protocol.selection is a section of options, got 5"),
    # Too large: a plan before any work, and the largest value that fits.
    ("dataset.n_train=1000000000", r"split train has 1000000000 images and the labels .* GB .*; at most \d+ images fit"),
    ("dataset.n_train=1000000 cache.disk_gb=1", r"\(1000000 images × 3 layers × 64 tokens × 32 × 2 bytes\).* at most \d+ "),
    ("protocol.selection.patches=100000", r"at most about trainer.batch_images=\d+ fits, or protocol.selection.patches=\d+"),
    ("protocol.selection.patches=100000 cache.disk_gb=0.1", r"at most 5 images fit, or protocol.selection.patches=32552;"),
    ("model.image_size=100000", r"100000 x 100000: a batch of 32 windows takes about .* at most model.image_size=\d+ fits"),
    ("trainer.seeds=1000000", r"at most trainer.seeds=\d+ fits"),
    ("probe.mode=quadratic_fixed_rank probe.rank=99999", r"probe.rank=99999 and .* 32 channels; at most probe.rank=32 fits"),
    # Wrong for these data or this model: seen on the labels, before any token.
    ("mode=train_binding dataset=scenes dataset.n_train=4 model.layers=-1", r"split train carries no object and feature codes"),
    ("dataset=balancedcolorshape_small dataset.n_train=4 model.output_mode=all", r"has no maps of objects and mode=train"),
    (
        "mode=train_binding model.name=vit_base_patch16_siglip_224 model.layers=-1 model.output_mode=all "
        "probe.mode=attention_quadratic",
        r"probe.mode=attention_quadratic reads the class token and vit_base_patch16_siglip_224 has none",
    ),
    ("protocol.selection.patches=1", r"split train has no usable pair"),
    ("wandb=off", r"wandb is a section of options, got 'off'"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "said"), CARELESS, ids=[command for command, _ in CARELESS])
def test_a_careless_command_is_answered_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    words = [command] if "{" in command else command.split(" ")
    sentence = answer(tmp_path, monkeypatch, *TINY, *words)
    assert re.search(rf"^error: .*{said}", sentence), sentence
    assert "\n" not in sentence and not re.search(r"defect|Traceback|Error\b|hydra\.cc|full_key", sentence)
    assert not list(tmp_path.glob("cache/tokens/*")), "refused before anything is extracted"
