"""Windows that overlap: where they lie, how their logits are averaged, and that whole images are a special case."""

import program
import pytest
import torch
import torch.nn.functional as F

from dense.contract import LabelMaps
from dense.features import dense_config, open_split
from dense.heads import Heads, Normalization
from dense.linear_seg import score_pixels
from dense.sliding import Windows, average_windows, check_slide, corners, score_windows, sliding_windows
from errors import UserError


def test_windows_reach_every_edge():
    assert corners((12, 20), (8, 8), (5, 5)) == [(0, 0), (0, 5), (0, 10), (0, 12), (4, 0), (4, 5), (4, 10), (4, 12)]
    assert corners((8, 8), (8, 8), (5, 5)) == [(0, 0)]
    # an image of 512 x 683 in windows of 512 every 341, as published
    assert corners((512, 683), (512, 512), (341, 341)) == [(0, 0), (0, 171)]


def test_the_average_of_overlapping_windows_is_the_brute_force_one():
    size, window = (14, 19), (8, 8)
    at = corners(size, window, (5, 3))
    logits = torch.randn(len(at), 2, 2, 3)
    expected = torch.zeros(3, *size)
    for row in range(size[0]):
        for column in range(size[1]):
            here = []
            for each, (top, left) in zip(logits, at, strict=True):
                if top <= row < top + 8 and left <= column < left + 8:
                    large = F.interpolate(each.movedim(-1, 0)[None], size=window, mode="bilinear", align_corners=False)[0]
                    here.append(large[:, row - top, column - left])
            expected[:, row, column] = torch.stack(here).mean(0)
    torch.testing.assert_close(average_windows(logits, at, window, size), expected)


def test_the_mean_decides_where_windows_disagree():
    heads, norm = Heads(1, [0], [0], 2, 2), Normalization("none", 1, 2)
    heads.weights[0].data.copy_(torch.eye(2).view(1, 2, 1, 2))
    heads.offsets[0].data.zero_()
    tokens = torch.zeros(1, 2, 1, 1, 2)
    tokens[0, :, 0, 0] = torch.tensor([[3.0, 0.0], [0.0, 1.0]])  # the first window is surer of class 0 than the second of 1
    look = lambda image: Windows(tokens, [(0, 0), (0, 2)], (4, 4), (4, 6))
    found = score_windows(heads, norm, look, LabelMaps.from_tensor(torch.zeros(1, 4, 6, dtype=torch.int64), 2), ["full"])
    assert found[0, 0, "full"].total().tolist() == [[16, 8], [0, 0]]


def test_one_window_is_the_whole_image(tmp_path):
    options = [*program.MODEL, "mode=linear_seg", "dataset.n_test=2", "protocol.geometry.kind=stretch", "cache.dtype=float32"]
    with program.configured(*options, *program.places(tmp_path)) as cfg:
        cfg = dense_config(cfg)
        split = open_split(cfg, "test", print)
        heads, norm = Heads(1, [0, 1], [1], 32, split.maps.n_classes), Normalization("none", 1, 32)
        numbers = split.sample.meta["numbers"]
        whole = score_pixels(heads, norm, split.grids, split.maps, ["full", 40])
        windows = score_windows(heads, norm, sliding_windows(cfg, "test", numbers, 0.5, print), split.maps, ["full", 40])
    assert whole.keys() == windows.keys()
    for key in whole:
        moved = (whole[key].total() - windows[key].total()).abs().sum() / whole[key].total().sum()
        assert float(moved) < 0.002  # equal but for pixels that lie between two classes


def test_the_protocol_runs_in_windows(tmp_path):
    overrides = [
        *program.MODEL, "mode=linear_seg", "protocol=dinov2_linear", "dataset.n_train=8", "dataset.n_test=3",
        "dataset.size=[96,160]", "trainer.n_boot=20", "wandb.mode=disabled", "dense.input_size=96", "dense.figures=false",
        "dense.evaluations=[linear_seg]", "dense.controls=[position]", "linear_seg.epochs=1", "linear_seg.held_out=0.2",
    ]  # fmt: skip
    scores = []
    for slide in ("0.666", "null"):
        done = program.run(tmp_path, *overrides, f"linear_seg.slide={slide}")
        records = [r for r in done.records() if r["question"] == "linear_seg" and r["seed"] == "mean"]
        scores.append({r["name"]: r["metrics"]["accuracy"] for r in records})
    assert scores[0]["backbone"] != scores[1]["backbone"] and scores[0]["position"] == scores[1]["position"]


def test_strides_are_checked():
    check_slide(None, "linear_seg")
    for wrong in (0, 1.2, -1, "x", True):
        with pytest.raises(UserError, match="linear_seg.slide="):
            check_slide(wrong, "linear_seg")
