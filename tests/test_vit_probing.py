"""The program from Python: what a call leaves is what the command leaves, and nothing else is left behind."""

import os
import runpy
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from program import TINY, configured, finish, places, start

import vit_probing as vp
from datasets.procedural import Scenes
from errors import UserError
from runs.validity import refuse_other_layer, refuse_other_use, refuse_standardised

ROOT = Path(__file__).parent.parent
SIZES = {"patch_size": 8, "image_size": 96, "mean": 0.5, "std": 0.25}
QUICK = ["trainer.epochs=1", "trainer.seeds=2", "trainer.n_boot=20", "controls=[position]"]


def scenes(n: int, split: str = "train") -> list:
    data = Scenes(split, n_train=n, n_val=n, n_test=n)
    return [data[i] for i in range(n)]


@pytest.fixture(scope="module")
def handed() -> tuple[list, list]:
    items = scenes(16)
    return [item.image.movedim(0, -1).numpy() for item in items], [item.labels["identity"].numpy() for item in items]


@pytest.fixture(scope="module")
def own() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 12, 8, 8)


@pytest.fixture(scope="module")
def result(tmp_path_factory, handed, own) -> vp.Result:
    folder = tmp_path_factory.mktemp("own")
    return vp.probe(own, *handed, *places(folder), *QUICK, **SIZES)


def numbers_of(directory: Path) -> dict[str, bytes]:
    """Every file of a run that holds numbers."""
    kept = [*directory.glob("*.jsonl"), directory / "layers.csv", *directory.glob("checkpoints/**/*.safetensors")]
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in kept}


def surroundings() -> tuple:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ours = {key: value for key, value in os.environ.items() if key.startswith(("HYDRA", "WANDB", "OMP"))}
    return (os.getcwd(), ours, sys.argv, list(sys.path), handlers, torch.get_num_threads(),
            GlobalHydra.instance().hydra, HydraConfig.instance().cfg, torch.random.get_rng_state().tolist(),
            torch.is_grad_enabled())  # fmt: skip


def test_a_call_leaves_the_records_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [*TINY, "controls=[position]", "threads=1"]  # how a product is cut into threads can change its last bit
    command = start(tmp_path / "command", *tiny)
    monkeypatch.chdir(tmp_path)  # as a notebook that lies elsewhere
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    before = surroundings()
    called = vp.run(*places(tmp_path / "call"), *tiny)
    assert surroundings() == before
    done = finish(command)
    assert done.status == 0, done.err
    (directory,) = (tmp_path / "command" / "outputs" / "train").iterdir()
    assert called.dir.name == directory.name
    assert numbers_of(called.dir) == numbers_of(directory) and len(numbers_of(directory)) >= 5
    chosen = [record for record in called.records if record["kind"] == "validation" and record["name"] == "probe"]
    assert called.objective == max(r["metrics"]["auroc"] for r in chosen if r["subset"] == "all")
    again = vp.run(*places(tmp_path / "call"), *tiny)
    assert again.dir == called.dir and numbers_of(again.dir) == numbers_of(directory), "a second call takes up the first"


