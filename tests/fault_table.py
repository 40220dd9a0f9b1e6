"""The table of faults: what goes wrong, what the client sees, what is charged.

A row either says how its fault is made, and `test_faults` runs it as it stands here, or names the
tests that make it with machinery of their own. `python tests/fault_table.py` prints all of it.

What the client sees:

- `whole`: all that the upstream sent, byte for byte.
- `failed CODE`: the whole events that came, then `response.failed` (chat: an error frame; messages:
  an `error` event) with CODE in its message, as the last thing of a body that ends properly.
- `STATUS CODE`: an error of ours. `STATUS as it came`: the upstream's own.
- `cut`: the connection is gone. `-`: nothing, the client itself is gone. `lost`: what we send.

What is charged: `nothing`; the `input`; the input and what was `delivered`, of a client that left
at least that; an `estimate`, which is above 0; the upstream's own `usage`.
"""
# ruff: noqa: T201 - a program for a terminal prints

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from answers import USAGE
from fault_moves import (
    Check,
    Client,
    a_connection_is_pooled,
    asked_once,
    asked_twice,
    is_cut_off,
    it_beats,
    leaves_after_all,
    leaves_after_text,
    leaves_at_once,
    patience_is_passed_on,
    pooled_connections_are_closed,
    reads,
    reads_slowly,
    slot_is_free_a_second_after,
    slot_is_held,
    stops_reading,
    upstream_is_let_go,
    within_connect,
)
from faults import FIRST_DELTA, STREAMED, Api, Charge, Script, events_of, json_of
from steps import (
    SSE_HEADERS,
    Chunk,
    EndChunks,
    Finish,
    Garbage,
    Headers,
    Repeat,
    Reset,
    Send,
    Sleep,
    Stall,
    Step,
    error_answer,
    json_answer,
    rechunk,
)

# What upstreams do: a step, or a part of an answer in the API that was asked for.

Part = Callable[[Api, bool], Script]


def head(_api: Api, streamed: bool) -> Script:  # noqa: FBT001 - as all parts
    """Send the head of an answer whose body comes in chunks."""
    kind = "text/event-stream" if streamed else "application/json"
    return [Headers(200, [("content-type", kind), SSE_HEADERS[1]])]


