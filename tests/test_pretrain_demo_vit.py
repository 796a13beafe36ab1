import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from errors import UserError

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/pretrain_demo_vit.py"
sys.path.insert(0, str(SCRIPT.parent))  # also found by the rendering processes

import pretrain_demo_vit as pretrain  # noqa: E402
import pretraining_publish as publishing  # noqa: E402
import pretraining_scenes as rendering  # noqa: E402

TINY = {
    "steps": 6,
    "batch_size": 8,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "fate_rank": 4,
    "warmup": 2,
    "pool": 16,
    "fresh": 2,
    "dtype": "float32",
}
CPU = torch.device("cpu")


def options(**changes) -> list[str]:
    return [word for name, value in (TINY | changes).items() for word in ("--" + name.replace("_", "-"), str(value))]


def run(tmp_path, name="a", *extra, **changes):
    out = tmp_path / f"{name}.safetensors"
    arguments = [*options(**changes), "--out", str(out), "--state", str(tmp_path / f"{name}.state"), "--device", "cpu"]
    pretrain.main([*arguments, "--threads", "1", "--save-every", "2", "--watch", "0", *extra])
    return out


@pytest.fixture(autouse=True)
def restore_global_switches():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    pretrain.set_fused_attn(True)


def test_writes_a_plain_timm_state_dict_with_its_description(tmp_path):
    out = run(tmp_path)
    about = json.loads(out.with_suffix(".json").read_text())
    weights = load_file(out)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    model = VisionTransformer(**about["architecture"])
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 16)
    assert about["digest"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert about["bytes"] == out.stat().st_size < 8_000_000
    assert about["steps"] == 6 and about["images_seen"] == 48 and about["recipe"]["seed"] == 0
    assert about["scenes"]["split"] == "pretrain" and about["sittings"][0]["processes"] == 1
    assert set(about["losses"]) == {"pixels", "fate"}


def test_interrupted_and_uninterrupted_runs_write_the_same_bytes(tmp_path):
    whole = run(tmp_path, "whole")
    broken = run(tmp_path, "broken", "--stop-at", "3")
    assert not broken.exists()
    run(tmp_path, "broken")
    assert whole.read_bytes() == broken.read_bytes()
    assert [s["from_step"] for s in json.loads(broken.with_suffix(".json").read_text())["sittings"]] == [0, 3]


def test_watching_changes_no_byte(tmp_path, capsys):
    assert run(tmp_path, "alone").read_bytes() == run(tmp_path, "watched", "--watch", "2").read_bytes()
    out = capsys.readouterr().out
    assert "before the first step: same object AUROC all" in out and "scores while training took" in out


def test_seed_decides(tmp_path):
    assert run(tmp_path, "a").read_bytes() == run(tmp_path, "again").read_bytes()
    assert run(tmp_path, "a").read_bytes() != run(tmp_path, "other", seed=1).read_bytes()


def test_rendering_processes_change_nothing(tmp_path):
    assert run(tmp_path, "inline").read_bytes() == run(tmp_path, "processes", "--workers", "1").read_bytes()


def test_budget_may_change_before_its_decay_begins_and_not_after(tmp_path):
    straight = run(tmp_path, "straight", steps=12)
    run(tmp_path, "changed", "--stop-at", "3", steps=6)
    assert run(tmp_path, "changed", steps=12).read_bytes() == straight.read_bytes()
    with pytest.raises(UserError, match="differs: steps"):
        run(tmp_path, "changed", steps=20)


def test_masked_prediction_alone(tmp_path):
    out = run(tmp_path, fate=0.0)
    assert set(json.loads(out.with_suffix(".json").read_text())["losses"]) == {"pixels"}


def test_both_losses_fall(tmp_path):
    recipe = pretrain.Recipe(**TINY | {"steps": 60, "batch_size": 16, "lr": 5e-3, "warmup": 5, "queries": 16})
    kwargs = {"device": CPU, "save_every": 1000, "workers": 0}
    start = pretrain.train(recipe, tmp_path / "s", stop_at=1, **kwargs)["losses"]
    (tmp_path / "s").unlink()
    end = pretrain.train(recipe, tmp_path / "s", **kwargs)["losses"]
    assert end["pixels"] < 0.9 * start["pixels"] and end["fate"] < start["fate"]


def test_fate_loss_is_the_mean_over_pairs_and_episodes():
    model = pretrain.Pretraining(pretrain.Recipe(**TINY))
    encoded, moved = torch.randn(2, 5, 16), torch.rand(2, 5, 3) < 0.5
    left, right = model.fate(encoded).chunk(2, -1)
    total = weights = 0.0
    for b in range(2):
        for i in range(5):
            for j in range(5):
                logit = (left[b, i] @ right[b, j] + left[b, j] @ right[b, i]) / (2 * 4**0.5) + model.fate_bias
                for e in range(3):
                    weight = 1.0 if moved[b, i, e] or moved[b, j, e] else 0.25
                    weight *= 4.0 if moved[b, i].any() and moved[b, j].any() else 1.0
                    target = (moved[b, i, e] == moved[b, j, e]).float()
                    total += weight * torch.nn.functional.binary_cross_entropy_with_logits(logit, target)
                    weights += weight
    torch.testing.assert_close(model.fate_loss(encoded, moved), total / weights)


def test_flips_turn_pictures_and_motion_alike():
    recipe = pretrain.Recipe(**TINY)
    pool = pretrain.Pool(recipe, 0, 1, CPU, 0)
    pool.fill(0)
    pool.images[:] = 255 * pool.moved[..., :1].movedim(-1, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    for step in range(12):
        images, moved, _ = pretrain.draw_batch(pool, recipe, step, 0, 1)
        assert torch.equal(torch.nn.functional.avg_pool2d(images.float(), 8)[:, 0].flatten(1) == 255, moved[..., 0])


def test_every_parameter_learns():
    recipe = pretrain.Recipe(**TINY)
    model = pretrain.Pretraining(recipe)
    pool = pretrain.Pool(recipe, 0, 1, CPU, 0)
    pool.fill(0)
    sum(model(*pretrain.draw_batch(pool, recipe, 0, 0, 1)).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_pool_at_a_step_does_not_depend_on_the_way_there():
    recipe = pretrain.Recipe(**TINY | {"pool": 6})
    walked, jumped = (pretrain.Pool(recipe, 0, 1, CPU, 0) for _ in range(2))
    walked.fill(0)
    for _ in range(5):
        walked.advance()
    jumped.fill(5)
    assert torch.equal(walked.images, jumped.images) and torch.equal(walked.moved, jumped.moved)


def test_shown_picture_is_that_of_the_data_set_and_motion_comes_from_pixels():
    recipe = pretrain.Recipe(episodes=3)
    images, moved = rendering.render(recipe, range(20))
    scenes = rendering.Scenes("pretrain")
    still, identity, _ = scenes.render_batch(range(20))
    assert torch.equal(images, still) and moved.shape == (20, 12, 12, 3) and moved.dtype == torch.bool
    clips = scenes.render_clip(range(20), 3)
    clips[:, 2] = clips[:, 0]  # what has come to rest by the moment shown has not moved
    again = rendering.moved_patches(clips, 8)
    assert not again[..., 0].any() and torch.equal(again[..., 1:], moved[..., 1:])
    # Sanity of the signal against the maps, which training never sees: the background rests, about half of the objects move.
    background = torch.nn.functional.avg_pool2d((identity == 0).float()[:, None], 8)[:, 0] == 1
    assert moved[background].float().mean() < 0.1
    assert 0.25 < moved[~background].float().mean() < 0.65


def test_two_processes_share_a_step(tmp_path):
    """Averaged gradients: both processes hold the same weights, and the run resumes."""
    arguments = [*options(steps=4), "--out", str(tmp_path / "two.safetensors"), "--state", str(tmp_path / "state")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29533", str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments, "--device", "cpu", "--threads", "1", "--watch", "0"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    about = json.loads((tmp_path / "two.json").read_text())
    assert about["sittings"][0]["processes"] == 2 and about["images_seen"] == 32


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"visible": 0.9}, "--visible"),
        ({"dim": 18}, "--dim"),
        ({"dtype": "float8"}, "--dtype"),
        ({"steps": 0}, "--steps"),
        ({"image_size": 90}, "--image-size"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        run(tmp_path, **changes)


def test_state_of_another_recipe_or_damaged_is_refused(tmp_path):
    run(tmp_path, "a", "--stop-at", "2")
    with pytest.raises(UserError, match="differs: lr"):
        run(tmp_path, "a", lr=0.1)
    (tmp_path / "a.state").write_bytes(b"not a state")
    with pytest.raises(UserError, match="delete it"):
        run(tmp_path, "a")


def test_too_large_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "MOST_BYTES", 10_000)
    with pytest.raises(UserError, match="lower --dim"):
        run(tmp_path)
    assert not list(tmp_path.glob("a.safetensors*"))


def test_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--lerning-rate", "1"])
    assert stop.value.code == 2 and "--lerning-rate" in capsys.readouterr().err


def test_published_file_is_the_one_described_and_configured():
    about = json.loads((ROOT / "weights/demo_vit.json").read_text())
    weights = ROOT / "weights/demo_vit.safetensors"
    assert publishing.digest(weights) == about["digest"] and weights.stat().st_size == about["bytes"] <= 8_000_000
    VisionTransformer(**about["architecture"]).load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    assert pretrain.Recipe(**about["recipe"]) == pretrain.Recipe()  # the script as it stands makes this file
    config = OmegaConf.load(ROOT / "cfgs/model/demo_vit.yaml")
    assert config.weights == "weights/demo_vit.safetensors" and config.digest == about["digest"]
    assert {**config.kwargs, "num_classes": 0} == about["architecture"]
    assert ([config.mean] * 3, [config.std] * 3) == (about["mean"], about["std"])
