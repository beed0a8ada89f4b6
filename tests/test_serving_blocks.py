"""The parts of the vLLM plugin that run without vLLM: scheduled drafts, blocks, acceptance, proposals, settings, heads."""

import importlib
import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mtp_trl.custom_generate.adapter_file import ADAPTER_FILE, read_adapter
from mtp_trl.modeling.exact import add_gated_adapter
from mtp_trl.modeling.mask_token import set_decoding_defaults
from mtp_trl.publishing.repository import write_decoder
from mtp_trl.serving.vllm import hooks
from mtp_trl.serving.vllm.blocks import Scheduled, accept_all, canvases, next_drafts, proposals, read_blocks
from mtp_trl.serving.vllm.gated import attach_adapter, check_weights
from mtp_trl.serving.vllm.heads import pad_heads
from mtp_trl.serving.vllm.proposer import MTPProposer
from mtp_trl.serving.vllm.serve import serve_command, speculative_config
from mtp_trl.serving.vllm.settings import Served, Settings

MASK, K, V = 30, 4, 32
# Drafts and masks of a batch: a full block, only masks, nothing, drafts truncated before their masks, one of three masks left.
BATCH = [[5, 6, MASK, MASK, MASK], [MASK] * 3, [], [7, 8], [9, MASK]]


def scheduled_by_v2(batch: list[list[int]] = BATCH) -> Scheduled:
    """The same batch with the token before each request's drafts included in the flat tensor, as in Model Runner V2."""
    ends = torch.tensor([len(row) + 1 for row in batch]).cumsum(0)
    starts = ends - torch.tensor([len(row) + 1 for row in batch])
    flat = torch.tensor([token for row in batch for token in (MASK, *row)])  # the token before the drafts must not be counted
    return Scheduled.of(flat, starts + 1, ends, starts, mask_token_id=MASK)


def scheduled(batch: list[list[int]] = BATCH) -> Scheduled:
    lengths = torch.tensor([len(row) for row in batch])
    flat = torch.tensor([token for row in batch for token in row], dtype=torch.int32)
    ends, row_ends = lengths.cumsum(0), (lengths + 1).cumsum(0)
    return Scheduled.of(flat, ends - lengths, ends, row_ends - lengths - 1, mask_token_id=MASK)


def random_logits(batch: list[list[int]] = BATCH) -> torch.Tensor:
    return torch.randn(sum(len(row) + 1 for row in batch), V, generator=torch.Generator().manual_seed(0)) * 3


def first_rows(batch: list[list[int]] = BATCH) -> list[int]:
    return [sum(len(row) + 1 for row in batch[:i]) for i in range(len(batch))]


@pytest.mark.parametrize("found", [scheduled(), scheduled_by_v2()])
def test_masks_are_distinguished_from_drafts(found):
    assert found.real_B.tolist() == [2, 0, 0, 2, 1]
    assert found.masks_B.tolist() == [3, 3, 0, 0, 1]
    assert found.first_row_B.tolist() == first_rows()
    assert [row[:n] for row, n in zip(found.longest(5).tolist(), map(len, BATCH), strict=True)] == BATCH


@pytest.mark.parametrize("at_once", [1, 2**26])
def test_blocks_are_read_after_the_drafts(monkeypatch, at_once):
    monkeypatch.setattr("mtp_trl.serving.vllm.blocks._ELEMENTS_AT_ONCE", at_once)
    logits = random_logits()
    blocks = read_blocks(logits, scheduled(), k=K)
    for i, (row, first) in enumerate(zip(BATCH, first_rows(), strict=True)):
        real, masks = len(row) - row.count(MASK), row.count(MASK)
        expected = [first + real + position for position in range(masks + 1)]
        assert blocks.read_BK[i].tolist() == [position <= masks for position in range(K)]
        assert blocks.rows_BK[i, : masks + 1].tolist() == expected
        assert blocks.tokens_BK[i, : masks + 1].tolist() == logits[expected].argmax(-1).tolist()


