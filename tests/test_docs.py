"""Runs every code block of docs/ and README.md, in order, on the bundled model with fewer steps."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import mtp_trl
from mtp_trl.cli import COMMANDS, main
from mtp_trl.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Replacements that make the examples fast enough for a test, or independent of how well the model was trained.
SHORTER = {
    "max_steps=500": "max_steps=1",
    "max_steps=400": "max_steps=1",
    '"train", 12000': '"train", 32',
    "--limit 100": "--limit 2",
    "--max-new-tokens 64": "--max-new-tokens 8",
    "max_new_tokens=64": "max_new_tokens=8",
    "max_completion_length=64": "max_completion_length=4",
    "--max-drop 0.05": "--max-drop 0.9",
    "--max_steps 10": "--max_steps 1 --dataset_size 32 --use_cpu true",
    "--verify --output": "--verify --max-new-tokens 8 --output",
}
PARSED_ONLY = {"push", "train"}  # push needs a Hub (tests/test_push.py), train its own process (tests/test_launch.py)


def blocks(document):
    return BLOCK.findall((DOCS / document).read_text(encoding="utf-8"))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that looks like a checkout, with the files that the examples expect the reader to have."""
    (tmp_path / "mtp_trl").symlink_to(ROOT / "mtp_trl")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    prompts = [f"Question: Nora has {n} pens.\nAnswer:" for n in range(60)]
    for name, count in (("held_out.jsonl", 2), ("calibration.jsonl", 60), ("prompts.jsonl", 2)):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts[:count]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(code):
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    return code


def run(document, *, namespace=None):
    """Run a document: Python blocks in one namespace, commands through `mtp_trl.cli.main`."""
    namespace = {} if namespace is None else namespace
    for language, code in blocks(document):
        if language == "python":
            exec(compile(shortened(code), document, "exec"), namespace)
        elif language == "sh":
            for line in shortened(code).strip().splitlines():
                program, command, *arguments = shlex.split(line)
                assert program == "mtp-trl"
                assert command in COMMANDS
                if command not in PARSED_ONLY:
                    assert main([command, *arguments]) == 0, line


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_every_code_block_in_docs_runs(checkout, capsys):
    torch.manual_seed(0)
    run("quickstart.md")
    assert (checkout / "my_export" / "README.md").is_file()
    assert "tokens per forward pass" in capsys.readouterr().out
    run("choosing_a_threshold.md")
    assert (checkout / "my_model" / "mtp_calibration.json").is_file()
    for document in ("your_own_domain.md", "recipes.md", "faq.md", "troubleshooting.md"):
        run(document)


CPU = ("--use_cpu", "true", "--bf16", "false")
README_REPLACEMENTS = {  # a bundled model, local data and a run of one step
    '"Qwen/Qwen3-4B-Instruct-2507"': '"mtp_trl/word_problems/base"',
    '"openai/gsm8k", "main", split="train"': '"json", data_files="gsm8k.jsonl", split="train"',
    "k_max=16": 'k_max=4, max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True',
    "max_new_tokens=192": "max_new_tokens=24",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_every_code_block_in_the_readme_runs(checkout, monkeypatch, capsys):
    """Python blocks run with `README_REPLACEMENTS`. Of the commands, only the recipes and their options are read."""
    (checkout / "demo_out").mkdir()
    (checkout / "demo_out" / "model").symlink_to(ROOT / "models" / "tiny_exact_long")
    row = json.dumps({"question": "Tom has 3 pens and buys 4. How many?", "answer": "3 + 4 = 7 #### 7"}) + "\n"
    (checkout / "gsm8k.jsonl").write_text(row * 8)
    pushed = []
    monkeypatch.setattr(mtp_trl.MTPDistillTrainer, "push_to_hub", lambda self: pushed.append(self.args.output_dir))
    namespace, launched = {}, []
    for language, code in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        if language == "python":
            for printed, replacement in README_REPLACEMENTS.items():
                code = code.replace(printed, replacement)
            exec(compile(code, "README.md", "exec"), namespace)
        for line in code.splitlines():
            words = shlex.split(line, comments=True) if language == "" else []
            if words[:2] in (["accelerate", "launch"], ["mtp-trl", "train"]):
                (recipe,) = (word for word in words if word.endswith(".yaml"))
                read_recipe(checkout / recipe, [*CPU, *words[words.index(recipe) + 1 :]])
                launched.append(recipe)
    assert "Answer: " in capsys.readouterr().out
    assert pushed == ["qwen3-mtp"]
    assert (checkout / "qwen3-mtp" / "custom_generate" / "mtp_adapter.safetensors").is_file()
    assert len(launched) == 3


# Not run here: api.md is generated, multi_node.md needs a cluster, and serving.md needs vLLM (tests/test_serving_vllm.py).
NOT_RUN = ("api.md", "multi_node.md", "serving.md")


def test_docs_contain_only_code_blocks_that_the_tests_run():
    for path in sorted(DOCS.glob("*.md")):
        if path.name not in NOT_RUN:
            assert {language for language, _ in blocks(path.name)} <= {"python", "sh"}, path.name


def test_links_between_documents_resolve():
    for path in sorted(DOCS.glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (DOCS / target).exists(), f"{path.name}: {target}"


def defined_in(path):
    """Names of functions, classes and methods (`Class.method`) defined in a source file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name for node in top} | {
        f"{node.name}.{method.name}" for node in top for method in node.body if isinstance(method, ast.FunctionDef)
    }


def test_every_file_and_function_named_in_contributing_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.(?:py|md|json))(?:::([\w.]+))?`", text)
    assert len(named) > 30
    for file, name in named:
        if "NAME" in file:  # stands for any result
            continue
        path = next((folder / file for folder in (ROOT, ROOT / "mtp_trl") if (folder / file).is_file()), None)
        assert path is not None, file
        assert not name or name in defined_in(path), f"{file}: {name}"


def test_the_api_reference_matches_the_docstrings():
    """If this fails, run `python benchmarks/api_reference.py`."""
    spec = importlib.util.spec_from_file_location("api_reference", ROOT / "benchmarks" / "api_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.DOCUMENT.read_text(encoding="utf-8") == module.reference()
    documented = {name.rpartition(".")[2] for names in module.PUBLIC.values() for name in names}
    assert set(mtp_trl.__all__) - {"__version__"} <= documented
