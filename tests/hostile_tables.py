"""Malformed and ambiguous requests, section by section of RFC 9112, each with its verdict."""

from hostile import (
    BODY,
    CHUNKED,
    HIDDEN,
    HOST,
    KEY,
    C,
    M,
    R,
    Row,
    bad,
    chunked,
    chunks,
    closing,
    head,
    last,
    length,
    post,
    told,
)
from rig import TEAM_A, TEAM_B

SIZE = len(BODY)
CRLF = b"\r\n"


def keyed(*lines: str | bytes) -> bytes:
    """Write a POST whose key is presented by these fields alone."""
    return head(HOST, *lines, length(BODY)) + BODY


def hosted(*lines: str | bytes, version: str = "1.1") -> bytes:
    """Write a POST with these fields for its Host."""
    return head(*lines, KEY, length(BODY), version=version) + BODY


def framed(*lines: str | bytes, body: bytes = BODY, version: str = "1.1") -> bytes:
    """Write a POST whose body is framed by these fields alone."""
    return head(HOST, KEY, *lines, version=version) + body


def sized(size: bytes) -> bytes:
    """Write a POST of one chunk that gives its size so."""
    return chunked(size + CRLF + BODY + CRLF + b"0\r\n\r\n")


def trailed(trailer: bytes) -> bytes:
    """Write a POST with a trailer section."""
    return chunked(chunks(BODY, last=b"0\r\n" + trailer + CRLF))


ONE = f"{SIZE:x}".encode()