def naive_drafts(logits: torch.Tensor, output: list[list[int]], thresholds: list[float]) -> list[list[int]]:
    """The drafts after the emitted token, as long as it and they reach their thresholds; no drafts after a rejected draft."""
    drafts = []
    for row, first, emitted in zip(BATCH, first_rows(), output, strict=True):
        real, masks = len(row) - row.count(MASK), row.count(MASK)
        drafts_of_row: list[int] = []
        if masks and len(emitted) == real + 1:
            confident = logits[first + real].softmax(-1)[emitted[-1]] >= thresholds[0]
            for position in range(1, masks + 1):
                prob, token = logits[first + real + position].softmax(-1).max(-1)
                if not confident or prob < thresholds[position]:
                    break
                drafts_of_row.append(int(token))
        drafts.append(drafts_of_row)
    return drafts


@pytest.mark.parametrize("thresholds", [[0.0] * K, [0.2] * K, [0.4] * K, [0.9] * K, [0.0, 0.3, 0.2, 0.1], [0.3, 0.0, 0.0, 0.9]])
def test_next_drafts_equal_the_naive_loop(thresholds):
    logits, found = random_logits(), scheduled()
    blocks = read_blocks(logits, found, k=K)
    best = logits.argmax(-1).tolist()
    first = first_rows()
    # All drafts accepted; no drafts, the best token; no drafts or masks; first draft rejected; draft accepted, another token.
    output = [[5, 6, best[first[0] + 2]], [best[first[1]]], [3], [4], [9, 2]]
    padded = torch.tensor([row + [-1] * (6 - len(row)) for row in output])
    limits = [torch.tensor([thresholds] * len(BATCH)), *thresholds[: len(set(thresholds)) == 1]]  # also as one number
    for limit in limits:
        result = next_drafts(logits, padded, found, blocks, threshold=limit, vocabulary=V).tolist()
        assert [tokens[:count] for count, *tokens in result] == naive_drafts(logits, output, thresholds)


def test_all_drafts_of_unverified_requests_are_accepted():
    logits, found = random_logits(), scheduled()
    blocks = read_blocks(logits, found, k=K)
    output = torch.full((len(BATCH), 6), -1, dtype=torch.int32)
    output[:, 0] = 1  # as if the sampler had rejected every first draft
    emitted = accept_all(output, found, blocks, torch.tensor([True, True, True, True, False])).tolist()
    first, best = first_rows(), logits.argmax(-1).tolist()
    assert emitted[0] == [5, 6, best[first[0] + 2], -1, -1, -1]
    assert emitted[1] == [best[first[1]], -1, -1, -1, -1, -1]
    assert emitted[2:] == output[2:].tolist()  # two have no masks, so the drafts may not be ours; the last one is verified


def test_proposals_are_drafts_and_masks_within_the_width():
    drafts = [[2, 5, 6, 7], [0, 5, 6, 7], [3, 5, 6, 7], [3, 5, 6, 7], [0, 0, 0, 0]]
    proposed = proposals(drafts, mask_token_id=MASK, masks=[3, 3, 3, 1, 0], width=5, fill=False)
    assert proposed == [[5, 6, MASK, MASK, MASK], [MASK] * 3, [5, 6, 7, MASK, MASK], [5, MASK], []]
    filled = proposals(drafts, mask_token_id=MASK, masks=[3, 3, 3, 1, 0], width=6, fill=True)
    assert filled == [[5, 6] + [MASK] * 4, [MASK] * 6, [5, 6, 7] + [MASK] * 3, [5] + [MASK] * 5, []]


@pytest.mark.parametrize("width", [2, 3, 6])
def test_canvases_are_proposals_that_fill_the_width(width):
    drafts, masks = [[2, 5, 6, 7], [0, 5, 6, 7], [3, 5, 6, 7], [3, 5, 6, 7], [3, 0, 0, 0]], [3, 3, 3, 1, 0]
    found = canvases(torch.tensor(drafts), masks_B=torch.tensor(masks), mask_token_id=MASK, width=width)
    filled = proposals(drafts, mask_token_id=MASK, masks=masks, width=width, fill=True)
    assert found.tolist() == [row or [MASK] * width for row in filled]


def vllm_config(*, mtp: dict[str, Any] | None = None, defaults: dict[str, Any] | None = None, **options: Any) -> Any:
    """The parts of vLLM's configuration that the plugin reads."""
    config_mtp = {"mask_token_id": MASK, "barred_token_ids": [MASK], "k_max": K} | (mtp or {})
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model="folder",
            revision=None,
            hf_config=SimpleNamespace(mtp=config_mtp),
            try_get_generation_config=lambda: defaults or {},
            get_vocab_size=lambda: V,
        ),
        additional_config={"mtp_trl": options},
        num_speculative_tokens=6,
        speculative_config=SimpleNamespace(num_speculative_tokens=6, rejection_sample_method="standard"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
    )


