"""Puts the project root on the import path and keeps the tests offline, seeded and away from the data of a machine."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).parent))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts from the same global random state, wherever somebody's own data lie."""
    torch.manual_seed(0)
    for name in list(os.environ):
        if name.startswith(("CLEVR_", "VG_", "OCCLUSION_CLEVR_", "BINDING_PROJECT_", "BLENDER_")):
            monkeypatch.delenv(name)
