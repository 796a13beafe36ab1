"""The baselines: what they know, and that they are asked about the very patches of the probe."""

from pathlib import Path

import torch
from program import TINY, configured, places
from samples import planted_sample

from activation import open_sample
from controls import Opened, build_controls, pixels, position, position_code, shuffle_identities, shuffled


def test_position_knows_how_far_apart_patches_of_two_windows_lie() -> None:
    sample = planted_sample(n_images=2)
    window = torch.arange(16) // 8  # the second half is seen in a second window, shifted by 2.5 patches to the right
    where = torch.stack([window, sample.position[0, :, 1], sample.position[0, :, 2]], -1).expand(2, -1, -1)
    place = sample.labels["place"] + window[:, None] * torch.tensor([0.0, 2.5])
    sample = sample._replace(position=where, labels={**sample.labels, "place": place})
    with configured(*TINY) as cfg:
        coded = position(Opened(cfg, {"train": sample})).samples["train"].tokens.gather(torch.arange(2))
    expected = position_code(torch.cat([where[..., :1].float(), place], -1))
    assert torch.equal(coded, expected[None])
    axes = expected.unflatten(-1, (3, 2, 16))[..., 1:, :, :].flatten(-3)  # row and column: windows apart
    distance = (place[0, :, None] - place[0]).norm(dim=-1)
    product = axes[0] @ axes[0].T  # a sum of cosines of the differences: of equal distances along one axis, equal products
    straight = place[0, :, 0][:, None] == place[0, :, 0]
    for d in distance[straight].unique():
        of_one = product[straight & (distance == d)]
        assert torch.allclose(of_one, of_one[:1].expand_as(of_one), atol=1e-4)


def test_pixels_stand_beside_tokens_of_whole_images(tmp_path: Path) -> None:
    overrides = [*TINY, *places(tmp_path), "model.layers=[0]", "model.output_mode=all", "controls=[pixels,pixels_position]"]
    with configured(*overrides) as cfg:
        samples = {split: open_sample(cfg, split, say=lambda text: None) for split in ("train", "val", "test")}
        alone, both = build_controls(Opened(cfg, samples), ("pixels", "pixels_position"), print)
        patches = pixels(Opened(cfg.copy(), samples)).samples["test"]
    for control in (alone, both):
        found, of_probe = control.samples["test"], samples["test"]
        assert torch.equal(found.position, of_probe.position) and torch.equal(found.valid, of_probe.valid)
        assert found.tokens.shape[1:3] == of_probe.tokens.shape[1:3]
    x = patches.tokens.gather(torch.arange(8))[0]  # [B, 1 + N, D]
    assert not x[:, 0].any() and x[:, 1:].abs().sum(-1).gt(0).all()  # the class token shows nothing
    assert not samples["test"].labels["identity_valid"][:, 0].any()  # and is asked nothing


def test_shuffled_identities_keep_every_count_and_nothing_else() -> None:
    rng = torch.Generator().manual_seed(0)
    draw = lambda high: torch.randint(0, high, (40, 24), generator=rng)
    identity, class_, valid = draw(5), draw(3), torch.rand(40, 24, generator=rng) > 0.2
    mixed = shuffle_identities(identity, class_, valid)
    fixed = ~valid | (identity == 0)
    assert torch.equal(mixed[fixed], identity[fixed]) and not torch.equal(mixed, identity)
    for m in range(40):
        for k in range(3):  # the identities of every class of an image are those that were there
            patches = (class_[m] == k) & ~fixed[m]
            assert mixed[m, patches].sort().values.equal(identity[m, patches].sort().values)
    same = lambda x: (x[:, :, None] == x[:, None])[(~fixed)[:, :, None] & (~fixed)[:, None]].float()
    agree = torch.corrcoef(torch.stack([same(mixed[:, ::1]), same(identity)]))[0, 1]
    assert agree < 0.35  # what is left is each patch with itself
    assert torch.equal(mixed, shuffle_identities(identity, class_, valid))
    alone = shuffle_identities(identity, None, valid)
    assert alone[~fixed].sort().values.equal(identity[~fixed].sort().values) and not torch.equal(alone, mixed)


def test_the_control_task_is_asked_where_identities_are() -> None:
    sample = planted_sample(n_images=3)
    with configured(*TINY) as cfg:
        subject = shuffled(Opened(cfg, {"train": sample}))
        assert subject.samples["train"].tokens is sample.tokens and len(subject.seeds) == 1
        assert not torch.equal(subject.samples["train"].labels["identity"], sample.labels["identity"])
    with configured("mode=train_class", *TINY) as cfg:
        assert shuffled(Opened(cfg, {"train": sample})) is None