def begun(api: Api, streamed: bool) -> Script:  # noqa: FBT001
    """Send a stream up to its first text, or half of a JSON answer."""
    if streamed:
        return [*head(api, True), *map(Chunk, events_of(api)[: FIRST_DELTA[api]])]
    answer = json.dumps(json_of(api)).encode()
    return [*head(api, False), Chunk(answer[: len(answer) // 2])]


def half_event(api: Api, _streamed: bool) -> Script:  # noqa: FBT001
    """Go on with half of an event."""
    return [Chunk(events_of(api)[FIRST_DELTA[api]][:-9])]


def but_last(api: Api, _streamed: bool) -> Script:  # noqa: FBT001
    """Send a stream without its last event."""
    return [*head(api, True), *map(Chunk, events_of(api)[:-1])]


def all_events(api: Api, _streamed: bool) -> Script:  # noqa: FBT001
    """Send a stream without the end of its body."""
    return [*head(api, True), *map(Chunk, events_of(api))]


def whole(api: Api, streamed: bool) -> Script:  # noqa: FBT001
    """Send all of it."""
    return [*all_events(api, True), EndChunks()] if streamed else json_answer(json_of(api))


def _piece(api: Api, size: int) -> bytes:
    return events_of(api, "x" * size)[FIRST_DELTA[api] - 1]


def flood(api: Api, _streamed: bool) -> Script:  # noqa: FBT001
    """Go on with 128 MiB of text."""
    return [Repeat(_piece(api, 2**16), 2000)]


def trickle(api: Api, _streamed: bool) -> Script:  # noqa: FBT001
    """Go on with a little text at a time, for 10 s."""
    return [Repeat(_piece(api, 10), 500, 0.02)]


DRIPS = Repeat(b": drip\n\n", 200, 0.02)  # a comment at a time, for 4 s
BLANKS = Repeat(b" ", 200, 0.02)  # white space at a time


def large(api: Api, _streamed: bool) -> Script:  # noqa: FBT001
    """Send a stream with 16 MiB in the middle."""
    frames = events_of(api)
    filling = b'event: x\ndata: {"type": "x", "y": "%b"}\n\n' % (b"y" * 2**18)
    at = FIRST_DELTA[api]
    return [*head(api, True), *map(Chunk, [*frames[:at], *[filling] * 64, *frames[at:]]),
            EndChunks()]  # fmt: skip


def line_of(size: int) -> Part:
    """Send a stream with a line of so many bytes in it."""

    def part(api: Api, _streamed: bool) -> Script:  # noqa: FBT001
        frames = events_of(api)
        at = FIRST_DELTA[api]
        event = b'event: x\ndata: {"type": "x", "y": "%b"}\n\n' % (b"y" * size)
        sent = b"".join([*frames[:at], event, *frames[at:]])
        return [*head(api, True), *map(Chunk, rechunk(sent, 2**20)), EndChunks()]

    return part


def spelt(way: str, split: int = 4096) -> Part:
    """Send a stream in an odd but right spelling, in chunks of so many bytes."""

    def part(api: Api, _streamed: bool) -> Script:  # noqa: FBT001
        sent = b"".join(events_of(api, "Grüße 🦀 x"))
        match way:
            case "CR":
                sent = sent.replace(b"\n", b"\r")
            case "CRLF":
                sent = sent.replace(b"\n", b"\r\n")
            case "BOM":
                sent = b"\xef\xbb\xbf" + sent
            case "no space":
                sent = re.sub(rb"(?m)^(data|event): ", rb"\1:", sent)
        return [*head(api, True), *map(Chunk, rechunk(sent, split)), EndChunks()]

    return part


_USAGES = {"responses": USAGE.responses(), "chat": USAGE.chat(), "messages": USAGE.messages()}
_OUTPUT = {"responses": "output_tokens", "chat": "completion_tokens", "messages": "output_tokens"}


def usage(value: Any, *, twice: bool = False) -> Part:
    """Answer in full, with this as the count of output, or (None) without any usage at its end."""

    def part(api: Api, streamed: bool) -> Script:  # noqa: FBT001
        good = json.dumps(_USAGES[api]).encode()
        bad = json.dumps(value if value is None else _USAGES[api] | {_OUTPUT[api]: value}).encode()
        if twice:
            bad = good + b', "usage": ' + bad
        if not streamed:
            return json_answer(json.dumps(json_of(api)).encode().replace(good, bad))
        frames = [frame.replace(good, bad) for frame in events_of(api)]
        return [*head(api, True), *map(Chunk, frames), EndChunks()]

    return part


def refusal(status: int) -> Part:
    """Refuse in the shape of the API, and ask for patience."""

    def part(api: Api, _streamed: bool) -> Script:  # noqa: FBT001
        after = [("retry-after", "17")]
        if api != "messages":
            return error_answer(status, "scripted error", code="scripted", headers=after)
        inner = {"type": "invalid_request_error", "message": "scripted error"}
        return json_answer({"type": "error", "error": inner}, status, after)

    return part


def redirect(_api: Api, _streamed: bool) -> Script:  # noqa: FBT001
    """Send the client, and its credential with it, elsewhere."""
    return [Headers(307, [("location", "/v1/elsewhere"), ("content-length", "0")])]


def coded(_api: Api, streamed: bool) -> Script:  # noqa: FBT001
    """Say gzip, and send something else."""
    kind = "text/event-stream" if streamed else "application/json"
    fields = [("content-type", kind), ("content-encoding", "gzip"), ("content-length", "40")]
    return [Headers(200, fields), Garbage(40)]


def huge_head(_api: Api, _streamed: bool) -> Script:  # noqa: FBT001
    """Send a field of 10 MB."""
    return [Headers(200, [("x-big", "a" * 10_000_000), ("content-length", "0")])]


# The table itself.


@dataclass(frozen=True)
class Row:
    """One fault."""

    id: str
    fault: str
    does: Sequence[Step | Part] = ()  # the upstream
    sees: str = ""
    charged: Charge | str = ""
    asks: str = "stream"  # or "JSON", or "both"
    client: Client = reads
    having: Mapping[str, Any] = field(default_factory=dict)  # of the configuration
    before: Check | None = None  # the request
    meanwhile: Check | None = None
    also: Sequence[Check] = ()
    apis: Sequence[Api] = STREAMED
    model: str = ""  # else one whose conversations the upstream holds, and one whose we do
    tests: Sequence[str] = ()  # that make it instead


def elsewhere(identifier: str, fault: str, sees: str, charged: str, *tests: str) -> Row:
    """Make a row that names the tests of a fault that needs machinery of its own."""
    return Row(identifier, fault, sees=sees, charged=charged, tests=tests)


SOON = {"timeouts": {"first_byte": "400ms", "idle": "300ms", "client_write": "300ms"}}
BEATS = {**SOON, "streams": {"keepalive": "50ms"}}
TOTAL = {"timeouts": {"idle": "300ms", "total": "600ms"}}
CONNECT = {"timeouts": {"connect": "300ms"}}
AGAIN = {"retries": 1}
UNSAFE = {"retries": 1, "routes": [{"model": "gpt-test", "upstreams": ["scripted"],
                                    "retry_unsafe": True}]}  # fmt: skip
R: Sequence[Api] = ("responses",)
CM: Sequence[Api] = ("chat", "messages")

# fmt: off
# ruff: noqa: E501 - a row is a line
TABLE: list[Row] = [
    Row("F01", "reset inside the head",               [Send(b"HTTP/1.1 200 O"), Reset()],      "502 upstream_error",     "nothing", "both"),
    Row("F01", "reset before the first event",        [head, Reset()],                         "failed upstream_error",  "input"),
    Row("F01", "reset between two events",            [begun, Reset()],                        "failed upstream_error",  "delivered"),
    Row("F01", "reset inside an event",               [begun, half_event, Reset()],            "failed upstream_error",  "delivered"),
    Row("F01", "reset inside JSON",                   [begun, Reset()],                        "502 upstream_error",     "nothing", "JSON"),
    elsewhere("F01", "reset at every boundary, and inside every event",                        "failed upstream_error",  "delivered",
              "test_faults_upstream::test_f01_f02_a_stream_that_breaks_off_fails_in_band",
              "test_faults_upstream::test_f01_a_cut_on_the_wire_shows_no_half_event"),

    Row("F02", "ends properly, without a last event", [begun, EndChunks()],                    "failed upstream_error",  "delivered"),
    Row("F02", "ends by closing",                     [begun, Finish()],                       "failed upstream_error",  "delivered"),
    Row("F02", "ends by closing inside an event",     [begun, half_event, Finish()],           "failed upstream_error",  "delivered"),

    Row("F03", "accepts and is silent",               [Stall()],                               "504 upstream_timeout",   "input", "both", having=SOON, meanwhile=slot_is_held),
    Row("F03", "the same, after a heartbeat",         [Stall()],                               "failed upstream_timeout", "input", having=BEATS, meanwhile=slot_is_held, also=[it_beats]),

    Row("F04", "stalls between two events",           [begun, Stall()],                        "failed upstream_timeout", "delivered", having=BEATS, meanwhile=slot_is_held, also=[it_beats]),
    Row("F04", "stalls inside an event",              [begun, half_event, Stall()],            "failed upstream_timeout", "delivered", having=BEATS, also=[it_beats]),
    Row("F04", "stalls inside JSON",                  [begun, Stall()],                        "504 upstream_timeout",   "input", "JSON", having=SOON),
    elsewhere("F04", "stalls inside an event over the bound",                                  "cut",                    "delivered",
              "test_faults_upstream::test_f04_no_heartbeat_inside_an_event_that_is_let_through"),

    Row("F05", "drips for ever",                      [begun, DRIPS],                          "failed upstream_timeout", "delivered", having=TOTAL),
    Row("F05", "drips JSON for ever",                 [head, BLANKS],                          "504 upstream_timeout",   "input", "JSON", having=TOTAL),

    Row("F06", "client reads slowly",                 [large],                                 "whole",                  "usage", client=reads_slowly, apis=R),
    elsewhere("F06", "client reads 50 MB slowly",                                              "whole",                  "usage",
              "test_faults_client::test_f06_a_slow_client_slows_the_upstream_and_gets_all",
              "test_faults_client::test_f07_a_client_that_reads_a_little_is_not_cut"),

    Row("F07", "client stops reading",                [begun, flood],                          "cut",                    "delivered", client=stops_reading, having=SOON, also=[slot_is_free_a_second_after]),
    elsewhere("F07", "client stops reading, all is sent",                                      "cut",                    "delivered",
              "test_faults_client::test_f07_a_client_that_stops_reading_is_cut"),

    Row("F08", "client leaves before the head",       [Stall()],                               "-",                      "input", client=leaves_at_once, also=[upstream_is_let_go]),
    Row("F08", "the same, JSON",                      [Stall()],                               "-",                      "estimate", "JSON", client=leaves_at_once, also=[upstream_is_let_go]),
    Row("F08", "client leaves inside JSON",           [begun, Stall()],                        "-",                      "estimate", "JSON", client=leaves_at_once, also=[upstream_is_let_go]),

    Row("F09", "client leaves mid-stream",            [begun, Stall()],                        "-",                      "delivered", client=leaves_after_text, also=[upstream_is_let_go]),
    elsewhere("F09", "2,000 clients leave mid-stream",                                         "-",                      "delivered",
              "test_faults_client::test_f09_many_clients_gone_mid_stream_leave_nothing"),

    Row("F10", "client leaves before the last event", [but_last, Stall()],                     "-",                      "delivered", client=leaves_after_text, apis=R),
    Row("F10", "the same, where the usage came",      [but_last, Stall()],                     "-",                      "usage", client=leaves_after_all, apis=CM),
    Row("F10", "client leaves after the last event",  [all_events, Stall()],                   "whole",                  "usage", client=leaves_after_all),

    Row("F11", "half-open, a fast stream",            [begun, flood],                          "cut",                    "delivered", client=is_cut_off, having=SOON, also=[slot_is_free_a_second_after]),
    Row("F11", "half-open, a slow stream",            [begun, trickle],                        "cut",                    "delivered", client=is_cut_off, having=SOON, also=[slot_is_free_a_second_after]),
    Row("F11", "half-open, heartbeats alone",         [begun, Stall()],                        "cut",                    "delivered", client=is_cut_off, having={**BEATS, "timeouts": {"client_write": "300ms"}}, also=[slot_is_free_a_second_after]),
    Row("F11", "half-open, and silence",              [begun, Stall()],                        "lost",                   "delivered", client=is_cut_off, having={"timeouts": {"idle": "400ms"}}, also=[slot_is_free_a_second_after]),
    Row("F11", "half-open before a JSON answer",      [Sleep(0.2), whole],                     "lost",                   "usage", "JSON", client=is_cut_off, also=[slot_is_free_a_second_after]),

    Row("F12", "pooled connection closed while idle", [whole],                                 "whole",                  "usage", "both", before=pooled_connections_are_closed, also=[asked_once]),
    Row("F12", "closed as the request comes",         [Finish()],                              "502 upstream_error",     "nothing", "both", having=AGAIN, before=a_connection_is_pooled, also=[asked_once]),
    Row("F12", "reset as the request comes",          [Reset()],                               "502 upstream_error",     "nothing", "both", having=AGAIN, before=a_connection_is_pooled, also=[asked_once]),
    Row("F12", "the same with `retry_unsafe`",        [Finish()],                              "whole, at the second",   "usage", "both", having=UNSAFE, model="gpt-test", before=a_connection_is_pooled, also=[asked_twice]),
    elsewhere("F12", "the same, another target left",                                          "whole or 502",           "usage",
              "test_attempts_again::test_f12_a_pooled_connection_that_was_closed"),

    Row("F13", "the name does not resolve",           [],                                      "502 upstream_error",     "nothing", "both", having=CONNECT, model="nowhere", also=[within_connect]),
    elsewhere("F13", "the resolver hangs, others go on",                                       "502 upstream_error",     "nothing",
              "test_faults_upstream::test_f13_a_resolver_that_hangs_is_given_up_within_connect"),

    elsewhere("F15", "certificate expired, of another host, self-signed",                      "502 upstream_error",     "nothing",
              "test_faults_upstream::test_f15_only_a_good_certificate_gets_the_request",
              "test_faults_upstream::test_f15_the_systems_authorities_do_not_know_a_private_one"),

    Row("F16", "redirect",                            [redirect],                              "502 upstream_error",     "nothing", "both", also=[asked_once]),
    elsewhere("F16", "redirect to another host",                                               "502 upstream_error",     "nothing",
              "test_faults_upstream::test_f16_a_redirect_is_not_followed"),

    Row("F17", "429 with Retry-After",                [refusal(429)],                          "429 as it came",         "nothing", "both", also=[patience_is_passed_on]),
    Row("F17", "400",                                 [refusal(400)],                          "400 as it came",         "nothing", "both"),
    Row("F17", "401: our credential",                 [refusal(401)],                          "502 upstream_credential", "nothing", "both"),
    Row("F17", "500",                                 [refusal(500)],                          "502 upstream_error",     "nothing", "both"),
    Row("F17", "503 with Retry-After",                [refusal(503)],                          "503 upstream_overloaded", "nothing", "both", also=[patience_is_passed_on]),
    Row("F17", "529 with Retry-After",                [refusal(529)],                          "503 upstream_overloaded", "nothing", "both", also=[patience_is_passed_on]),
    Row("F17", "429 after a heartbeat",               [Sleep(0.15), refusal(429)],             "failed scripted",        "nothing", having=BEATS, also=[it_beats]),

    Row("F18", "gzip that is none",                   [coded],                                 "502 upstream_error",     "nothing", "JSON"),
    Row("F18", "gzip that is none, a stream",         [coded],                                 "failed upstream_error",  "input"),
    Row("F18", "a bad chunk size",                    [head, Send(b"xyz\r\nab\r\n0\r\n\r\n")], "502 upstream_error",     "nothing", "JSON"),
    Row("F18", "a bad chunk size, a stream",          [begun, Send(b"xyz\r\nab\r\n0\r\n\r\n")], "failed upstream_error", "delivered"),
    Row("F18", "a header of 10 MB",                   [huge_head],                             "502 upstream_error",     "nothing", "both"),
    Row("F18", "no HTTP at all",                      [Garbage(300), Finish()],                "502 upstream_error",     "nothing", "both"),
    elsewhere("F18", "twenty more kinds of nonsense",                                          "502 upstream_error",     "nothing",
              "test_faults_upstream::test_f18_garbage_is_a_502_that_says_nothing_of_it",
              "test_faults_upstream::test_f18_no_header_is_smuggled_to_the_client"),

    Row("F19", "a line of 100 MB",                    [line_of(100_000_000)],                  "whole",                  "usage", apis=R, model="gpt-test"),
    Row("F19", "a line of 24 MB",                     [line_of(24_000_000)],                   "whole",                  "usage"),
    Row("F19", "a byte at a time",                    [spelt("LF", split=1)],                  "whole",                  "usage"),
    Row("F19", "CR",                                  [spelt("CR")],                           "whole",                  "usage"),
    Row("F19", "CRLF, cut anywhere",                  [spelt("CRLF", split=3)],                "whole",                  "usage"),
    Row("F19", "BOM",                                 [spelt("BOM")],                          "whole",                  "usage"),
    Row("F19", "`data` without a space",              [spelt("no space")],                     "whole",                  "usage"),
    elsewhere("F19", "any bytes, cut anywhere",                                                "whole",                  "usage",
              "test_sse::test_nothing_is_lost",
              "test_faults_upstream::test_f19_odd_streams_arrive_byte_for_byte"),

    Row("F20", "usage missing",                       [usage(None)],                           "whole",                  "estimate", "JSON"),
    Row("F20", "usage missing, a stream",             [usage(None)],                           "whole",                  "estimate", apis=("responses", "chat")),
    Row("F20", "usage negative",                      [usage(-50_000)],                        "whole",                  "estimate", "both"),
    Row("F20", "usage above 100,000,000",             [usage(100_000_001)],                    "whole",                  "estimate", "both"),
    Row("F20", "usage a string",                      [usage("7")],                            "whole",                  "estimate", "both"),
    Row("F20", "usage twice, the last one bad",       [usage(-1, twice=True)],                 "whole",                  "estimate", "both"),
    elsewhere("F20", "usage in two events, and what fills no bucket",                          "whole",                  "estimate",
              "test_faults_upstream::test_f20_a_usage_given_twice_is_the_last_or_an_estimate",
              "test_faults_upstream::test_f20_messages_without_any_usage_are_estimated",
              "test_limits_load::test_f20_a_bad_usage_fills_no_bucket"),

    elsewhere("F21", "64 file descriptors, 100 clients",                                       "whole, or 503 overloaded, or waits", "usage",
              "test_faults_resources::test_f21_few_descriptors"),
    elsewhere("F22", "200 bodies of 8 MB, bounded memory",                                     "whole, or 413, or 503 overloaded", "nothing",
              "test_faults_resources::test_f22_many_large_bodies_under_a_memory_bound",
              "test_hostile_load::test_many_large_bodies"),
    elsewhere("F23", "SIGTERM mid-stream",                                                     "whole; then 503 shutting_down", "usage",
              "test_faults_drain::test_f23_a_stream_completes_in_the_drain",
              "test_faults_drain::test_f23_during_the_delay_requests_are_served_and_connections_closed",
              "test_faults_drain::test_f23_after_the_delay_requests_are_refused",
              "test_faults_drain::test_f23_f25_the_process_ends_with_0"),
    elsewhere("F24", "a stream longer than the drain",                                         "failed shutting_down",   "delivered",
              "test_faults_drain::test_f24_f25_what_does_not_end_is_cut_in_order",
              "test_faults_drain::test_f24_drained_and_cut_add_up"),
    elsewhere("F25", "a second SIGTERM",                                                       "failed shutting_down",   "delivered",
              "test_faults_drain::test_f24_f25_what_does_not_end_is_cut_in_order",
              "test_faults_drain::test_f23_f25_the_process_ends_with_0"),
    elsewhere("F26", "kill -9",                                                                "cut; what was whole stays", "nothing is held",
              "test_crash::test_f26_kill_9_loses_nothing",
              "test_crash::test_f26_slots_are_free_after_a_kill"),
    elsewhere("F27", "100 reloads under load",                                                 "whole",                  "usage; no bucket is refilled",
              "test_reload_faults::test_f27_a_hundred_reloads_under_load",
              "test_limits_kept::test_f27_a_hundred_reloads_refill_nothing"),
    elsewhere("F28", "reload of a bad file",                                                   "whole",                  "usage",
              "test_reload_faults::test_f28_a_bad_file_changes_nothing"),
    elsewhere("F29", "reload that revokes a key",                                              "401 invalid_api_key from then on", "nothing",
              "test_reload_faults::test_f29_a_revoked_key"),
    elsewhere("F30", "reload that moves a route",                                              "whole, from where it began", "usage",
              "test_reload_faults::test_f30_a_route_moves_during_a_stream"),
    elsewhere("F31", "disk full",                                                              "503 or failed store_unavailable", "usage",
              "test_sessions_faults::test_f31_a_full_disk"),
    elsewhere("F32", "standard error blocked",                                                 "whole",                  "usage",
              "test_reload_faults::test_f32_standard_error_is_blocked",
              "test_logs_writer::test_a_blocked_stream_drops_lines"),
    elsewhere("F33", "SQLite locked",                                                          "503 or failed store_unavailable, soon", "usage",
              "test_sessions_faults::test_f33_a_locked_database",
              "test_sessions_faults::test_f33_the_loop_goes_on_while_the_database_is_locked"),
    elsewhere("F33", "SQLite read-only",                                                       "503 or failed store_unavailable", "usage",
              "test_sessions_faults::test_f33_a_database_that_became_read_only"),
    elsewhere("F33", "SQLite corrupt",                                                         "nothing: no start",      "nothing",
              "test_sessions_faults::test_a_file_that_cannot_be_used"),
    elsewhere("F34", "wall clock steps of an hour",                                            "the same admissions",    "usage",
              "test_limits_load::test_f34_the_wall_clock_does_not_matter"),
    elsewhere("F40", "loop blocked, 1,000 slow heads, 200 clients",                            "whole; slow ones cut",   "usage",
              "test_hostile_load::test_f40_slow_heads_while_the_loop_is_blocked"),
]
# fmt: on

IDS = {f"F{number:02}" for number in range(1, 35) if number != 14} | {"F40"}


def printed() -> str:
    """Return the table as Markdown."""
    lines = ["| # | fault | client sees | charged | by |", "|---|---|---|---|---|"]
    for row in TABLE:
        by = ", ".join(row.tests) or f"test_faults, {row.asks}"
        lines.append(f"| {row.id} | {row.fault} | {row.sees} | {row.charged} | {by} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(printed())
