"""No test reaches another machine, in its own process or in one that it starts."""

import os
import socket

import pytest
from huggingface_hub import create_repo
from transformers.utils.hub import hf_api


@pytest.mark.parametrize("host", ["huggingface.co", "192.0.2.1"])
def test_a_connection_to_another_machine_is_refused(network_attempts, host):
    with pytest.raises(RuntimeError, match=f"A test tried to reach '{host}'"):
        socket.create_connection((host, 443), timeout=1)
    with socket.socket() as connection, pytest.raises(RuntimeError, match=r"'192\.0\.2\.1'.* tests run offline"):
        connection.connect(("192.0.2.1", 443))
    assert network_attempts.read_text().count("A test tried to reach") == 2
    network_attempts.unlink()  # otherwise this test fails


def test_a_local_server_is_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, server.getsockname()[1])).close()


def test_clients_that_an_earlier_test_made_use_the_local_hub(request):
    """transformers keeps its client, and `create_repo` is a method of another, both with the endpoint of the start."""
    assert hf_api().endpoint == create_repo.__self__.endpoint == "https://huggingface.co"
    online = request.getfixturevalue("online")
    assert hf_api().endpoint == create_repo.__self__.endpoint == online.url


def test_a_process_that_catches_the_error_is_noticed(run_program, network_attempts):
    code = "import contextlib, urllib.request as r\nwith contextlib.suppress(Exception): r.urlopen('https://huggingface.co')"
    assert run_program(["-c", code], env={**os.environ, "PYTHONPATH": "elsewhere"}).returncode == 0
    assert "A test tried to reach 'huggingface.co'" in network_attempts.read_text()
    network_attempts.unlink()
