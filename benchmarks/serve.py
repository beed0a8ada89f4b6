"""Measures the speed of vLLM's OpenAI server under 1 to 32 clients, with and without the plugin.

    export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1
    .venv-vllm/bin/python benchmarks/serve.py models/tiny_exact_long models/tiny_long --confadapt 0.95 \
        --output docs/results/serve.json -- --dtype float32 --enforce-eager --max-model-len 512

It compares four ways of serving: plain vLLM; PARD, which is vLLM's own parallel drafting, with the same folder as drafter; the
plugin with verified decoding; and the plugin with ConfAdapt. PARD is left out for exact-mode folders, because they cannot draft
without the plugin.

The servers run one after the other and answer the same prompts under every number of clients: the bundled word problems, or
`--prompts FILE`, with one prompt per line. Options after `--` are passed to vLLM. The output is written after every number of
clients, and an interrupted run resumes after its last result.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtp_trl.evaluation.tasks import result
from mtp_trl.modeling.files import write_atomically
from mtp_trl.publishing.provenance import run_facts
from mtp_trl.serving.vllm.hooks import check_version, installed_version
from mtp_trl.serving.vllm.serve import servable, serve_command
from mtp_trl.word_problems import test_problems

WAYS = {"plain": "plain vLLM", "pard": "PARD, itself as drafter", "verified": "verified", "confadapt": "ConfAdapt"}
NAME = "served"


@dataclass(frozen=True)
class Row:
    """A result. Times are medians over requests, in seconds; `speed` is relative to plain vLLM with as many clients."""

    model: str
    way: str
    clients: int
    accuracy: float | None
    tokens_per_s: float
    speed: float
    time_to_first_token: float
    time_per_token: float
    tokens_per_pass: float | None


@dataclass(frozen=True)
class Answer:
    """The times at which a request was sent and the first and last piece of its answer arrived; whether the answer is right."""

    sent: float
    first: float
    last: float
    tokens: int
    right: bool | None


def commands(folder: Path, options: argparse.Namespace, scratch: Path) -> dict[str, list[str]]:
    """Return the command line of each way's server, without the port."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    mtp = config["mtp"]
    model = Path(servable(str(folder)))
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--served-model-name={NAME}"]
    ours = [f"--served-model-name={NAME}", *options.vllm]
    built = {
        "plain": [*server, f"--model={model}", *options.vllm],
        "verified": serve_command(str(model), ours, verify=True),
        "confadapt": serve_command(str(model), ours, verify=False, confadapt=options.confadapt),
    }
    if not mtp.get("exact"):
        drafting = pard(model, scratch / "drafter", mtp)
        built["pard"] = [*server, f"--model={model}", f"--speculative-config={json.dumps(drafting)}", *options.vllm]
    return {way: built[way] for way in WAYS if way in built}


def pard(model: Path, drafter: Path, mtp: dict[str, Any]) -> dict[str, Any]:
    """Return vLLM's `speculative_config` with the model as its own drafter.

    The drafter is a copy in the folder `drafter`, whose config names the mask token as vLLM expects it.
    """
    shutil.copytree(model, drafter)
    config = json.loads((drafter / "config.json").read_text(encoding="utf-8")) | {"pard_token": mtp["mask_token_id"]}
    write_atomically(drafter / "config.json", json.dumps(config))
    block = {"parallel_drafting": True, "num_speculative_tokens": mtp["k_max"] - 1}
    return {"method": "draft_model", "model": str(drafter), **block}


