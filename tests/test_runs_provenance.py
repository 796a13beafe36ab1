"""Where numbers come from: the digest of the program's code is that of the tree, whatever folders it has."""

from pathlib import Path

from runs.provenance import code_digest, provenance


def test_a_file_in_a_new_folder_changes_the_digest_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("print(1)\n")
    digests = [code_digest(tmp_path)]
    for folder in ("new_question", "tests", "scripts", ".venv"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "task.py").write_text("x = 1\n")
        digests.append(code_digest(tmp_path))
    assert digests[0] != digests[1]  # a folder nobody listed
    assert digests[1:] == [digests[1]] * 4  # tests, scripts and hidden folders make no number
    (tmp_path / "new_question" / "task.py").write_text("x = 2\n")
    assert code_digest(tmp_path) != digests[1]
    (tmp_path / "new_question" / "task.py").rename(tmp_path / "new_question" / "other.py")
    assert code_digest(tmp_path) not in digests


def test_versions_are_read_without_importing_what_they_are_of() -> None:
    assert {"torch", "torchvision", "timm", "numpy", "python", "code", "cpu"} <= provenance().keys()
