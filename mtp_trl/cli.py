"""The console script `mtp-trl`. A subcommand is one function that declares its options and returns what to call."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    from .evaluation.sweep import Threshold
    from .evaluation.tasks import Task

# Imports of torch, transformers and the like stay inside the commands, so that --help is instant.
Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mtp-trl", description="Multi-token prediction by online self-distillation.")
    parser.add_argument("--version", action="version", version=f"mtp-trl {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for name, declare in COMMANDS.items():
        description = (declare.__doc__ or "").strip()
        subparser = subparsers.add_parser(name, help=description.splitlines()[0], description=description, allow_abbrev=False)
        subparser.set_defaults(command=declare(subparser), parser=subparser)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(f"there is no command {arguments[0]!r}{_like(arguments[0], COMMANDS)}; `mtp-trl --help` lists them")
    options, unknown = parser.parse_known_args(arguments)
    if "command" not in options:
        parser.print_help(sys.stderr)
        return 2
    if unknown and "overrides" not in options:
        known = [option for action in options.parser._actions for option in action.option_strings]
        guess = _like(unknown[0].partition("=")[0], known) if unknown[0].startswith("-") else ""
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{guess}")
    options.overrides = unknown
    command: Command = options.command
    try:
        return command(options)
    except (ValueError, OSError) as error:  # what the user can mend; the rest is ours and keeps its traceback
        print(f"mtp-trl: {error}", file=sys.stderr)
        return 2


def _like(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _train(parser: argparse.ArgumentParser) -> Command:
    """Train as a recipe says, on the devices of one process (`accelerate launch` for more)."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the recipe")
    parser.epilog = "Any other option is a recipe key with another value: --max_steps 10."
    parser.set_defaults(overrides=[])

    def command(options: argparse.Namespace) -> int:
        from .launch import main as launch

        return launch(options.config, options.overrides)

    return command


