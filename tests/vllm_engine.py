"""Runs one vLLM engine over a list of jobs, in a process of its own: `python tests/vllm_engine.py JOBS.json OUTPUT.json`.

JOBS is {"engine": arguments of vllm.LLM, "jobs": {name: {"prompts": [...], "sampling": {...} or [{...}, ...]}}}; the output
{"jobs": {name: [[{"tokens", "text", "reason", "logprobs"} of each sample] of each prompt]}, "metrics": {name: value}}.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_DO_NOT_TRACK="1",
)

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams


def sampling(values):
    regex = values.pop("regex", None)
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
    work = json.loads(Path(jobs_file).read_text())
    llm = LLM(dtype="float32", seed=0, disable_log_stats=False, **{"enforce_eager": True, **work["engine"]})
    results = {}
    for name, job in work["jobs"].items():
        asked = job["sampling"]
        params = [sampling(one) for one in asked] if isinstance(asked, list) else sampling(asked)
        outputs = llm.generate(job["prompts"], params, use_tqdm=False)
        results[name] = [[record(sample) for sample in output.outputs] for output in outputs]
    metrics = {metric.name: getattr(metric, "value", getattr(metric, "values", None)) for metric in llm.get_metrics()}
    Path(output_file).write_text(json.dumps({"jobs": results, "metrics": metrics}))


if __name__ == "__main__":
    main(*sys.argv[1:])