def params(**values: Any) -> Any:
    """Sampling parameters of a plain greedy request, with `values` replaced."""
    plain = {"temperature": 0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}
    unset = dict.fromkeys(("logprobs", "logprob_token_ids", "bad_words", "allowed_token_ids", "logit_bias"))
    unset |= dict.fromkeys(("structured_outputs", "extra_args"))
    return SimpleNamespace(**{**plain, **unset, **values})


def test_settings_come_from_the_repository_the_engine_and_the_request():
    assert Served.of(vllm_config()).defaults == Settings(K, (0.0,), verify=True)
    assert Served.of(vllm_config(defaults={"confadapt": 0.5, "verify": False})).defaults == Settings(K, (0.5,), verify=False)
    served = Served.of(vllm_config(defaults={"confadapt": 0.5, "verify": True}, confadapt=0.9, mtp_k=3))
    assert served.defaults == Settings(3, (0.9,), verify=True)
    assert served.of_request(params()) == served.defaults
    assert served.of_request(params(extra_args={"confadapt": 0.1, "verify": 0, "other": "x"})) == Settings(
        3, (0.1,), verify=False
    )
    assert served.of_request(params(extra_args={"mtp_k": 1})).k == 1
    assert served.of_request(params(extra_args={"confadapt": [0.9, 0.5]})).thresholds == (0.9, 0.5)
    assert Served.of(vllm_config(defaults={"confadapt": [0.9, 0.5]})).defaults.thresholds == (0.9, 0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.7},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"min_tokens": 4},
        {"logprobs": 0},
        {"logprob_token_ids": [1]},
        {"bad_words": ["x"]},
        {"allowed_token_ids": [1]},
        {"logit_bias": {1: 2.0}},
        {"structured_outputs": object()},
    ],
)
def test_requests_that_change_the_logits_are_verified(changes):
    served = Served.of(vllm_config(verify=False))
    assert not served.of_request(params()).verify
    assert served.of_request(params(**changes)).verify


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confadapt": 1.5}, "probability"),
        ({"confadapt": True}, "probability"),
        ({"mtp_k": K + 1}, "between 1 and 4"),
        ({"mtp_k": 2.0}, "whole number"),
        ({"verify": "no"}, "verify must be"),
        ({"treshold": 0.5}, "no option treshold"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Served.of(vllm_config(**options))


def test_a_request_out_of_range_is_decoded_one_token_per_pass(monkeypatch, caplog):
    """An exception would end the engine, and every other request with it."""
    monkeypatch.setattr(hooks, "check_version", lambda: None)
    monkeypatch.setattr(hooks, "install", lambda proposer: None)
    proposer = MTPProposer(vllm_config())
    extra_args = {"a": {"confadapt": 7}, "b": None}
    requests = {name: SimpleNamespace(sampling_params=params(extra_args=extra)) for name, extra in extra_args.items()}
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a", "b"]), requests=requests, max_model_len=64)
    logits = torch.zeros(2, V)
    assert proposer.sample(runner, logits, None, lambda *_: "sampled") == "sampled"
    assert logits[:, MASK].tolist() == [-torch.inf] * 2
    assert proposer.propose([[3], [3]], None, None) == [[], [MASK] * 3]
    assert "confadapt must be a probability in [0, 1], got 7" in caplog.text
    caplog.clear()
    proposer.sample(runner, logits, None, lambda *_: "sampled")
    assert not caplog.records  # the warning is logged only once
    requests["a"] = SimpleNamespace(sampling_params=params(extra_args={"mtp_k": 3}))  # another request with the same name
    proposer.sample(runner, logits, None, lambda *_: "sampled")
    assert proposer.propose([[3], [3]], None, None) == [[MASK] * 2, [MASK] * 3]


@pytest.mark.parametrize("change", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_exact_mode_is_refused_if_the_adapter_would_be_split(monkeypatch, change):
    monkeypatch.setattr(hooks, "check_version", lambda: None)
    config = vllm_config(mtp={"exact": True})
    config.parallel_config.__dict__.update(change)
    with pytest.raises(ValueError, match=next(iter(change))):
        MTPProposer(config)


def test_samplers_that_might_accept_a_mask_are_refused(monkeypatch):
    monkeypatch.setattr(hooks, "check_version", lambda: None)
    config = vllm_config()
    config.speculative_config.rejection_sample_method = "synthetic"
    with pytest.raises(ValueError, match="may accept a mask"):
        MTPProposer(config)


def test_a_model_without_a_mask_token_is_refused():
    config = vllm_config()
    config.model_config.hf_config = SimpleNamespace()
    with pytest.raises(ValueError, match="no mask token"):
        Served.of(config)


def test_a_standalone_adapter_supplies_the_mask_token_and_the_defaults(tmp_path):
    file = tmp_path / "custom_generate" / "mtp_adapter.safetensors"
    file.parent.mkdir()
    mtp = {"mask_token_id": 29, "barred_token_ids": [29], "k_max": 6, "exact": True}
    shape = {"r": "1", "lora_alpha": "1"}
    save_file({"mask_row": torch.zeros(4)}, file, metadata=shape | {"mtp": json.dumps(mtp), "defaults": '{"confadapt": 0.5}'})
    config = vllm_config(adapter=str(tmp_path))
    config.model_config.hf_config = SimpleNamespace()  # the base has no mask token
    served = Served.of(config)
    assert (served.mask_token_id, served.adapter) == (29, str(file))
    assert served.defaults == Settings(6, (0.5,), verify=True)
    config.model_config.get_vocab_size = lambda: 29
    with pytest.raises(ValueError, match="serve the model that was saved with the adapter"):
        Served.of(config)
    lora = shape | {"mtp": json.dumps(mtp), "defaults": "{}", "lora_layers": '["model.layers.0.mlp.up_proj"]'}
    save_file({"mask_row": torch.zeros(4)}, file, metadata=lora)
    with pytest.raises(ValueError, match="is a LoRA adapter; serve the merged model"):
        Served.of(config)


def test_the_adapter_is_read_from_the_revision_served(monkeypatch):
    calls = []
    monkeypatch.setattr("mtp_trl.serving.vllm.settings.cached_file", lambda *a, **k: calls.append((*a, k)) or "adapter")
    config = vllm_config(mtp={"exact": True})
    config.model_config.model, config.model_config.revision = "me/exact", "v2"
    served = Served.of(config)
    assert calls == [("me/exact", ADAPTER_FILE, {"revision": "v2"})]
    assert (served.adapter, served.base) == ("adapter", ("me/exact", "v2"))


def test_serve_reads_the_configuration_of_the_revision(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("mtp_trl.serving.vllm.serve.servable", lambda model, revision: model)
    monkeypatch.setattr(hooks, "uses_v2", lambda: False)
    calls, config = [], tiny_model("llama").config
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **k: calls.append(k) or config)
    for options in (["--revision", "v2"], ["--revision=v2"]):
        assert serve_command("me/model", options)[-len(options) :] == options
    assert calls == [{"revision": "v2"}] * 2


def save_exact(tiny_model, folder):
    model = tiny_model("llama")
    model.config.mtp["exact"] = True
    adapter = add_gated_adapter(model, rank=2, alpha=4)
    set_decoding_defaults(model, confadapt=0.5, verify=True)
    model.save_pretrained(folder, max_shard_size="40KB")
    write_decoder(folder, model, {"base_model": "org/base"})
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return read_adapter(str(folder / ADAPTER_FILE)), adapter


def test_weights_that_the_adapter_was_not_trained_on_are_not_served(tiny_model, tmp_path):
    """The files are compared, because vLLM fuses and packs the weights when it loads them."""
    saved, _ = save_exact(tiny_model, tmp_path)
    check_weights(saved, str(tmp_path), None)
    name = "model.layers.1.mlp.down_proj.weight"
    shard = tmp_path / json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][-1, 3] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="trained on org/base, and these weights differ from it; serve it with org/base instead"
    ):
        check_weights(saved, str(tmp_path), None)
    save_file({key: value for key, value in tensors.items() if key != name}, shard, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="these weights cannot be compared with it"):
        check_weights(saved, str(tmp_path), None)


