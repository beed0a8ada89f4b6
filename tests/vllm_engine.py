"""Runs one vLLM engine over a list of jobs, in a separate process: `python tests/vllm_engine.py JOBS.json OUTPUT.json`.

JOBS is {"engine": arguments of vllm.LLM, "v2": whether to use Model Runner V2, "jobs": {name: {"prompts": [...],
"sampling": {...} or [{...}, ...]}}}. OUTPUT is
{"jobs": {name: [[{"tokens", "text", "reason", "logprobs"} of each sample] of each prompt]}, "metrics": {name: value}}.
"""

import json
import os
import sys
from pathlib import Path

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_DO_NOT_TRACK": "1",
}


def interpret_triton():
    """Run Model Runner V2 on a CPU, in Triton's interpreter, because Triton cannot compile its kernels for CPUs.

    vLLM checks that Triton has a backend for the processor. Nothing is compiled, so any other backend can stand in.
    """
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    from triton.backends import backends

    backends["cpu"] = next(iter(backends.values()))
    from triton.runtime.interpreter import InterpreterBuilder

    store = InterpreterBuilder.create_masked_store

    def store_where_true(self, pointers, value, mask, *others):
        mask.data = mask.data != 0  # in vLLM's grammar kernel, the interpreter's mask holds integers instead of booleans
        return store(self, pointers, value, mask, *others)

    InterpreterBuilder.create_masked_store = store_where_true


def add_metrics(engine):
    """Add the metrics of Model Runner V2. vLLM's servers load metrics plugins, but its `LLM` does not."""
    from mtp_trl.serving.vllm.metrics import BlockMetrics

    metrics = BlockMetrics(engine.vllm_config, [0])
    metrics.log_engine_initialized()
    engine.logger_manager.stat_loggers.append(metrics)


def sampling(values):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    regex = values.pop("regex", None)
    if "logit_bias" in values:  # keys of JSON objects are strings
        values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
    return SamplingParams(**values, structured_outputs=StructuredOutputsParams(regex=regex) if regex else None)


def record(sample):
    chosen = [[entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs or [], strict=False)]]
    return {
        "tokens": list(sample.token_ids),
        "text": sample.text,
        "reason": sample.finish_reason,
        "logprobs": chosen[0] if sample.logprobs else None,
    }


def main(jobs_file, output_file):
    os.environ.update(ENVIRONMENT)
    work = json.loads(Path(jobs_file).read_text())
    if work.get("v2"):
        interpret_triton()
    from vllm import LLM

    llm = LLM(dtype="float32", seed=0, disable_log_stats=False, **{"enforce_eager": True, **work["engine"]})
    if work.get("v2"):
        add_metrics(llm.llm_engine)
    results = {}
    for name, job in work["jobs"].items():
        options = job["sampling"]
        params = [sampling(one) for one in options] if isinstance(options, list) else sampling(options)
        outputs = llm.generate(job["prompts"], params, use_tqdm=False)
        results[name] = [[record(sample) for sample in output.outputs] for output in outputs]
    metrics = {metric.name: getattr(metric, "value", getattr(metric, "values", None)) for metric in llm.get_metrics()}
    Path(output_file).write_text(json.dumps({"jobs": results, "metrics": metrics}))


if __name__ == "__main__":
    main(*sys.argv[1:])
