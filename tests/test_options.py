"""Mistakes get one sentence that says what is wrong, what is valid and what to do; nothing unread passes silently."""

import re
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from program import FIT, MODEL, ROOT, TINY, configured, run

import options
from errors import UserError
from runs.adopt import with_new_names


def explained(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    """The sentence for a command that cannot even be composed."""
    monkeypatch.setattr(sys, "argv", ["main.py", *overrides])
    with pytest.raises((HydraException, ValueError)) as caught, initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        compose("config", list(overrides))
    return options.explain(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["mode=nonsense"], r"unknown mode 'nonsense'; valid: .*check_data, .*eval, .*train_class"),
        (["model=nonsense"], r"unknown model 'nonsense'; valid: augreg_base, .*timm$"),  # no _defaults
        (["dataset=nonsense"], r"unknown dataset 'nonsense'; valid: ade20k, .*scenes"),
        (["protocol=nonsense"], r"unknown protocol 'nonsense'; valid: clean, .*object_binding_2025"),
        (["experiment=nonsense"], r"unknown experiment 'nonsense'; valid: "),
        (["hydra/launcher=nonsense"], r"unknown hydra/launcher 'nonsense'; valid: .*slurm"),
        (["modle=demo_vit"], r"unknown option 'modle'; valid keys at the top: .*cache, .*controls, .*model"),
        (["probe.nonsense=1"], r"unknown option 'probe.nonsense'; valid keys of probe: hidden, .*rank"),
        (["trainer={lrr: 1}"], r"unknown option 'trainer.lrr'"),
        (["trainer.lr.x=1"], r"unknown option 'trainer.lr.x'; trainer.lr is a plain value"),
        (["dataset=ade20k", "dataset.n_train=3"], r"unknown option 'dataset.n_train'; valid keys of dataset: .*root"),
        (["model=siglip_base", "model.kwargs.depth=2"], r"of model.kwargs: none; .* added with \+model.kwargs.<key>=…"),
        (["+mode=train"], r"mode is there already; choose with mode=…, without a \+"),
        (["+experiment=binding_grid"], r"experiment is there already; choose with experiment=…, without a \+"),
        (["cache.max_gb=1"], r"^cache.max_gb is called cache.disk_gb now; write cache.disk_gb=… instead$"),
        (["trainer={batch_size: 1}"], r"^trainer.batch_size is called trainer.batch_images now; "),
        (["foo"], r"cannot read 'foo': options are written name=value, such as trainer.epochs=3$"),
    ],
)
def test_what_cannot_be_composed_is_explained(monkeypatch: pytest.MonkeyPatch, overrides: list[str], said: str) -> None:
    sentence = explained(monkeypatch, *overrides)
    assert re.search(said, sentence) and "\n" not in sentence


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        return compose("config")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("trainer.epochs", "abc", "a whole number of at least 1"),
        ("trainer.epochs", 0, "a whole number of at least 1"),
        ("trainer.epochs", 1.5, "a whole number of at least 1"),
        ("trainer.batch_images", True, "a whole number of at least 1"),
        ("trainer.batch_images", [4], "a whole number"),
        ("trainer.lr", "abc", "a number of at least 0"),
        ("trainer.lr", float("nan"), "a number of at least 0"),
        ("trainer.lr", -1, "a number of at least 0"),
        ("trainer.seeds", 0, "a whole number of at least 1 or a list of them"),
        ("trainer.seeds", [0, "a"], "a whole number of at least 0 or a list of them"),
        ("seed", -1, "a whole number of at least 0"),
        ("seed", 2**31, "a whole number of at least 0, below 2147483648"),
        ("output_dir", "", "a text, such as outputs"),
        ("cache.dir", 2024, "a text, such as cache"),
        ("threads", "many", "a whole number of at least 0"),
        ("probe.standardize", "maybe", "true or false"),
        ("cache.workers", None, "a whole number of at least 0"),
        ("vis.anchors", "first", "a whole number of at least 1"),
    ],
)
def test_a_value_of_another_kind_is_refused(composed: DictConfig, key: str, value: object, expected: str) -> None:
    cfg = composed.copy()
    OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(UserError, match=rf"^{key}: got .*, expected {expected}"):
        options.check(cfg)