def test_the_adapter_is_not_attached_to_other_weights(tiny_model, tmp_path):
    save_exact(tiny_model, tmp_path)
    for shard in tmp_path.glob("model-*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    served = SimpleNamespace(adapter=str(tmp_path / ADAPTER_FILE), base=(str(tmp_path), None))
    with pytest.raises(ValueError, match="these weights differ from it"):
        attach_adapter(None, served, max_tokens=1)


def test_the_weights_are_compared_at_the_revision_served(tiny_model, tmp_path, monkeypatch):
    saved, _ = save_exact(tiny_model, tmp_path)
    calls = set()
    monkeypatch.setattr("mtp_trl.serving.vllm.gated.repository_file", lambda name, _, revision: calls.add((name, revision)))
    with pytest.warns(UserWarning, match="these weights cannot be compared with it"):
        check_weights(saved, "me/exact", "v2")
    assert calls == {("me/exact", "v2")}


def test_exact_mode_does_not_reuse_graphs_compiled_without_the_adapter(monkeypatch):
    monkeypatch.setattr(hooks, "check_version", lambda: None)
    monkeypatch.setattr(hooks, "install", lambda proposer: None)
    monkeypatch.setattr("mtp_trl.serving.vllm.settings.cached_file", lambda *_, **__: "adapter")
    plain, exact = vllm_config(), vllm_config(mtp={"exact": True})
    before = dict(exact.additional_config)
    for config in (plain, exact):
        MTPProposer(config)
    assert plain.additional_config == before != exact.additional_config


@pytest.mark.parametrize(("version", "message"), [(None, "not installed"), ("0.33.1", "is not 0.32.x"), ("1.32.0", "is not")])
def test_an_unknown_version_is_refused_with_the_remedy(monkeypatch, version, message):
    monkeypatch.setattr(hooks, "installed_version", lambda: version)
    with pytest.raises(ValueError, match=message) as refusal:
        hooks.check_version()
    assert "pip install 'vllm>=0.32,<0.33'" in str(refusal.value)


def test_the_tested_version_passes(monkeypatch):
    monkeypatch.setattr(hooks, "installed_version", lambda: "0.32.4+cu130")
    hooks.check_version()


def test_expand_batch_to_tokens_repeats_and_replaces():
    values, ends = torch.tensor([0.0, 0.5, 2.0]), torch.tensor([2, 2, 5], dtype=torch.int32)
    assert hooks.expand_batch_to_tokens(values, ends, 5, 0, 1).tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]


