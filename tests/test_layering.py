"""The import rule of the house, checked on the source: modules import downwards only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {path.stem for path in ROOT.glob("*.py")} | {"datasets", "dense", "neco"}
FREE = {"errors"}
ALLOWED = {
    "main": {"options", "results"},  # everything else by name, from the mode's config
    "trainer": {"tasks", "probes", "activation", "controls", "metrics", "options", "report", "results"},
    "report": {"tasks", "metrics", "results"},
    "controls": {"activation"},
    "tasks": {"activation", "backbones", "losses", "metrics", "probes"},
    "binding": {"activation", "binding_probes", "datasets", "metrics", "probes", "report", "results", "tasks"},
    "visualize_binding": {"results"},
    "visualize": {"activation", "backbones", "options", "probes", "patches", "results", "metrics"},
    "activation": {"patches", "backbones", "index", "store"},
    "index": {"patches", "store", "datasets"},
    "patches": {"windows"},
    "datasets": {"datasets"},
    "probes": {"forms"},
    "backbones": {"backbone_weights"},
    "binding_probes": {"probes", "forms"},
    "conftest": set(),
    "errors": set(),
    **{leaf: set() for leaf in ("forms", "metrics", "windows", "options", "results", "backbone_weights", "losses", "store")},
}


def imports_of(path: Path) -> set[str]:
    """First components of everything a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names & OURS - FREE


@pytest.mark.parametrize("module", sorted(OURS))
def test_imports_point_downwards(module: str) -> None:
    paths = [ROOT / f"{module}.py"] if (ROOT / f"{module}.py").exists() else sorted((ROOT / module).glob("*.py"))
    for path in paths:
        assert imports_of(path) - {module} <= ALLOWED[module] - {module}, path


def test_datasets_know_only_scene_and_codes() -> None:
    for path in (ROOT / "datasets").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("datasets"):
                assert node.module in ("datasets.scene", "datasets.codes", "datasets.color_shape"), path


@pytest.mark.parametrize("module", ["trainer", "tasks", "controls", "activation", "probes", "metrics", "results"])
def test_no_training_path_imports_matplotlib(module: str) -> None:
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    top = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    top |= {(n.module or "").split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert not top & {"matplotlib", "visualize"}


def test_nothing_unpickles_data() -> None:
    for path in [*ROOT.glob("*.py"), *(ROOT / "datasets").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert ast.unparse(node.func) not in ("pickle.load", "pickle.loads", "np.load", "numpy.load"), path
                if ast.unparse(node.func) == "torch.load":
                    assert any(k.arg == "weights_only" for k in node.keywords), path


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.stem)
def test_root_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500
