"""The extraction benchmark: its count of operations against torch's own, and a run of it on a tiny model."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones.load import load_backbone

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import bench_extract

SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 2}


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_giant_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_operations_are_those_torch_counts(name: str) -> None:
    backbone = load_backbone({"source": "timm", "name": name, "pretrained": False, "kwargs": SMALL}, "cpu")
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the counter does not know the fused attention of a CPU
    size = backbone.facts.patch_size
    with FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, 3 * size, 5 * size), [1])
    assert bench_extract.count_flops(backbone, (3, 5)) == counter.get_total_flops()


def test_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    bench_extract.main(
        "--model demo_vit --image-size 96 64 --images 6 --rounds 1 --batch 2 --patches 8 --layers [embed,3]".split()
    )
    lines = capsys.readouterr().out.splitlines()
    assert "2 layers written, 8 patches of 96 kept" in lines[1]
    assert lines[-1].startswith("median: ") and float(lines[-1].split()[1]) > 0
