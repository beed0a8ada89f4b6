"""Which architectures are supported? Builds a tiny random model of every model type that transformers lists as a causal LM,
decodes with it and trains it. Writes the table of docs/architectures.md.

Each type is checked in a separate process with a time limit, so that a check that hangs or crashes does not stop the others.
Results are written after each type, and a second run resumes after the last one.

    python benchmarks/architectures.py --output docs/results/architectures.json
    python benchmarks/architectures.py --only llama,mamba2
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import multiprocessing
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from tiny_models import BARRED, EOS, MASK, PAD, build
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mtp_trl.custom_generate.choice import accept_confident_prefix
from mtp_trl.custom_generate.generate import generate
from mtp_trl.modeling.checks import can_pack, check_output_logits
from mtp_trl.modeling.exact import add_gated_adapter
from mtp_trl.modeling.files import write_atomically
from mtp_trl.modeling.logits import output_logits
from mtp_trl.publishing.provenance import run_facts
from mtp_trl.training.config import MTPDistillConfig
from mtp_trl.training.readers import ExactReader, WholeRowReader, read_rows
from mtp_trl.training.regions import row_generator, sample_regions
from mtp_trl.training.step import Batch, Tokens, build_layout, distillation_pass

K, THRESHOLD, NEW, STEPS, LENGTH = 4, 0.3, 16, 10, 12
TOKENS = Tokens(mask_id=MASK, pad_id=PAD, barred=torch.tensor(BARRED), eos=torch.tensor([EOS]))
LARGEST_GAP = 1e-3  # between the logits of a layout and of separate passes, with standard deviation 3, in float32
RIGHT = "right"


# --- decoding ---------------------------------------------------------------------------------------------------------


def prompts() -> list[list[int]]:
    """Return random prompts of 9, 6, 4 and 1 tokens."""
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(2, MASK, (length,), generator=rng).tolist() for length in (9, 6, 4, 1)]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = [[PAD] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def answers(sequences: Tensor, rows: list[list[int]]) -> list[list[int]]:
    """Return the generated tokens of each row, up to and including EOS."""
    generated = sequences[:, max(map(len, rows)) :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in generated]


def greedy(model: PreTrainedModel, rows: list[list[int]]) -> list[list[int]]:
    """Decode with transformers' own greedy decoding."""
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": list(BARRED)}
    return answers(GenerationMixin.generate(model, **padded(rows), **options), rows)


@torch.no_grad()
def naive(model: PreTrainedModel, prompt: list[int], *, k: int) -> list[int]:
    """Decode one prompt in blocks, with passes over the whole text, no padding and no cache; k=1 is greedy decoding."""
    ids = list(prompt)
    while len(ids) - len(prompt) < NEW:
        input_ids = torch.tensor([ids + [MASK] * (k - 1)])
        mask = torch.ones_like(input_ids)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[0, -k:].float()
        logits[:, list(BARRED)] = -torch.inf
        probabilities, block = logits.softmax(-1).max(-1)
        for token in block[: accept_confident_prefix(probabilities[None], threshold=THRESHOLD)].tolist():
            ids.append(token)
            if token == EOS or len(ids) - len(prompt) == NEW:
                return ids[len(prompt) :]
    return ids[len(prompt) :]


def ours(model: PreTrainedModel, rows: list[list[int]], *, verify: bool) -> tuple[list[list[int]], str]:
    """Decode with this project's `generate`; return the texts, and whether it used a cache ("cached" or "uncached")."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"mtp_k": K, "confadapt": THRESHOLD, "max_new_tokens": NEW, "do_sample": False}
        sequences = generate(**padded(rows), model=model, verify=verify, **options)
    slow = any("without a cache" in str(warning.message) for warning in caught)
    assert isinstance(sequences, Tensor)
    return answers(sequences, rows), "uncached" if slow else "cached"


class Case:
    """A model, its prompts and its reference texts, each of which is decoded at most once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.rows = model, prompts()

    @cached_property
    def uncached(self) -> list[list[int]]:
        return [naive(self.model, row, k=1) for row in self.rows]

    @cached_property
    def single(self) -> list[list[int]] | str:
        return answer_of(lambda: [greedy(self.model, [row])[0] for row in self.rows])

    @cached_property
    def batched(self) -> list[list[int]] | str:
        return answer_of(lambda: greedy(self.model, self.rows))


