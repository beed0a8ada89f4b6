"""The rules of the tree, checked on the source: who imports whom, and nothing of one machine in a tracked file."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mtp_trl"

# Lower layers know nothing of higher ones. A name stands for the module or sub-package directly under mtp_trl.
LAYER = {
    "custom_generate": 0,
    "checkpoints": 1,
    "config": 1,
    "data": 1,
    "forward": 1,
    "guard": 1,
    "gated_adapter": 1,
    "mask_token": 1,
    "models": 1,
    "objective": 1,
    "optimizer": 1,
    "regions": 1,
    "self_distillation": 1,
    "word_problems": 1,
    "estimate": 2,
    "card": 2,
    "evaluation": 2,
    "hub": 2,
    "lora": 2,
    "publish": 2,
    "saving": 2,
    "recipe": 2,
    "serving": 2,
    "trainer": 2,
    "cli": 3,
    "launch": 3,
    "__main__": 3,
}
PURE = ("regions", "objective")


def source_files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def package_of(path: Path) -> list[str]:
    return ["mtp_trl", *path.relative_to(PACKAGE).parts[:-1]]


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything the file imports, at the top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package_of(path)[: len(package_of(path)) - node.level + 1] if node.level else []
            base = ".".join([*parts, *(node.module.split(".") if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def unit_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def test_imports_go_one_way():
    wrong = []
    for path in source_files():
        unit = unit_of(path)
        if unit == "__init__":
            continue
        assert unit in LAYER, f"{path.name}: give mtp_trl.{unit} a layer in this test"
        for name in imported_modules(path):
            parts = name.split(".")
            # `from mtp_trl import x` goes through the lazy names: the module itself must be named instead.
            if parts[0] != "mtp_trl" or parts[1] in {unit, "__version__"}:
                continue
            if parts[1] not in LAYER or LAYER[parts[1]] > LAYER[unit]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_decoder_stands_alone():
    """generate.py is uploaded by itself: torch, transformers and the standard library are all it may use."""
    allowed = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}  # transformers brings safetensors
    names = imported_modules(PACKAGE / "custom_generate" / "generate.py")
    assert {name.split(".")[0] for name in names} <= allowed


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_know_no_model_and_no_disk(module):
    forbidden = {"transformers", "trl", "tokenizers", "datasets", "pathlib", "os", "io", "json", "mtp_trl"}
    names = imported_modules(PACKAGE / f"{module}.py")
    assert not {name.split(".")[0] for name in names} & forbidden


def test_no_path_of_one_machine_in_tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    machine = re.compile(r"(?<![\w.~-])/(?:work|home|root|Users)/[\w.-]+/")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        found += [f"{name}: {match.group()}" for match in machine.finditer(text)]
    assert not found