def test_calls_of_two_threads_wait_for_each_other(tmp_path: Path) -> None:
    found: dict[int, vp.Result] = {}

    def call(seed: int) -> None:
        found[seed] = vp.run(*places(tmp_path), *TINY, f"seed={seed}")

    threads = [threading.Thread(target=call, args=(seed,)) for seed in (1, 2)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert [found[seed].config.seed for seed in (1, 2)] == [1, 2] and found[1].dir != found[2].dir


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["mode=trian"], "unknown mode 'trian'; valid: .*train"),
        (["trainer.epoch=3"], "unknown option 'trainer.epoch'; valid keys of trainer: .*epochs"),
        (["trainer.epochs=many"], "trainer.epochs: got 'many', expected a whole number"),
        (["dataset=folder"], "dataset.root has no value"),
        (["trainer.epochs"], "cannot read 'trainer.epochs': options are written name=value"),
        (["dataset=in_memory", "dataset.handle=abc"], "handed over in another Python process"),
        (["model=module", "model.name=python:x-1"], "handed over in another Python process"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    before = surroundings()
    with pytest.raises(UserError, match=sentence):
        vp.run(*places(tmp_path), *overrides)
    assert surroundings() == before


def test_a_hydra_program_may_call(tmp_path: Path) -> None:
    with configured("mode=show"):
        outer = HydraConfig.get()
        assert vp.compose("mode=train", "seed=3").seed == 3
        assert HydraConfig.get() is outer


def test_activations_are_those_the_modes_read(tmp_path: Path) -> None:
    samples = vp.open_activations(*places(tmp_path), *TINY, splits=["test"])
    assert list(samples) == ["test"] and samples["test"].tokens.shape == (3, 8, 36, 32)[:2] + samples["test"].tokens.shape[2:]
    assert vp.made_by(samples["test"])["weights"] == "random:0"


def test_result_of_a_module(result: vp.Result, handed, own) -> None:
    assert "foreground AUROC" in result.table and "  probe gains" in result.table and "finished" in repr(result)
    assert {row["name"] for row in result.rows} == {"probe", "position"}
    assert len(result.curve().axes) == 4
    by_image = [row for row in result.image_scores if row["subset"] == "all"]
    assert len(by_image) == 4 and {row["layer"] for row in by_image} == {0} and all(row["auroc"] > 0 for row in by_image)
    form = result.form(layer=0)
    assert torch.equal(form.form, form.form.mT) and form.form.shape == (2, 12, 12)
    assert not torch.equal(form.form, result.form(0, "foreground").form)
    reread = vp.load_run(result.dir)
    assert reread.table == result.table and reread.rows == result.rows and len(reread.records) == len(result.records) > 0


def test_scores_of_one_image_are_those_of_the_run(result: vp.Result, handed, own) -> None:
    """The form asked about fresh tokens of a test image ranks its pairs as the run did."""
    cfg = result.config
    again = [f"model.name='{cfg.model.name}'", f"dataset.handle='{cfg.dataset.handle}'", f"cache.dir={cfg.cache.dir}"]
    sample = vp.open_activations("model=module", "dataset=in_memory", *again, splits=["test"])["test"]
    tokens = sample.tokens.gather([0])[0, 0]  # [T, D]
    scores = result.trained.scores(tokens, layer=0, made_by=vp.made_by(sample))
    first, second = torch.triu_indices(len(tokens), len(tokens), 1)
    identity, valid = sample.labels["identity"][0], sample.labels["identity_valid"][0]
    used = valid[first] & valid[second]
    same = (identity[first] == identity[second])[used]
    logits = result.trained.form(0).logits(tokens, tokens)[:, first, second][:, used]
    above = (logits[:, same][:, :, None] > logits[:, ~same][:, None]).double().mean()
    assert float(above) == pytest.approx(result.image_scores[0]["auroc"], abs=2e-3)  # tokens are kept as float16
    assert scores.shape == (len(tokens), len(tokens)) and 0 <= float(scores.min()) <= float(scores.max()) <= 1


MADE_BY = {
    "weights": "sha256:aa", "depth": 12, "dim": 8, "patch_size": 8, "image_size": [96, 96], "num_prefix_tokens": 1,
    "has_class_token": True, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic", "norm": False,
    "output_mode": "patches", "windows.kind": "cover", "windows.interpolation": None, "windows.antialias": True, "scale": [1.0],
}  # fmt: skip
WRONG = [
    ("weights", "sha256:bb", "the backbone weights sha256:aa, these activations have sha256:bb"),
    ("weights", "random:0", "the backbone weights"), ("weights", None, "the backbone weights"),
    ("depth", 24, "the depth 12, these activations have 24"), ("dim", 16, "the width 8, these activations have 16"),
    ("patch_size", 16, "the patch size 8"), ("image_size", [96, 48], "the windows of size"),
    ("image_size", [224, 224], "the windows of size"), ("num_prefix_tokens", 5, "the number of class and register tokens 1"),
    ("num_prefix_tokens", 0, "the number of class and register tokens"), ("has_class_token", False, "the class token True"),
    ("has_class_token", 1, "the class token"), ("mean", [0.485, 0.456, 0.406], "the pixel mean"),
    ("mean", [0.0, 0.0, 0.0], "the pixel mean"), ("std", [1.0, 1.0, 1.0], "the pixel deviation"),
    ("interpolation", "bilinear", "the interpolation bicubic"), ("norm", True, "the final norm False, .* have True"),
    ("norm", None, "the final norm"), ("output_mode", "all", "the output mode patches"),
    ("output_mode", "mean_spatial", "the output mode"), ("windows.kind", "stretch", "the windows' kind cover, .* stretch"),
    ("windows.interpolation", "nearest", "the windows' interpolation"), ("windows.antialias", False, "the windows' antialias"),
    ("scale", [1.1], "the size of the tokens"), ("scale", [1.0, 1.0], "the size of the tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "sentence"), WRONG)
def test_activations_made_in_another_way_are_refused(key: str, value: object, sentence: str) -> None:
    path = Path("best.00.safetensors")
    refuse_other_use(path, MADE_BY, dict(MADE_BY))
    refuse_other_use(path, MADE_BY, MADE_BY | {"scale": [1.001]})  # rounding of another machine
    refuse_other_use(path, None, {})  # of a version that stated nothing
    with pytest.raises(UserError, match=f"{path} was fitted on {sentence}"):
        refuse_other_use(path, MADE_BY, MADE_BY | {key: value})


@pytest.mark.parametrize("layer", [12, -1, "0", True, None])
def test_layers_without_a_probe_are_refused(layer: object) -> None:
    assert refuse_other_layer(Path("run"), ["embed", 0, 11], 11) == 2
    with pytest.raises(UserError, match="run holds no probe of layer .*, only of embed, 0, 11; name one of these"):
        refuse_other_layer(Path("run"), ["embed", 0, 11], layer)


def test_tokens_of_another_scale_are_refused(result: vp.Result, handed, own) -> None:
    made_by = vp.made_by(own, **SIZES)
    pixels = (torch.from_numpy(handed[0][0]).movedim(-1, 0)[None].float() / 255 - 0.5) / 0.25
    tokens = own(pixels).flatten(2).mT[0]
    ask = lambda x, **by: result.trained.scores(x, **{"layer": 0, "made_by": made_by, **by})
    assert ask(tokens).shape == (144, 144)
    with pytest.raises(UserError, match="are standardised already .*hand them over as the model gives them"):
        ask((tokens - tokens.mean(0)) / tokens.std(0))
    with pytest.raises(UserError, match="these have .*check them"):
        ask(tokens * 1e5)
    refuse_standardised(Path("run"), (0.01, 1.0), (0.0, 1.0))  # fitted behind a norm: that is how its tokens are
    with pytest.raises(UserError, match="holds no probe of layer 3"):
        ask(tokens, layer=3)
    with pytest.raises(UserError, match=r"reads tokens \[N, 12\] of floating point, got \[144, 11\]"):
        ask(tokens[:, 1:])
    with pytest.raises(UserError, match="reads tokens"):
        ask(tokens[None])
    torch.manual_seed(5)
    with pytest.raises(UserError, match="the backbone weights"):
        ask(tokens, made_by=vp.made_by(torch.nn.Conv2d(3, 12, 8, 8), **SIZES))
    with pytest.raises(UserError, match="the pixel deviation"):
        ask(tokens, made_by=vp.made_by(own, **SIZES | {"std": 0.2}))
    with pytest.raises(UserError, match="the windows' kind cover"):
        ask(tokens, made_by=vp.made_by(own, "protocol.geometry.kind=stretch", **SIZES))
    with pytest.raises(UserError, match="has no fit of pairs 'background'"):
        result.form(0, "background")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"identity_maps": None}, "there are no maps"),
        ({"identity_maps": []}, "identity_maps has 0 entries for 16 images"),
        ({"images": lambda x: [i / 255 for i in x]}, "expected uint8 pixels"),
        ({"images": lambda x: [i[..., :2] for i in x]}, r"image 0 has shape \[96, 96, 2\]"),
        ({"identity_maps": lambda x: [m[:-1] for m in x]}, r"has shape \[95, 96\], its image is \[96, 96\]"),
        ({"identity_maps": lambda x: [m * 1.0 for m in x]}, "expected whole numbers"),
        ({"splits": ["train"] * 16}, "split val has no image"),
        ({"splits": ["training"] * 16}, "dataset.splits: got 'training'"),
        ({"probe": "quadratik"}, "unknown probe 'quadratik'; valid: .*quadratic"),
        ({"patch": 8}, "unknown argument patch; what can be stated of a module is patch_size"),
    ],
)
def test_what_is_handed_over_is_checked(handed, own, changes: dict, sentence: str) -> None:
    arguments = {"images": handed[0], "identity_maps": handed[1], **SIZES}
    for key, value in changes.items():
        arguments[key] = value(arguments[key]) if callable(value) else value
    with pytest.raises(UserError, match=sentence):
        vp.probe(own, **arguments)