def answer_of(decode: Callable[[], list[list[int]]]) -> list[list[int]] | str:
    """Return the texts that transformers decodes, or the reason why it fails."""
    try:
        return decode()
    except Exception as error:
        return reason(error)


def check_upstream(case: Case) -> dict[str, str]:
    """Check transformers itself: cached against uncached decoding, and rows of a padded batch against single rows."""
    for texts in (case.single, case.batched):
        if isinstance(texts, str):
            return {"upstream": f"its own cached decoding {texts}"}
    if case.single != case.uncached:
        return {"upstream": "its own cached decoding differs from its uncached"}
    if case.batched != case.single:
        return {"upstream": "its own padded batch differs from single rows"}
    return {"upstream": RIGHT}


def check_verified(case: Case) -> dict[str, str]:
    """Check that verified text is greedy text."""
    texts, cache = ours(case.model, case.rows, verify=True)
    if texts == case.uncached:
        return {"cache": cache, "verified": RIGHT}
    same = texts in (case.single, case.batched)
    return {"cache": cache, "verified": "as transformers with its cache" if same else "wrong"}


def check_blocks(case: Case) -> dict[str, str]:
    """Check that unverified blocks are those of passes over the whole text."""
    texts, _ = ours(case.model, case.rows, verify=False)
    return {"blocks": RIGHT if texts == [naive(case.model, row, k=K) for row in case.rows] else "wrong"}


# --- training ---------------------------------------------------------------------------------------------------------