def test_padded_heads_compute_the_same_function(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "narrow")
    (tmp_path / "narrow" / "custom_generate").mkdir()
    update = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(2, 32),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.randn(32, 2),
        "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": torch.randn(2, 32),
        "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight": torch.randn(32, 2),
    }
    adapter = "custom_generate/mtp_adapter.safetensors"
    save_file(update, tmp_path / "narrow" / adapter, metadata={"r": "2"})
    wide = AutoModelForCausalLM.from_pretrained(pad_heads(tmp_path / "narrow", tmp_path / "wide", head_dim=32))
    ids = torch.randint(2, 60, (2, 24))
    torch.testing.assert_close(wide(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)

    def merge(model, tensors):
        for name in ("q_proj", "o_proj"):
            low, high = (tensors[f"base_model.model.model.layers.0.self_attn.{name}.lora_{x}.weight"] for x in "AB")
            model.get_submodule(f"model.layers.0.self_attn.{name}").weight.data += high @ low

    before = model(input_ids=ids).logits
    merge(model, update)
    merge(wide, load_file(tmp_path / "wide" / adapter))
    assert (model(input_ids=ids).logits - before).abs().max() > 0.1
    torch.testing.assert_close(wide(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_heads_of_other_architectures_are_refused(tiny_model, tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="qwen3"):
        pad_heads(tmp_path / "model", tmp_path / "wide", head_dim=32)


def test_the_command_line_of_serve(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("mtp_trl.serving.vllm.serve.servable", lambda model, revision: model)
    monkeypatch.setattr(hooks, "uses_v2", lambda: False)
    tiny_model("llama").save_pretrained(tmp_path)
    command = serve_command(str(tmp_path), ["--port", "8001"], confadapt=0.0, mtp_k=None, verify=False, fixed_width=None)
    assert command[1:5] == [
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={tmp_path}",
        f"--served-model-name={tmp_path}",
    ]
    assert '"num_speculative_tokens": 14' in command[5]  # k_max of 8
    assert command[6:] == ['--additional-config={"mtp_trl": {"confadapt": 0.0, "verify": false}}', "--port", "8001"]
    assert speculative_config(4)["num_speculative_tokens"] == 6
    for option in ("--speculative-config={}", "--speculative_config={}"):  # vLLM accepts both spellings
        with pytest.raises(ValueError, match="filled in"):
            serve_command(str(tmp_path), [option])
    with pytest.raises(ValueError, match="plain decoding"):
        serve_command(str(tmp_path), [], mtp_k=1)


def test_the_benchmark_counts_tokens_and_compares_with_plain_vllm(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    serve = importlib.import_module("serve")
    answers = [
        serve.Answer(sent=0.0, first=0.5, last=2.5, tokens=5, right=True),
        serve.Answer(sent=1.0, first=2.0, last=4.0, tokens=3, right=False),
    ]
    plain = serve.row("a", "plain", 2, answers, None, [])
    assert (plain.tokens_per_s, plain.speed, plain.accuracy) == (8 / 4, 1.0, 0.5)
    assert (plain.time_to_first_token, plain.time_per_token) == (0.75, 0.75)
    faster = [serve.Answer(sent=0.0, first=0.5, last=1.0, tokens=8, right=None)]
    other = serve.row("b", "plain", 2, faster, None, [plain])
    ours = serve.row("a", "verified", 2, faster, 2.5, [other, plain])
    assert (ours.speed, ours.accuracy) == (4.0, None)
    facts = {"date": "today", "hardware": "CPU", "command": "serve.py", "versions": {"vllm": "0.32.0", "torch": "2.13.0"}}
    options = {"requests": 2, "max_tokens": 8, "confadapt": 0.9}
    one_piece = [serve.Answer(sent=0.0, first=1.0, last=1.00001, tokens=8, right=None)]
    burst = serve.row("a", "confadapt", 2, one_piece, 2.5, [plain])
    table = serve.table({"rows": [vars(plain), vars(ours), vars(burst)], "asked": options, "provenance": facts})
    assert "| a | plain vLLM | 2 | 50.0% | 2 | 1.00x | 750 | 750.0 | 1.00 |" in table
    assert "| a | verified | 2 | - | 8 | 4.00x | 500 | 71.4 | 2.50 |" in table
    assert "| a | ConfAdapt | 2 | - | 8 | 4.00x | 1,000 | - | 2.50 |" in table


def test_an_interrupted_benchmark_resumes_after_its_last_row(monkeypatch, tmp_path, capsys):
    """Interrupted after its third row and started again, it measures no row twice and loses none."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    serve = importlib.import_module("serve")
    answer = serve.Answer(sent=0.0, first=0.5, last=2.5, tokens=5, right=True)
    started: list[str] = []
    left = [3]

    @contextmanager
    def running(command, log):
        started.append(command[0])
        yield "address"

    async def load(address, prompts, *, clients, max_tokens):
        if max_tokens == 192:  # not the warm-up
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return [answer]

    for name, fake in {"running": running, "load": load, "counters": lambda address: (1.0, 1.0)}.items():
        monkeypatch.setattr(serve, name, fake)
    monkeypatch.setattr(serve, "commands", lambda folder, options, scratch: {way: [way] for way in ("plain", "verified")})
    monkeypatch.setattr(serve, "check_version", lambda: None)
    output = tmp_path / "serve.json"
    command = ["serve.py", "models/a", "models/b", "--clients", "1,2", "--output", str(output)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(KeyboardInterrupt):
        serve.main()
    assert started == ["plain", "verified"]
    left[0] = 99
    serve.main()
    rows = [(row["model"], row["way"], row["clients"]) for row in json.loads(output.read_text())["rows"]]
    assert rows == [(model, way, n) for model in "ab" for way in ("plain vLLM", "verified") for n in (1, 2)]
    assert started == ["plain", "verified", "verified", "plain", "verified"]
    monkeypatch.setattr("sys.argv", [*command, "--requests", "3"])
    with pytest.raises(SystemExit, match="delete it, or name another --output"):
        serve.main()
