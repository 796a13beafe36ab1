"""The proof of post-training compares like with like: gains are paired over images and seeds, controls over seeds too."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from errors import UserError
from metrics.bootstrap import Estimate

SPEC = importlib.util.spec_from_file_location("neco_proof", Path(__file__).parent.parent / "scripts/neco_proof.py")
proof = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(proof)


def scores(change: float) -> dict[str, Estimate]:
    """The same scatter over images for every network, all scores moved by one amount."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in (*proof.SHOWN, *proof.CURVES):
        layers = 2 if name == "binding ratio" else 9 if name in proof.CURVES else 1
        influence = torch.randn(layers, 40, generator=generator).double() / 100
        found[name] = Estimate(torch.full((layers,), 0.5 + change).double(), influence - influence.mean(1, keepdim=True))
    return found


def test_gains_are_paired_and_shown(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    changes = {"before-0": 0.0, "NeCo-0": 0.02, "NeCo-1": 0.04, "shuffled-0": -0.01, "no_teacher-0": 0.0}
    for name, change in changes.items():
        proof.save(tmp_path / "scores" / f"{name.removesuffix('-0') if name == 'before-0' else name}.safetensors",
                   scores(change), {"variant": name})  # fmt: skip
    proof.show(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    row = {(r["variant"], r["of"]): r for r in rows if r["score"] == "binding ratio" and r["layer"] == "7"}
    gain = row["NeCo", "gain"]
    assert gain["value"] == pytest.approx(0.03) and gain["each"] == pytest.approx([0.02, 0.04])
    assert (gain["low"], gain["high"]) == pytest.approx((0.02, 0.04))  # images cancel, seeds are left
    lead = row["shuffled", "NeCo less this"]
    assert lead["seeds"] == 1 and (lead["low"], lead["value"], lead["high"]) == pytest.approx((0.03, 0.03, 0.03))
    assert row["before", "score"]["high"] > row["before", "score"]["low"] + 1e-3
    assert "+3.0 [+2.0, +4.0]" in (tmp_path / "table.txt").read_text()
    assert (tmp_path / "before_after.png").read_bytes().startswith(b"\x89PNG")


def test_scores_of_other_settings_are_not_taken_over(tmp_path: Path) -> None:
    proof.save(tmp_path / "before.safetensors", scores(0.0), {"variant": "before", "code": "old"})
    with pytest.raises(UserError, match="is of something else .code: \"old\""):
        proof.load(tmp_path / "before.safetensors", {"code": "new"})
    with pytest.raises(UserError, match="holds no scores yet"):
        proof.show(tmp_path)
