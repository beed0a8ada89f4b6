"""Test what the uploaded decoder is allowed to do, and that hostile files are refused."""

import ast
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtp_trl
from mtp_trl.apps.show import as_html
from mtp_trl.custom_generate.adapter_file import ADAPTER_FILE, adapter_from
from mtp_trl.custom_generate.repository import attach_adapter
from mtp_trl.modeling.exact import add_gated_adapter
from mtp_trl.modeling.mask_token import add_mask_token, set_decoding_defaults
from mtp_trl.publishing.export import export
from mtp_trl.publishing.provenance import run_facts
from mtp_trl.publishing.repository import write_decoder

PACKAGE = Path(mtp_trl.__file__).parent
DECODER = [
    (path.name, node)
    for path in sorted((PACKAGE / "custom_generate").glob("*.py"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
]
FORBIDDEN_MODULES = set(
    "asyncio builtins code codeop ctypes ftplib http httpx importlib marshal multiprocessing os pickle pty requests runpy "
    "shelve shutil smtplib socket socketserver ssl subprocess tempfile urllib webbrowser xmlrpc zipimport".split()
)
FORBIDDEN_NAMES = {"eval", "exec", "compile", "open", "__import__", "input", "breakpoint", "globals", "vars"}
WRITING = re.compile(
    r"write\w*|save\w*|unlink|rmdir|mkdir|touch|rename|symlink_to|hardlink_to|chmod|push_to_hub|upload\w*|urlopen"
)


def called(node):
    """Return the name of the called function: `f` for f(...), `g` for a.b.g(...)."""
    function = node.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


CALLS = [(file, node) for file, node in DECODER if isinstance(node, ast.Call)]


# ---- the decoder's source ----


def test_the_decoder_imports_nothing_that_opens_connections_or_runs_programs():
    names = set()
    for _, node in DECODER:
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1  # only from its own folder
            names.add((node.module or "").split(".")[0])
    assert not names & FORBIDDEN_MODULES


def test_the_decoder_evaluates_no_text_and_opens_only_the_adapter():
    used = {node.id for _, node in DECODER if isinstance(node, ast.Name)}
    assert not used & FORBIDDEN_NAMES
    loads = {
        (file, ast.unparse(node.func)) for file, node in CALLS if called(node) in ("load", "loads", "load_file", "safe_open")
    }
    assert loads == {("adapter_file.py", "json.loads"), ("adapter_file.py", "safe_open")}  # neither loads pickles


def test_the_decoder_writes_nothing():
    # The decoder defines `_save_to_state_dict`, to keep the adapter out of the model's weights, but does not call it.
    assert [ast.unparse(node) for _, node in CALLS if WRITING.fullmatch(called(node))] == []


def test_the_decoder_fetches_only_the_adapter_of_its_own_repository():
    names = ("cached_file", "hf_hub_download", "snapshot_download", "from_pretrained", "has_file", "list_repo_files")
    fetches = [(file, ast.unparse(node)) for file, node in CALLS if called(node) in names]
    expected = "cached_file(self.name, ADAPTER_FILE, _raise_exceptions_for_missing_entries=False, **self.options)"
    assert fetches == [("repository.py", expected)]


def test_the_package_reads_no_pickle():
    """Loading a pickle, as torch.load does, can run code from the file; weights are safetensors."""
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not [
            call for call in calls if ast.unparse(call.func) in ("torch.load", "pickle.load", "pickle.loads", "eval", "exec")
        ]


# ---- hostile repositories ----


@pytest.fixture
def folder(tmp_path, tiny_model):
    model = tiny_model("llama")
    set_decoding_defaults(model, confadapt=0.9, verify=False)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(PACKAGE / "word_problems" / "base").save_pretrained(tmp_path / "model")
    facts = {"base_model": "org/base", "mask_token": "<|mtp|>", "objective": "hard", "k_min": 2, "k_max": 8, "settings": {}}
    write_decoder(tmp_path / "model", model, facts | run_facts())
    return tmp_path / "model"


def change(folder, name, **values):
    content = json.loads((folder / name).read_text())
    part = content["mtp"] if name == "config.json" else content
    part.update(values)
    (folder / name).write_text(json.dumps(content))


def decode(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6)


@pytest.mark.parametrize(
    "values",
    [
        {"confadapt": "0.9"}, {"confadapt": 1.5}, {"confadapt": -1}, {"confadapt": True}, {"confadapt": []},
        {"confadapt": [0.9, "0.8"]}, {"confadapt": {"1": 0.9}},
        {"mtp_k": 0}, {"mtp_k": "8"}, {"mtp_k": 2.5}, {"mtp_k": -3}, {"mtp_blocks": 0}, {"mtp_blocks": "many"},
        {"verify": "yes"}, {"verify": 1},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_decoding_defaults_are_refused(folder, values):
    change(folder, "generation_config.json", **values)
    with pytest.raises(ValueError, match=next(iter(values))):
        decode(folder)


def test_weights_that_are_a_pickle_are_not_published(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ValueError, match="must be saved as safetensors"):
        export(folder, tmp_path / "out")


def test_secrets_and_pickles_in_a_model_folder_are_not_published(folder, tmp_path):
    for name in (".env", ".netrc", "token", "training_args.bin", "scheduler.pt", "model.pkl", "custom_generate/other.py"):
        (folder / name).write_text("hf_secret")
    published = export(folder, tmp_path / "out")
    for path in published.rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes()


MTP = {"mask_token": "<|mtp|>", "mask_token_id": 60, "k_max": 8, "barred_token_ids": [60, 61, 62, 63]}


@pytest.mark.parametrize(
    "mtp",
    ["x", ["a"], 5, {"exact": True}, MTP | {"mask_token_id": "a"}, MTP | {"exact": "yes"}, MTP | {"mask_token": 5},
     MTP | {"base_vocab_size": "64"}, MTP | {"barred_token_ids": "abc"}],
    ids=str,
)  # fmt: skip
def test_a_hostile_config_is_refused_in_decoding_and_in_training(folder, tiny_model, mtp):
    content = json.loads((folder / "config.json").read_text()) | {"mtp": mtp}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.mtp .*load another revision"):
        decode(folder)
    model = tiny_model("llama")
    model.config.mtp = mtp
    with pytest.raises(ValueError, match=r"config\.mtp .*load another revision"):
        add_mask_token(model, AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def exact_folder(tmp_path, tiny_model):
    """Return a folder with an exact-mode adapter. Its base is in the folder `base` next to it."""
    model = tiny_model("llama")
    mtp = model.config.mtp
    del model.config.mtp
    model.save_pretrained(tmp_path / "base")
    model.config.mtp = mtp | {"exact": True}
    add_gated_adapter(model, rank=2, alpha=4)
    set_decoding_defaults(model, confadapt=0.5, verify=True)
    facts = {"base_model": "org/base", "settings": {}}
    write_decoder(tmp_path / "exact", model, facts)
    return tmp_path / "exact"


def change_metadata(folder, **values):
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        metadata = file.metadata() | values
    save_file(
        load_file(folder / ADAPTER_FILE), folder / ADAPTER_FILE, metadata={k: v for k, v in metadata.items() if v is not None}
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", "0"), ("r", "__import__('os')"), ("r", None), ("r", "3"), ("r", "1000000000000"), ("lora_alpha", "nan"),
        ("lora_alpha", '"4"'), ("lora_alpha", "NaN"), ("lora_alpha", "1" * 400), ("mtp", None), ("mtp", "[1]"), ("mtp", "{"),
        ("mtp", "[" * 100_000),
        ("mtp", json.dumps(MTP | {"mask_token_id": "a"})), ("mtp", json.dumps(MTP | {"mask_token_id": -1})),
        ("mtp", json.dumps(MTP | {"barred_token_ids": "abc"})), ("mtp", json.dumps(MTP | {"k_max": 10**9})),
        ("defaults", None), ("defaults", "[]"), ("defaults", "not json"), ("lora_layers", "5"), ("lora_layers", "[5]"),
    ],
)  # fmt: skip
def test_an_adapter_file_with_hostile_metadata_is_refused(exact_folder, name, value):
    change_metadata(exact_folder, **{name: value})
    base = AutoModelForCausalLM.from_pretrained(exact_folder.parent / "base")
    with pytest.raises(ValueError, match=rf"mtp_adapter.safetensors .*{'rank' if value == '3' else ''}.*load another revision"):
        base.generate(torch.tensor([[5, 6]]), max_new_tokens=3, custom_generate=str(exact_folder), trust_remote_code=True)


def test_an_adapter_cannot_bar_every_token_of_its_base(exact_folder):
    base = AutoModelForCausalLM.from_pretrained(exact_folder.parent / "base")
    every = list(range(base.config.vocab_size))
    change_metadata(exact_folder, mtp=json.dumps(MTP | {"barred_token_ids": every}))
    with pytest.raises(ValueError, match=r"not all barred.*load another revision"):
        base.generate(torch.tensor([[5, 6]]), max_new_tokens=3, custom_generate=str(exact_folder), trust_remote_code=True)


@pytest.mark.parametrize("change", [{"mask_row": None}, {"mask_row": torch.zeros(2, 32)}, {"lora_B.weight": None}])
def test_an_adapter_file_without_its_tensors_is_refused(exact_folder, change):
    with safe_open(exact_folder / ADAPTER_FILE, framework="pt") as file:
        metadata, tensors = file.metadata(), load_file(exact_folder / ADAPTER_FILE)
    ((suffix, new),) = change.items()
    name = next(name for name in tensors if name.endswith(suffix))
    tensors = {key: value for key, value in tensors.items() if key != name} | ({} if new is None else {name: new})
    with pytest.raises(ValueError, match=r"mtp_adapter\.safetensors has .*load another revision"):
        adapter_from(tensors, metadata)


def test_an_adapter_can_set_only_decoding_defaults(exact_folder):
    change_metadata(exact_folder, defaults=json.dumps({"confadapt": 0.7, "max_new_tokens": 10**6, "to_dict": 1, "mtp_k": 3}))
    base = AutoModelForCausalLM.from_pretrained(exact_folder.parent / "base")
    attach_adapter(base, str(exact_folder))
    assert base.generation_config.confadapt == 0.7
    assert base.generation_config.max_new_tokens is None
    assert callable(base.generation_config.to_dict)
    assert "mtp_k" not in base.mtp_adapter.defaults


def test_attaching_an_adapter_to_a_model_with_a_hostile_config_is_an_error(exact_folder):
    base = AutoModelForCausalLM.from_pretrained(exact_folder.parent / "base")
    base.config.mtp = {"exact": True}
    with pytest.raises(ValueError, match=r"config\.mtp has mask_token_id='None'"):
        attach_adapter(base, str(exact_folder))


# ---- text of models and data ----


def test_the_text_of_a_model_cannot_become_markup_in_the_page():
    page = as_html(["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;"])
    assert "<script" not in page
    assert "<img" not in page
    assert "&amp;lt;" in page