def batch() -> Batch:
    generators = [row_generator(0, 0, row) for row in range(2)]
    clean = torch.randint(3, MASK, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    regions = sample_regions([3] * 2, [LENGTH - 2] * 2, k_min=2, k_max=K, slots=8, generators=generators)
    return Batch(clean, torch.full((2,), 4), torch.full((2,), LENGTH), regions)


def settings() -> MTPDistillConfig:
    return MTPDistillConfig(tempfile.gettempdir(), k_max=K, slots_per_row=8, use_cpu=True, bf16=False, report_to="none")


@torch.no_grad()
def largest_gap(model: PreTrainedModel) -> float:
    """Return the largest difference between the logits read from a layout and those of one forward pass per region."""
    texts, args = batch(), settings()
    layout = build_layout(model, texts, TOKENS, args)
    hidden = read_rows(model, layout, layout.ids_XT)
    logits = output_logits(model, hidden[layout.read_BRK.flatten()]).view(*layout.read_BRK.shape, -1)
    gap = 0.0
    for row, region in (texts.regions.size_BR > 0).nonzero().tolist():
        anchor, size = int(texts.regions.anchor_BR[row, region]), int(texts.regions.size_BR[row, region])
        ids = torch.cat([texts.clean_BN[row, : anchor + 1], torch.full((size - 1,), MASK)])
        expected = model(input_ids=ids[None], use_cache=False).logits[0, anchor:]
        gap = max(gap, (expected - logits[row, region, :size]).abs().max().item())
    return gap


def train(model: PreTrainedModel, *, exact: bool) -> tuple[str, PreTrainedModel]:
    """Train a copy on one batch for `STEPS` steps; return whether the loss falls, and the copy.

    If it does not, try again with a smaller learning rate, because the target changes with the student's blocks.
    """
    for learning_rate in (1e-2, 1e-3) if exact else (1e-3, 1e-4):
        trained = copy.deepcopy(model)
        found = _train(trained, exact=exact, learning_rate=learning_rate)
        if found == RIGHT:
            break
    return found, trained


def _train(model: PreTrainedModel, *, exact: bool, learning_rate: float) -> str:
    if exact:
        add_gated_adapter(model, rank=8, alpha=16)
        reader: Any = ExactReader(model, with_teacher=True)
    else:
        teacher = copy.deepcopy(model).requires_grad_(False)
        reader = WholeRowReader(model, teacher, torch.no_grad()(lambda read: read(teacher)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(STEPS):
        output = distillation_pass(reader, batch(), TOKENS, settings(), objective="hard")
        loss = output.loss / output.weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not all(torch.isfinite(torch.tensor(losses))):
        return "the loss is not finite"
    return RIGHT if losses[-1] < losses[0] else f"the loss does not fall ({losses[0]:.2f} to {losses[-1]:.2f})"


def check_training(case: Case) -> dict[str, str]:
    """Check full fine-tuning."""
    model = case.model
    layout = "packed" if can_pack(model) else "suffix"
    check_output_logits(model)
    if (gap := largest_gap(model)) > LARGEST_GAP:
        return {"layout": layout, "training": f"its logits are off by {gap:.2g}"}
    return {"layout": layout, "training": train(model, exact=False)[0]}


def check_exact(case: Case) -> dict[str, str]:
    """Check exact mode: the loss falls, and the verified text is still the base's."""
    check_output_logits(case.model)
    before, _ = ours(case.model, case.rows, verify=True)
    found, trained = train(case.model, exact=True)
    after, _ = ours(trained, case.rows, verify=True)
    return {"exact": found if after == before else "wrong"}


# --- a row for each model type ----------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Case], dict[str, str]]] = {
    "upstream": check_upstream,
    "verified": check_verified,
    "blocks": check_blocks,
    "training": check_training,
    "exact": check_exact,
}


def text_decoder(model_type: str) -> str | None:
    """Return the model type of a composite config's text decoder, which has its own row; None for other configs."""
    parts = getattr(CONFIG_MAPPING[model_type], "sub_configs", None) or {}
    if "text_config" not in parts:
        return None
    decoder = str(CONFIG_MAPPING[model_type]().get_text_config(decoder=True).model_type)
    return decoder if decoder in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def reason(error: BaseException) -> str:
    """Return one line about the error: "refused" if this package raised it as a ValueError, else "fails"."""
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    refused = isinstance(error, ValueError) and "mtp_trl" in Path(file).parts
    line = " ".join(str(error).split())
    return f"{'refused' if refused else 'fails'}: {line if refused else f'{type(error).__name__}: {line}'}"[:300]


def check(model_type: str) -> Iterator[dict[str, str]]:
    """Yield the results of the checks, one column after the other."""
    try:
        decoder = text_decoder(model_type)
        if decoder is not None and decoder != model_type:
            yield {"built": f"see {decoder}"}
            return
        case = Case(build(model_type, context=0.6))
    except Exception as error:
        yield {"built": reason(error)}
        return
    yield {"built": RIGHT}
    case.model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS)  # forces no token
    for column, checked in COLUMNS.items():
        try:
            yield checked(case)
        except Exception as error:
            if os.environ.get("SHOW_TRACEBACKS"):
                traceback.print_exc()
            yield {column: reason(error)}


def _work(model_type: str, pipe: Connection) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for found in check(model_type):
        pipe.send(found)
    pipe.send(None)


@contextmanager
def _process(model_type: str) -> Iterator[tuple[Any, Connection]]:
    context = multiprocessing.get_context("fork")  # so that libraries are imported only once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(model_type, sender))
    process.start()
    sender.close()
    try:
        yield process, receiver
    finally:
        process.kill()
        process.join()


def row_of(model_type: str, *, seconds: float) -> dict[str, str]:
    """Check a model type in a separate process; return the results up to the first check that hangs or crashes."""
    row = {"type": model_type}
    with _process(model_type) as (_, receiver):
        while True:
            column = next((name for name in ("built", *COLUMNS) if name not in row), "exact")
            try:
                if not receiver.poll(seconds):
                    row[column] = f"fails: not finished within {seconds:g} s"
                    return row
                found = receiver.recv()
            except EOFError:
                row[column] = "fails: the process ended"
                return row
            if found is None:
                return row
            row |= found


# --- the table --------------------------------------------------------------------------------------------------------


def short(found: str, name: str) -> str:
    """Remove what differs between models with the same result: the class's name, numbers, and the remedy after the reason."""
    found = re.sub(
        r"(?<!returns)(?<!returns ) ?\((?:largest|\d)[^)]*\)|\(?\[\d[^]]*\]\)?", "", found.replace(name, "the model")
    ).partition(";")[0]
    return found.replace("|", "\\|").strip().rstrip(".")


def cells(row: dict[str, str]) -> tuple[str, ...]:
    """Return the cells of a model type: decoding, training, exact mode and transformers itself."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[row["type"]]
    if row["built"] != RIGHT:
        return (f"not built: {short(row['built'], name)}", "-", "-", "-")
    decoding = short(row["verified"], name)
    if row.get("blocks") != row["verified"]:
        decoding += f"; blocks: {short(row.get('blocks', '-'), name)}"
    if row.get("cache") == "uncached":
        decoding += ", without a cache"
    training = short(row.get("training", "-"), name)
    if row.get("layout") == "suffix":
        training += ", a row per region"
    upstream = short(row["upstream"], name)
    return decoding, training, short(row.get("exact", "-"), name), "" if upstream == RIGHT else upstream


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table, in which model types with the same cells share a line."""
    parts = {row["type"]: row["built"][4:] for row in results["rows"] if row["built"].startswith("see ")}
    rows = [row for row in results["rows"] if row["type"] not in parts]
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        groups.setdefault(cells(row), []).append(row["type"])
    built = [row for row in rows if row["built"] == RIGHT]
    counts = [sum(row.get(column) == RIGHT for row in built) for column in ("verified", "training", "exact")]
    counted = f"Of {len(rows)} model types, {len(built)} could be built. Of these, {counts[0]} decode verified text correctly, "
    counted += f"{counts[1]} train with full fine-tuning, and {counts[2]} train in exact mode."
    lines = [
        counted,
        "",
        "| model types | decoding | training | exact mode | transformers itself |",
        "| --- | --- | --- | --- | --- |",
    ]
    for found, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {' | '.join(found)} |")
    several = ", ".join(f"`{name}` (`{part}`)" for name, part in parts.items())
    if several:
        lines += ["", f"These types combine several models; look up their text decoder (in parentheses): {several}."]
    facts = results["provenance"]
    versions = f"torch {facts['versions']['torch']}, transformers {facts['versions']['transformers']}"
    lines += ["", f"{facts['date']}, {facts['hardware']}, {versions}; `{facts['command']}`"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), help="model types to check, separated by commas")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of each check (default: 60)")
    parser.add_argument("--output", type=Path, help="JSON; model types in it are checked again only if --only names them")
    options = parser.parse_args()
    known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if unknown := sorted(set(options.only or []) - set(known)):
        parser.error(f"{', '.join(unknown)}: transformers has no causal LM of this type.")
    rows: dict[str, dict[str, str]] = {}
    if options.output is not None and options.output.exists():
        rows = {row["type"]: row for row in json.loads(options.output.read_text(encoding="utf-8"))["rows"]}
    torch.set_num_threads(1)  # the checks run in forked processes
    for model_type in track(options.only or [name for name in known if name not in rows], "Architectures"):
        rows[model_type] = row_of(model_type, seconds=options.seconds)
        results = {"rows": [rows[name] for name in known if name in rows], "provenance": run_facts()}
        if options.output is None:
            print(json.dumps(rows[model_type], indent=2), flush=True)
        else:
            write_atomically(options.output, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
