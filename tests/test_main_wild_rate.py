"""A learning rate far too high, from the command line: every mode that trains ends in one sentence, never in a quiet score."""

from pathlib import Path

import pytest
from program import TINY, run

WILD = [*TINY, "model.layers=[0]", "trainer.epochs=2", "trainer.seeds=1", "trainer.lr=1e9"]
MODES = {
    "train": [],
    "train_class": [],
    "train_identity": [],
    "train_binding": ["probe.mode=quadratic_concat", "model.output_mode=mean_spatial", "trainer.batch_images=8"],
}


@pytest.mark.parametrize("mode", MODES)
def test_a_wild_learning_rate_is_named(mode: str, tmp_path: Path) -> None:
    try:
        finished = run(tmp_path, *WILD, f"mode={mode}", *MODES[mode])
    except SystemExit as stopped:  # the loss became infinite
        assert "the loss is not finite (fit probe" in str(stopped) and "lower trainer.lr" in str(stopped)
        return
    scores = [r for r in finished.records() if r["kind"] == "score"]
    assert scores and all(r["worse_than_constant"] for r in scores)
    log = " ".join((finished.dir / "log.txt").read_text().split())  # long sentences are wrapped
    assert "! worse than a constant answer on validation: probe" in log and "lower trainer.lr" in log