def test_other_questions_of_a_module(tmp_path: Path, handed, own) -> None:
    classes = [(identity > 0).astype("int64") for identity in handed[1]]
    named = {"class_maps": classes, "class_names": ["background", "thing"], "probe": "class_linear"}
    result = vp.probe(own, handed[0], None, *places(tmp_path), *QUICK, **named, **SIZES)
    assert result.config.mode == "train_class" and "class accuracy" in result.table
    with pytest.raises(UserError, match="has no table.txt: it is no run of probes"):
        _ = vp.run("mode=extract", *places(tmp_path), *TINY).table


# ------------------------------------------------------------------------------------------------------------ monitor


def monitored(model: torch.nn.Module, **options) -> vp.Monitor:
    items = scenes(16, "val")
    images, identity, classes = [i.image for i in items], *([i.labels[n] for i in items] for n in ("identity", "class"))
    return vp.Monitor(model, images, identity, classes, **{"say": None, "steps": 3, **SIZES, **options})


def train(monitor_every: int | None) -> tuple[torch.Tensor, list]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), torch.nn.Dropout(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = None if monitor_every is None else monitored(model, every=monitor_every, most=1.0)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 96, 96)).square().mean().backward()
        optimizer.step()
        if monitor is not None:
            monitor._started = monitor._started or -1e6  # as if it had been running for long
            monitor(step)
    assert model.training
    return model[0].weight.detach().clone(), [] if monitor is None else monitor.scores


