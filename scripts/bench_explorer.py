"""How fast the explorer page is and how exact: seconds of the model and of a click, size of the file, largest differences.

    python main.py && python scripts/bench_explorer.py [--run outputs/train/<run>] [--scenes 50]

Builds the page of a finished run of the embedded backbone with the first test scenes, opens it in a headless Chromium, and
measures what a reader waits for, as the page reports it: a photo until its maps at all layers (resized, windows cut, the
model, the probes), the model alone on one window, a click until the maps are drawn. Then every scene's maps in the page, of
one anchor at all layers by probe, cosine, dot product and attention (as a share of its largest weight), against Python's.
"""

import argparse
import base64
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from browser import CHROMIUM, Page, open_browser
from hydra import compose, initialize_config_dir

from errors import UserError
from pairs.encode import EncodedScene, FittedRun, encode_scene, open_fitted_run
from pairs.explorer import explorer_page
from pairs.maps import choose_anchor
from runs.finished import newest_run
from store.index import build_dataset

ROOT = Path(__file__).parent.parent
READY = "document.body.dataset.ready"
VIEWS = ("probe", "cosine", "dot", "attention")
CLICKS = 20


@torch.inference_mode()
def maps_in_python(run: FittedRun, seen: EncodedScene, at: int) -> dict[str, list[np.ndarray | None]]:
    """Per view and layer the scores of all patches of one window with patch `at`."""
    maps: dict[str, list[np.ndarray | None]] = {view: [] for view in VIEWS}
    for layer, form in enumerate(run.forms()):
        x, weights = seen.tokens[layer, 0], seen.attention[layer]
        maps["probe"].append(form.scores(x[at : at + 1], x)[0].numpy())
        maps["cosine"].append(torch.cosine_similarity(x[at : at + 1], x).numpy())
        maps["dot"].append((x @ x[at] / (x[at] @ x[at])).numpy())
        maps["attention"].append(None if weights is None else weights[0, -len(x) :][at].numpy())
    return maps


def largest_differences(tab: Page, run: FittedRun, seen: list[EncodedScene], anchors: list[int]) -> dict[str, float]:
    """Over all scenes, layers and patches, per view."""
    worst = dict.fromkeys(VIEWS, 0.0)
    for number, (of_scene, at) in enumerate(zip(seen, anchors, strict=True)):
        text = tab.run(f"""(async () => {{
          await explorer.choose({number}); const out = {{}};
          for (const view of {json.dumps(VIEWS)})
            out[view] = (await explorer.mapsOf({{ run: 0, view }})).map((map) => map && Array.from(map));
          return JSON.stringify(out);
        }})()""")
        shown = json.loads(text)
        for view, exact in maps_in_python(run, of_scene, at).items():
            for a, b in zip(exact, shown[view], strict=True):
                if a is not None:
                    scale = float(a.max()) if view == "attention" else 1.0
                    worst[view] = max(worst[view], float(np.abs(a - np.array(b)).max()) / scale)
    return worst


def photo() -> bytes:
    """A square picture of 640 px as JPEG: one window."""
    coarse = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(coarse).resize((640, 640), Image.Resampling.BICUBIC).save(data, "jpeg", quality=90)
    return data.getvalue()


def seconds_of_photo(tab: Page) -> tuple[float, float]:
    """A photo until its maps at all layers are drawn, and the model's part of it."""
    text = base64.b64encode(photo()).decode()
    total = tab.run(f"""(async () => {{
      const bytes = Uint8Array.from(atob("{text}"), (c) => c.charCodeAt(0)), started = performance.now();
      await explorer.addPhoto(new File([bytes], "photo.jpg", {{ type: "image/jpeg" }}));
      return performance.now() - started;
    }})()""")
    return total / 1000, tab.run("explorer.timing.model") / 1000


def milliseconds_of_clicks(tab: Page) -> list[float]:
    """A new anchor until the maps of all layers are computed and drawn, sorted."""
    times = tab.run(f"""(async () => {{
      const out = [];
      for (let i = 0; i < {CLICKS}; i++) {{
        explorer.state.at = 3 + 5 * i;
        await explorer.update();
        out.push(explorer.timing.click);
      }}
      return out;
    }})()""")
    return sorted(times)


def main() -> None:
    """Read the command line, build the page, measure and print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--run", type=Path, help="directory of the run (default: the newest of mode=train)")
    options.add_argument("--scenes", type=int, default=50)
    options = options.parse_args()
    if CHROMIUM is None:
        sys.exit("no chromium here; install it (Debian: apt-get install chromium)")
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        cfg = compose("config", ["mode=vis"])
    run = open_fitted_run(options.run or newest_run(cfg.output_dir), cfg)
    dataset = build_dataset(run.cfg, "test")
    seen = [encode_scene(dataset[i], run.layers, run.cfg, run.backbone, attention=True) for i in range(options.scenes)]
    places = [choose_anchor(of_scene, "patch").place for of_scene in seen]
    with tempfile.TemporaryDirectory() as folder, open_browser(Path(folder)) as tab:
        page = Path(folder) / "explorer.html"
        page.write_bytes(explorer_page("benchmark", [run], [[s] for s in seen[:6]], places[:6], dataset.classes, [[0, 0, 0]]))
        print(f"file with 6 images: {page.stat().st_size / 1e6:.1f} MB")
        tab.open(page.as_uri(), READY)
        photos = [seconds_of_photo(tab) for _ in range(3)]
        clicks = milliseconds_of_clicks(tab)
        print(f"photo to maps of {len(run.layers)} layers: {min(photos)[0]:.2f} s, of which the model {min(photos)[1]:.2f} s")
        median = clicks[len(clicks) // 2]
        print(f"click to maps of all layers: least {clicks[0]:.0f}, median {median:.0f}, slowest {clicks[-1]:.0f} ms")
        page.write_bytes(explorer_page("benchmark", [run], [[s] for s in seen], places, dataset.classes, [[0, 0, 0]]))
        tab.open(page.as_uri(), READY)
        width = seen[0].geometry.grid[1]
        anchors = [row * width + column for _, row, column in places]
        worst = largest_differences(tab, run, seen, anchors)
        print(f"largest differences to Python over {len(seen)} scenes: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
        if wrong := tab.complaints() + tab.fetched():
            sys.exit(f"the page complains: {wrong[0]}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:  # there is no run, or none that can be shown
        sys.exit(f"error: {error}")
