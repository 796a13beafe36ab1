"""Records: nothing lost, nothing torn, no damage that goes unnoticed."""

import json
import random
from pathlib import Path

import pytest

from errors import UserError
from runs.records import line_of, open_records, read_lines, read_records


def records(n: int) -> list[dict]:
    return [{"kind": "score", "layer": i, "metrics": {"auroc": i / 7, "none": float("nan")}, "name": "é"} for i in range(n)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line_of(record) + "\n" for record in records(4)), encoding="utf-8")
    return path


def layers(found: list[dict]) -> list[int]:
    return [record["layer"] for record in found]


def test_a_line_is_json_with_a_digest_that_readers_here_take_off(file: Path) -> None:
    assert [json.loads(line)["metrics"]["none"] for line in file.read_text().splitlines()] == [None] * 4
    assert read_records(file)[1] == {"kind": "score", "layer": 1, "metrics": {"auroc": 1 / 7, "none": None}, "name": "é"}


def test_a_last_record_without_its_newline_is_kept(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    said = []
    assert layers(read_records(file)) == [0, 1, 2, 3]
    assert len(open_records(file, said.append)) == 4 and not said
    assert file.read_bytes().endswith(b"}\n") and layers(read_records(file)) == [0, 1, 2, 3]


def test_a_last_line_that_a_kill_cut_off_is_left_out_in_silence(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])
    said = []
    assert layers(read_records(file, said.append)) == [0, 1, 2]
    assert len(open_records(file, said.append)) == 3 and not said
    assert file.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"kind": "sco', "Unterminated"), (b"\xff\xfe", "codec"), (b"[1, 2]", "no JSON object"), (b"7", "no JSON object"),
        (b"[" * 100_000, "nested too deeply"), (b'{"layer": 1, "check": "0123456789abcdef"}', "its checksum differs"),
    ],
)  # fmt: skip
def test_damaged_lines_are_reported_and_cut_out(file: Path, line: bytes, reason: str, capsys: pytest.CaptureFixture) -> None:
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    assert layers(read_records(file)) == [0, 1, 2, 3]
    assert "metrics.jsonl: line 3 is damaged (" in capsys.readouterr().err
    said = []
    assert len(open_records(file, said.append)) == 4
    assert len(said) == 1 and reason in said[0] and "is left out" in said[0]
    assert read_lines(file).damaged == [] and layers(read_records(file)) == [0, 1, 2, 3]


def test_every_flipped_byte_is_noticed(file: Path) -> None:
    good, draw = file.read_bytes(), random.Random(0)
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        lines = read_lines(file)
        if good[at : at + 1] != b"\n":
            assert len(lines.damaged) == 1 or at > good.rindex(b"{"), at
        assert all(record in read_back for record in lines.records), at


read_back = [json.loads(json.dumps({**r, "metrics": {**r["metrics"], "none": None}})) for r in records(4)]


def test_lines_of_the_version_before_are_taken_as_they_are(file: Path) -> None:
    file.write_text('{"kind": "score", "layer": 5}\n{"kind": "epoch", "val_loss": [1.0]}\n')
    assert [r["kind"] for r in read_records(file)] == ["score", "epoch"] and not read_lines(file).damaged


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder where a file belongs; name another run"):
        read_records(tmp_path)
