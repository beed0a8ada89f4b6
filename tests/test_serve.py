"""`transformers serve FOLDER --trust-remote-code` answers the OpenAI client in blocks by default, streamed or not."""

import socket
import subprocess
import sys
import time

import pytest

from mtp_trl.evaluation.loading import load_student

# These warnings come from transformers' server and its dependencies.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
MESSAGES = [{"role": "user", "content": "How many pens?"}]
TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_student):
    """A random model that accepts whole blocks by default, so that its text differs from one-token-per-pass decoding."""
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    folder = tmp_path_factory.mktemp("served") / "model"
    return write_student(folder, confadapt=0.0, verify=False, chat_template=template)


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    """An OpenAI client of the command, which runs in a separate process and listens on loopback."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--trust-remote-code", "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), *options]
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with log.open("w") as stream, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream) as server:
        try:
            wait_until_it_listens(port, server, log)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=5)
        finally:
            server.kill()


def wait_until_it_listens(port, server, log, *, seconds=300):
    for _ in range(10 * seconds):
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f"transformers serve does not listen:\n{log.read_text()[-3000:]}")


def expected(folder, **options):
    model, tokenizer = load_student(folder)
    ids = tokenizer.apply_chat_template(MESSAGES, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False, **options)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def ask(client, folder, **options):
    return client.chat.completions.create(model=str(folder), messages=MESSAGES, max_tokens=TOKENS, temperature=0, **options)


def test_answers_use_blocks_by_default_and_the_requests_own_settings(client, folder):
    in_blocks, plain = expected(folder), expected(folder, mtp_k=1)
    assert in_blocks != plain
    assert ask(client, folder).choices[0].message.content == in_blocks
    verified = ask(client, folder, extra_body={"generation_config": '{"confadapt": 0.0, "verify": true}'})
    assert verified.choices[0].message.content == plain


def test_streamed_pieces_add_up_to_the_answer(client, folder):
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, folder, stream=True) if chunk.choices]
    assert "".join(pieces) == expected(folder)
    assert sum(map(bool, pieces)) > 1
