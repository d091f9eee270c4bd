"""The files keep to their place: a room imports only from the floors below it, model.py knows nothing
of ranks or speed, and at run time only the listed packages are used."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = [
    {"model", "files", "stored_tensors", "config", "processes"},
    {"families"},
    {"fast", "chat"},
    {"checkpoint", "talk"},
    {"lora", "data", "pictures"},
    {"peft_format"},
    {"adapter"},
    {"select_experts", "generate", "merge"},
    {"tasks", "overlap"},
    {"eval", "training"},
    {"train"},
    {"train_ep", "compare"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in sorted(rooms)}
PACKAGES = {
    *("torch", "safetensors", "tokenizers", "numpy", "tqdm", "huggingface_hub", "jinja2"),
    *("matplotlib", "triton"),  # asked for before it is used; torch's build for a GPU brings triton
}


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).glob("*.py")) or [ROOT / f"{room}.py"]


def imports(path: Path) -> set[str]:
    """The modules that a file names: `from training import plan` names training.plan, too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_every_product_file_is_in_a_room():
    found = {path.stem for path in ROOT.glob("*.py")}
    found |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found - {"tests", "benchmarks", "demo"} == FLOOR_OF.keys()


@pytest.mark.parametrize("room", FLOOR_OF)
def test_a_room_imports_only_from_the_floors_below(room):
    for path in files(room):
        for other in top(imports(path)) & FLOOR_OF.keys() - {room}:
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{path.name} imports {other}"


@pytest.mark.parametrize("room", [room for room in FLOOR_OF if (ROOT / room).is_dir()])
def test_the_files_of_a_room_import_each_other_without_circles(room):
    names = {f"{room}.{path.stem}" for path in files(room)}
    left = {f"{room}.{path.stem}": imports(path) & names for path in files(room)}
    while left:
        free = {name for name, needed in left.items() if not needed & left.keys()}
        assert free, f"a circle in {sorted(left)}"
        left = {name: needed for name, needed in left.items() if name not in free}


def test_model_imports_nothing_local():
    assert not top(imports(ROOT / "model.py")) & FLOOR_OF.keys()


def test_only_two_files_know_torch_distributed():
    for room in FLOOR_OF:
        for path in files(room):
            named = any(name.startswith("torch.distributed") for name in imports(path))
            named = named or "torch.distributed" in path.read_text()
            assert named == (room in ("processes", "train_ep")), path


def test_only_the_listed_packages_are_imported():
    listed = (ROOT / "requirements.txt").read_text()
    for room in FLOOR_OF:
        for path in files(room):
            outside = top(imports(path)) - set(sys.stdlib_module_names) - FLOOR_OF.keys()
            assert outside <= PACKAGES, path
            assert all(name in listed for name in outside), path


def test_no_file_is_longer_than_600_lines_and_each_says_what_it_holds():
    for room in FLOOR_OF:
        for path in files(room):
            text = path.read_text()
            assert text.count("\n") <= 600, path
            assert ast.get_docstring(ast.parse(text)), path
            assert max(map(len, text.split("\n"))) <= 100, path
