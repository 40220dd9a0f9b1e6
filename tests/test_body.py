"""A body inflated within bounds, and the memory that bodies hold."""

import asyncio
import gzip
import os
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator

import brotli  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy import body
from aiproxy.body import Buffered, Hold
from aiproxy.coding import MAX_MEMBERS
from aiproxy.errors import ProxyError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MiB = 2**20


def _raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


Pack = Callable[[bytes], bytes]

WAYS: dict[str, tuple[str, Pack]] = {
    "gzip": ("gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "deflate without its head": ("deflate", _raw_deflate),
    "br": ("br", lambda data: bytes(brotli.compress(data, quality=4))),
    "zstd": ("zstd", zstd.compress),
}
every_way = pytest.mark.parametrize(("encoding", "pack"), WAYS.values(), ids=WAYS)


def inflate(data: bytes, encoding: str, limit: int) -> bytes:
    """Return the whole body."""
    return b"".join(body.inflate(data, encoding, limit))


def refusal(data: bytes, encoding: str, limit: int = MiB) -> tuple[int, str | None]:
    """Return status and code with which a body is refused."""
    with pytest.raises(ProxyError) as caught:
        inflate(data, encoding, limit)
    return caught.value.status, caught.value.code


@every_way
@given(st.binary(max_size=3000), st.integers(1, 3))
def test_inflate_gives_back_what_was_packed(
    encoding: str, pack: Pack, data: bytes, times: int
) -> None:
    """Of any bytes, packed in any of the ways that clients do."""
    assert inflate(pack(data * times), encoding, MiB) == data * times


@every_way
def test_more_than_one_slice(encoding: str, pack: Pack) -> None:
    """Bodies of several MiB come out whole, those that hardly shrink too."""
    noise = os.urandom(2 * MiB + 17)
    assert inflate(pack(noise), encoding, 3 * MiB) == noise
    assert inflate(pack(b"a" * 3 * MiB), encoding, 3 * MiB) == b"a" * 3 * MiB
    mixed = b"".join(os.urandom(2**14) + b"a" * 2 * MiB for _ in range(8))
    assert inflate(pack(mixed), encoding, 17 * MiB) == mixed


@every_way
@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_truncated_body_does_not_decode(
    encoding: str, pack: Pack, data: bytes, draw: st.DataObject
) -> None:
    """Cut at any place it is 400 invalid_json, never a part of the body."""
    packed = pack(data)
    cut = draw.draw(st.integers(1, len(packed) - 1))
    assert refusal(packed[:cut], encoding) == (400, "invalid_json")


@every_way
def test_the_limit_is_of_what_comes_out(encoding: str, pack: Pack) -> None:
    """Exactly `limit` bytes pass, one more is 413."""
    assert len(inflate(pack(b"a" * 5000), encoding, 5000)) == 5000
    assert refusal(pack(b"a" * 5001), encoding, 5000) == (413, "request_too_large")


@every_way
def test_a_bomb_is_not_unpacked(encoding: str, pack: Pack) -> None:
    """A body that grows a thousandfold is refused after its limit and a slice, not at its end."""
    bomb = pack(bytes(64 * MiB))
    assert len(bomb) < MiB
    tracemalloc.start()
    try:
        assert refusal(bomb, encoding, 2 * MiB) == (413, "request_too_large")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MiB


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
@pytest.mark.parametrize("data", [b'{"a":1}', b"\xff" * 40, b"\x1f\x8b", b"\0", b" "])
def test_what_was_never_packed_does_not_decode(encoding: str, data: bytes) -> None:
    """Plain JSON and noise under a content encoding are 400 invalid_json."""
    assert refusal(data, encoding) == (400, "invalid_json")


@every_way
def test_garbage_after_the_body_does_not_decode(encoding: str, pack: Pack) -> None:
    """What follows the packed body is no part of it, and is refused."""
    assert refusal(pack(b'{"a":1}') + b"garbage", encoding) == (400, "invalid_json")


@pytest.mark.parametrize("way", ["gzip", "zstd"])
def test_several_members_in_a_row(way: str) -> None:
    """A gzip file has members, zstd has frames; they are one body (RFC 1952, RFC 8878)."""
    encoding, pack = WAYS[way]
    assert inflate(pack(b'{"a"') + pack(b":1}"), encoding, 100) == b'{"a":1}'
    assert refusal(pack(b"a" * 60) + pack(b"a" * 60), encoding, 100)[0] == 413


@pytest.mark.parametrize("way", ["gzip", "zstd"])
def test_many_empty_members_come_to_an_end(way: str) -> None:
    """Members that hold nothing are still read once only."""
    encoding, pack = WAYS[way]
    assert inflate(pack(b"") * 2000 + pack(b"x"), encoding, 100) == b"x"
    assert refusal(pack(b"") * MAX_MEMBERS + pack(b"x"), encoding) == (400, "invalid_json")


def code_of(act: Callable[[], object]) -> tuple[int, str | None]:
    """Return status and code of the refusal."""
    with pytest.raises(ProxyError) as caught:
        act()
    return caught.value.status, caught.value.code


def test_memory_is_shared_and_given_back() -> None:
    """All requests together stay below the limit; what one held is free when it releases."""
    shared = Buffered(100)
    one, other = Hold(shared), Hold(shared)
    one.take(60)
    assert code_of(lambda: other.take(41)) == (503, "overloaded")
    other.take(40)
    assert (shared.held, one.size, other.size) == (100, 60, 40)
    one.release()
    one.release()
    assert (shared.held, one.size) == (40, 0)
    other.take(60)
    other.release()
    assert shared.held == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50) | st.none()), max_size=40))
def test_memory_adds_up(steps: list[tuple[int, int | None]]) -> None:
    """Whatever is taken, refused and released, what is held is the sum and never over the limit."""
    shared = Buffered(100)
    holds = [Hold(shared) for _ in range(4)]
    for which, size in steps:
        if size is None:
            holds[which].release()
        else:
            try:
                holds[which].take(size)
            except ProxyError:
                assert shared.held + size > 100
        assert shared.held == sum(hold.size for hold in holds) <= 100


async def test_bodies_are_inflated_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slice at a time, of all bodies: a small one waits for slices, not for a bomb's end."""
    order: list[str] = []
    at_once: list[int] = []
    running = threading.Semaphore(4)

    def inflate(data: bytes, _coding: str, _limit: int) -> Iterator[bytes]:
        for _ in range(8 if data == b"large" else 2):
            with running:
                time.sleep(0.001)  # it works: another that may run now would be seen beside it
                at_once.append(4 - running._value)
                order.append(data.decode())
            yield data

    monkeypatch.setattr(body, "inflate", inflate)
    shared = Buffered(100)
    bodies = [b"large", b"small", b"large"]
    found = await asyncio.gather(*(body._inflated(it, "gzip", Hold(shared), 99) for it in bodies))
    assert found == [b"large" * 8, b"small" * 2, b"large" * 8]
    assert set(at_once) == {1}
    assert order[:6] == ["large", "small", "large"] * 2
