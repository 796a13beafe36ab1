"""The benchmark of the dense evaluations runs on small arrays, and both sides of what it compares give the same."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import bench_dense

from dense.retrieval import nearest, transfer
from metrics.segmentation import confusion_matrix, iou

SMALL = ["--rounds", "1", "--pixels", "500", "--clusters", "8", "--bank", "200", "--queries", "16", "--dim", "64"]
SMALL += ["--tokens", "2048", "--iterations", "2", "--images", "1"]


@pytest.mark.parametrize("part", bench_dense.PARTS)
def test_every_part_prints_a_line(part):
    options = bench_dense.read_options([*SMALL, "--part", part])
    assert options.part == [part]
    (line,) = getattr(bench_dense, part)(options)
    assert line.startswith(part) and " x " in line and "nan" not in line


def test_the_published_ways_give_the_same():
    target, prediction = torch.randint(0, 21, (300,)), torch.randint(0, 6, (300,))
    expected = bench_dense.published_matching(target, prediction, 21, 6)
    torch.testing.assert_close(iou(confusion_matrix(target, prediction, 21, 6)).float(), expected)
    bank, queries = F.normalize(torch.randn(100, 8), dim=-1), F.normalize(torch.randn(5, 8), dim=-1)
    labels = torch.rand(100, 3)
    found = nearest(queries, bank, 30)
    torch.testing.assert_close(transfer(*found, labels), bench_dense.published_transfer(found[1], bank, labels, queries))