@pytest.mark.parametrize(("key", "value"), [("trainer.seeds", [0, 5]), ("trainer.lr", 1), ("cache.disk_gb", 1), ("seed", 0)])
def test_values_of_the_right_kind_pass(composed: DictConfig, key: str, value: object) -> None:
    cfg = composed.copy()
    OmegaConf.update(cfg, key, value, merge=False)
    options.check(cfg)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("mode_and_model=nonsense", "mode_and_model follows from the other choices and cannot be set; leave mode_and_model=n"),
        ("+unknown=1", r"\+unknown=1 adds an option that nothing reads; valid keys at the top: .*cache, "),
        ("+trainer.foo=1", r"\+trainer.foo=1 adds an option that nothing reads; valid keys of trainer: averaging, "),
        ("++probe.foo=1", r"nothing reads; valid keys of probe"),
        ("+trainer.max_gb=1", r"^trainer.max_gb is called trainer.stack_gb now; write trainer.stack_gb=… instead$"),
        ("~wandb", r"~wandb takes an option away, and all of them are needed"),
        ("protocol.selection.patches=few", r"patches: got 'few', expected a whole number of at least 1 or all$"),
        ("protocol.selection.per_visit=abc", r"expected a whole number of at least 1 or null$"),
        ("protocol.selection.seed=abc", r"expected a whole number of at least 0"),
        ("protocol.selection.min_purity=abc", r"expected a number of at least 0"),
        ("protocol.geometry.antialias=maybe", r"expected true or false"),
        ("protocol.pairs.fit=all", r"protocol.pairs.fit: got 'all', expected a list, such as \[all, foreground\]"),
        ("protocol.labels.ignore=0", r"expected a list, such as \[-1\]"),
        ("model.pretrained=maybe", r"model.pretrained: got 'maybe', expected true or false"),
        ("model.seed=abc", r"expected a whole number of at least 0"),
        ("trainer=foo", r"trainer is a section of options, got 'foo'; set them one by one, such as trainer.seeds=…"),
    ],
)
def test_what_nobody_reads_is_refused(override: str, said: str) -> None:
    with configured(override) as cfg, pytest.raises(UserError, match=said):
        options.check(cfg)


@pytest.mark.parametrize(("key", "new"), options.RENAMED.items())
def test_the_stored_configuration_of_an_older_run_is_read_with_the_new_names(composed: DictConfig, key: str, new: str) -> None:
    stored = OmegaConf.create(OmegaConf.to_container(composed))  # as read from a file
    section, _, name = new.rpartition(".")
    (stored[section] if section else stored).pop(name)
    OmegaConf.update(stored, key, 7, force_add=True)
    read = with_new_names(stored)
    assert OmegaConf.select(read, new) == 7 and OmegaConf.select(read, key) is None


def test_words_that_stand_for_numbers_pass() -> None:
    words = ["protocol.selection.patches=all", "protocol.selection.per_visit=null"]
    with configured("protocol=object_binding_2026", *words) as cfg:
        options.check(cfg)


def test_architecture_and_data_set_may_get_keys_their_files_do_not_list() -> None:
    with configured("+model.kwargs.class_token=true", "+dataset.foo=1") as cfg:
        options.check(cfg)  # timm and the data set refuse by name what they do not know


