"""Score maps by their numbers: windows of every shape, anchors of every kind, against one pair at a time."""

import json

import numpy as np
import pytest
import torch
from looking import ROOT, SHAPES, encoded, fitted_run, geometry_of, probe_stack, scene_of
from omegaconf import OmegaConf

from backbones.attention import attention_weights
from backbones.load import load_backbone
from datasets.scene import Scene
from errors import UserError
from pairs.encode import encode_scene
from pairs.losses import agreement
from pairs.maps import anchor_tokens, auroc, choose_anchor, map_row, nearest_of_class
from patches.anchor import patch_box
from patches.geometry import plan_geometry
from patches.selection import owned_patches
from patches.windows import cut_windows, join_scores, merge_scores

# ----------------------------------------------------------------------------------------------------- joined windows


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_of_one_value_join_to_that_value(shape, smooth):
    geometry = geometry_of(shape)
    maps = torch.full((len(geometry.starts), *geometry.grid), 0.3)
    joined = join_scores(maps, torch.ones(len(maps), dtype=torch.bool), geometry, shape, smooth=smooth)
    torch.testing.assert_close(joined, torch.full(shape, 0.3))


def padded_geometry():
    rules = OmegaConf.load(ROOT / "cfgs/protocol/object_binding_2025.yaml").protocol.geometry
    return plan_geometry((512, 700), geometry=rules, patch_size=14, image_size=(518, 518)), (512, 700)


@pytest.mark.parametrize("case", ["touching", "overlapping", "padded"])
def test_where_windows_meet_nothing_jumps(case):
    """Two windows that disagree: the published mean jumps by half of it, the joined map never by much from pixel to pixel."""
    if case == "padded":
        geometry, shape = padded_geometry()
    else:
        shape = (32, 64) if case == "touching" else (32, 48)
        geometry = geometry_of(shape)
    assert len(geometry.starts) == 2
    maps = torch.zeros(2, *geometry.grid)
    maps[1] = 1.0
    valid = torch.ones(2, dtype=torch.bool)
    step = lambda x: float((x[:, 1:] - x[:, :-1]).abs().max())
    assert step(merge_scores(maps, valid, geometry, shape)) > 0.4
    joined = join_scores(maps, valid, geometry, shape)
    assert step(joined) < 0.2
    assert bool((joined[0, 1:] >= joined[0, :-1] - 1e-6).all())  # from the one to the other
    assert float(joined[0, 0]) == 0 and float(joined[0, -1]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(32, 128), (40, 56)])
def test_a_window_without_numbers_leaves_a_hole_and_changes_nothing_else(shape):
    geometry = geometry_of(shape)
    n = len(geometry.starts)
    maps = torch.full((n, *geometry.grid), 0.6)
    maps[0] = torch.nan
    valid = torch.tensor([False] + [True] * (n - 1))
    joined = join_scores(maps.nan_to_num(9.0), valid, geometry, shape)
    assert bool(joined[0, 0].isnan()) and float(joined[-1, -1]) == pytest.approx(0.6)


