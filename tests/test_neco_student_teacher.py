"""Schedules, moving average, queue, head, parameter groups: reference values and laws."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from errors import UserError
from neco.student_teacher import (
    PatchEncoder,
    ProjectionHead,
    ReferenceQueue,
    cosine,
    encode,
    freeze_but,
    move_average,
    parameter_groups,
    set_schedule,
    trained_blocks,
)

GOLDEN = json.loads((Path(__file__).parent / "golden/neco/schedules.json").read_text())


def tiny(**options: object) -> PatchEncoder:
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", **kwargs, dynamic_img_size=True, **options)
    return PatchEncoder(vit, ProjectionHead(16, 8, 6, 3))


def test_schedules_are_the_reference_ones() -> None:
    total = GOLDEN["epochs"] * GOLDEN["iters_per_epoch"]
    for key, start, end in (("weight_decay", 0.04, 0.5), ("momentum", 0.9995, 1.0)):
        assert [cosine(step, total, start, end) for step in GOLDEN["steps"]] == pytest.approx(GOLDEN[key], abs=1e-12)
    lr = GOLDEN["lr"]
    for index, base in enumerate(lr["base"]):
        found = [cosine(step, lr["T_max"], base, lr["eta_min"]) for step in range(len(lr["values"]))]
        assert found == pytest.approx([row[index] for row in lr["values"]], abs=1e-14)


def test_schedules_stay_at_their_end() -> None:
    assert [cosine(step, 10, 2.0, 0.5) for step in (10, 11, 10**9)] == [0.5] * 3
    assert cosine(-3, 10, 2.0, 0.5) == 2.0 and cosine(0, 0, 2.0, 0.5) == 0.5


def test_moving_average_is_the_reference_trace() -> None:
    trace = GOLDEN["ema"]
    teacher, student = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(teacher.weight)
    steps = len(trace["student"])
    for step, (value, expected) in enumerate(zip(trace["student"], trace["teacher"], strict=True)):
        nn.init.constant_(student.weight, value)
        move_average(teacher, student, cosine(step, steps, 0.9, 1.0))
        assert teacher.weight.item() == pytest.approx(expected, abs=1e-12)
    assert not teacher.weight.grad_fn


def test_queue_counts_what_it_holds_and_forgets_the_oldest() -> None:
    queue, generator = ReferenceQueue(2, 8, 1), torch.Generator().manual_seed(0)
    queue.push(0, torch.tensor([[1.0], [2.0], [3.0]]))
    assert queue.filled.tolist() == [3, 0]
    assert set(queue.draw(0, 8, generator).flatten().tolist()) == {1.0, 2.0, 3.0}  # never a zero vector
    queue.push(0, torch.arange(10.0, 17.0)[:, None])
    assert queue.tokens[0].flatten().tolist() == [*range(10, 17), 1.0] and queue.filled.tolist() == [8, 0]
    assert set(queue.draw(0, 8, generator).flatten().tolist()) == {*range(10, 17), 1.0}
    queue.push(0, torch.arange(20.0, 40.0)[:, None])
    assert queue.tokens[0].flatten().tolist() == list(range(20, 28))
    copy = ReferenceQueue(2, 8, 1)
    copy.load_state_dict(queue.state_dict())
    assert copy.filled.tolist() == queue.filled.tolist() and torch.equal(copy.tokens, queue.tokens)
    for crop, count in ((0, 9), (1, 1)):
        with pytest.raises(UserError, match=r"queue_length=8 .*at least"):
            queue.draw(crop, count, generator)


def test_head_has_published_layers_and_unit_length() -> None:
    head = ProjectionHead(16)
    shapes = {key: list(value.shape) for key, value in head.state_dict().items() if key.endswith("weight")}
    assert shapes == {"0.weight": [2048, 16], "2.weight": [2048, 2048], "4.weight": [256, 2048]}
    torch.testing.assert_close(head(torch.randn(3, 5, 16)).norm(dim=-1), torch.ones(3, 5))
    assert [type(module) for module in ProjectionHead(16, layers=1)] == [nn.Linear]
    assert head[0].bias.eq(0).all() and head[0].weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_encoder_gives_final_norm_patches_in_place() -> None:
    encoder = tiny(reg_tokens=2).eval()
    images = torch.randn(2, 3, 12, 20)
    patches = encoder.tokens(images)
    torch.testing.assert_close(patches, encoder.vit.forward_features(images)[:, 3:])
    maps = encoder(images)
    assert maps.shape == (2, 6, 3, 5)
    torch.testing.assert_close(maps[:, :, 1, 2], encoder.projection_head(patches[:, 7]))
    together = encode(encoder, [images, images.flip(0), images[..., :8]])
    torch.testing.assert_close(together[1], maps.flip(0))
    assert together[2].shape == (2, 6, 3, 2)


def test_class_attention_is_softmax_over_all_tokens() -> None:
    encoder = tiny(reg_tokens=2).eval()
    attention = encoder.class_attention(torch.randn(2, 3, 16, 16))
    assert attention.shape == (2, 4, 4) and (attention > 0).all() and (attention.sum((1, 2)) < 1).all()
    with pytest.raises(UserError, match="class token"):
        tiny(class_token=False, global_pool="avg").class_attention(torch.randn(1, 3, 16, 16))


def test_groups_decay_matrices_tokens_and_positions_only() -> None:
    encoder = tiny(init_values=1.0)
    groups = parameter_groups(encoder, 1e-5, 1e-4)
    assert [(g["lr"], g["decays"]) for g in groups] == [(1e-5, True), (1e-5, False), (1e-4, True), (1e-4, False)]
    names = {id(p): name for name, p in encoder.named_parameters()}
    assert sorted(names.values()) == sorted(names[id(p)] for g in groups for p in g["params"])
    decayed = {names[id(p)] for g in groups if g["decays"] for p in g["params"]}
    assert {"vit.pos_embed", "vit.cls_token", "vit.patch_embed.proj.weight", "projection_head.2.weight"} <= decayed
    assert not any(name.endswith(("bias", "gamma", "norm.weight", "norm1.weight")) for name in decayed)
    optimizer = torch.optim.AdamW(groups)
    set_schedule(optimizer, 5, 10, 0.0, (0.04, 0.5))
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.27, 0.0, 0.27, 0.0])
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([5e-6, 5e-6, 5e-5, 5e-5])


def test_trainable_blocks() -> None:
    assert trained_blocks(None, 12) is None
    assert trained_blocks(9, 12) == [9, 10, 11] == trained_blocks(-3, 12)
    assert trained_blocks([0, -1], 12) == [0, 11]
    for wrong in (12, [-13], [], True, ["x"]):
        with pytest.raises(UserError, match="trainable_blocks"):
            trained_blocks(wrong, 12)
    encoder = tiny()
    freeze_but(encoder.vit, [2])
    learning = {name for name, p in encoder.vit.named_parameters() if p.requires_grad}
    assert learning and all(name.startswith("blocks.2.") for name in learning)
    assert len(parameter_groups(encoder, 1e-5, 1e-4)) == 4
