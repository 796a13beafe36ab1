"""The explorer page in a real browser: its numbers are Python's, it answers clicks and keys, and it fetches nothing."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import CHROMIUM, open_browser
from looking import ROOT, fitted_run, scene_of
from omegaconf import OmegaConf
from PIL import Image
from toys import toy_config

from backbones.load import load_backbone
from datasets.procedural import Scenes
from datasets.scene import Scene
from pairs import explorer
from pairs.encode import FittedRun, encode_scene
from pairs.explorer import explorer_page, general_factors, plain_vit, quantise, stored_ranks, symmetric_factors
from pairs.maps import choose_anchor, map_row
from probes import build_probe

PALETTE = [[0, 114, 178], [230, 159, 0], [0, 158, 115]]
LAYERS = ["embed", *range(8)]
VIEWS = ("probe", "cosine", "dot", "attention")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium runs these tests")


# --------------------------------------------------------------------------------------------------- without a browser


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_factors_are_the_best_of_their_rank(rank):
    g, w = torch.randn(30, 9), torch.randn(9, 9)
    form = w + w.mT
    z, signs = symmetric_factors(g, form, rank)
    exact = g.double() @ form.double() @ g.double().mT
    left = float((z.double() * signs @ z.double().mT - exact).norm())
    assert left == pytest.approx(float(torch.linalg.svdvals(exact)[rank:].norm()), abs=1e-3)
    a, b = general_factors(g @ w @ g.mT, rank)
    tail = torch.linalg.svdvals(g @ w @ g.mT)[rank:].norm()
    assert float((a @ b.mT - g @ w @ g.mT).norm()) == pytest.approx(float(tail), rel=0.02, abs=1e-3)


def test_quantised_numbers_are_within_half_a_step():
    z = torch.randn(50, 4) * torch.tensor([1.0, 10.0, 0.01, 0.0])
    values, step = quantise(z)
    assert values.dtype == torch.int16 and bool(((values * step - z).abs() <= step / 2 + 1e-7).all())


def test_an_image_of_a_large_backbone_fits_its_bytes():
    n_tokens, n_layers, n_seeds = 37 * 37, 12, 3
    ranks = stored_ranks(n_tokens, n_seeds, n_layers)
    columns = n_seeds * ranks["probe"] + ranks["cosine"] + ranks["attention"]
    assert n_tokens * n_layers * columns * 2 * 4 / 3 <= 15e6 and ranks["probe"] >= 48


def test_only_what_the_page_computes_is_put_into_it(tmp_path):
    toy = toy_config(tmp_path, "model.kwargs.img_size=32")
    assert plain_vit(load_backbone(toy.model, torch.device("cpu")))
    larger = toy_config(tmp_path, "model.kwargs.img_size=64")  # its positions are resampled for images of 32 px
    assert not plain_vit(load_backbone(larger.model, torch.device("cpu")))
    other = toy_config(tmp_path, "model.name=vit_small_patch14_dinov2", "model.kwargs.patch_size=8")
    assert not plain_vit(load_backbone(other.model, torch.device("cpu")))  # layer scale
    pixels = toy_config(tmp_path, "model.source=pixels")
    assert not plain_vit(load_backbone(pixels.model, torch.device("cpu")))


# ------------------------------------------------------------------------------------------------------- in a browser


def random_probe(mode: str, layers: list, tokens: torch.Tensor, **options):
    """A probe with weights of the size of fitted ones, standardised with the statistics of tokens [L, n, N, D]."""
    cfg = {"mode": mode, "standardize": True, "linear_term": True, "matmul_dtype": "float32", **options}
    probe = build_probe(cfg, seeds=[0, 1], layers=layers, dim=tokens.shape[-1])
    probe.set_statistics(tokens.flatten(1, 2).mean(1), tokens.flatten(1, 2).std(1))
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.mul_(4)
    return probe.eval()


def page_of(runs: list[FittedRun], scenes: list[Scene], file: Path) -> SimpleNamespace:
    seen = [[encode_scene(s, r.layers, r.cfg, r.backbone, attention=True) for r in runs] for s in scenes]
    anchors = [choose_anchor(of_scene[0], "patch").place for of_scene in seen]
    file.write_bytes(explorer_page("test", runs, seen, anchors, ["background", "thing", "other"], PALETTE))
    return SimpleNamespace(address=file.as_uri(), runs=runs, seen=seen, file=file)


def expected_maps(page: SimpleNamespace, image: int, run: int, at: int) -> dict[str, list]:
    """What Python says: per view and layer the scores of all patches with patch number `at`."""
    seen, forms = page.seen[image][run], page.runs[run].forms()
    found: dict[str, list] = {view: [] for view in VIEWS}
    n_patches = seen.tokens.shape[2]
    with torch.no_grad():
        for layer, form in enumerate(forms):
            x = seen.tokens[layer].flatten(0, 1)
            found["probe"].append(form.scores(x[at : at + 1], x)[0].numpy())
            found["cosine"].append(torch.cosine_similarity(x[at : at + 1], x).numpy())
            found["dot"].append((x @ x[at] / (x[at] @ x[at])).numpy())
            weights, full = seen.attention[layer], np.full(len(x), np.nan)
            if weights is not None:
                window = at // n_patches
                mine = weights[window, -n_patches:][at % n_patches].numpy()
                full[window * n_patches : (window + 1) * n_patches] = mine
            found["attention"].append(None if weights is None else full)
    return found


def page_maps(tab, image: int, run: int, at: int) -> dict[str, list]:
    script = """(async () => {{
      await explorer.choose({image}); explorer.state.at = {at}; const out = {{}};
      for (const view of {views}) out[view] = (await explorer.mapsOf({{run: {run}, view}})).map((m) => m && Array.from(m));
      return JSON.stringify(out);
    }})()"""
    text = tab.run(script.format(image=image, at=at, run=run, views=json.dumps(VIEWS)))
    return json.loads(text)


def worst(page: SimpleNamespace, tab, image: int, run: int, at: int) -> dict[str, float]:
    """Largest difference per view; attention as a share of its largest weight."""
    exact, shown, found = expected_maps(page, image, run, at), page_maps(tab, image, run, at), {}
    for view in VIEWS:
        found[view] = 0.0
        for a, b in zip(exact[view], shown[view], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                b = np.array([np.nan if v is None else v for v in b])
                assert np.array_equal(np.isnan(a), np.isnan(b))
                scale = np.nanmax(a) if view == "attention" else 1.0
                found[view] = max(found[view], float(np.nanmax(np.abs(a - b)) / scale))
    return found


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as page:
        page.size(1280, 900)
        yield page


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> SimpleNamespace:
    """The embedded backbone, two probes, generated scenes and a scene that needs two windows."""
    folder = tmp_path_factory.mktemp("demo")
    model = OmegaConf.merge(*(OmegaConf.load(ROOT / f"cfgs/model/{name}.yaml") for name in ("_defaults", "demo_vit")))
    del model["defaults"]
    cfg = toy_config(folder)
    cfg.update(model=model, task="pairwise", probe={"mode": "quadratic"})
    backbone = load_backbone(cfg.model, torch.device("cpu"))
    cfg.protocol.pairs.fit = ["all"]
    scenes, wide = Scenes("test", n_test=3), Scenes("test", n_test=2, size=[110, 150])
    tokens = encode_scene(scenes[0], LAYERS, cfg, backbone).tokens
    runs = [
        FittedRun(folder / "first", cfg, [random_probe("quadratic", LAYERS, tokens)], backbone),
        FittedRun(folder / "second", cfg, [random_probe("mlp", ["embed", 3, 7], tokens[[0, 4, 8]])], backbone),
    ]
    return page_of(runs, [scenes[0], scenes[1], scenes[2], wide[1]], folder / "explorer.html")


@pytest.fixture
def opened(tab, demo):
    tab.events.clear()
    tab.open(demo.address, "document.body.dataset.ready")
    return tab


def state(tab) -> dict:
    return json.loads(tab.run("JSON.stringify({...explorer.state, hash: location.hash})"))


def settle(tab, condition: str) -> None:
    tab.wait(f"explorer.current()[0] && ({condition})")


@needs_browser
def test_the_page_computes_what_python_computes(opened, demo):
    assert len(demo.file.read_bytes()) <= 10e6
    for image, at in ((0, 0), (1, 77), (2, 143), (3, 150), (3, 20)):
        differences = worst(demo, opened, image, 0, at)
        assert max(differences.values()) < 2e-3, (image, differences)
    assert max(worst(demo, opened, 1, 1, 5).values()) < 2e-3
    assert opened.complaints() == [] and opened.fetched() == []


@needs_browser
def test_a_click_moves_the_anchor_and_the_numbers_shown_are_those_of_the_map(opened, demo):
    box = json.loads(opened.run("JSON.stringify(document.querySelector('#pane0 canvas').getBoundingClientRect())"))
    row, column = 9, 2
    x, y = (box["x"] + (column + 0.5) / 12 * box["width"], box["y"] + (row + 0.5) / 12 * box["height"])
    before = opened.run("document.querySelector('#pane0 canvas').toDataURL()")
    opened.click(x, y)
    settle(opened, f"explorer.state.at === {row * 12 + column}")
    opened.wait("document.querySelector('#anchor-patch').textContent === 'row 9, column 2'")
    assert opened.run("document.querySelector('#pane0 canvas').toDataURL()") != before
    hover = 4 * 12 + 7
    place = {"x": box["x"] + 7.5 / 12 * box["width"], "y": box["y"] + 4.5 / 12 * box["height"]}
    opened.send("Input.dispatchMouseEvent", type="mouseMoved", **place)
    exact = expected_maps(demo, 0, 0, row * 12 + column)["probe"][-1]
    opened.wait("document.querySelector('#under').innerText.includes('row 4, column 7')")
    assert abs(float(opened.run("document.querySelector('#score-a').textContent")) - exact[hover]) < 2e-3
    identity = demo.seen[0][0].scene.labels["identity"][4 * 8 + 4, 7 * 8 + 4]
    name = f"object {identity}" if identity else "background"
    assert opened.run("document.querySelector('#object-name').textContent") == name
    run, seen = demo.runs[0], demo.seen[0][0]
    auroc = map_row(run, seen, choose_anchor(seen, "patch", patch=[0, row, column]), "probe").auroc[-1]
    shown = opened.run("document.querySelector('#auroc-a').textContent")
    assert shown == "–" if auroc is None else abs(float(shown) - auroc) < 0.02
    assert opened.complaints() == []


@needs_browser
def test_keys_alone_move_everything_and_the_link_reopens_the_view(opened, demo):
    start = state(opened)["at"]
    for key, condition in [
        ("ArrowRight", f"explorer.state.at === {start + 1}"), ("ArrowDown", f"explorer.state.at === {start + 13}"),
        ("[", "explorer.state.panes[0].layer === 7"), ("2", "explorer.state.panes[0].view === 'cosine'"),
        ("s", "!explorer.state.smooth"), ("-", "explorer.state.opacity === 60"), ("c", "explorer.state.compare"),
        ("x", "explorer.state.active === 1"), ("4", "explorer.state.panes[1].view === 'attention'"),
    ]:  # fmt: skip
        opened.press(key)
        settle(opened, condition)
    settle(opened, "explorer.current()[1] && location.hash.includes('attention')")
    before, numbers = state(opened), opened.run("document.querySelector('#under').innerText")
    assert not opened.run("document.querySelector('#pane1').hidden")
    opened.open(demo.address + before["hash"], "document.body.dataset.ready")
    after = state(opened)
    after["active"] = before["active"]
    assert after == before and opened.run("document.querySelector('#under').innerText") == numbers
    opened.press("n")
    settle(opened, "explorer.state.image === 1 && location.hash.includes(encodeURIComponent(explorer.library[1].key))")
    assert opened.complaints() == []


@needs_browser
def test_layers_runs_and_labels_of_patches_are_shown_side_by_side(opened, demo):
    at, seen = state(opened)["at"], demo.seen[0][0]
    for name, called in (("identity", "object {}"), ("class", "{}")):
        labels = seen.labels[name]
        number, share = int(labels.label.flatten()[at]), round(100 * float(labels.purity.flatten()[at]))
        number = {0: "background", 1: "thing", 2: "other"}.get(number, f"class {number}") if name == "class" else number
        element = {"identity": "object", "class": "class"}[name]
        for place in ("patch", "anchor"):
            shown = opened.run(f"document.querySelector('#{place}-{element}').textContent")
            assert shown == f"{called.format(number)}, {share} %"
    opened.run("(() => { const s = document.querySelector('#pane0 input'); s.value = 2; s.oninput(); })()")
    settle(opened, "explorer.state.panes[0].layer === 2 && location.hash.includes('a=0.1.probe')")
    opened.run("document.querySelector('#compare').click()")
    settle(opened, "explorer.current()[1] && !document.querySelector('#pane1').hidden")
    assert opened.run("document.querySelector('#pane1 select').value") == "1"  # the second run
    assert opened.run("document.querySelector('#pane1 input').max") == "2"
    for run, layer, element in ((0, 2, "score-a"), (1, 2, "score-b")):
        exact = expected_maps(demo, 0, run, at)["probe"][layer][at]
        assert abs(float(opened.run(f"document.querySelector('#{element}').textContent")) - exact) < 2e-3
    assert opened.run("document.querySelector('#pane0 .ticks').innerText").split() == ["0", "0.25", "0.5", "0.75", "1"]
    light = opened.run("getComputedStyle(document.body).backgroundColor")
    opened.run("document.querySelector('#theme').click()")
    assert opened.run("getComputedStyle(document.body).backgroundColor") != light
    before = opened.run("document.querySelector('#pane0 canvas').toDataURL()")
    opened.run("(() => { const o = document.querySelector('#opacity'); o.value = 20; o.oninput(); })()")
    settle(opened, "location.hash.includes('opacity=20')")
    assert opened.run("document.querySelector('#pane0 canvas').toDataURL()") != before
    assert opened.complaints() == []


@needs_browser
def test_a_photo_is_cut_scaled_and_scored_as_python_does(opened, demo, tmp_path):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 20, 3)).astype(np.uint8)).resize((333, 200), Image.Resampling.BICUBIC)
    coarse.save(tmp_path / "photo.png")
    data = list((tmp_path / "photo.png").read_bytes())
    opened.run(f"explorer.addPhoto(new File([new Uint8Array({data})], 'photo.png', {{type: 'image/png'}}))")
    settle(opened, "explorer.state.image === 4 && location.hash.includes('photo')")
    run = demo.runs[0]
    scene = Scene(torch.from_numpy(np.array(coarse)).permute(2, 0, 1).contiguous(), {}, "photo.png")
    seen = encode_scene(scene, run.layers, run.cfg, run.backbone, attention=True)
    page = SimpleNamespace(runs=demo.runs, seen=[*[None] * 4, [seen]])
    assert len(page.seen[4][0].geometry.starts) == 2
    differences = worst(page, opened, 4, 0, 200)
    assert max(differences.values()) < 0.03, differences  # pixels differ by at most one grey level
    assert "no labels" in opened.run("document.querySelector('#under').innerText")
    opened.run("explorer.addPhoto(new File(['words'], 'notes.txt', {type: 'text/plain'}))")
    opened.wait("document.querySelector('#status').textContent.includes('notes.txt is no picture')")


@needs_browser
def test_a_drawn_scene_has_true_objects_and_its_link_draws_it_again(opened, demo):
    opened.run("document.querySelector('#draw').click()")
    settle(opened, "explorer.library.length === 5 && explorer.state.image === 4 && location.hash.includes('scene=')")
    assert opened.run("document.querySelector('#auroc-a').textContent") != "–"
    count = opened.run("explorer.library[4].objects.length")
    opened.run("document.querySelector('#add').click()")
    settle(opened, f"explorer.library[4].objects.length === {count + 1}")
    opened.wait(f"(location.hash.match(/%3B/g) || []).length === {count}")
    opened.wait("explorer.timing.click > 0")
    before, shown = state(opened)["hash"], opened.run("document.querySelector('#score-a').textContent")
    opened.open(demo.address + before, "document.body.dataset.ready")
    assert state(opened)["hash"] == before and opened.run("document.querySelector('#score-a').textContent") == shown
    assert opened.complaints() == []


@needs_browser
def test_other_backbones_are_kept_as_factors_within_what_the_page_says(tab, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "WEIGHTS_MB", 0)
    monkeypatch.setattr(explorer, "IMAGE_MB", 0.05)
    layers, run = ["embed", 0, 1], fitted_run(tmp_path, [])
    tokens = encode_scene(scene_of((40, 56)), layers, run.cfg, run.backbone).tokens
    probes = [random_probe("quadratic", layers, tokens), random_probe("attention_low_rank", layers, tokens, rank=4)]
    runs = [run._replace(probes=[probe]) for probe in probes]
    for run in runs:
        run.cfg.protocol.pairs.fit = ["all"]
    page = page_of(runs, [scene_of((32, 32)), scene_of((40, 56))], tmp_path / "stored.html")
    tab.events.clear()
    tab.open(page.address, "document.body.dataset.ready")
    notes = tab.run("document.querySelector('#notes').innerText")
    said = {name: float(notes.partition(f"{name} ")[2].split()[0].strip(",")) for name in ("probe", "cosine", "attention")}
    assert "Largest differences" in notes and said["probe"] < 0.2
    for image, run, at in ((0, 0, 3), (1, 0, 20), (1, 1, 9)):
        differences = worst(page, tab, image, run, at)
        for name in said:
            assert differences[name] <= said[name] + 1e-3, (name, differences, said)
    assert tab.run("document.querySelector('#photo').hidden")
    assert tab.complaints() == [] and tab.fetched() == []


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_fits_laptop_and_phone(opened, width, dark):
    opened.size(width, 844, dark)
    try:
        assert opened.run("document.documentElement.scrollWidth") <= width
        background = opened.run("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") != dark
        canvas = json.loads(opened.run("JSON.stringify(document.querySelector('#pane0 canvas').getBoundingClientRect())"))
        assert 300 < canvas["width"] <= width and math.isclose(canvas["width"], canvas["height"], rel_tol=0.02)
    finally:
        opened.size(1280, 900)
