"""Forbids connections to other machines, in the test run and in every Python process that a test starts.

Python imports this file at startup if its folder is on PYTHONPATH; `conftest.py` puts it there and runs the file itself. An
attempt raises an error. Programs may catch that error, so the attempt is also written to a file, and the test fails in the end.
"""

import os
import sys

LOCAL = {"None", "", "localhost", "::1", "0.0.0.0", "::", os.uname().nodename}


def forbid_network(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):  # not the path of a Unix socket
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else str(host)
    if host in LOCAL or host.startswith("127."):
        return
    message = (
        f"A test tried to reach {host!r}, but tests run offline. Use the local Hub (fixtures `online` and `hub_server` in "
        "tests/conftest.py), or turn off in conftest.py what reports to its makers."
    )
    with open(os.environ["MTP_TESTS_NETWORK"] + "/attempts", "a") as file:  # noqa: PTH123 (pathlib would slow every start)
        file.write(f"{message}\n{' '.join(sys.orig_argv)[:500]}\n")
    raise RuntimeError(message)


sys.addaudithook(forbid_network)