def test_monitoring_changes_nothing_of_the_training() -> None:
    (alone, _), (watched, scores) = train(None), train(2)
    assert torch.equal(alone, watched)
    assert [score["step"] for score in scores] == [-1, 2]
    assert scores[0]["all_auroc"] != scores[1]["all_auroc"] and 0 < scores[1]["foreground_half_width"] < 0.5


def test_a_monitor_keeps_to_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monitor = monitored(torch.nn.Conv2d(3, 8, 8, 8), every=5, most=0.05)
    monkeypatch.setattr("pairs.monitor.time.perf_counter", lambda: clock["now"])
    monitor._cost = 1.0

    def score(step: int) -> dict:
        clock["now"] += 1.0  # seconds a score takes
        monitor.scores.append({"step": step})
        monitor.spent += 1.0
        return monitor.scores[-1]

    monkeypatch.setattr(monitor, "_score", score)
    for step in range(400):
        clock["now"] += 0.1
        monitor(step)
        assert monitor.share <= 0.05
    steps = [found["step"] for found in monitor.scores[1:]]
    assert 1 <= len(steps) <= 3 and all(b - a > 5 for a, b in zip(steps, steps[1:], strict=False)), "put off, not left out"


def test_a_monitor_finds_what_is_there() -> None:
    """Tokens that carry the identity of their patch are told apart, tokens of noise are not."""
    items = scenes(16, "val")
    by_image = {item.image[:, ::8, ::8].float().sum().item(): item.labels["identity"] for item in items}

    def known(x: torch.Tensor) -> torch.Tensor:
        pixels = ((x * 0.25 + 0.5) * 255).round()
        maps = [by_image.get(image[:, ::8, ::8].sum().item(), torch.zeros(96, 96)) for image in pixels]
        codes = torch.nn.functional.one_hot(torch.stack(maps)[:, 4::8, 4::8].long(), 8).float()
        return torch.cat([8 * codes, x[:, :, 4::8, 4::8].movedim(1, -1)], -1)

    found = monitored(known, steps=60).scores[0]
    assert found["all_auroc"] > 0.9 and found["foreground_auroc"] > 0.9


def test_a_monitor_refuses_what_it_cannot_score() -> None:
    with pytest.raises(UserError, match="needs at least 8 images"):
        vp.Monitor(torch.nn.Conv2d(3, 8, 8, 8), [1] * 7, [1] * 7, **SIZES)
    with pytest.raises(UserError, match="every=0"):
        monitored(torch.nn.Conv2d(3, 8, 8, 8), every=0)


# ------------------------------------------------------------------------------------- examples and the command line


@pytest.mark.parametrize(("script", "arguments", "said"), [
    ("own_module.py", [], ["hardest image", "refused: the module returns 145 tokens for a grid of 12 x 12 = 144 patches"]),
    ("watch_training.py", ["6"], ["before the first step", "of the time"]),
])  # fmt: skip
def test_examples_run(tmp_path: Path, monkeypatch, capsys, script: str, arguments: list[str], said: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / "docs" / "examples" / script), run_name="__main__")
    out = capsys.readouterr().out
    assert all(text in out for text in said), out


BUILD = """
import torch

def build(pretrained=True):
    torch.manual_seed(1 if pretrained else 2)
    model = torch.nn.Conv2d(3, 12, 8, 8)
    model.patch_size, model.image_size, model.mean, model.std = 8, 96, 0.5, 0.25
    return model
"""


def test_a_module_of_ones_own_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys_model.py").write_text(BUILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    small = ["dataset.n_train=16", "dataset.n_val=8", "dataset.n_test=8", *QUICK, "wandb.mode=disabled"]
    named = "model.name=somebodys_model:build"
    run = vp.run(*places(tmp_path), "model=module", named, *small, "controls=[position,pixels,random]")
    assert {row["name"] for row in run.rows} == {"probe", "position", "pixels", "random"}
    with pytest.raises(UserError, match="only the command line may name; add model.name=somebodys_model:build"):
        vp.run(*places(tmp_path), "mode=eval", f"run='{run.dir}'")  # a file of the run names the code: it is not called
    scored = vp.run(*places(tmp_path), "mode=eval", f"run='{run.dir}'", named)
    assert scored.objective == pytest.approx(run.objective)
    with pytest.raises(UserError, match="a module has none; take another probe"):
        vp.run(*places(tmp_path), "model=module", named, *small, "probe.mode=attention")
