"""Check rules on the source files: import order, file lengths, shape letters, and no local paths in tracked files."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mtp_trl"

# A layer imports only from earlier layers in this list. A name is a folder or a file directly under mtp_trl.
LAYERS = (
    ("custom_generate", "word_problems", "argument_types"),
    ("modeling",),
    ("publishing",),
    ("training",),
    ("evaluation", "recipe"),
    ("apps", "serving", "estimate"),
    ("launch",),
    ("cli", "__main__"),
)
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}
PURE = ("regions", "objective")
MAX_LINES = 350  # per file


def source_files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def package_of(path: Path) -> list[str]:
    return ["mtp_trl", *path.relative_to(PACKAGE).parts[:-1]]


def imported_modules(path: Path) -> set[str]:
    """Return the absolute names of everything that a file imports, at the top or inside functions."""
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


def test_imports_go_in_one_direction():
    violations = []
    for path in source_files():
        unit = unit_of(path)
        if unit == "__init__":
            continue
        assert unit in LAYER, f"{path.name}: give mtp_trl.{unit} a layer in this test"
        for name in imported_modules(path):
            parts = name.split(".")
            # `from mtp_trl import x` of a public name is a violation too: it must be imported from its module.
            if parts[0] != "mtp_trl" or parts[1] in {unit, "__version__"}:
                continue
            if parts[1] not in LAYER or LAYER[parts[1]] >= LAYER[unit]:
                violations.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not violations


DECODER = sorted(path for path in (PACKAGE / "custom_generate").glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", DECODER, ids=lambda path: path.stem)
def test_the_decoder_is_self_contained(path):
    """The decoder may import only torch, transformers, safetensors, the standard library and its own files."""
    allowed = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}  # transformers brings safetensors
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:  # not `from .name import ...`
            names = [str(node.module)]
        assert {name.split(".")[0] for name in names} <= allowed, names


def test_generate_imports_all_files_of_the_decoder_and_there_are_no_cycles():
    """Transformers copies the files that `generate.py` imports by `from .name import ...`, but not by `from . import name`."""
    needs = {path.stem: relative_imports(path) for path in DECODER}
    assert needs["generate"] == needs.keys() - {"generate"}
    while needs:
        leaves = {name for name, others in needs.items() if not others & needs.keys()}
        assert leaves, f"these import each other: {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in leaves}


def relative_imports(path: Path) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    assert all(node.level <= 1 and (node.level == 0 or node.module) for node in nodes)
    return {str(node.module) for node in nodes if node.level == 1}


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def legend() -> dict[str, str]:
    """Return the meaning of each shape letter, from the table in mtp_trl/README.md."""
    page = (PACKAGE / "README.md").read_text(encoding="utf-8").partition("## Shapes")[2]
    return dict(re.findall(r"^\| (\w) \| (.+) \|$", page, re.MULTILINE))


def shape_letters(source: str) -> set[str]:
    """Return the shape letters in tensor names, and in the shapes in brackets in docstrings and comments."""
    letters: set[str] = set()
    axis = r"[A-Za-z0-9.]+(?: [*+-] [A-Z0-9]+)*"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string not in ("lora_A", "lora_B"):
            if suffix := re.fullmatch(r"[a-z][a-z0-9_]*_([A-Z1]*[A-Z][A-Z1]*|r[A-Z]|[A-Z]r)", token.string):
                letters |= set(suffix.group(1)) - {"1"}
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            for shape in re.findall(rf"\[({axis}(?:, {axis})*)\]", token.string):
                letters |= set(re.findall(r"\b[A-Z]\b", shape))
    return letters


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_shape_letter_means_the_same_everywhere(path):
    source, meanings = path.read_text(encoding="utf-8"), legend()
    comment = re.search(r"^# Shapes: (.+(?:\n# .+)*)", source, re.MULTILINE)
    stated = dict(entry.split(" ", 1) for entry in comment.group(1).replace("\n#", "").split(", ")) if comment else {}
    assert stated == {letter: meanings.get(letter) for letter in sorted(shape_letters(source), key=lambda x: (x.islower(), x))}


def test_every_folder_has_a_short_readme():
    for folder in {path.parent for path in source_files()} - {PACKAGE}:
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
        assert 3 <= len(lines) <= 25, folder


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_no_model_and_no_file_code(module):
    forbidden = {"transformers", "trl", "tokenizers", "datasets", "pathlib", "os", "io", "json", "mtp_trl"}
    names = imported_modules(PACKAGE / "training" / f"{module}.py")
    assert not {name.split(".")[0] for name in names} & forbidden


def test_tracked_files_contain_no_local_paths():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    local_path = re.compile(r"(?<![\w.~-])/(?:work|home|root|Users)/[\w.-]+/")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        found += [f"{name}: {match.group()}" for match in local_path.finditer(text)]
    assert not found