# What is wrong only in the light of model or data: the whole program runs into it.
WRONG = [
    (["probe.mode=nonsense"], r"unknown probe.mode 'nonsense'; valid: linear, .*dot_product"),
    (["mode=train_class", "probe.mode=quadratic"], r"needs a pointwise probe; valid: class_linear"),
    (["probe.mode=class_linear"], r"needs a pairwise probe; valid: linear"),
    (["probe.mode=attention"], r"no block comes after layer 1; set model.layers=\[embed,0\]"),
    (["probe.matmul_dtype=nonsense"], r"unknown probe.matmul_dtype 'nonsense'; valid: auto"),
    (["controls=[nonsense]"], r"unknown control 'nonsense'; valid .*position, .*cosine"),
    (["controls=nonsense"], r"unknown control 'nonsense'"),
    (["trainer.schedule=nonsense"], r"unknown trainer.schedule 'nonsense'; valid: constant"),
    (["trainer.optimizer=nonsense"], r"unknown trainer.optimizer 'nonsense'; valid: adamw"),
    (["wandb.mode=nonsense"], r"unknown wandb.mode 'nonsense'; valid: online, offline, disabled"),
    (["protocol.pairs.loss=nonsense"], r"unknown protocol.pairs.loss 'nonsense'; valid: upper"),
    (["protocol.pairs.accuracy=nonsense"], r"unknown protocol.pairs.accuracy 'nonsense'; valid: upper"),
    (["protocol.pairs.fit=[nonsense]"], r"protocol.pairs.fit names 'nonsense'; valid: all, foreground"),
    (["protocol.geometry.kind=nonsense"], r"unknown protocol.geometry.kind=nonsense; valid: cover"),
    (["model.layers=[7]"], r"there is no layer 7, expected all, embed, -2…1"),
    (["model.image_size=97"], r"model.image_size=97 x 97 does not fit .* multiples of its patch size 16, such as 96"),
    (["model.output_mode=cls"], r"mode=train scores pairs of patches: expected patches or all"),
    (["mode=extract", "model.name=vit_base_patch16_siglip_224", "model.output_mode=cls"], r"needs a class token and"),
    (["model.output_mode=nonsense"], r"model.output_mode"),
    (["model.dtype=nonsense"], r"model.dtype=nonsense is unknown"),
    (["+model.kwargs.nonsense=1"], r"does not take model.kwargs"),
    (["model.name=nonsense"], r"timm has no model nonsense"),
    (["cache.dtype=nonsense"], r"cache.dtype=nonsense is unknown"),
    (["cache.disk_gb=1e-9"], r"cache.disk_gb is 1e-09"),
    (["device=nonsense"], r"device=nonsense is unknown|no CUDA device"),
    (["dataset.size=8"], r"dataset.size: got 8"),
    (["dataset.noise=much"], r"dataset.noise: got 'much', expected a number"),
    (["mode=check_data", "dataset.noise=much"], r"dataset.noise: got 'much', expected a number"),
    (["dataset.on_error=nonsense"], r"dataset.on_error: got 'nonsense', expected raise or skip"),
    (["+dataset.nonsense=1"], r"dataset.nonsense: Scenes takes no such option; it takes hue_spread"),
    (["mode=eval"], r"no finished run of mode train"),
    (["trainer.seeds=[1,1]"], r"trainer.seeds names a seed twice"),
    (["mode=vis", "run=/nowhere"], r"/nowhere is not a run directory"),
    (["output_dir=/proc/nowhere"], r"cannot create the run directory .* set output_dir=…"),
    (["cache.dir=/proc/nowhere"], r"cannot be written .* set cache.dir"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), WRONG, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_bad_input_is_one_sentence(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=rf"^error: .*{said}") as caught:
        run(tmp_path, *TINY, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("override", ["device=cuda", "model.attention=xformers"])
def test_what_needs_cuda_says_so(tmp_path: Path, override: str) -> None:
    with pytest.raises(SystemExit, match="error: .*CUDA"):
        run(tmp_path, *TINY, override)
    if override.startswith("model"):  # nor is it passed over where everything is cached and no backbone is built
        short = [*TINY, "mode=extract", "model.layers=[0]"]
        run(tmp_path, *short)
        with pytest.raises(SystemExit, match="error: .*CUDA"):
            run(tmp_path, *short, override)


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    ade = [*MODEL, *FIT, "dataset=ade20k"]
    challenge = tmp_path / "ADEChallengeData2016"
    (challenge / "images" / "training").mkdir(parents=True)
    (challenge / "annotations").mkdir()
    for root, said in [
        (None, "dataset.root has no value; give it one on the command line: dataset.root=…"),
        ("/nowhere", "dataset.root: got /nowhere, which is no folder; expected"),
        (tmp_path, "expected the full release ADE20K_2021_17_01"),
    ]:
        with pytest.raises(SystemExit, match=f"^error: .*{said}"):
            run(tmp_path, *ade, *([] if root is None else [f"dataset.root={root}"]))
    with pytest.raises(SystemExit, match=r"error: .*/nowhere.* expected one with images/, and identity/ or class/ or both"):
        run(tmp_path, *MODEL, *FIT, "dataset=folder", "dataset.root=/nowhere")


def test_a_data_set_of_codes_is_not_asked_for_objects(tmp_path: Path) -> None:
    codes = [*MODEL, *FIT, "dataset=colorshape", "dataset.n_train=4", "dataset.n_val=2", "dataset.n_test=2"]
    for mode in ("patches", "all"):
        with pytest.raises(SystemExit, match="error: .*(pixel labels|has no maps of objects)"):
            run(tmp_path, *codes, f"model.output_mode={mode}")


def test_what_fits_the_embedded_backbone_alone_is_its_default_alone() -> None:
    with configured("mode=train_binding") as embedded, configured("mode=train_binding", "model=dinov2_base") as other:
        assert (list(embedded.model.layers), embedded.model.output_mode) == ([3, -1], "cls")
        assert (other.model.layers, other.model.output_mode) == (-1, "mean_spatial")
    with configured("mode=train_binding", "model.layers=[0]", "model.output_mode=all") as chosen:
        assert (list(chosen.model.layers), chosen.model.output_mode) == ([0], "all")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "clean"),
        (["trainer.lr=1e-3"], "clean"),  # clean says nothing of the optimiser
        (["protocol.selection.patches=8"], "clean, changed: selection.patches=8"),
        (["mode=train_binding"], "clean, changed: geometry.kind=stretch"),
        (["protocol.pairs.fit=[all]", "protocol.labels.ignore=[]"], "clean, changed: labels.ignore=[], pairs.fit=[all]"),
        (["protocol=object_binding_2025"], "object_binding_2025"),
        (["protocol=object_binding_2025", "trainer.epochs=2"], "object_binding_2025, changed: trainer.epochs=2"),
    ],
)  # fmt: skip
def test_a_protocol_that_differs_from_its_file_says_so_in_its_name(overrides: list[str], name: str) -> None:
    with configured(*overrides) as cfg:
        options.name_protocol(cfg)
        assert cfg.protocol.name == name


