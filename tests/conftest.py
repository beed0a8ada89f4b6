"""Fixtures, and settings that libraries read on import: tests download nothing, report nothing and write no shared files.

`no_network/sitecustomize.py` makes sure that no test reaches another machine.
"""

import atexit
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["VLLM_DO_NOT_TRACK"] = "1"
os.environ["VLLM_HOST_IP"] = "127.0.0.1"  # vLLM would look for its address with a socket to a public DNS server
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _private_folder(variable: str) -> None:
    os.environ[variable] = tempfile.mkdtemp(prefix="mtp_trl_tests_")
    atexit.register(shutil.rmtree, os.environ[variable], ignore_errors=True)


# Downloads, data sets and remote code are cached in this folder. Use one per process, since parallel workers would write the
# same files, and a test would find what another run of the tests has left.
_private_folder("HF_HOME")
# DeepSpeed compiles its CPU communication in this folder under a lock file. A run that is killed while compiling leaves the
# lock behind, so in a persistent folder all later runs would wait forever. Workers use the folder of the main process.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _private_folder("TORCH_EXTENSIONS_DIR")

_GUARD = Path(__file__).with_name("no_network")


def _without_network(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a Python process that must not reach other machines."""
    paths = filter(None, [str(_GUARD), environment.get("PYTHONPATH")])
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


_private_folder("MTP_TESTS_NETWORK")  # attempts are written to it
os.environ.update(_without_network(os.environ))
runpy.run_path(str(_GUARD / "sitecustomize.py"))

import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import constants, hf_api  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from mtp_trl.custom_generate import settings  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import tiny_models  # noqa: E402


@pytest.fixture(autouse=True)
def network_attempts() -> Iterator[Path]:
    """Fail a test that tried to reach another machine, even if it caught the error. Return the file that lists the attempts."""
    attempts = Path(os.environ["MTP_TESTS_NETWORK"]) / "attempts"
    yield attempts
    if attempts.exists():
        text = attempts.read_text()
        attempts.unlink()
        pytest.fail(text)


@pytest.fixture(autouse=True)
def same_passes_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not let the clock choose block sizes by default: the number of passes would depend on how busy the machine is."""
    monkeypatch.setattr(settings, "DTYPES_BY_CLOCK", ())


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Return a function that builds a tiny random model: `tiny_model("gemma3")`."""
    return tiny_models.build


@pytest.fixture(scope="session")
def write_student() -> Callable[..., Path]:
    """Return a function that saves an adapted, untrained model: `write_student(folder, confadapt=0.9, verify=False)`.

    It also saves the same weights without a mask token to the folder `base`, if given.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from mtp_trl.modeling.mask_token import add_mask_token, set_decoding_defaults
    from mtp_trl.publishing.repository import write_decoder
    from mtp_trl.word_problems.tokenizer import train_tokenizer

    def write(
        folder: Path,
        *,
        confadapt: float,
        verify: bool,
        base: Path | None = None,
        positions: int = 512,
        chat_template: str | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> Path:
        tokenizer = train_tokenizer(["Tom has 3 pens and buys 4 pens. How many? 3 + 4 = 7 #### 7"] * 3, vocabulary=300)
        tokenizer.chat_template = chat_template
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=positions, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        if base is not None:
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
        add_mask_token(model, tokenizer, k_max=4)
        set_decoding_defaults(model, confadapt=confadapt, verify=verify)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_decoder(folder, model, provenance or {"base_model": "base"})
        return folder

    return write


@pytest.fixture
def run_program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs Python to completion: `run_program(["-m", "accelerate.commands.launch", ...])`.

    After the timeout it kills the program and all its children. `subprocess.run(timeout=...)` would kill only the launcher,
    and then wait for the pipes that its workers still hold open.
    """

    def run(
        arguments: Sequence[object], *, timeout: float = 550, env: Mapping[str, str] = os.environ, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, env=_without_network(env), **streams, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                started = psutil.Process(process.pid)
                for running in [started, *started.children(recursive=True)]:
                    running.kill()
                out, err = process.communicate()
                pytest.fail(f"{command} did not end within {timeout} s\n{out[-2000:]}\n{err[-6000:]}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run


@pytest.fixture
def hub_server() -> Iterator[Any]:
    """A running local Hub, whose repositories the test can read."""
    spec = importlib.util.spec_from_file_location("hub_stub", Path(__file__).parent / "hub_stub.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def online(hub_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Connect this process to the local Hub, with a token that has write access."""
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub_server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", hub_server.url)  # used by module-level functions
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # created with the endpoint of its first use
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    return hub_server
