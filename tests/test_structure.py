"""The files keep to their place: imports go one way, and at run time only the listed packages are
used."""

import ast
import sys

from conftest import ROOT

LOCAL = {
    "model": set(),
    "data": set(),
    "select_experts": {"model", "data"},
    "sandbox": set(),
    "eval": {"model", "data", "sandbox"},
    "train": {"model", "data", "select_experts", "eval"},
    "train_ep": {"model", "train"},
}
PACKAGES = {"torch", "safetensors", "tokenizers", "numpy", "tqdm", "huggingface_hub", "matplotlib"}


def imports(name: str) -> set[str]:
    nodes = list(ast.walk(ast.parse((ROOT / f"{name}.py").read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_imports_go_one_way():
    for name, allowed in LOCAL.items():
        assert imports(name) & LOCAL.keys() <= allowed
        # select_experts and eval split their examples over processes.
        if name not in ("select_experts", "eval", "train_ep"):
            assert not any(module.startswith("torch.distributed") for module in imports(name))


def test_only_the_listed_packages_are_imported():
    for name in LOCAL:
        outside = (
            {module.split(".")[0] for module in imports(name)}
            - set(sys.stdlib_module_names)
            - set(LOCAL)
        )
        assert outside <= PACKAGES
    listed = (ROOT / "requirements.txt").read_text()
    assert all(package in listed for package in PACKAGES - {"matplotlib"})
