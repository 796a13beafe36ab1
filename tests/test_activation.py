"""The cache of labels and tokens: what it holds, when it is used again, and how it fails."""

import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import Toy, toy_config

import activation
from activation import open_sample
from backbones.load import backbone_facts, load_backbone
from errors import UserError
from files import sealed
from patches.geometry import plan_geometry
from patches.labels import patch_labels
from patches.windows import cut_windows
from store.reading import IMAGES_SHARE, ImageMemory
from store.shards import StackedTokens


def quiet(text: str) -> None:
    pass


def token_files(directory: Path) -> dict[str, str]:
    """Digest of every token file and record."""
    files = sorted([*directory.rglob("*.safetensors"), *directory.rglob("shards/*.json")])
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a backbone may not be built and no image may be opened."""

    def fail(*args, **kwargs):
        raise AssertionError("touched")

    monkeypatch.setattr("store.extract.load_backbone", fail)
    monkeypatch.setattr(Toy, "__getitem__", fail)


@pytest.mark.parametrize("widths", ["[32]", "[32,56]"])
def test_tokens_and_labels_are_those_of_a_direct_pass(tmp_path: Path, widths: str) -> None:
    cfg = toy_config(tmp_path, "cache.dtype=float32", f"dataset.widths={widths}")
    sample = open_sample(cfg, "train", say=quiet)
    facts, backbone = backbone_facts(cfg.model), load_backbone(cfg.model, "cpu")
    dataset, geometry_cfg = Toy("train", **{"widths": cfg.dataset.widths}), cfg.protocol.geometry
    layers = sample.tokens.layers
    assert layers == ["embed", 0, 1] and sample.tokens.shape == (3, 10, 6, 16)
    tokens = sample.tokens.gather(range(10))
    for m in range(10):
        scene = dataset[m]
        geometry = plan_geometry(
            tuple(scene.image.shape[-2:]),
            geometry=geometry_cfg,
            patch_size=facts.patch_size,
            image_size=facts.image_size,
        )
        windows = cut_windows(
            scene.image,
            geometry,
            mean=facts.mean,
            std=facts.std,
            interpolation=facts.interpolation,
            antialias=geometry_cfg.antialias,
        )
        labels = patch_labels(scene.labels["identity"], geometry, labels=cfg.protocol.labels)
        with torch.inference_mode():
            direct = backbone(windows, layers)
        window, row, column = sample.position[m].T
        for layer, of_layer in enumerate(direct):
            expected = of_layer.patch[window, row * geometry.grid[1] + column]
            torch.testing.assert_close(tokens[layer, m], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(sample.labels["identity"][m], labels.label[window, row, column].long())
        torch.testing.assert_close(sample.labels["identity_purity"][m], labels.purity[window, row, column])
        assert sample.keys[m] == scene.key and tuple(sample.grids[m]) == geometry.grid
    assert sample.meta["classes"] == ["background", "thing"] and sample.meta["report"] == {"found": 10}


def test_a_hit_builds_no_backbone_and_opens_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = toy_config(tmp_path)
    first = open_sample(cfg, "train", say=quiet)
    forbid(monkeypatch)
    said = []
    again = open_sample(cfg, "train", say=said.append)
    assert not said and again.meta["bytes_written"] == 0
    assert torch.equal(first.tokens.gather([1, 2]), again.tokens.gather([1, 2]))
    assert torch.equal(first.position, again.position) and first.keys == again.keys
    for name, value in first.labels.items():
        assert torch.equal(value, again.labels[name]) and value.dtype == again.labels[name].dtype


@pytest.mark.parametrize(
    "change",
    ["model.seed=1", "model.norm=true", "cache.dtype=bfloat16", "protocol.selection.patches=5", "dataset.look=1"],
)
def test_whatever_decides_the_tokens_names_another_directory(tmp_path: Path, change: str) -> None:
    first = open_sample(toy_config(tmp_path), "train", say=quiet)
    other = open_sample(toy_config(tmp_path, change), "train", say=quiet)
    assert first.meta["directory"] != other.meta["directory"] and other.meta["bytes_written"] > 0


def test_labels_are_made_anew_without_extracting_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_sample(toy_config(tmp_path), "train", say=quiet)
    monkeypatch.setattr("store.extract.load_backbone", None)
    touched = open_sample(toy_config(tmp_path, "dataset.version=1"), "train", say=quiet)  # same images, newer files
    assert touched.meta["index"] != first.meta["index"] and touched.meta["directory"] == first.meta["directory"]


def test_layers_are_added_alone_and_end_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_sample(toy_config(tmp_path / "whole"), "train", say=quiet)
    asked = []

    def spy(cfg, device, say):
        backbone = load_backbone(cfg, device)
        return lambda images, layers: asked.append(list(layers)) or backbone(images, layers)

    monkeypatch.setattr("store.extract.load_backbone", spy)
    few = open_sample(toy_config(tmp_path / "grown", "model.layers=[0]"), "train", say=quiet)
    assert few.tokens.layers == [0] and asked[-1] == [0]
    grown = open_sample(toy_config(tmp_path / "grown"), "train", say=quiet)
    assert asked[-1] == ["embed", 1]
    assert token_files(Path(grown.meta["directory"])) == token_files(Path(whole.meta["directory"]))
    assert torch.equal(grown.tokens.gather(range(10)), whole.tokens.gather(range(10)))


def test_output_modes_are_read_from_the_stored_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = open_sample(toy_config(tmp_path / "direct", "model.output_mode=cls_mean"), "train", say=quiet)
    every = open_sample(toy_config(tmp_path / "all", "model.output_mode=all"), "train", say=quiet)
    forbid(monkeypatch)
    sample = {
        mode: open_sample(toy_config(tmp_path / "all", f"model.output_mode={mode}"), "train", say=quiet)
        for mode in ("cls", "mean_spatial", "cls_mean")
    }
    x = every.tokens.gather(range(10))
    assert x.shape == (3, 10, 17, 16) and every.position[0, 0].tolist() == [-1, -1, -1]
    assert every.position[3, 1:].tolist() == [[0, row, column] for row in range(4) for column in range(4)]
    assert every.labels["identity"].shape == (10, 17) and not every.labels["identity_valid"][:, 0].any()
    cls, mean, both = (sample[mode].tokens.gather(range(10)) for mode in ("cls", "mean_spatial", "cls_mean"))
    assert torch.equal(cls, x[:, :, :1])
    torch.testing.assert_close(mean, x[:, :, 1:].mean(2, keepdim=True), atol=2e-3, rtol=2e-3)
    assert torch.equal(both, torch.cat([cls, mean], -1)) and both.shape == (3, 10, 1, 32)
    assert torch.equal(both, direct.tokens.gather(range(10)))  # pooled from stored tokens = pooled in the forward pass
    assert sample["cls"].position.eq(-1).all() and not sample["cls"].labels["identity_valid"].any()


def test_registers_are_never_kept_and_a_class_token_is_not_assumed(tmp_path: Path) -> None:
    registers = ["model.kwargs.reg_tokens=3", "cache.dtype=float32"]
    every = open_sample(toy_config(tmp_path, *registers, "model.output_mode=all"), "train", say=quiet)
    assert every.meta["facts"]["num_prefix_tokens"] == 4 and every.tokens.shape[2] == 17
    cfg = toy_config(tmp_path, *registers)
    scene, facts = Toy("train")[0], backbone_facts(cfg.model)
    geometry = plan_geometry((32, 32), geometry=cfg.protocol.geometry, patch_size=facts.patch_size, image_size=facts.image_size)
    style = {"mean": facts.mean, "std": facts.std, "interpolation": facts.interpolation, "antialias": True}
    last = load_backbone(cfg.model, "cpu")(cut_windows(scene.image, geometry, **style), [1])[0]
    expected = torch.cat([last.prefix[:, :1], last.patch], 1)
    torch.testing.assert_close(every.tokens.gather([0], [2])[0], expected, atol=1e-5, rtol=1e-5)

    bare = ["model.name=vit_base_patch16_siglip_gap_224", "model.kwargs.class_token=false"]
    every = open_sample(toy_config(tmp_path, *bare, "model.output_mode=all"), "train", say=quiet)
    mean = open_sample(toy_config(tmp_path, *bare, "model.output_mode=mean_spatial"), "train", say=quiet)
    assert every.tokens.shape[2] == 16 and every.position.min() == 0 and mean.tokens.shape[2] == 1


def test_codes_are_passed_on_and_cannot_select_patches(tmp_path: Path) -> None:
    sample = open_sample(toy_config(tmp_path, "dataset.codes=true", "model.output_mode=cls"), "train", say=quiet)
    assert sample.labels["object_code"].shape == (10, 4) and sample.labels["H_Y_given_F"].shape == (10, 1)
    assert sample.info == {"bits": 2.0} and sample.position.shape == (10, 1, 3)
    with pytest.raises(UserError, match="needs pixel labels"):
        open_sample(toy_config(tmp_path, "dataset.codes=true"), "train", say=quiet)


def test_every_label_has_its_own_validity_and_purity(tmp_path: Path) -> None:
    """The class of object 3 is ignored, its identity is not; cells of one label fill whole patches."""
    sample = open_sample(toy_config(tmp_path, "dataset.holes=true"), "train", say=quiet)
    identity, labels = sample.labels["identity"], sample.labels
    assert labels["identity_valid"].all() and labels["identity_purity"].eq(1).all()
    assert (identity == 3).any() and torch.equal(labels["class_valid"], identity != 3)
    assert torch.equal(labels["class"], torch.where(identity == 3, 0, identity.clamp(max=1)))
    assert torch.equal(labels["class_purity"], (identity != 3).float())
    assert sample.meta["selected_by"] == "identity" and torch.equal(sample.valid, labels["identity_valid"])
    every = open_sample(toy_config(tmp_path, "dataset.holes=true", "model.output_mode=all"), "train", say=quiet)
    assert torch.equal(every.labels["class_valid"][:, 1:], every.labels["identity"][:, 1:] != 3)
    assert not every.labels["class_valid"][:, 0].any() and not every.labels["identity_valid"][:, 0].any()


def test_patches_are_selected_by_the_named_label(tmp_path: Path) -> None:
    both = toy_config(tmp_path, "dataset.holes=true", "protocol.selection.by=class")
    sample = open_sample(both, "train", say=quiet)
    assert sample.meta["selected_by"] == "class" and torch.equal(sample.valid, sample.labels["class_valid"])
    assert sample.valid.all() and (sample.labels["identity"] != 3).all()  # patches without a class are not drawn
    alone = open_sample(toy_config(tmp_path, "dataset.holes=true", "dataset.maps=[class]"), "train", say=quiet)
    assert alone.meta["selected_by"] == "class" and "identity" not in alone.labels
    assert {*alone.labels} >= {"class", "class_purity", "class_valid", "place"}
    assert all(torch.equal(alone.labels[name], sample.labels[name]) for name in alone.labels)
    assert alone.meta["directory"] == sample.meta["directory"] and alone.meta["bytes_written"] == 0  # the same tokens
    objects = open_sample(toy_config(tmp_path, "dataset.maps=[identity]"), "train", say=quiet)
    assert "class" not in objects.labels and objects.labels["identity_valid"].all()


def test_labels_that_cannot_select_patches_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for overrides, sentence in (
        (["protocol.selection.by=identity", "dataset.maps=[class]"], "by=identity and the images have no identity maps"),
        (["protocol.selection.by=object"], "unknown protocol.selection.by=object; valid: identity, class, null"),
        (["dataset.maps=[]"], "train-000 has no label map; its data set needs identity or class maps, or codes"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_sample(toy_config(tmp_path, *overrides, "dataset.on_error=skip"), "train", say=quiet)
    read = Toy.__getitem__
    without = lambda scene: scene._replace(labels={"class": scene.labels["class"]})
    monkeypatch.setattr(Toy, "__getitem__", lambda self, i: without(read(self, i)) if i == 4 else read(self, i))
    with pytest.raises(UserError, match="train-004 has labels class and train-000 has identity, class; all images"):
        open_sample(toy_config(tmp_path), "train", say=quiet)


def test_output_modes_that_cannot_be_given(tmp_path: Path) -> None:
    no_class_token = ["model.name=vit_base_patch16_siglip_gap_224", "model.output_mode=cls"]
    for overrides, sentence in (
        (no_class_token, "needs a class token and vit_base_patch16_siglip_gap_224 has none"),
        (["model.output_mode=mean"], "is unknown, expected one of patches"),
        (["cache.dtype=int8"], "is unknown, expected one of float16"),
        (["cache.batch_windows=0"], "cache.batch_windows=0 is not possible"),
        (["device=tpu"], "device=tpu is unknown"),
        (["device=cuda:99"], "device=cuda:99 and this machine has .* CUDA devices"),
        (["model.output_mode=all", "dataset.widths=[56]"], "takes 2 windows"),
        (["model.output_mode=mean_spatial", "dataset.widths=[56]"], "takes 2 windows"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_sample(toy_config(tmp_path, *overrides), "train", say=quiet)


def test_unreadable_images_stop_or_are_skipped_and_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train-003: truncated file"):
        open_sample(toy_config(tmp_path, "dataset.unreadable=[3,7]"), "train", say=quiet)
    said = []
    skipping = toy_config(tmp_path, "dataset.unreadable=[3,7]", "dataset.on_error=skip")
    sample = open_sample(skipping, "train", say=said.append)
    assert len(sample.keys) == 8 and sample.meta["skipped"] == [[f"train-00{i}", "truncated file"] for i in (3, 7)]
    assert "2 of 10 images unreadable" in said[0] and "train-003" in said[0]
    with pytest.raises(UserError, match="train-003: truncated file"):  # the index is there, the permission is not
        open_sample(toy_config(tmp_path, "dataset.unreadable=[3,7]"), "train", say=quiet)
    with pytest.raises(UserError, match="no usable image among the 2 of split train: 2 × truncated file"):
        open_sample(toy_config(tmp_path, "dataset.n=2", "dataset.unreadable=[0,1]", "dataset.on_error=skip"), "train")


def test_images_the_protocol_drops_are_counted_and_listed(tmp_path: Path) -> None:
    said = []
    geometry = ["kind=two_windows", "window=32", "stride=21", "drop=true", "interpolation=bilinear", "antialias=false"]
    published = [*(f"protocol.geometry.{option}" for option in geometry), "dataset.widths=[48,32]"]
    sample = open_sample(toy_config(tmp_path, *published), "train", say=said.append)
    assert len(sample.keys) == 5 and sum(sample.meta["dropped"].values()) == 5
    assert [key for key, _ in sample.meta["dropped_images"]] == [f"train-00{i}" for i in (1, 3, 5, 7, 9)]
    assert "5 of 10 images dropped by the protocol: train-001 (1 sliding window" in said[0]


def test_every_patch_can_be_kept_and_shorter_images_are_filled_up(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path, "protocol.selection.patches=all", "dataset.widths=[32,48]")
    sample = open_sample(cfg, "train", say=quiet)
    assert sample.tokens.shape[2] == 24  # 4 × 6 patches, in two windows that overlap
    assert sample.labels["identity_valid"].sum(1).tolist() == [16, 24] * 5
    assert len(sample.position[1].unique(dim=0)) == 24
    again = open_sample(toy_config(tmp_path, "protocol.selection.patches=all", "dataset.widths=[32,48]",
                                   "protocol.selection.per_visit=8"), "train", say=quiet)  # fmt: skip
    assert again.meta["index"] == sample.meta["index"]


def test_wrong_options_of_a_data_set_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dataset.colour: Toy takes no such option; it takes codes"):
        open_sample(toy_config(tmp_path, "+dataset.colour=1".lstrip("+")), "train", say=quiet)
    with pytest.raises(UserError, match=r"^dataset.n: got 'many', expected a whole number$"):
        open_sample(toy_config(tmp_path, "dataset.n=many"), "train", say=quiet)


def test_worker_processes_make_the_same_bytes(tmp_path: Path) -> None:
    alone = open_sample(toy_config(tmp_path / "a", "dataset.widths=[32,56]"), "val", say=quiet)
    helped = open_sample(toy_config(tmp_path / "b", "dataset.widths=[32,56]", "cache.workers=2"), "val", say=quiet)
    assert token_files(Path(alone.meta["directory"])) == token_files(Path(helped.meta["directory"]))


def test_the_announced_bytes_are_the_bytes_on_disk_and_any_reader_reads_them(tmp_path: Path) -> None:
    said = []
    sample = open_sample(toy_config(tmp_path), "train", say=said.append)
    directory = Path(sample.meta["directory"])
    files = list(directory.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) == sample.meta["bytes_written"]
    assert any("extracting 10 of 10 images × 3 layers × 6 tokens × 16 float16" in line for line in said)
    first = load_file(directory / "layer_00" / "00001.safetensors")["tokens"]
    assert first.dtype == torch.float16 and torch.equal(first.float(), sample.tokens.gather(range(4, 8), [1])[0])
    record = json.loads((directory / "shards" / "00001.json").read_text())
    assert record["layers"]["0"]["sha256"] == token_files(directory)["layer_00/00001.safetensors"]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["facts"]["backbone"]["patch_size"] == 8 and manifest["shards"] == 3


def test_mapped_files_and_memory_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.shards.MAP_BYTES", 1)  # one map at a time
    held = open_sample(toy_config(tmp_path), "train", say=quiet).tokens
    mapped = open_sample(toy_config(tmp_path, "cache.ram_gb=0"), "train", say=quiet).tokens
    images = torch.tensor([9, 0, 4, 4, 3, 8])
    assert torch.equal(held.gather(images), mapped.gather(images))
    assert torch.equal(held.gather(images, [2, 0]), mapped.gather(images)[[2, 0]])
    assert mapped.nbytes == held.nbytes == 3 * 10 * 6 * 16 * 2
    x = torch.randn(2, 5, 3, 4)
    wrapped = StackedTokens.from_tensor(x, [0, 1])
    assert torch.equal(wrapped.gather([4, 1]), x[:, [4, 1]]) and wrapped.shape == (2, 5, 3, 4)


def test_too_large_an_extraction_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"10 images × 3 layers × 6 tokens × 16 × 2 bytes.*cache.disk_gb is 1e-06"):
        open_sample(toy_config(tmp_path, "cache.disk_gb=1e-6"), "train", say=quiet)
    assert not (tmp_path / "tokens").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file where a folder belongs; move it away, or set cache.dir"):
        open_sample(toy_config(tmp_path / "file"), "train", say=quiet)


def test_damage_is_named_and_repaired_on_request(tmp_path: Path) -> None:
    sample = open_sample(toy_config(tmp_path), "train", say=quiet)
    directory = Path(sample.meta["directory"])
    before = token_files(directory)
    file = directory / "layer_00" / "00001.safetensors"
    good = file.read_bytes()

    def check(sentence: str, *overrides: str) -> None:
        with pytest.raises(UserError, match=sentence):
            open_sample(toy_config(tmp_path, *overrides), "train", say=quiet)
        open_sample(toy_config(tmp_path, "cache.repair=true", *overrides), "train", say=quiet)
        assert token_files(directory) == before

    file.write_bytes(good[:-1])
    check(r"layer_00/00001.safetensors is damaged \(\d+ bytes instead of \d+\).*delete it or set cache.repair")
    file.write_bytes(b"x" + good[1:])
    check("header")
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    check("00001.safetensors.*checksum")
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    check("00001.safetensors.*checksum", "cache.verify=true", "cache.ram_gb=0")
    (directory / "shards" / "00002.json").write_text("{")
    check("00002.json is damaged")
    file.unlink()  # deleting is the other remedy
    open_sample(toy_config(tmp_path), "train", say=quiet)
    assert token_files(directory) == before

    index = next((tmp_path / "index").glob("*/index.safetensors"))
    index.write_bytes(index.read_bytes()[:-1])
    check("index.safetensors is damaged")
    manifest = directory / "manifest.json"
    text = manifest.read_text()
    manifest.write_text("{")
    check("manifest.json is damaged .*cache.repair=true")
    assert manifest.read_text() == text
    entries = json.loads(text) | {"facts": json.loads(text)["facts"] | {"norm": True}}
    manifest.write_text(sealed({key: value for key, value in entries.items() if key != "check"}))
    with pytest.raises(UserError, match=r"holds another configuration \(norm differ"):
        open_sample(toy_config(tmp_path), "train", say=quiet)


def test_a_held_lock_is_waited_for_and_a_dead_holders_is_not(tmp_path: Path) -> None:
    sample = open_sample(toy_config(tmp_path, "model.layers=[0]"), "train", say=quiet)
    path = Path(sample.meta["directory"]) / "lock"
    said = []
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({"pid": 4711, "host": "elsewhere", "job": ""}))
        file.flush()
        with pytest.raises(UserError, match="is held by process 4711 on elsewhere.*cache.lock_timeout"):
            open_sample(toy_config(tmp_path, "cache.lock_timeout=0.2"), "train", say=said.append)
        assert any("waiting for process 4711" in line for line in said)
        open_sample(toy_config(tmp_path, "model.layers=[0]"), "train", say=quiet)  # a hit needs no lock
    assert path.read_text()  # what a killed process leaves behind
    assert open_sample(toy_config(tmp_path), "train", say=quiet).meta["bytes_written"] > 0


@pytest.mark.parametrize("n_writes", [2, 5])
def test_a_full_disk_leaves_no_half_file_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_writes: int) -> None:
    whole = open_sample(toy_config(tmp_path / "whole"), "train", say=quiet)
    left, sync = [n_writes], os.fsync

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="the disk is full"):
            open_sample(toy_config(tmp_path / "full"), "train", say=quiet)
    assert not list(tmp_path.rglob("*.part"))
    resumed = open_sample(toy_config(tmp_path / "full"), "train", say=quiet)
    assert token_files(Path(resumed.meta["directory"])) == token_files(Path(whole.meta["directory"]))


@pytest.mark.parametrize("value, sentence", [(float("nan"), "not finite"), (1e5, "beyond the range of cache.dtype=float16")])
def test_numbers_that_cannot_be_kept_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, sentence: str
) -> None:
    def spoiled(cfg, device, say):
        backbone = load_backbone(cfg, device)

        def forward(images, layers):
            tokens = backbone(images, layers)
            tokens[1].patch[0] = value
            return tokens

        return forward

    monkeypatch.setattr("store.extract.load_backbone", spoiled)
    with pytest.raises(UserError, match=f"layer 0 of image train-000 has activations.*{sentence}|{sentence}"):
        open_sample(toy_config(tmp_path), "train", say=quiet)
    assert not list(tmp_path.rglob("shards/*.json"))
    if value == 1e5:
        assert open_sample(toy_config(tmp_path, "cache.dtype=float32"), "train", say=quiet).meta["bytes_written"]


def test_an_image_that_changes_under_way_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_sample(toy_config(tmp_path, "model.layers=[0]"), "train", say=quiet)
    read = Toy.__getitem__
    monkeypatch.setattr(Toy, "__getitem__", lambda self, i: (s := read(self, i))._replace(image=255 - s.image))
    with pytest.raises(UserError, match="train-000: the image changed"):
        open_sample(toy_config(tmp_path, "cache.ram_gb=0"), "train", say=quiet)


def test_images_are_read_once_while_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, numbers, read = ImageMemory(), [], Toy.__getitem__
    monkeypatch.setattr("store.reading.IMAGES", memory)
    monkeypatch.setattr(Toy, "__getitem__", lambda self, i: numbers.append(i) or read(self, i))
    bytes_each = 3 * 32 * 32
    first = open_sample(toy_config(tmp_path), "train", say=quiet)
    random = open_sample(toy_config(tmp_path, "model.seed=1"), "train", say=quiet)  # another backbone, the same images
    assert numbers == list(range(10)) and memory.nbytes == 10 * bytes_each
    assert random.meta["bytes_written"] == first.meta["bytes_written"] > 0
    numbers.clear()
    alone = open_sample(toy_config(tmp_path / "alone", "cache.ram_gb=0"), "train", say=quiet)
    assert numbers == [*range(10), *range(10)]  # no room: once for labels, once for tokens
    assert token_files(Path(alone.meta["directory"])) == token_files(Path(first.meta["directory"]))
    little = 6.5 * bytes_each / IMAGES_SHARE / 1e9
    open_sample(toy_config(tmp_path, f"cache.ram_gb={little}"), "val", say=quiet)  # another split takes the room
    assert memory.nbytes == 6 * bytes_each and numbers[20:] == [*range(10), *range(6, 10)]


def test_mode_extract_fills_every_split_and_records_it(tmp_path: Path) -> None:
    class Run:
        def __init__(self) -> None:
            self.records, self.lines = [], []
            self.write, self.say = self.records.append, self.lines.append

    run = Run()
    activation.run(toy_config(tmp_path), run)
    assert [record["split"] for record in run.records] == ["train", "val", "test"]
    assert all(record["images"] == 10 and record["bytes_written"] > 0 for record in run.records)
    assert "images/s" in run.lines[-1] and len(run.lines[-1].splitlines()) == 4
    json.dumps(run.records)