def _estimate(parser: argparse.ArgumentParser) -> Command:
    """Say how much GPU memory a recipe takes, before anything but the model's config is read."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument(
        "--gpus", type=_positive, default=1, metavar="N", help="processes that share the ZeRO shards (default: 1)"
    )
    parser.add_argument("--memory", type=float, default=80, metavar="GIB", help="of each GPU (default: 80)")
    parser.epilog = "Any other option is a recipe key with another value. The exit status is 1 when it does not fit."
    parser.set_defaults(overrides=[])

    def command(options: argparse.Namespace) -> int:
        from .estimate import run_estimate

        fits = run_estimate(options.recipe, options.overrides, processes=options.gpus, memory=options.memory)
        return 0 if fits else 1

    return command


def _env(parser: argparse.ArgumentParser) -> Command:
    """Print versions and hardware, for bug reports."""

    def command(options: argparse.Namespace) -> int:
        from .hub import run_facts

        facts = run_facts()
        for name, value in {**facts["versions"], "hardware": facts["hardware"], "platform": sys.platform}.items():
            print(f"{name}: {value}")
        return 0

    return command


def _demo(parser: argparse.ArgumentParser) -> Command:
    """Adapt the bundled model live, evaluate it, show one answer: under 8 minutes on 2 CPU cores."""
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="recipes/tiny_exact.yaml (default), recipes/tiny.yaml, or one like them"
    )

    def command(options: argparse.Namespace) -> int:
        from .evaluation.demo import RECIPE, run_demo

        run_demo(recipe=options.recipe or RECIPE)
        return 0

    return command


def _eval(parser: argparse.ArgumentParser) -> Command:
    """Accuracy against acceleration: decode held-out prompts at k=1, in blocks and at several thresholds."""
    parser.add_argument("model", help="folder or Hub id of an adapted model")
    _data_options(parser)
    parser.add_argument(
        "--base", metavar="MODEL", help="also decode the model before adaptation, which an adapter alone acts on, and compare"
    )
    parser.add_argument(
        "--thresholds", type=_thresholds, default=[0.9], metavar="T,T,...", help="ConfAdapt (default: 0.9); T/T/... by place"
    )
    parser.add_argument("--static", type=_integers, default=[], metavar="K,K,...", help="static blocks as well")
    parser.add_argument("--verify", action="store_true", help="the thresholds verified as well")
    parser.add_argument(
        "--blocks", type=_positive, default=1, metavar="N", help="with --verify: also with N blocks of masks a pass"
    )
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="B")
    parser.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N")
    parser.add_argument("--output", type=_new_folder, metavar="FOLDER", help="write Markdown, JSON, answers and plot there")
    harness = parser.add_argument_group("lm-evaluation-harness", "its tasks in place of --data, with its prompts and stops")
    harness.add_argument("--tasks", type=_names, metavar="TASK,...", help="gsm8k_cot,ifeval,... (`lm_eval ls tasks`)")
    harness.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="put prompts through the tokenizer's chat template (default: as the paper, for its Llama and no other)",
    )
    harness.add_argument(
        "--task-data",
        type=_task_file,
        action="append",
        default=[],
        metavar="TASK=FILE",
        help="JSON Lines as the test set",
    )
    harness.add_argument("--include-path", type=Path, metavar="FOLDER", help="tasks of your own")

    def command(options: argparse.Namespace) -> int:
        if options.blocks > 1 and not options.verify:
            options.parser.error("--blocks needs --verify: several blocks are drafts of the text that is then verified")
        if options.tasks:
            _require("lm_eval", "--tasks", extra="eval")
        from .evaluation.commands import run_eval, run_tasks

        if options.tasks:
            run_tasks(
                options.model,
                options.tasks,
                base=options.base,
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
            )
            return 0
        run_eval(
            options.model,
            _task(options),
            base=options.base,
            ks=options.static,
            thresholds=options.thresholds,
            verify=options.verify,
            blocks=options.blocks,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            output=options.output,
        )
        return 0

    return command


def _calibrate(parser: argparse.ArgumentParser) -> Command:
    """Find the lowest threshold that keeps a bound on the loss, with a stated confidence, and make it the default.

    It is a threshold for unverified text: verify=False becomes the folder's default too, also in exact mode.
    """
    parser.add_argument("model", help="folder of an adapted model; its defaults are changed")
    _data_options(parser)
    parser.add_argument("--max-drop", type=float, default=0.01, metavar="D", help="loss allowed, a share (default: 0.01)")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="C", help="default: 0.95")
    parser.add_argument("--per-place", action="store_true", help="also search thresholds that differ by place in the block")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="B")
    parser.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N")

    def command(options: argparse.Namespace) -> int:
        _require("scipy", "The test of a threshold", extra="eval")
        from .evaluation.commands import run_calibrate

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


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="word_problems", help="word_problems (default) or a JSON Lines file")
    parser.add_argument("--prompt-column", default="prompt", metavar="NAME", help="in the file (default: prompt)")
    parser.add_argument(
        "--completion-column", default="completion", metavar="NAME", help="scored where it ends in '#### number'"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N problems")


def _task(options: argparse.Namespace) -> "Task":
    from .evaluation.tasks import load_task

    return load_task(options.data, limit=options.limit, prompt=options.prompt_column, completion=options.completion_column)


def _show(parser: argparse.ArgumentParser) -> Command:
    """Answer a prompt in the terminal, with a colour for each forward pass."""
    parser.add_argument("model", help="folder or Hub id of an adapted model")
    parser.add_argument("prompt", help="text to complete, as it stands")
    parser.add_argument("--base", metavar="MODEL", help="what an adapter alone acts on (default: the one it names)")
    parser.add_argument(
        "--confadapt", type=_threshold, metavar="T", help="threshold, or T/T/... by place (default: the model's)"
    )
    parser.add_argument("--k", type=_block, metavar="K", help="largest block, or auto (default: the model's)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="return exactly the model's own text (default: the model's)",
    )
    parser.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N")
    parser.add_argument("--html", type=_new_file, metavar="FILE", help="write the coloured answer there too")

    def command(options: argparse.Namespace) -> int:
        from .evaluation.commands import run_show

        run_show(
            options.model,
            options.prompt,
            base=options.base,
            confadapt=options.confadapt,
            mtp_k=options.k,
            verify=options.verify,
            max_new_tokens=options.max_new_tokens,
            html=options.html,
        )
        return 0

    return command


def _serve(parser: argparse.ArgumentParser) -> Command:
    """Serve an adapted model with vLLM's OpenAI server, several tokens per forward pass."""
    parser.add_argument("model", help="folder or Hub id of an adapted model")
    parser.add_argument(
        "--confadapt", type=_threshold, metavar="T", help="threshold, or T/T/... by place (default: the model's)"
    )
    parser.add_argument("--k", type=int, metavar="K", help="largest block (default: the model's)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="return exactly the model's own text (default: the model's, else yes)",
    )
    parser.add_argument("--adapter", metavar="REPO", help="exact mode: an adapter published alone, for the base named as model")
    parser.add_argument("--fixed-width", action="store_true", help="draft as many tokens in every pass (full CUDA graphs)")
    parser.epilog = "Any other option is vLLM's: --port 8001 --max-model-len 4096. A request may carry its own values."
    parser.set_defaults(overrides=[])

    def command(options: argparse.Namespace) -> int:
        from .serving.vllm.serve import run_serve

        return run_serve(
            options.model,
            options.overrides,
            confadapt=options.confadapt,
            mtp_k=options.k,
            verify=options.verify,
            adapter=options.adapter,
            fixed_width=options.fixed_width or None,
        )

    return command


