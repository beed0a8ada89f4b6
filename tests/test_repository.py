"""Exact mode's adapter is found while the model loads, with the options of `from_pretrained`."""

import ast
import copy
import json
import pickle
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub import HfApi, constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mtp_trl.custom_generate import adapter
from mtp_trl.custom_generate import generate as decoder
from mtp_trl.custom_generate.adapter_file import ADAPTER_FILE
from mtp_trl.custom_generate.generate import attach_decoder, generate
from mtp_trl.custom_generate.repository import attach_adapter
from mtp_trl.modeling.exact import add_gated_adapter
from mtp_trl.modeling.mask_token import set_decoding_defaults
from mtp_trl.publishing.repository import write_decoder

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
IDS = torch.tensor([[7, 12, 33, 5]])
OPTIONS = {"max_new_tokens": 24, "do_sample": False, "confadapt": 0.0, "verify": False, "eos_token_id": None}


def exact_model(tiny_model, seed=5):
    """A random base with a random adapter. Unverified text shows which adapter drafted it."""
    model = tiny_model("llama", context=0.3)
    model.generation_config.eos_token_id = None
    model.config.mtp["exact"] = True
    noise = torch.Generator().manual_seed(seed)
    for update in add_gated_adapter(model, rank=2, alpha=4).updates:
        torch.nn.init.normal_(update.lora_B, std=0.3, generator=noise)
    set_decoding_defaults(model, confadapt=0.5, verify=True)
    return attach_decoder(model)


def save(model, folder):
    model.save_pretrained(folder)
    write_decoder(folder, model, {"base_model": "org/base"})
    return folder


def text(model, **options):
    return model.generate(IDS, **OPTIONS | options).tolist()


@pytest.fixture
def models(tiny_model):
    """Two adapters on the same base."""
    return exact_model(tiny_model, 5), exact_model(tiny_model, 6)


@pytest.fixture
def folder(models, tmp_path):
    return save(models[0], tmp_path / "exact")


def load(name, **options):
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **options)


def test_the_two_adapters_draft_differently(models):
    assert text(models[0]) != text(models[1])
    assert text(models[0], verify=True) == text(models[1], verify=True) == text(models[0], mtp_k=1)


def test_a_folder_may_be_deleted_after_loading(models, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load("exact")
    shutil.rmtree(folder)
    monkeypatch.chdir("/")
    assert text(model) == text(models[0])


def test_a_copy_of_a_loaded_model_has_an_adapter_of_its_own(models, folder):
    model = load(folder)
    other = copy.deepcopy(model)
    assert text(other) == text(model) == text(models[0])
    assert other.mtp_adapter is not model.mtp_adapter


@pytest.fixture
def name(request):
    """Name of a repository, a different one in every test, since the client caches commits."""
    return "me/" + re.sub(r"\W+", "-", request.node.name)[-60:]


def upload(hub, folder, name, **options):
    api = HfApi(token="hf_test")
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, **options)
    return hub.repositories[name]


def test_a_private_repository_is_read_with_the_token_that_it_is_loaded_with(
    online, models, folder, tmp_path, monkeypatch, name
):
    upload(online, folder, name).private = True
    monkeypatch.delenv("HF_TOKEN")
    model = load(name, token="hf_test", cache_dir=tmp_path / "cache")
    assert text(model) == text(models[0])
    assert list((tmp_path / "cache").rglob("mtp_adapter.safetensors"))
    assert b"hf_test" not in pickle.dumps(model.generate)  # the model keeps no token