def test_the_patch_grid_shows_the_scores_themselves():
    geometry = geometry_of((32, 32))
    maps = torch.rand(1, 4, 4)
    joined = join_scores(maps, torch.ones(1, dtype=torch.bool), geometry, (32, 32), smooth=False)
    torch.testing.assert_close(joined, maps[0].repeat_interleave(8, 0).repeat_interleave(8, 1))


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("shape", SHAPES)
def test_the_own_score_of_the_anchor_is_the_value_of_the_map_in_its_box(shape, tmp_path):
    # On raw pixels the dot product of a bright patch with itself is by far the highest: the map must peak in the box.
    scene, geometry = scene_of(shape), geometry_of(shape)
    scene.image[:] = 128
    place = tuple(owned_patches(geometry).nonzero()[-2].tolist())
    top, left, bottom, right = (round(v) for v in patch_box(place, geometry, shape))
    scene.image[:, top:bottom, left:right] = 255
    probe = probe_stack("dot_product", ["embed"], 192, variants=2)
    with torch.no_grad():
        probe.bias.fill_(-60.0)
    run = fitted_run(tmp_path, [probe], "model.source=pixels", "model.layers=[embed]")
    seen = encoded(run, scene)
    assert seen.attention == [None]  # raw pixels have none
    anchor = choose_anchor(seen, "patch", [(top + bottom) // 2, (left + right) // 2])
    row = map_row(run, seen, anchor, "probe")
    assert anchor.place == place
    assert row.maps.shape == (1, *shape) and row.patch_scores.shape == (1, len(geometry.starts), *geometry.grid)
    own = float(row.patch_scores[0][place])
    assert own > 0.9 and own == float(row.patch_scores.max())
    y, x = divmod(int(row.maps[0].argmax()), shape[1])
    assert top <= y < bottom and left <= x < right
    assert float(row.maps[0][(top + bottom) // 2, (left + right) // 2]) == pytest.approx(own, abs=0.15)
    outside = row.maps[0].clone()
    outside[max(top - 8, 0) : bottom + 8, max(left - 8, 0) : right + 8] = 0
    assert float(outside.max()) < 0.05


def test_scores_equal_one_pair_at_a_time_across_windows_seeds_and_chunks(tmp_path):
    scene, geometry = scene_of((32, 80)), geometry_of((32, 80))
    chunks = [probe_stack("quadratic", ["embed", 0], 16), probe_stack("quadratic", [1], 16)]
    run = fitted_run(tmp_path, chunks, "model.norm=true")
    seen = encoded(run, scene)
    anchor = choose_anchor(seen, "patch")
    row = map_row(run, seen, anchor, "probe")
    assert row.layers == ["embed", 0, 1] and len(geometry.starts) > 1
    facts = run.backbone.facts
    windows = cut_windows(
        scene.image, geometry, mean=facts.mean, std=facts.std, interpolation=facts.interpolation, antialias=True
    )
    tokens = [t.patch for t in run.backbone(windows, ["embed", 0, 1])]
    window, line, column = anchor.place
    for index, (chunk, layer) in enumerate([(0, 0), (0, 1), (1, 0)]):
        probe, x = chunks[chunk], tokens[index].view(len(windows), 4, 4, 16)
        for w in range(len(windows)):
            for r, c in [(0, 0), (2, 3)]:
                total = 0.0
                for seed in (0, 1):  # the first two of four entries were fitted on all pairs
                    form = (probe.weight + probe.weight.mT)[seed, layer] / (2 * 16**0.5)
                    logit = x[window, line, column] @ form @ x[w, r, c] + probe.bias[seed, layer]
                    total += float(torch.sigmoid(logit.detach())) / 2
                assert float(row.patch_scores[index, w, r, c]) == pytest.approx(total, abs=1e-5)


def test_a_pointwise_probe_scores_pairs_by_the_inner_product_of_its_distributions(tmp_path):
    probe, scene = probe_stack("class_linear", [1], 16, variants=1, n_classes=5), scene_of((32, 32))
    run = fitted_run(tmp_path, [probe], task="class")
    seen = encoded(run, scene)
    anchor = choose_anchor(seen, "patch", [1, 1])
    row = map_row(run, seen, anchor, "probe")
    with torch.no_grad():
        share = probe(seen.tokens[:, :1].flatten(1, 2)[:, None]).softmax(-1)[:, 0, 0]  # [S, N, K]
    expected = torch.stack([agreement(s.log(), "inner")[0] for s in share]).mean(0)
    torch.testing.assert_close(row.patch_scores[0, 0].flatten(), expected)
    assert row.name == "class agreement"  # no probability of one object
    assert anchor.object_id == 0 and anchor.place == (0, 0, 0)


def test_attention_rows_are_the_weights_of_the_next_block(tmp_path):
    run = fitted_run(tmp_path, [probe_stack("cosine", ["embed", 0, 1], 16)])
    seen = encoded(run, scene_of((32, 80)))
    anchor = choose_anchor(seen, "patch", patch=[1, 2, 3])
    row = map_row(run, seen, anchor, "attention")
    block = run.backbone.model.blocks[1]  # reads layer 0
    whole = torch.cat([seen.prefix[1], seen.tokens[1]], 1)  # [n, P + N, D]
    q, k, _ = block.attn.qkv(block.norm1(whole)).view(*whole.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = torch.softmax(q @ k.mT / 8**0.5, -1).mean(1)[1, 1 + 2 * 4 + 3, 1:]
    torch.testing.assert_close(row.patch_scores[1, 1].flatten(), expected, atol=1e-6, rtol=1e-4)
    assert bool(row.patch_scores[1, 0].isnan().all())  # no other window is seen
    assert bool(row.patch_scores[2].isnan().all()) and bool(row.maps[2].isnan().all())  # no block reads the last layer
    assert row.auroc[2] is None and row.auroc[0] is not None


def test_recording_attention_changes_no_token(tmp_path):
    run = fitted_run(tmp_path, [probe_stack("cosine", ["embed", 0], 16)])
    with_attention, without = (encoded(run, scene_of((40, 56)), attention=flag) for flag in (True, False))
    assert torch.equal(with_attention.tokens, without.tokens) and without.attention == [None, None]


def test_attention_from_queries_and_keys_is_the_published_one():
    golden = json.loads((ROOT / "tests/golden/object_binding/misc.json").read_text())["data"]["attention"]
    qkv = torch.tensor(golden["qkv"])
    heads = golden["num_heads"]
    batch, n, width = qkv.shape
    q, k, _ = qkv.view(batch, n, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(attention_weights(q, k), torch.tensor(golden["attn"]), atol=2e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ anchors


def test_an_object_is_asked_with_the_mean_of_its_patches(tmp_path):
    run = fitted_run(tmp_path, [probe_stack("cosine", ["embed", 1], 16)])
    seen = encoded(run, scene_of((32, 80)))
    anchor = choose_anchor(seen, "object", [31, 3])
    assert anchor.object_id == 5
    labels, owned = seen.labels["identity"], owned_patches(seen.geometry)
    mine = (labels.label == 5) & owned
    expected = seen.tokens.view(2, *mine.shape, 16)[:, mine].mean(1)
    torch.testing.assert_close(anchor_tokens(seen, anchor)[:, 0], expected)
    row = map_row(run, seen, anchor, "cosine")
    torch.testing.assert_close(
        row.patch_scores[1, 0].flatten(), torch.cosine_similarity(expected[1][None], seen.tokens[1, 0]), atol=1e-6, rtol=1e-5
    )


def test_the_class_token_is_asked_in_its_own_window(tmp_path):
    run = fitted_run(tmp_path, [probe_stack("cosine", [0], 16)])
    seen = encoded(run, scene_of((32, 80)))
    anchor = choose_anchor(seen, "cls")
    assert anchor.place is None and anchor.box is None
    row = map_row(run, seen, anchor, "cosine")
    for window in range(len(seen.geometry.starts)):
        expected = torch.cosine_similarity(seen.prefix[0, window], seen.tokens[0, window])
        torch.testing.assert_close(row.patch_scores[0, window].flatten(), expected, atol=1e-6, rtol=1e-5)
    assert row.auroc == [None]


def test_further_anchors_lie_in_the_next_smaller_objects(tmp_path):
    run = fitted_run(tmp_path, [probe_stack("cosine", [0], 16)])
    scene = scene_of((32, 80))
    sizes = {n: int((scene.labels["identity"] == n).sum()) for n in (2, 5)}
    seen = encoded(run, scene)
    assert [choose_anchor(seen, "patch", nth=n).object_id for n in (0, 1)] == sorted(sizes, key=lambda n: -sizes[n])


def test_anchors_that_are_not_there_are_named(tmp_path):
    run = fitted_run(tmp_path, [probe_stack("cosine", [0], 16)])
    seen = encoded(run, scene_of((32, 32)))
    with pytest.raises(UserError, match="unknown vis.anchor=head; valid: patch, object, cls"):
        choose_anchor(seen, "head")
    with pytest.raises(UserError, match=r"vis.patch=\[0, 4, 0\], expected \[window, row, column\] below \[1, 4, 4\]"):
        choose_anchor(seen, "patch", patch=[0, 4, 0])
    with pytest.raises(UserError, match="no known object at the anchor"):
        choose_anchor(seen, "object", [0, 0])
    photo = encoded(run, Scene(scene_of((40, 56)).image, {}, "photo"))
    assert choose_anchor(photo, "patch").place == choose_anchor(photo, "patch", [20, 28]).place
    assert map_row(run, photo, choose_anchor(photo, "patch"), "probe").auroc == [None]
    pixels = fitted_run(tmp_path, [probe_stack("dot_product", ["embed"], 192)], "model.source=pixels", "model.layers=[embed]")
    with pytest.raises(UserError, match="needs a backbone with a class token"):
        choose_anchor(encoded(pixels, scene_of((32, 32))), "cls")


def test_a_protocol_that_leaves_the_image_out_is_named(tmp_path):
    run = fitted_run(tmp_path, [probe_stack("cosine", [0], 16)])
    run.cfg.protocol = OmegaConf.load(ROOT / "cfgs/protocol/object_binding_2025.yaml").protocol
    run.cfg.model.kwargs.patch_size, run.cfg.model.image_size = 14, 518
    backbone = load_backbone(run.cfg.model, torch.device("cpu"))
    with pytest.raises(UserError, match="object_binding_2025 leaves out toy"):
        encode_scene(scene_of((512, 512)), [0], run.cfg, backbone)


def test_the_neighbour_is_the_nearest_object_of_the_class():
    identity = torch.zeros(20, 40, dtype=torch.int32)
    for number, left in ((1, 0), (2, 10), (3, 20), (4, 34)):
        identity[5:10, left : left + 5] = number
    category = torch.zeros_like(identity)
    for number, of_class in ((1, 1), (2, 2), (3, 1), (4, 1)):
        category[identity == number] = of_class
    scene = Scene(torch.zeros(3, 20, 40, dtype=torch.uint8), {"identity": identity, "class": category}, "row")
    assert [nearest_of_class(scene, number) for number in (0, 1, 2, 3, 4)] == [0, 3, 0, 4, 3]
    assert nearest_of_class(Scene(scene.image, {"identity": identity}, "row"), 1) == 0


def test_auroc_counts_couples():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
    won = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auroc(scores, positive) == pytest.approx(np.mean(won))
    assert auroc(scores, np.ones(40, bool)) is None
