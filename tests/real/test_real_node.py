"""The SDKs of Node with a real model that speaks other APIs, or its own loosely."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from real.daemon import Daemon

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

NODE = Path(__file__).parent.parent / "node"


@pytest.mark.parametrize("model", ["over-chat", "over-messages", "normalized"])
def test_sdks_of_node(daemon: Daemon, model: str) -> None:
    """Turns, the stream helper, answers that are cut, and the AI SDK's own schema: all hold."""
    node = shutil.which("node")
    if node is None or not (NODE / "node_modules").is_dir():
        pytest.fail(f"node or its packages are missing: run {NODE}/install")
    ran = subprocess.run(  # noqa: S603 - our own program
        [node, str(NODE / "real.mjs")],
        env={
            "PATH": os.environ["PATH"],
            "AIPROXY_URL": f"http://{daemon.listen}/v1",
            "AIPROXY_KEY": daemon.key,
            "AIPROXY_MODEL": model,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    said: dict[str, Any] = json.loads(ran.stdout)
    (before, one), (after, other) = said["turns"]
    assert after > before > 0
    assert min(one, other) > 0
    helper = said["helper"]
    assert helper["text"] == helper["final"] != ""
    assert helper["numbers"] == list(range(len(helper["numbers"])))
    assert said["cut"] == ["incomplete", "max_output_tokens"]
    ai = said["ai"]
    assert min(*ai["texts"], ai["pieces"]) > 0
    assert set(ai["reasons"]) <= {"stop", "length"}
    assert ai["inputs"][1] > ai["inputs"][0]