def test_what_was_loaded_online_decodes_offline(online, models, folder, tmp_path, monkeypatch, name):
    upload(online, folder, name)
    model = load(name, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert text(model) == text(models[0])
    assert text(load(name, cache_dir=tmp_path / "cache")) == text(models[0])


def test_another_revision_decodes_with_its_own_adapter(online, models, folder, tmp_path, name):
    upload(online, folder, name)
    HfApi(token="hf_test").create_branch(name, branch="next")
    upload(online, save(models[1], tmp_path / "other"), name, revision="next")
    assert text(load(name, revision="next", cache_dir=tmp_path / "cache")) == text(models[1])


def test_a_checkpoint_in_a_subfolder_decodes_with_its_own_adapter(online, models, folder, tmp_path, name):
    """transformers loads the code from the root. Weights, configuration and adapter come from the subfolder."""
    upload(online, folder, name)
    upload(online, save(models[1], tmp_path / "other"), name, path_in_repo="last-checkpoint")
    assert text(load(name, subfolder="last-checkpoint", cache_dir=tmp_path / "cache")) == text(models[1])
    assert text(load(tmp_path / "exact")) == text(models[0])


def test_a_decoder_attached_later_reads_the_adapter_at_once_and_from_the_same_folder(models, folder, tmp_path, monkeypatch):
    """The model is loaded without `trust_remote_code`, which would have bound its `generate`."""
    save(models[1], folder / "last-checkpoint")
    monkeypatch.chdir(tmp_path)
    model = attach_decoder(AutoModelForCausalLM.from_pretrained("exact"))
    checkpoint = AutoModelForCausalLM.from_pretrained("exact", subfolder="last-checkpoint")
    attach_decoder(checkpoint, subfolder="last-checkpoint")
    monkeypatch.chdir("/")
    assert text(model) == text(models[0])
    assert text(checkpoint) == text(models[1])
    with pytest.raises(TypeError, match="unknown options sub_folder"):
        attach_decoder(checkpoint, sub_folder="x")


def test_an_interrupted_attach_leaves_no_hooks(models, monkeypatch):
    model, expected = models[0], text(models[0])
    gated = model.mtp_adapter
    gated.detach(model)
    with monkeypatch.context() as patch:
        patch.setattr(adapter._MaskRow, "to", interrupt)
        with pytest.raises(KeyboardInterrupt):
            gated.attach(model)
    assert not any(module._forward_hooks for module in model.modules())
    gated.attach(model)
    assert text(model) == expected


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_interrupted_plain_decoding_leaves_the_adapter_attached(models):
    """Plain decoding detaches the adapter for its time."""
    expected = text(models[0])
    with pytest.raises(KeyboardInterrupt):
        text(models[0], mtp_k=1, stopping_criteria=[interrupt])
    assert text(models[0]) == expected


def test_a_repository_without_an_adapter_does_not_remove_the_one_attached(models, folder, tmp_path):
    model = load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no .*mtp_adapter.safetensors; pass a repository of an exact-mode"):
        attach_adapter(model, str(tmp_path / "empty"))
    assert text(model) == text(models[0])


def test_a_git_lfs_pointer_is_named_as_such(folder):
    (folder / ADAPTER_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"is not a safetensors file .*git lfs pull"):
        load(folder)


def test_a_lora_added_to_an_exact_model_can_be_merged(models, folder):
    """PEFT wraps and unwraps the layers. The adapter stays on the inner layers."""
    model = load(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"]))
    assert text(adapted) == text(models[0])  # B is zero
    assert text(adapted.merge_and_unload()) == text(models[0])


def test_an_exact_repository_without_its_adapter_does_not_load(folder):
    """After an OSError, transformers would assume that there is no custom `generate` and decode one token per pass."""
    (folder / ADAPTER_FILE).unlink()
    with pytest.raises(ValueError, match=r"was adapted in exact mode, but has no .*mtp_adapter.safetensors"):
        load(folder)


def test_an_exact_repository_on_the_hub_without_its_adapter_does_not_load(online, folder, tmp_path, name):
    (folder / ADAPTER_FILE).unlink()
    upload(online, folder, name)
    with pytest.raises(ValueError, match=f"{name} was adapted in exact mode, but has no"):
        load(name, cache_dir=tmp_path / "cache")


def adapter_only(model, folder):
    """Save an adapter-only repository, for a base without a mask token."""
    save(model, folder)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()
    return folder


def one_at_a_time(function):
    """Wrap `ast.parse`, which transformers calls in every thread; CPython before 3.11.8 may fail then (cpython#106905)."""
    lock = threading.Lock()

    def call(*args, **kwargs):
        with lock:
            return function(*args, **kwargs)

    return call


def test_threads_with_two_adapters_on_one_base_do_not_disturb_each_other(models, tiny_model, tmp_path, monkeypatch):
    """Other threads decode or run the unmodified base at the same time."""
    monkeypatch.setattr(ast, "parse", one_at_a_time(ast.parse))
    base = tiny_model("llama", context=0.3)
    base.generation_config.eos_token_id = None
    del base.config.mtp
    repositories = [adapter_only(model, tmp_path / name) for name, model in zip("ab", models, strict=True)]
    plain = {"max_new_tokens": 24, "do_sample": False}
    plain_text, logits = base.generate(IDS, **plain).tolist(), base(IDS).logits

    def decode(call):
        if call == 2:
            return base.generate(IDS, **plain).tolist()
        if call == 3:
            return torch.equal(base(IDS).logits, logits)
        return text(base, custom_generate=str(repositories[call]), trust_remote_code=True)

    expected = [text(models[0]), text(models[1]), plain_text, True]
    calls = [0, 1, 2, 3] * 6
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(decode, calls)) == [expected[call] for call in calls]


def test_an_adapter_is_active_in_its_own_thread_and_inactive_after_an_error(models):
    model, ids = models[0], IDS
    with torch.no_grad():
        inactive = model(ids).logits
        seen = []
        with model.mtp_adapter.acting_on(2):
            active = model(ids).logits
            other = threading.Thread(target=lambda: seen.append(model(ids).logits))
            other.start()
            other.join()
        assert not torch.equal(active, inactive)
        assert torch.equal(seen[0], inactive)
        with pytest.raises(KeyboardInterrupt), model.mtp_adapter.acting_on(2):
            raise KeyboardInterrupt
        assert torch.equal(model(ids).logits, inactive)
        with model.mtp_adapter.acting_on(2), model.mtp_adapter.acting_on(0):
            assert torch.equal(model(ids).logits, inactive)


def test_only_generate_is_bound_to_the_repository_it_comes_from(folder):
    assert load(folder).generate.keywords["repository"].name == str(folder)
    assert decoder.generate is generate is decoder.generate_blocks
    with pytest.raises(AttributeError, match="no attribute 'decode'"):
        _ = decoder.decode


def nudged(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    return model


def test_a_second_adapter_that_does_not_fit_leaves_the_first_on_the_base(models, tiny_model, tmp_path):
    base = tiny_model("llama", context=0.3)
    base.generation_config.eos_token_id = None
    del base.config.mtp
    call = {"custom_generate": str(adapter_only(models[0], tmp_path / "a")), "trust_remote_code": True}
    expected = text(base, **call)
    wrong = exact_model(lambda *args, **kwargs: nudged(tiny_model(*args, **kwargs)))
    with pytest.raises(ValueError, match="these weights differ"):
        text(base, custom_generate=str(adapter_only(wrong, tmp_path / "b")), trust_remote_code=True)
    assert base.mtp_adapter.source[0] == call["custom_generate"]
    assert text(base, **call) == expected


def test_decoding_defaults_of_the_adapter_are_those_of_the_folder(folder):
    assert json.loads((folder / "generation_config.json").read_text())["confadapt"] == 0.5
    assert load(folder).generation_config.verify is True