MESSAGE: dict[str, Row] = {  # section 2: messages, lines, versions
    "as it should be": Row(post()),
    "an empty line before": Row(CRLF + post()),
    "many empty lines before": Row(CRLF * 50 + post()),
    "a space before": bad(b" " + post()),
    "a zero byte before": bad(b"\0" + post()),
    "LF ends the lines": bad(post().replace(CRLF, b"\n")),
    "LF ends the first line": bad(post().replace(b"1.1\r\n", b"1.1\n")),
    "LF ends a field": bad(post().replace(b"host: a\r\n", b"host: a\n")),
    "LF ends the head": bad(post().replace(b"\r\n\r\n", b"\r\n\n")),
    "CR ends the lines": bad(post().replace(CRLF, b"\r")),
    "space behind the first line": bad(post().replace(b"\r\nhost", b"\r\n host")),
    "HTTP/0.9 without a version": bad(b"GET /\r\n"),
    "HTTP/0.9 by name": bad(post(version="0.9")),
    "HTTP/1.0": closing(post(version="1.0")),
    "HTTP/1.0 that stays": Row(post("connection: keep-alive", version="1.0")),
    "HTTP/1.2": bad(post(version="1.2")),
    "HTTP/1.10": bad(post(version="1.10")),
    "HTTP/01.1": bad(post(version="01.1")),
    "HTTP/1": bad(post(version="1")),
    "HTTP/2.0": bad(post(version="2.0")),
    "HTTP/3.0": bad(post(version="3.0")),
    "a lower-case version": bad(post().replace(b" HTTP/", b" http/")),
    # llhttp knows these, and says nothing of it: no harm, since one request is served as one.
    "ICE": told(head(HOST, KEY, method="SOURCE").replace(b" HTTP/", b" ICE/"), 405,
                "method_not_allowed"),
    "RTSP": Row(post().replace(b" HTTP/", b" RTSP/")),
    "the preface of HTTP/2": bad(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "the hello of TLS": bad(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(99)),
    "the banner of SSH": bad(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a PROXY line": bad(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + post()),
    "an answer": bad(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
    "JSON alone": bad(BODY),
    "every byte there is": bad(bytes(range(256))),
}  # fmt: skip

LINE: dict[str, Row] = {  # section 3: the request line
    "lower-case method": bad(post(method="post")),
    "unheard-of method": bad(post(method="FOO")),
    "no method": bad(post(method="")),
    "no token as method": bad(post(method="P@ST")),
    "zero byte in the method": bad(post(method="PO\0ST")),
    "long method": bad(post(method="X" * 20_000)),
    "method of another protocol": bad(post(method="DESCRIBE")),
    "method of WebDAV": told(post(method="PROPFIND"), 405, "method_not_allowed"),
    "TRACE": told(head(HOST, KEY, method="TRACE", target="/"), 405, "method_not_allowed"),
    "two spaces": Row(post().replace(b"POST /", b"POST  /")),
    "tab for a space": bad(post().replace(b"POST /", b"POST\t/")),
    "tab before the version": bad(post().replace(b" HTTP", b"\tHTTP")),
    "vertical tab for a space": bad(post().replace(b"POST /", b"POST\x0b/")),
    "space at the end": bad(post().replace(b"1.1\r\n", b"1.1 \r\n")),
    "space in the target": bad(post(target=f"{C} x")),
    "no target": bad(post(target="")),
    "absolute form": bad(post(target=f"http://a{C}")),
    "absolute form, elsewhere": bad(post(target="https://api.openai.com/v1/models")),
    "authority form": bad(post(target="a:80")),
    "CONNECT": bad(head("host: a:1", KEY, method="CONNECT", target="a:1")),
    "asterisk form": bad(head(HOST, KEY, method="OPTIONS", target="*")),
    "asterisk form of a POST": bad(post(target="*")),
    "relative": bad(post(target=C[1:])),
    "fragment": bad(post(target=f"{C}#x")),
    "query": Row(post(target=f"{C}?model=x&key={TEAM_B[:9]}")),
    "query with a path": Row(post(target=f"{C}?/../../v1/models")),
    "empty query": Row(post(target=f"{C}?")),
    "two question marks": Row(post(target=f"{C}??x=/v1/models")),
    "network path": told(post(target=f"//evil{C}"), 404, "unknown_url"),
    "two slashes": told(post(target="/v1//chat/completions"), 404, "unknown_url"),
    "slash at the end": told(post(target=f"{C}/"), 404, "unknown_url"),
    "%2F": told(post(target="/v1%2fchat%2Fcompletions"), 404, "unknown_url"),
    "dots": told(post(target="/v1/x/../chat/completions"), 404, "unknown_url"),
    "dots, encoded": told(post(target="/v1/%2e%2e/v1/chat/completions"), 404, "unknown_url"),
    "dots at the end": told(post(target=f"{M}/../chat/completions"), 404, "unknown_url",
                            anthropic=True),
    "backslashes": told(post(target="/v1\\chat\\completions"), 404, "unknown_url"),
    "parameter": told(post(target=f"{C};a=b"), 404, "unknown_url"),
    "%23": told(post(target=f"{C}%23x"), 404, "unknown_url"),
    "%3F": told(post(target=f"{C}%3Fx"), 404, "unknown_url"),
    "%00": told(post(target=f"{C}%00"), 404, "unknown_url"),
    "%0d%0a": told(post(target=f"{C}%0d%0aX-A:%201"), 404, "unknown_url"),
    "bad percent": told(post(target=f"{C}%zz"), 404, "unknown_url"),
    "zero byte in the target": bad(post(target=f"{C}\0")),
    "control character in the target": bad(post(target=f"{C}\x01")),
    "DEL in the target": bad(post(target=f"{C}\x7f")),
    "Latin-1 in the target": bad(post(target="/v1/ch\xe4t")),
    "UTF-8 in the target": bad(post(target="/v1/ch\xc3\xa4t")),
    "CR in the target": bad(post(target=f"{C}\rx")),
    "LF in the target": bad(post(target=f"{C}\nx")),
    "long target": bad(post(target="/" + "x" * 17_000), 431),
    "long query": bad(post(target=f"{C}?{'x' * 100_000}"), 431),
}  # fmt: skip

HOSTS: dict[str, Row] = {  # section 3.2: Host
    "no host": bad(hosted()),
    "no host in HTTP/1.0": closing(hosted(version="1.0")),
    "the same host twice": bad(hosted(HOST, HOST)),
    "two hosts": bad(hosted(HOST, "host: b")),
    "two hosts in HTTP/1.0": bad(hosted(HOST, "host: b", version="1.0")),
    "an empty host": Row(hosted("host:")),
    "a host with a port": Row(hosted("host: [::1]:80")),
    **{
        f"host {value!a}": bad(hosted(f"host: {value}"))
        for value in ("a b", "a, b", "a/b", "u@a", "http://a", "a:x", "[::1", "a#b", "\xe4", "a\tb")
    },
}  # fmt: skip

FIELDS: dict[str, Row] = {  # section 5: field syntax
    "space before the colon": bad(post("x-a : 1")),
    "tab before the colon": bad(post("x-a\t: 1")),
    "space in the name": bad(post("x a: 1")),
    "folded by a space": bad(post("x-a: 1", " 2")),
    "folded by a tab": bad(post("x-a: 1", "\t2")),
    "folded key": bad(keyed("authorization: Bearer", f" {TEAM_A}")),
    "folded length": bad(framed("content-length:", f" {SIZE}")),
    "no colon": bad(post("x-a")),
    "only spaces": bad(post("   ")),
    "empty name": bad(post(": 1")),
    "empty value": Row(post("x-a:")),
    "space for a value": Row(post("x-a: \t ")),
    "colons in the value": Row(post("x:a:b")),
    "pseudo-field of HTTP/2": bad(post(":path: /v1/models")),
    "bare CR": bad(post("x-a: 1\r2")),
    "bare LF": bad(post("x-a: 1\nx-b: 2")),
    "zero byte": bad(post("x-a: 1\0")),
    "zero byte in the name": bad(post("x-\0a: 1")),
    "control character": bad(post("x-a: \x01")),
    "vertical tab": bad(post("x-a: \x0b1")),
    "escape": bad(post("x-a: \x1b[31m")),
    "DEL": bad(post("x-a: \x7f")),
    "tab in a value": Row(post("x-codex-a: a\tb")),
    "Latin-1": Row(post("x-codex-a: \xe4")),
    "no UTF-8": Row(post(b"x-codex-a: \xff\xfe\xc3")),
    "Latin-1 in the name": bad(post("x-\xe4: 1")),
    "parentheses in the name": bad(post("x(a): 1")),
    "slash in the name": bad(post("x/a: 1")),
    "long name": bad(post("x" * 33_000 + ": 1"), 431),
    "long value": bad(post("x-a: " + "x" * 33_000), 431),
    "128 fields": Row(post(*["x-a: 1"] * 125)),
    "129 fields": bad(post(*["x-a: 1"] * 126), 431),
    "5,000 fields": bad(post(*["x-a: 1"] * 5000), 431),
    "underscores": Row(post("X_Forwarded_User: root", "x_api_key: x", "content_length: 3",
                            "Transfer_Encoding: chunked", "x_request_id: \xff")),
    "names for another method": Row(post("x-http-method-override: DELETE",
                                         "x-original-url: /v1/models", "x-rewrite-url: /-/reload")),
    "odd Content-Type": Row(post('content-type: ;;;="')),
    "another charset": Row(post("content-type: application/json; charset=utf-16")),
    "two Content-Types": bad(post("content-type: text/html", "content-type: text/plain")),
    "odd request id": Row(post("x-request-id: a b\t\xff")),
    "two codings": bad(post("content-encoding: gzip", "content-encoding: br"), 415,
                       "unsupported_content_encoding"),
    "a list of codings": bad(post("content-encoding: gzip, gzip"), 415,
                             "unsupported_content_encoding"),
    "a transfer coding as content coding": bad(post("content-encoding: chunked"), 415,
                                               "unsupported_content_encoding"),
    "another coding than it says": told(post("content-encoding: gzip"), 400, "invalid_json"),
}  # fmt: skip

KEYS: dict[str, Row] = {  # RFC 9110 section 11.6.2: credentials
    "key twice": Row(post(KEY)),
    "key in both fields": Row(post(f"x-api-key: {TEAM_A}")),
    "spaces around the key": Row(keyed(f"authorization:  Bearer   {TEAM_A}  ")),
    "two keys": bad(post(f"authorization: Bearer {TEAM_B}"), 401, "invalid_api_key"),
    "x-api-key is another": bad(post(f"x-api-key: {TEAM_B}"), 401, "invalid_api_key"),
    "x-api-key is empty": bad(post("x-api-key:"), 401, "invalid_api_key"),
    "no key": bad(keyed(), 401, "invalid_api_key"),
    "empty": bad(keyed("authorization:"), 401, "invalid_api_key"),
    "Bearer alone": bad(keyed("authorization: Bearer"), 401, "invalid_api_key"),
    "Basic": bad(keyed("authorization: Basic YTpi"), 401, "invalid_api_key"),
    "a list": bad(keyed(f"{KEY}, Bearer x"), 401, "invalid_api_key"),
    "zero byte behind the key": bad(keyed(f"{KEY}\0")),
    "no UTF-8 key": bad(keyed(b"authorization: Bearer \xff\xfe"), 401, "invalid_api_key"),
    "long key": bad(keyed("authorization: Bearer " + "x" * 30_000), 401, "invalid_api_key"),
    "with underscores": bad(keyed(f"x_api_key: {TEAM_A}"), 401, "invalid_api_key"),
    "key in a trailer": bad(head(HOST, CHUNKED) + chunks(BODY, last=f"0\r\n{KEY}\r\n\r\n".encode()),
                            401, "invalid_api_key"),
}  # fmt: skip

FRAMING: dict[str, Row] = {  # section 6: how long the body is
    "length, then chunks": bad(framed(length(BODY), CHUNKED, body=chunks(BODY))),
    "chunks, then length": bad(framed(CHUNKED, length(BODY), body=chunks(BODY))),
    "CL.TE": bad(framed(f"content-length: {5 + len(HIDDEN)}", CHUNKED, body=b"0\r\n\r\n" + HIDDEN)),
    "TE.CL": bad(framed(CHUNKED, "content-length: 4", body=chunks(HIDDEN))),
    "TE.0": bad(framed(CHUNKED, "content-length: 0", body=chunks(HIDDEN))),
    "the same length twice": bad(framed(length(BODY), length(BODY))),
    "a shorter length first": bad(framed("content-length: 0", length(BODY))),
    "a shorter length last": bad(framed(length(BODY), "content-length: 0")),
    **{
        f"length {value!a}": bad(framed(f"content-length: {value}"))
        for value in (
            f"{SIZE}, {SIZE}", f"{SIZE}, 0", "-1", f"+{SIZE}", f"0x{SIZE:x}", f"{SIZE} {SIZE}",
            f"{SIZE};", f"{SIZE}.0", "1e2", "", f'"{SIZE}"', f"{SIZE}\x0b", f"{SIZE}\xa0", "9_7",
            "\xb2", "9" * 30, str(2**64), str(2**64 + SIZE), "Infinity",
        )
    },
    "length of 100 GB": bad(framed("content-length: 99999999999"), 413, "request_too_large"),
    "zeros before the length": Row(framed(f"content-length: {SIZE:0100}")),
    "tabs around the length": Row(framed(f"content-length:\t{SIZE}\t")),
    "length, odd case": Row(framed(f"CoNtEnT-lEnGtH: {SIZE}")),
    "length, space before the colon": bad(framed(f"content-length : {SIZE}")),
    "length that Connection names": Row(post("connection: content-length, host, authorization")),
    "chunks that Connection names": last(chunked(chunks(BODY), "connection: transfer-encoding")),
    **{
        f"coding {value!a}": bad(framed(f"transfer-encoding: {value}", *more, body=body))
        for more, body in (((), chunks(BODY)), ((length(BODY),), BODY))
        for value in (
            "gzip", "gzip, chunked", "chunked, gzip", "chunked, chunked", "chunked,", ",chunked",
            "chunked;q=1", "\x0bchunked", "chunked\x0b", "xchunked", "chunkedx", "identity",
            "chunked, identity", "identity, chunked", "", '"chunked"', "chunked\xa0", "chu nked",
            "cow", "\xffchunked", "chunked\0",
        )
    },
    "coding, upper case": last(framed("Transfer-Encoding: CHUNKED", body=chunks(BODY))),
    "coding behind a tab": last(framed("transfer-encoding:\tchunked", body=chunks(BODY))),
    "chunked twice": bad(framed(CHUNKED, CHUNKED, body=chunks(BODY))),
    "chunked, then another": bad(framed(CHUNKED, "transfer-encoding: cow", body=chunks(BODY))),
    "another, then chunked": bad(framed("transfer-encoding: cow", CHUNKED, body=chunks(BODY))),
    "coding, space before the colon": bad(framed("transfer-encoding : chunked", length(BODY))),
    "coding behind a bare LF": bad(framed("x: y\ntransfer-encoding: chunked", length(BODY))),
    "coding, folded": bad(framed("transfer-encoding:", " chunked", body=chunks(BODY))),
    "coding, zero byte": bad(framed("transfer-\0encoding: chunked", length(BODY))),
    "chunks in HTTP/1.0": bad(framed(CHUNKED, body=chunks(BODY), version="1.0")),
    "both in HTTP/1.0": bad(framed(CHUNKED, length(BODY), version="1.0")),
}  # fmt: skip

CHUNKS: dict[str, Row] = {  # section 7: the chunked coding
    "chunks of one byte": last(chunked(chunks(*(bytes([byte]) for byte in BODY)))),
    "no chunk": bad(chunked(b"0\r\n\r\n"), 400, "invalid_json"),
    "a long last chunk": last(chunked(chunks(BODY, last=b"00000\r\n\r\n"))),
    **{
        f"chunk size {size[:20]!r}": bad(sized(size))
        for size in (
            b"", b"zz", b"-1", b"+" + ONE, b"0x" + ONE, b"1" + b"0" * 16, b"f" * 17, ONE + b" ",
            b" " + ONE, ONE + b"\t", ONE + b"\x0b", ONE + b"\0", b"6 1", b"%x" % (SIZE - 1),
            b"%x" % (SIZE + 1), ONE + b"," + ONE, ONE + b";", ONE + b";a\rb", ONE + b";\nb",
            ONE + b";a\0", ONE + b';a="b\r\n',
        )
    },
    "zeros before the size": last(sized(b"0" * 100 + ONE)),
    "an extension": last(sized(ONE + b';a;b=c;d="e;f"')),
    "a long extension": last(sized(ONE + b";" + b"x" * 40_000)),
    "LF behind the size": bad(chunked(ONE + b"\n" + BODY + b"\r\n0\r\n\r\n")),
    "CR behind the size": bad(chunked(ONE + b"\r" + BODY + b"\r\n0\r\n\r\n")),
    "LF behind the chunk": bad(chunked(ONE + CRLF + BODY + b"\n0\r\n\r\n")),
    "nothing behind the chunk": bad(chunked(ONE + CRLF + BODY + b"0\r\n\r\n")),
    "an empty line behind the chunk": bad(chunked(chunks(BODY, last=CRLF + b"0\r\n\r\n"))),
    "LF at the end": bad(chunked(chunks(BODY, last=b"0\r\n\n"))),
    "a trailer": last(trailed(b"x-codex-a: 1\r\n")),
    "a length in the trailer": bad(trailed(b"content-length: 5\r\n")),
    "a coding in the trailer": bad(trailed(b"transfer-encoding: chunked\r\n")),
    "an upgrade in the trailer": last(trailed(b"connection: upgrade\r\nupgrade: h2c\r\n")),
    "a key in the trailer": last(trailed(b"x-api-key: y\r\n")),
    "a request in the trailer": bad(trailed(b"GET /v1/models HTTP/1.1\r\n")),
    "no name in the trailer": bad(trailed(b"x a\r\n")),
    "a control character in the trailer": bad(trailed(b"x-a: \x01\r\n")),
    "LF in the trailer": bad(trailed(b"x-a: 1\n")),
    "a folded trailer": bad(trailed(b"x-a: 1\r\n 2\r\n")),
    "5,000 trailers": bad(trailed(b"x-a: 1\r\n" * 5000), 431),
    "a long trailer": bad(trailed(b"x-a: " + b"x" * 40_000 + CRLF), 431),
}  # fmt: skip

CONNECTION: dict[str, Row] = {  # section 9; RFC 9110 sections 7.6, 7.8 and 10.1
    "Connection names what crosses": Row(post("connection: authorization, content-type, host",
                                              "connection: x-request-id, accept",
                                              "content-type: application/json", "accept: a/b")),
    "Connection: close": closing(post("connection: close")),
    "close and keep-alive": closing(post("connection: keep-alive, close")),
    "close in quotes": Row(post('connection: "close"')),
    "an empty Connection": Row(post("connection: ,, ,")),
    "a long Keep-Alive": Row(post("keep-alive: timeout=99999999, max=0")),
    "TE": Row(post("te: trailers, deflate;q=0.5")),
    "Proxy-*": Row(post("proxy-authorization: Basic YTpi", "proxy-authenticate: x")),
    "Max-Forwards": Row(post("max-forwards: 0")),
    "h2c": Row(post("connection: upgrade, http2-settings", "upgrade: h2c", "http2-settings: AA"),
               stays=None),
    "h2c with chunks": Row(chunked(chunks(BODY), "connection: upgrade", "upgrade: h2c"),
                           stays=None),
    "an upgrade to TLS": Row(post("connection: upgrade", "upgrade: TLS/1.0"), stays=None),
    "a WebSocket elsewhere": Row(post("connection: upgrade", "upgrade: websocket"), stays=None),
    "an upgrade that Connection does not name": Row(post("upgrade: h2c"), stays=None),
    "a WebSocket": bad(post("connection: upgrade", "upgrade: websocket", target=R), 426,
                       "upgrade_not_supported"),
    "expectation twice": Row(post("expect: 100-continue", "expect: 100-continue")),
    "expectation, upper case": Row(post("expect: 100-CONTINUE")),
    "another expectation": bad(post("expect: 200-ok"), 417),
    "an empty expectation": bad(post("expect:"), 417),
    "a list of expectations": bad(post("expect: 100-continue, x"), 417),
    "an expectation of a GET": bad(head(HOST, KEY, "expect: x", method="GET", target="/v1/models"),
                                   417),
    "no chunks in Anthropic's shape": bad(chunked(chunks(BODY), version="1.0"), behind=b"").on(M),
    "no expectation in Anthropic's shape": bad(post("expect: x"), 417).on(M),
    "no key in Anthropic's shape": bad(keyed(), 401, "invalid_api_key").on(M),
}  # fmt: skip

TABLES = {
    "message": MESSAGE,
    "line": LINE,
    "host": HOSTS,
    "field": FIELDS,
    "key": KEYS,
    "framing": FRAMING,
    "chunks": CHUNKS,
    "connection": CONNECTION,
}
ROWS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}
