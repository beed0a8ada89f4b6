"""Options of `mtp-trl eval`, `mtp-trl calibrate` and `mtp-trl generate`.

torch and other slow modules are imported inside functions, so that --help is instant.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..argument_types import (
    Command,
    check_gguf_option,
    gguf_option,
    integers,
    names,
    new_file,
    new_folder,
    positive,
    require,
    task_file,
    thresholds,
    trust_option,
)

if TYPE_CHECKING:
    from .tasks import Task


def declare_eval(parser: argparse.ArgumentParser) -> Command:
    """Measure accuracy against acceleration: decode held-out prompts at k=1, in static blocks and at several thresholds."""
    parser.add_argument("model", help="folder or Hub id of an adapted model")
    _data_options(parser)
    parser.add_argument(
        "--base", metavar="MODEL", help="also decode the base and compare; an adapter-only repository is applied to this base"
    )
    gguf_option(parser)
    parser.add_argument(
        "--thresholds",
        type=thresholds,
        default=[0.9],
        metavar="T,T,...",
        help="ConfAdapt thresholds (default: 0.9); T/T/... by position",
    )
    parser.add_argument(
        "--static", type=integers, default=[], metavar="K,K,...", help="also decode static blocks of these sizes"
    )
    parser.add_argument("--verify", action="store_true", help="also decode each threshold with verification")
    parser.add_argument(
        "--blocks", type=positive, default=1, metavar="N", help="with --verify: also decode with N blocks of masks per pass"
    )
    parser.add_argument("--batch-size", type=positive, default=16, metavar="B")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N")
    parser.add_argument(
        "--output", type=new_folder, metavar="FOLDER", help="write Markdown, JSON, answers and a plot to this folder"
    )
    trust_option(parser)
    harness = parser.add_argument_group(
        "lm-evaluation-harness", "evaluate its tasks instead of --data, with its prompts and stop strings"
    )
    harness.add_argument("--tasks", type=names, metavar="TASK,...", help="gsm8k_cot,ifeval,... (`lm_eval ls tasks` lists all)")
    harness.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="apply the tokenizer's chat template to prompts (default: only for the paper's Llama, as in the paper)",
    )
    harness.add_argument(
        "--task-data",
        type=task_file,
        action="append",
        default=[],
        metavar="TASK=FILE",
        help="use a JSON Lines file as the task's test set",
    )
    harness.add_argument("--include-path", type=Path, metavar="FOLDER", help="folder with additional tasks")

    def command(options: argparse.Namespace) -> int:
        if options.blocks > 1 and not options.verify:
            options.parser.error("--blocks needs --verify: several blocks of masks only provide drafts, which must be verified")
        check_gguf_option(options)
        if options.tasks:
            require("lm_eval", "--tasks", extra="eval")
        from .commands import run_eval, run_tasks

        if options.tasks:
            run_tasks(
                options.model,
                options.tasks,
                base=options.base,
                gguf_file=options.gguf_file,
                ks=options.static,
                thresholds=options.thresholds,
                verify=options.verify,
                blocks=options.blocks,
                batch_size=options.batch_size,
                limit=options.limit,
                chat_template=options.chat_template,
                data=dict(options.task_data),
                tasks_folder=options.include_path,
                output=options.output,
                trust_remote_code=options.trust_remote_code,
            )
            return 0
        run_eval(
            options.model,
            _task(options),
            base=options.base,
            gguf_file=options.gguf_file,
            ks=options.static,
            thresholds=options.thresholds,
            verify=options.verify,
            blocks=options.blocks,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            output=options.output,
            trust_remote_code=options.trust_remote_code,
        )
        return 0

    return command


def declare_calibrate(parser: argparse.ArgumentParser) -> Command:
    """Find the lowest threshold whose loss stays within a bound, with a stated confidence, and make it the default.

    The threshold is for unverified text, so verify=False becomes the folder's default too, also in exact mode.
    """
    parser.add_argument("model", help="folder of an adapted model; its decoding defaults are changed")
    _data_options(parser)
    parser.add_argument(
        "--max-drop", type=float, default=0.01, metavar="D", help="largest allowed loss, as a fraction (default: 0.01)"
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="C",
        help="confidence that the loss stays within the bound (default: 0.95)",
    )
    parser.add_argument("--per-place", action="store_true", help="also search thresholds that differ by position in the block")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="B")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N")

    def command(options: argparse.Namespace) -> int:
        require("scipy", "mtp-trl calibrate", extra="eval")
        from .commands import run_calibrate

        run_calibrate(
            options.model,
            _task(options),
            max_drop=options.max_drop,
            confidence=options.confidence,
            per_place=options.per_place,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
        )
        return 0

    return command


def declare_generate(parser: argparse.ArgumentParser) -> Command:
    """Let a model answer prompts, and write its answers as training data.

    Each row has prompt, completion, finish_reason (length if the answer was cut, else stop) and index (the row in PROMPTS). An
    interrupted run resumes.
    """
    parser.add_argument("model", help="folder or Hub id of a causal LM, adapted or not")
    parser.add_argument(
        "prompts", type=Path, metavar="PROMPTS", help="JSON Lines or Parquet file with a column prompt or messages"
    )
    parser.add_argument("--output", type=new_file, required=True, metavar="FILE", help="JSON Lines file to write")
    parser.add_argument(
        "--prompt-column", metavar="NAME", help="column of prompts, text or messages (default: prompt, else messages)"
    )
    parser.add_argument(
        "--no-chat-template",
        dest="chat_template",
        action="store_false",
        help="do not apply the tokenizer's chat template to prompts that are text",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts")
    parser.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="longest answer (default: 512)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="B", help="rows decoded together (default: 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="sample at this temperature (default: 0, greedy)"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens, P in total (default: 1)")
    parser.add_argument("--seed", type=int, metavar="S", help="seed of the sampling (default: 0)")
    trust_option(parser)

    def command(options: argparse.Namespace) -> int:
        from .answer_file import run_generate
        from .answers import AnswerSettings

        run_generate(
            options.model,
            options.prompts,
            options.output,
            AnswerSettings(
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed,
            ),
            column=options.prompt_column,
            chat_template=options.chat_template,
            limit=options.limit,
            trust_remote_code=options.trust_remote_code,
        )
        return 0

    return command


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="word_problems", help="word_problems (default) or a JSON Lines file")
    parser.add_argument("--prompt-column", default="prompt", metavar="NAME", help="column of prompts (default: prompt)")
    parser.add_argument(
        "--completion-column",
        default="completion",
        metavar="NAME",
        help="column of completions (default: completion); answers are scored if each of them has '#### number'",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N problems")


def _task(options: argparse.Namespace) -> Task:
    from .tasks import load_task

    return load_task(options.data, limit=options.limit, prompt=options.prompt_column, completion=options.completion_column)
