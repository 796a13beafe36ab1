"""The import rule of the house, checked on the source: modules import downwards only, as each room says of itself."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {path.stem for path in ROOT.glob("*.py")} - {"conftest"}
ROOMS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
FREE = {"errors"}
# What a module at the root may import (a room says it in its docstring); the rest is reached by name, from a mode's config.
ROOT_IMPORTS = {
    "main": {"options", "runs", "files", "machine"},
    # the same entries from Python, and what they hand over and give back
    "vit_probing": {"main", "options", "activation", "backbones", "datasets.in_memory", "files", "pairs", "probes", "runs"},
    "options": set(),
    "errors": set(),
    "files": set(),
    "machine": set(),
    "forms": {"machine", "runs.states"},
    "activation": {"store", "backbones", "machine", "datasets.scene", "files", "runs.progress"},
    "probes": {"forms", "machine", "runs.states", "files"},
    "tasks": {"activation", "probes", "metrics", "machine"},
    "controls": {"activation", "backbones.module", "forms", "probes", "runs.states", "tasks"},
    "trainer": {"tasks", "controls", "probes", "activation", "metrics", "runs", "options", "machine", "files"},
}
# The places that call what a configuration names: modes, tasks, and the doors of data sets and of modules of the user's
# own, which check the name first.
DYNAMIC = {"main.py", "tasks.py", "datasets/scene.py", "backbones/module.py"}
DRAWS = {"show/style.py", "show/look.py", "pairs/layer_curve.py", "pairs/map_figures.py", "binding/figures.py"}
DRAWS |= {"show/across_figures.py", "show/learning.py", "neco/figures.py", "dense/figures.py", "analysis/figures.py"}
DRAWS |= {"pairs/calibrate_figure.py"}
LONGEST = 450
SOURCES = [ROOT / f"{name}.py" for name in sorted(MODULES)]
SOURCES += sorted(path for room in ROOMS for path in (ROOT / room).glob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything of ours a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} if "." in node.module else {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in MODULES | ROOMS and name.split(".")[0] not in FREE}


def may_import(path: Path) -> set[str]:
    """What a file may import: of a room, the room itself and what its `May import:` line names."""
    if path.parent == ROOT:
        return ROOT_IMPORTS[path.stem]
    text = ast.get_docstring(ast.parse((path.parent / "__init__.py").read_text()))
    _, _, line = text.partition("May import: ")
    assert line, f"{path.parent.name}/__init__.py lacks its `May import:` line"
    return {path.parent.name} | set(re.findall(r"[\w.]+", line)) - {"nothing"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    allowed = may_import(path)
    wrong = {name for name in imports_of(path) if not any(f"{name}.".startswith(f"{entry}.") for entry in allowed)}
    assert not wrong, f"{name_of(path)} may not import {sorted(wrong)}"


def test_rooms_do_not_import_in_a_circle() -> None:
    """Followed from room to room, what may be imported never leads back."""
    below = {room: {name.split(".")[0] for name in may_import(ROOT / room / "__init__.py")} - {room} for room in ROOMS}
    below |= {name: {entry.split(".")[0] for entry in entries} for name, entries in ROOT_IMPORTS.items()}
    left = dict(below)
    while left:
        lowest = {name for name, entries in left.items() if not entries & (left.keys() - {name})}
        assert lowest, f"these import each other: {sorted(left)}"
        left = {name: entries for name, entries in left.items() if name not in lowest}


def test_nothing_imports_the_page_of_calls() -> None:
    assert not [name_of(path) for path in SOURCES if "vit_probing" in imports_of(path)]


def test_every_room_is_introduced() -> None:
    for room in ROOMS:
        tree = ast.parse((ROOT / room / "__init__.py").read_text())
        assert len(tree.body) == 1 and ast.get_docstring(tree), f"{room}/__init__.py is a docstring and nothing else"
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - ROOMS
    assert folders <= {"tests", "scripts"}, f"folders of code without an __init__.py: {folders}"


def test_no_question_imports_another() -> None:
    questions = {"pairs", "binding", "dense", "analysis", "neco"}
    for path in SOURCES:
        if path.parent != ROOT and path.parent.name in questions:  # a checkout may be called like a room
            others = {name.split(".")[0] for name in imports_of(path)} & questions - {path.parent.name}
            allowed = {"neco": {"dense"}, "analysis": {"pairs"}}  # analysis reads fitted probes of pairs
            assert others <= allowed.get(path.parent.name, set()), name_of(path)


def test_data_sets_do_not_know_each_other() -> None:
    shared = ("scene", "pictures", "listings", "metadata", "codes", "priors", "splits", "sampling", "published")
    parts = {"procedural": {"painting"}, "ade20k": {"ade20k_files"}, "visual_genome": {"arrangements"},
             "occlusion_clevr": {"occlusion_cache"}, "balanced_color_shape": {"color_shape"},
             "ade20k_challenge": {"ade20k_files"}, "coco": {"coco_masks"}}  # fmt: skip
    for path in (ROOT / "datasets").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in (name for name in names if name.startswith("datasets.")):
                part = name.removeprefix("datasets.")
                assert part in shared or part in parts.get(path.stem, ()), f"{path} imports {name}"


def test_what_a_configuration_names_is_imported_in_few_places() -> None:
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "import_module":
                found.add(name_of(path))
            if isinstance(node, ast.Name) and node.id in ("__import__", "import_module"):
                found.add(name_of(path))
    assert found <= DYNAMIC


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_files_that_draw_import_matplotlib(path: Path) -> None:
    if name_of(path) in DRAWS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "matplotlib" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "matplotlib"


def test_nothing_unpickles_data() -> None:
    for path in [*SOURCES, *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert ast.unparse(node.func) not in ("pickle.load", "pickle.loads", "np.load", "numpy.load"), path
                if ast.unparse(node.func) == "torch.load":
                    assert any(k.arg == "weights_only" for k in node.keywords), path


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


def test_the_root_does_not_grow() -> None:
    assert len(MODULES) <= 12
