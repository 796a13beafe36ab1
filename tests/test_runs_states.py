"""Tensors and their recipe in one file: equal bytes, and no damage that goes unnoticed."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import UserError
from probes import build_probe, load_probe
from runs.states import load_state, pack, save_state

RECIPE = {"mode": "linear", "fit": {"name": "probe", "layers": ["embed", 3]}, "rates": [0.1, 1e-30]}


def tensors() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.arange(12.0).view(3, 4), "step": torch.tensor(7.0), "best": torch.tensor([[1, 2]]),
        "half": torch.ones(3, dtype=torch.bfloat16), "none": torch.zeros(0, 2), "valid": torch.tensor([True, False]),
    }  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "state.safetensors"
    save_state(path, tensors(), RECIPE)
    return path


def test_what_was_written_is_read_and_any_reader_reads_the_tensors(file: Path) -> None:
    state = load_state(file, {"fit": {"name": "probe"}})
    assert state.recipe == RECIPE and state.checked
    for name, value in tensors().items():
        assert torch.equal(state.tensors[name], value) and state.tensors[name].dtype == value.dtype
        assert torch.equal(load_file(file)[name], value)


def test_equal_content_is_equal_bytes_whatever_the_order(file: Path) -> None:
    turned = dict(reversed(RECIPE.items()))
    assert pack(dict(reversed(tensors().items())), turned) == file.read_bytes()


def test_a_colleague_may_read_the_file(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_state(tmp_path / "file", tensors(), RECIPE)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_every_flipped_byte_is_noticed(file: Path) -> None:
    good, draw = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(8), *draw.sample(range(8, header), 60), *draw.sample(range(header, len(good)), 30)]:
        bad = bytearray(good)
        bad[at] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        try:
            state = load_state(file)
        except UserError as error:
            assert str(file) in str(error) and "delete it and repeat the command" in str(error)
        else:  # spaces that fill up the header, the only bytes that say nothing
            assert good[at : at + 1] == b" ", at
            assert state.recipe == RECIPE


def test_damage_of_other_kinds_is_one_sentence(tmp_path: Path, file: Path) -> None:
    def sentence(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_state(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "cannot be read (No such file" in sentence(tmp_path / "absent")
    assert "is a folder where a file belongs" in sentence(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "symbolic links" in sentence(tmp_path / "loop")
    for name, data in (("empty", b""), ("text", b"not a checkpoint"), ("cut", file.read_bytes()[:-1])):
        (tmp_path / name).write_bytes(data)
        assert "is damaged (" in sentence(tmp_path / name)
    deep = b'{"__metadata__": ' + b'{"a": ' * 100_000
    (tmp_path / "deep").write_bytes(len(deep).to_bytes(8, "little") + deep)
    assert "is damaged (" in sentence(tmp_path / "deep")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    assert "is damaged (" in sentence(tmp_path / "foreign")
    save_file({"a": torch.zeros(1)}, tmp_path / "list", {"state": "[]"})
    assert "is damaged (" in sentence(tmp_path / "list")


def test_what_is_not_finite_is_neither_written_nor_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file would hold numbers that are not finite \(weight\) and is not written"):
        save_state(tmp_path / "file", {"weight": torch.tensor([1.0, torch.nan])}, {})
    assert not list(tmp_path.iterdir())
    texts = {"recipe": json.dumps({"mode": "linear"}), "facts": "{}"}  # of the version before, without a digest
    save_file({"weight": torch.tensor([torch.inf])}, tmp_path / "old", texts)
    with pytest.raises(UserError, match=r"old holds numbers that are not finite \(weight\); delete it"):
        load_state(tmp_path / "old")


def test_a_file_of_something_else_is_refused_by_name(file: Path) -> None:
    with pytest.raises(UserError, match=r'something else \(name: "probe", expected "position"\); delete it and repeat'):
        load_state(file, {"fit": {"name": "position"}})
    with pytest.raises(UserError, match=r"\(seeds: null, expected \[0\]\)"):
        load_state(file, {"seeds": [0]})


def test_a_probe_of_the_version_before_is_read_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    probe = build_probe({"mode": "linear"}, seeds=[0], layers=["embed", 1], dim=4)
    weights = {name: value.detach() for name, value in probe.state_dict().items()}
    save_file(weights, tmp_path / "old", {"recipe": json.dumps(probe.recipe), "facts": json.dumps({"backbone": "a"})})
    again = load_probe(tmp_path / "old", expected={"backbone": "a"})
    assert again.facts == {"backbone": "a"} and torch.equal(again.weight, probe.weight)
    warning = f"warning: {tmp_path}/old is of a version that wrote no checksums, so nobody would notice damage to it; "
    assert capsys.readouterr().err == f"{warning}to be sure, repeat the command that wrote it\n"
    save_state(tmp_path / "new", weights, {})
    assert load_state(tmp_path / "new").checked and not capsys.readouterr().err
    assert not load_state(tmp_path / "old").checked
    with pytest.raises(UserError, match='backbone: "a", expected "b"'):
        load_probe(tmp_path / "old", expected={"backbone": "b"})


def test_a_whole_file_that_is_no_probe_is_one_sentence(tmp_path: Path) -> None:
    save_state(tmp_path / "file", {"weight": torch.zeros(1)}, {"mode": "unheard of", "facts": {}})
    with pytest.raises(UserError, match="file holds no probe this version knows .*; name another or repeat the fit"):
        load_probe(tmp_path / "file")