@dataclass(frozen=True)
class Prompt:
    """A prompt, with the problem's result if it is a word problem."""

    text: str
    result: str | None


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[str]:
    """Run a server, wait until it answers, and yield its address."""
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with (
        log.open("w") as stream,
        subprocess.Popen(
            [*command, "--host=127.0.0.1", f"--port={port}"], stdout=stream, stderr=stream, start_new_session=True
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 900
            while True:
                try:
                    if httpx.get(f"{address}/health").status_code == 200:
                        break
                except httpx.HTTPError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit(f"The server did not start:\n{log.read_text()[-4000:]}") from None
                    time.sleep(1)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


async def ask(client: Any, address: str, prompt: Prompt, max_tokens: int) -> Answer:
    body = {"model": NAME, "prompt": prompt.text, "temperature": 0, "max_tokens": max_tokens}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    sent, first, last, tokens, text = time.perf_counter(), None, 0.0, 0, ""
    async with client.stream("POST", f"{address}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if event["choices"]:
                    last = time.perf_counter()
                    first = last if first is None else first
                    text += event["choices"][0]["text"]
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    assert first is not None
    return Answer(sent, first, last, tokens, None if prompt.result is None else result(text) == prompt.result)


async def load(address: str, prompts: Sequence[Prompt], *, clients: int, max_tokens: int) -> list[Answer]:
    """Send all prompts, with `clients` concurrent requests."""
    import httpx

    free_clients = asyncio.Semaphore(clients)
    async with httpx.AsyncClient(timeout=900) as client:

        async def one(prompt: Prompt) -> Answer:
            async with free_clients:
                return await ask(client, address, prompt, max_tokens)

        return await asyncio.gather(*map(one, prompts))


def counters(address: str) -> tuple[float, float]:
    """Return the number of passes with drafts and of accepted drafts so far; zeros without speculative decoding."""
    import httpx

    lines = httpx.get(f"{address}/metrics").text.splitlines()
    names = [f"vllm:spec_decode_{name}_total{{" for name in ("num_drafts", "num_accepted_tokens")]
    passes, accepted = (sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)) for name in names)
    return passes, accepted


def read_prompts(options: argparse.Namespace) -> list[Prompt]:
    if options.prompts is None:
        return [Prompt(problem.prompt, str(problem.result)) for problem in test_problems(options.requests)]
    return [Prompt(line, None) for line in options.prompts.read_text(encoding="utf-8").splitlines()[: options.requests]]


def measure(folder: Path, options: argparse.Namespace, rows: list[Row]) -> Iterator[Row]:
    """Yield the rows of the folder that are missing in `rows`."""
    prompts = read_prompts(options)
    with tempfile.TemporaryDirectory() as scratch:
        for way, command in commands(folder, options, Path(scratch)).items():
            done = {row.clients for row in rows if (row.model, row.way) == (folder.name, WAYS[way])}
            missing = [clients for clients in options.clients if clients not in done]
            if not missing:
                continue
            with running(command, Path(scratch) / f"{way}.log") as address:
                asyncio.run(load(address, prompts[:8], clients=8, max_tokens=32))  # warm up caches and memory
                for clients in missing:
                    print(f"\r{folder.name}, {WAYS[way]}, {clients} clients".ljust(79), end="", file=sys.stderr, flush=True)
                    passes, accepted = counters(address)
                    answers = asyncio.run(load(address, prompts, clients=clients, max_tokens=options.max_tokens))
                    passes, accepted = (now - before for now, before in zip(counters(address), (passes, accepted), strict=True))
                    yield row(folder.name, way, clients, answers, 1 + accepted / passes if passes else None, rows)
    print(file=sys.stderr)


def row(model: str, way: str, clients: int, answers: list[Answer], tokens_per_pass: float | None, before: Sequence[Row]) -> Row:
    seconds = max(answer.last for answer in answers) - min(answer.sent for answer in answers)
    speed = sum(answer.tokens for answer in answers) / seconds
    same = (one for one in before if (one.model, one.way, one.clients) == (model, WAYS["plain"], clients))
    plain = next((one.tokens_per_s for one in same), speed)
    known = [answer.right for answer in answers if answer.right is not None]
    return Row(
        model=model,
        way=WAYS[way],
        clients=clients,
        accuracy=sum(known) / len(known) if known else None,
        tokens_per_s=speed,
        speed=speed / plain,
        time_to_first_token=statistics.median(answer.first - answer.sent for answer in answers),
        time_per_token=statistics.median((one.last - one.first) / (one.tokens - 1) for one in answers if one.tokens > 1),
        tokens_per_pass=tokens_per_pass,
    )


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    rows, facts = [Row(**values) for values in results["rows"]], results["provenance"]
    lines = [
        "| model | serving | clients | accuracy | tokens/s | vs plain vLLM | first token, ms | ms per token | tokens/pass |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.model} | {row.way} | {row.clients} | {'-' if row.accuracy is None else f'{100 * row.accuracy:.1f}%'} | "
        f"{row.tokens_per_s:,.0f} | {row.speed:.2f}x | {1000 * row.time_to_first_token:,.0f} | "
        f"{_milliseconds(row.time_per_token)} | {'1.00' if row.tokens_per_pass is None else f'{row.tokens_per_pass:.2f}'} |"
        for row in rows
    ]
    versions = f"vLLM {facts['versions']['vllm']}, torch {facts['versions']['torch']}"
    asked = results["asked"]
    threshold = "the model's" if asked["confadapt"] is None else f"{asked['confadapt']:g}"
    setting = f"{asked['requests']} requests, greedy, up to {asked['max_tokens']} tokens, medians over requests; ConfAdapt at "
    lines += ["", f"{setting}{threshold}. {facts['date']}, {facts['hardware']}, {versions}; `{facts['command']}`"]
    return "\n".join(lines) + "\n"


def _milliseconds(seconds: float) -> str:
    """Format a time, or a dash if most answers came in one piece, so that the time between their tokens is unknown."""
    return "-" if seconds < 5e-5 else f"{1000 * seconds:.1f}"


def results_so_far(output: Path | None, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the results so far; without an output file, results with no rows yet.

    Raises:
        SystemExit: the output file is of a run with other options.
    """
    if output is None or not output.is_file():
        facts = run_facts()
        facts["versions"]["vllm"] = installed_version()
        return {"rows": [], "asked": asked, "provenance": facts}
    results: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    if results["asked"] != asked:
        raise SystemExit(f"{output} holds a run with {results['asked']}, not {asked}; delete it, or name another --output.")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of adapted models")
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--requests", type=int, default=128, help="requests for each number of clients (default: 128)")
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--confadapt", type=float, help="threshold of ConfAdapt, not of verified (default: the model's)")
    parser.add_argument("--prompts", type=Path, help="file with one prompt per line (default: the bundled word problems)")
    parser.add_argument("--output", type=Path, help="JSON")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:end])
    options.vllm = sys.argv[end + 1 :]
    check_version()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `running` stops the server
    asked = {name: getattr(options, name) for name in ("requests", "max_tokens", "confadapt", "vllm")}
    results = results_so_far(options.output, asked | {"prompts": options.prompts and options.prompts.name})
    rows = [Row(**values) for values in results["rows"]]
    for folder in options.models:
        for new in measure(folder, options, rows):
            rows.append(new)
            results["rows"] = [asdict(one) for one in rows]
            if options.output is not None:
                write_atomically(options.output, json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
