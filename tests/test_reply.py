"""The answer to a client as it is written: when it has ended, and what of it is not sent yet."""

import asyncio
from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp.http import HttpVersion10, HttpVersion11

from aiproxy.reply import Reply


def reply(*, version: Any = HttpVersion11, method: str = "POST", **headers: str) -> tuple[Any, Any]:
    """Make an answer, and the transport that it is written to."""
    transport = Mock(spec=asyncio.Transport)
    transport.is_closing.return_value = False
    request = Mock(version=version, method=method, headers=headers, keep_alive=True)
    request.transport = transport
    return Reply(request), transport


def written(transport: Any) -> bytes:
    """Return what was written."""
    return b"".join(call.args[0] for call in transport.write.call_args_list)


def test_a_whole_answer_has_ended() -> None:
    """It is written at once, and nothing can be added to it: no end, no error."""
    made, transport = reply()
    made.send(200, [("x-a", "b")], b"{}")
    assert (made.started, made.ended, made.bytes_out) == (True, True, 2)
    before = written(transport)
    assert before.startswith(b"HTTP/1.1 200 OK\r\nx-a: b\r\n")
    assert before.endswith(b"\r\nContent-Length: 2\r\n\r\n{}")
    made.end()
    assert written(transport) == before


def test_a_body_in_chunks_ends_once() -> None:
    """Its last chunk is written by `end` alone, and but once."""
    made, transport = reply()
    made.start(200, [])
    made.write(b"")
    made.write(b"data")
    assert not made.ended
    made.end()
    made.end()
    _, body = written(transport).split(b"\r\n\r\n", 1)
    assert (body, made.ended, made.bytes_out) == (b"4\r\ndata\r\n0\r\n\r\n", True, 4)


def test_to_http_1_0_the_end_of_the_connection_is_the_end() -> None:
    """There are no chunks, nothing may follow, and who leaves a body unended drops it."""
    made, transport = reply(version=HttpVersion10)
    made.start(200, [])
    made.write(b"data")
    head, body = written(transport).split(b"\r\n\r\n", 1)
    assert body == b"data"
    assert b"Connection: close" in head
    assert b"Transfer-Encoding" not in head
    assert not made.keep_alive
    made.abandon()
    assert transport.abort.call_count == 1


@pytest.mark.parametrize("name", ["Transfer-Encoding", "Upgrade"])
def test_what_the_parser_takes_wrong_is_the_last_request(name: str) -> None:
    """A request in chunks and one that offers to upgrade end their connection."""
    for headers, keep in (({}, True), ({name: "x"}, False)):
        made, transport = reply(**headers)
        assert made.keep_alive is keep
        made.send(200, [], b"")
        assert (b"Connection: close" in written(transport)) is not keep


def test_what_is_not_sent_without_a_socket_to_ask() -> None:
    """What waits in the process is known all the same; of a client that is gone nothing waits."""
    made, transport = reply()
    transport.get_write_buffer_size.return_value = 7
    transport.get_extra_info.return_value = None
    assert made.unsent() == 7
    transport.get_extra_info.return_value = Mock(fileno=Mock(return_value=-1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiproxy.reply.fcntl.ioctl", Mock(side_effect=OSError))
        assert made.unsent() == 7
    made._request.transport = None
    assert made.unsent() == 0


def test_nothing_follows_what_was_dropped() -> None:
    """The connection is closed at once, with all that waits, and takes no other request."""
    made, transport = reply()
    made.start(200, [])
    made.abort()
    assert transport.abort.called
    assert (made.ended, made.keep_alive) == (True, False)
