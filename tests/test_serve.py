"""`transformers serve FOLDER --trust-remote-code` answers the OpenAI client, in blocks by default, whole and streamed."""

import socket

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_trl import hub
from mtp_trl.evaluation.models import load_student
from mtp_trl.mask_token import add_mask_token
from mtp_trl.word_problems import tokenizer as bundled

# transformers' server and the libraries below it, not ours
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
MESSAGES = [{"role": "user", "content": "How many pens?"}]
TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model whose default is whole blocks, which gives another text than one token per pass."""
    folder = tmp_path_factory.mktemp("served") / "model"
    tokenizer = bundled.train_tokenizer(["Tom has 3 pens and buys 4 pens. How many? 3 + 4 = 7 #### 7"] * 3, vocabulary=300)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    add_mask_token(model, tokenizer, k_max=4)
    hub.set_decoding_defaults(model, confadapt=0.0, verify=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hub.write_decoder(folder, model, {"base_model": "base"})
    return folder


@pytest.fixture(scope="module")
def client(folder):
    """The OpenAI client, over HTTP on loopback."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    from transformers.cli.serve import Serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # what `transformers serve FOLDER --trust-remote-code --device cpu --port PORT` runs
    server = Serve(
        force_model=str(folder),
        trust_remote_code=True,
        device="cpu",
        dtype="float32",
        host="127.0.0.1",
        port=port,
        non_blocking=True,
    )
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=5)
    server.kill_server()


def expected(folder, **options):
    model, tokenizer = load_student(folder)
    ids = tokenizer.apply_chat_template(MESSAGES, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False, **options)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def ask(client, folder, **options):
    return client.chat.completions.create(model=str(folder), messages=MESSAGES, max_tokens=TOKENS, temperature=0, **options)


def test_answers_are_in_blocks_by_default_and_as_a_request_says(client, folder):
    in_blocks, plain = expected(folder), expected(folder, mtp_k=1)
    assert in_blocks != plain
    assert ask(client, folder).choices[0].message.content == in_blocks
    asked = ask(client, folder, extra_body={"generation_config": '{"confadapt": 0.0, "verify": true}'})
    assert asked.choices[0].message.content == plain


def test_streamed_pieces_are_the_answer(client, folder):
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, folder, stream=True) if chunk.choices]
    assert "".join(pieces) == expected(folder)
    assert sum(map(bool, pieces)) > 1
