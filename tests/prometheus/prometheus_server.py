"""A real Prometheus on loopback, which scrapes one target each second, and its HTTP API."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from child_rig import free_ports
from invariants import eventually
from queries import ALERTS

BIN = Path(__file__).parent / "bin"
PATIENCE = 30.0  # seconds for what takes Prometheus one or two
SCRAPE = 1  # seconds between two scrapes
JOB = "aiproxy"

Series = list[tuple[dict[str, str], list[float]]]


class Prometheus:
    """The server's API."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def get(self, path: str, **params: str) -> Any:
        """Return the data of an answer, which must be a success without any remark."""
        async with self._session.get(f"{self._url}/api/v1/{path}", params=params) as answer:
            said = json.loads(await answer.read())
        assert said["status"] == "success", (params, said)
        assert not said.get("warnings"), (params, said)
        assert not said.get("infos"), (params, said)
        return said["data"]

    async def instant(self, query: str) -> Series:
        """Ask for the value at this moment."""
        return _series(await self.get("query", query=query))

    async def range(self, query: str, span: int) -> Series:
        """Ask for the values of each second of the last `span` seconds, this moment included."""
        end = time.time()
        found = await self.get(
            "query_range", query=query, start=f"{end - span}", end=f"{end}", step=f"{SCRAPE}"
        )
        return _series(found)

    async def ready(self) -> None:
        """Assert that it serves."""
        try:
            async with self._session.get(f"{self._url}/-/ready") as answer:
                assert answer.status == 200
        except aiohttp.ClientConnectionError as error:
            raise AssertionError("it does not listen yet") from error


def _series(data: Mapping[str, Any]) -> Series:
    """Read an instant or a range vector; what is no number is left out."""
    found: Series = []
    for each in data["result"]:
        pairs = each["values"] if data["resultType"] == "matrix" else [each["value"]]
        values = [float(text) for _, text in pairs]
        found.append((each["metric"], [it for it in values if not math.isnan(it)]))
    return found


@asynccontextmanager
async def prometheus(folder: Path, target: int) -> AsyncIterator[Prometheus]:
    """Run the server in an empty folder, with the alerts, before a target's port on loopback."""
    config = {
        "global": {"scrape_interval": f"{SCRAPE}s", "evaluation_interval": f"{SCRAPE}s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [
            {"job_name": JOB, "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
        ],
    }
    file, log = folder / "prometheus.yml", folder / "prometheus.log"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    port = free_ports()[0]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            str(BIN / "prometheus"),
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        async with aiohttp.ClientSession() as session:
            server = Prometheus(f"http://127.0.0.1:{port}", session)
            await eventually(server.ready, PATIENCE)
            yield server
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