def _app(parser: argparse.ArgumentParser) -> Command:
    """A page in the browser: threshold, verification, plain decoding beside it, the ratio of speeds (needs mtp-trl[app])."""
    parser.add_argument("model", help="folder or Hub id of an adapted model")
    parser.add_argument("--base", metavar="MODEL", help="what an adapter alone acts on (default: the one it names)")
    parser.add_argument("--port", type=int, metavar="N", help="on loopback (default: the first free one from 7860)")

    def command(options: argparse.Namespace) -> int:
        _require("gradio", "The page", extra="app")
        from .evaluation.app import run_app

        run_app(options.model, base=options.base, port=options.port)
        return 0

    return command


def _push(parser: argparse.ArgumentParser) -> Command:
    """Upload an adapted model to the Hub in one commit, with its decoder, defaults, provenance and card."""
    parser.add_argument("folder", type=Path, help="where a run saved its model, or one of its checkpoints")
    parser.add_argument("repository", help="you/name; made if it is not there")
    _publishing_options(parser)
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    parser.add_argument("--revision", metavar="BRANCH", help="a branch (default: main)")
    parser.add_argument("--message", default="Upload model", help="of the commit")

    def command(options: argparse.Namespace) -> int:
        from .publish import push

        commit = push(
            options.folder,
            options.repository,
            private=options.private,
            revision=options.revision,
            commit_message=options.message,
            adapter_only=options.adapter_only,
            results=options.results,
        )
        print(commit)
        return 0

    return command


def _export(parser: argparse.ArgumentParser) -> Command:
    """Write what `push` would upload into a new folder."""
    parser.add_argument("folder", type=Path, help="where a run saved its model, or one of its checkpoints")
    parser.add_argument("output", type=Path, help="the folder to make")
    _publishing_options(parser)
    parser.add_argument("--repository", metavar="NAME", help="what the card tells readers to load")

    def command(options: argparse.Namespace) -> int:
        from .publish import export

        print(
            export(
                options.folder,
                options.output,
                repo_id=options.repository,
                adapter_only=options.adapter_only,
                results=options.results,
            )
        )
        return 0

    return command


def _publishing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter-only", action="store_true", help="the adapter of exact mode, or the LoRA, without the base's weights"
    )
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="FILE", help="results.json of `mtp-trl eval`, for the card"
    )


def _require(package: str, what: str, *, extra: str) -> None:
    """Raises ValueError where a package of an extra is missing, before any work is done."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ValueError(f"{what} needs {package}, which is not installed; pip install 'mtp-trl[{extra}]'.")


def _block(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _thresholds(text: str) -> list["Threshold"]:
    return [_threshold(part) for part in text.split(",")]


def _threshold(text: str) -> "Threshold":
    try:
        places = tuple(float(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability, such as 0.9, or several by place, 0.99/0.9") from None
    return places if len(places) > 1 else places[0]


def _names(text: str) -> list[str]:
    return text.split(",")


def _task_file(text: str) -> tuple[str, Path]:
    task, equals, path = text.partition("=")
    if not equals or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=FILE with a file that is there")
    return task, Path(path)


def _integers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _new_folder(text: str) -> Path:
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, and a folder is needed")
    return Path(text)


def _new_file(text: str) -> Path:
    if Path(text).is_dir() or not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no place for a file: its folder must be there")
    return Path(text)


COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Command]] = {
    "demo": _demo,
    "train": _train,
    "estimate": _estimate,
    "eval": _eval,
    "calibrate": _calibrate,
    "show": _show,
    "serve": _serve,
    "app": _app,
    "export": _export,
    "push": _push,
    "env": _env,
}


if __name__ == "__main__":
    sys.exit(main())