def test_records_carry_the_name_of_a_changed_protocol(tmp_path: Path) -> None:
    finished = run(tmp_path, *TINY, "model.layers=[0]", "protocol.selection.patches=8", "probe.mode=cosine")
    assert {record["protocol"] for record in finished.records()} == {"clean, changed: selection.patches=8"}
    assert "clean_changed_selection.patches_8" in finished.dir.name


def test_what_a_file_of_ones_own_misspells_is_named(composed: DictConfig) -> None:
    cfg = composed.copy()
    OmegaConf.update(cfg, "trainer.lrr", 1, force_add=True)  # Hydra takes any key of a file
    with pytest.raises(UserError, match=r"^trainer.lrr stands in a file of cfgs and nothing reads it; valid keys of trainer: "):
        options.check(cfg)


def test_a_sweep_in_a_file_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nhydra: {sweeper: {params: {seed: '1,2'}}}\n")
    with configured(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine") as cfg:
        with pytest.raises(UserError, match=r"a sweep over seed; add -m to run all its jobs"):
            options.check(cfg)


def test_the_help_names_options_that_exist(composed: DictConfig) -> None:
    template = OmegaConf.load(ROOT / "cfgs" / "config.yaml").hydra.help.template
    text = template.partition("What to change")[2].partition("Files to choose from")[0]
    keys = re.findall(r"([\w.]+)=(?= |$)", text, re.MULTILINE)
    exists = lambda key: key.rpartition(".")[2] in (OmegaConf.select(composed, key.rpartition(".")[0] or "@") or composed)
    assert len(keys) > 40
    assert [key for key in keys if not exists(key)] == ["experiment", "dataset.root"]  # of some files only
