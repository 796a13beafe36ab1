"""A probe, a control, a data set, a figure and a mode added from outside the tree, run through the command line."""

import csv
import json
from pathlib import Path

from program import FIT, MODEL, finish, start

MODE = '''
import torch
from controls import CONTROLS
from forms import FitAxes
from pairs.task import run as run_pairs
from probes import PROBES, DiagQuadratic


class Squared(DiagQuadratic):
    """sum_k w_k (x_k y_k)^2 + b."""

    def scores(self, x, y):
        return super().scores(x.square(), None if y is None else y.square())


def noise(opened):
    """Tokens without any information, the same for every run."""
    from controls import MadeTokens

    made = {}
    for split, sample in opened.samples.items():
        tokens = torch.randn(sample.tokens.shape[1:3] + (8,), generator=torch.Generator().manual_seed(0))
        read = lambda images, tokens=tokens: tokens[images][None]
        made[split] = sample._replace(tokens=MadeTokens(read, "noise", len(sample.keys)))
    return opened.subject("noise", made)


def draw_counts(rows):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().bar(range(len(rows)), [float(row["value"] or 0) for row in rows])
    return figure


PROBES["squared"] = Squared
CONTROLS["noise"] = noise


def run(cfg, run):
    import csv

    from files import write_atomically
    from show.style import png_bytes

    result = run_pairs(cfg, run)
    with open(run.dir / "layers.csv") as file:
        write_atomically(run.dir / "counts.png", png_bytes(draw_counts(list(csv.DictReader(file)))))
    return result
'''
DATA = '''
import torch
from datasets.scene import Scene


class Quarters:
    """Images of four flat quarters, each an object."""

    classes = ["background", "quarter"]

    def __init__(self, split: str, *, n: int = 8, on_error: str = "raise") -> None:
        self.split, self.n, self.on_error = split, n, on_error

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        rng = torch.Generator().manual_seed(i + 1000 * ["train", "val", "test"].index(self.split))
        grow = lambda x: x.repeat_interleave(48, -2).repeat_interleave(48, -1)
        image = grow(torch.randint(0, 256, (3, 2, 2), generator=rng, dtype=torch.uint8))
        identity = grow(torch.arange(1, 5, dtype=torch.int32).view(2, 2))
        return Scene(image, {"identity": identity, "class": (identity > 0).int()}, f"{self.split}-{i}")

    def fingerprint(self):
        return {"n": self.n}

    def info(self):
        return {}

    def report(self):
        return {"images": self.n}
'''


def test_everything_a_reader_may_add_is_added_from_outside(tmp_path: Path) -> None:
    (tmp_path / "mine" / "mode").mkdir(parents=True)
    (tmp_path / "mine" / "dataset").mkdir()
    mode = "# @package _global_\nmode: added\nentry: added_mode.run\ntask: pairwise\n"
    mode += "probe: {mode: squared}\ncontrols: [noise, position]\n"
    (tmp_path / "mine" / "mode" / "added.yaml").write_text(mode)
    (tmp_path / "mine" / "dataset" / "quarters.yaml").write_text("_target_: added_data.Quarters\nn: 8\non_error: raise\n")
    (tmp_path / "added_mode.py").write_text(MODE)
    (tmp_path / "added_data.py").write_text(DATA)
    chosen = ["mode=added", "dataset=quarters", "dataset.allow=added_data"]
    options = [option for option in FIT if not option.startswith("controls")]
    done = finish(start(tmp_path, f"--config-dir={tmp_path / 'mine'}", *MODEL, *options, *chosen, PYTHONPATH=str(tmp_path)))
    assert done.status == 0, done.err
    (records,) = (tmp_path / "outputs").glob("added/*/metrics.jsonl")
    scores = [json.loads(line) for line in records.read_text().splitlines()]
    assert {record["control"] for record in scores} == {"", "noise", "position"}
    assert {record["probe"] for record in scores} == {"squared"} and {record["dataset"] for record in scores} == {"quarters"}
    assert (records.parent / "counts.png").stat().st_size > 0
    with open(records.parent / "layers.csv") as file:
        assert {row["name"] for row in csv.DictReader(file)} == {"probe", "noise", "position"}
