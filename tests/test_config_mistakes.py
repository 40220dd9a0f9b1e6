"""The table of bad files, and of doubtful ones: the exact sentence that each gets, with its place.

A case is what is put into the group's file, and its mistakes as `LINE:COL: path: what is wrong`.
"""
# ruff: noqa: E501 - a case is one line, as a mistake is

from datetime import UTC, datetime
from pathlib import Path

import pytest

from aiproxy.config import ConfigError, loads

HASH = "a" * 64
NOW = datetime(2027, 1, 1, tzinfo=UTC)
ENVIRON = {
    "A": "x",
    "SECRET": "s3cret",
    "EMPTY": "\n",
    "SPACE": " x",
    "CONTROL": "a\x01b",
    "ACCENT": "é",
}

# fmt: off
YAML: list[tuple[str, ...]] = [
    ("a: *\n", '1:4: an unquoted * begins a YAML alias, which is not allowed: quote the glob, as in "*"'),
    ("- *gpt*\n", '1:3: an unquoted * begins a YAML alias, which is not allowed: quote the glob, as in "*"'),
    ("a: &\n", "1:4: an unquoted & begins a YAML anchor, which is not allowed: quote the text"),
    ("a: [b\n", "2:1: not valid YAML: a '[' that is never closed, or a comma missing"),
    ("a: b: c\n", "1:5: not valid YAML: a ':' where none can be: check the indentation, or quote the text"),
    ("a: 'x\n", "2:1: not valid YAML: a quote that is never closed"),
    ("a: @x\n", "1:4: not valid YAML: a tab, or one of @ ` %, where a value begins: indent with spaces, or quote the text"),
    ("\ta: 1\n", "1:1: not valid YAML: a tab, or one of @ ` %, where a value begins: indent with spaces, or quote the text"),
    ("- a\nb: 1\n", "2:1: not valid YAML: this line does not line up with the list above it"),
    ("a: 1\n  b: 2\n", "2:4: not valid YAML: a ':' where none can be: check the indentation, or quote the text"),
    ("listen: [::1]:8080\n", "1:10: not valid YAML: a value is missing, or needs quotes"),
    ("a: {b: c\n", "2:1: not valid YAML: a '{' that is never closed, or a comma missing"),
    ('a: "\\q"\n', "1:5: not valid YAML: found unknown escape character"),
    ("ok: 1\né: \x01\n", "2:4: not valid YAML: the control character U+0001"),
    ("a: \ud800\n", "1:4: not valid YAML: the control character U+D800"),
    ("%FOO\n---\na: 1\n", "1:5: not valid YAML: found unknown directive name"),
    ("a: " + "[" * 70, "1:68: nested deeper than 64 levels"),
    ("- a\n", "1:1: must be a mapping, not a list"),
    ("text\n", "1:1: must be a mapping, not text"),
    ("*root\n", '1:1: an unquoted * begins a YAML alias, which is not allowed: quote the glob, as in "*"'),
    ("!!map {}\n", "1:1: a tag is not allowed: a value is what it looks like"),
]

TOP: list[tuple[str, ...]] = [
    ("--- \nlisten: 5", "3:1: more than one document: keep only one"),
    ("routes: []", "3:1: routes: this key is already on line 2"),
    ("<<: {a: b}", "3:1: <<: a merge key is not allowed: write the keys where they count"),
    ("? [a]\n: b", "3:3: a key must be text, on one line"),
    ("!!str listen: x", "3:1: listen: a key can have neither a tag nor an anchor"),
    ("*a : b", '3:1: an unquoted * begins a YAML alias, which is not allowed: quote the glob, as in "*"'),
    ("listen: &a unix:/x", "3:9: listen: an anchor is not allowed: write the value where it counts"),
    ("trusted_proxies: [*-x]", '3:19: trusted_proxies[0]: an unquoted * begins a YAML alias, which is not allowed: quote the glob, as in "*"'),
    ("listen: *a", '3:9: listen: an unquoted * begins a YAML alias, which is not allowed: quote the glob, as in "*"'),
    ("admin: !!str x", "3:8: admin: a tag is not allowed: a value is what it looks like"),
    ("listne: 5", "3:1: listne: unknown key (did you mean 'listen'?)"),
    ("zzz: 5", "3:1: zzz: unknown key"),
    ("'a\\nb': 1", "3:1: a\\nb: unknown key"),
    ('"a\\nb": 1', "3:1: a\\nb: unknown key"),
    ("Listen: x", "3:1: Listen: unknown key (did you mean 'listen'?)"),
    ("listen: 8080", "3:9: listen: must be HOST:PORT or unix:PATH, not 8080"),
    ("listen: :80", "3:9: listen: must be HOST:PORT or unix:PATH, not ':80'"),
    ("listen: ::1:80", "3:9: listen: must be HOST:PORT or unix:PATH, not '::1:80': an IPv6 address needs brackets, as in '[::1]:8080'"),
    ("listen: '[::1]:80000'", "3:9: listen: must be HOST:PORT or unix:PATH, not '[::1]:80000'"),
    ("listen: '[::g]:80'", "3:9: listen: must be HOST:PORT or unix:PATH, not '[::g]:80'"),
    ("listen: '[127.0.0.1]:80'", "3:9: listen: must be HOST:PORT or unix:PATH, not '[127.0.0.1]:80'"),
    ("listen: a b:80", "3:9: listen: must be HOST:PORT or unix:PATH, not 'a b:80'"),
    ("listen: 1.2.3:80", "3:9: listen: must be HOST:PORT or unix:PATH, not '1.2.3:80'"),
    ("listen: 'unix:'", "3:9: listen: must be HOST:PORT or unix:PATH, not 'unix:'"),
    ("listen: unix:/" + "x" * 109, "3:9: listen: the path is longer than 107 bytes"),
    ("listen:", "3:8: listen: has no value: give it one, or leave it out"),
    ("listen: {}", "3:9: listen: must be HOST:PORT or unix:PATH, not a mapping"),
    ("admin: 127.0.0.1:8080", "3:8: admin: clashes with listen, 127.0.0.1:8080"),
    ("listen: 0.0.0.0:9090", "3:9: listen: clashes with admin, 127.0.0.1:9090"),
    ("admin: [a]", "3:8: admin: must be HOST:PORT or unix:PATH, not a list"),
    ("trusted_proxies: 10.0.0.0/8", "3:18: trusted_proxies: must be a list, not text"),
    ("trusted_proxies: [10.0.0.1/8, foo, 5]", "3:19: trusted_proxies[0]: has bits set beyond its prefix: write 10.0.0.0/8", "3:31: trusted_proxies[1]: must be a CIDR such as 10.0.0.0/8, not 'foo'", "3:36: trusted_proxies[2]: must be a CIDR such as 10.0.0.0/8, not 5"),
    ("trusted_proxies: [~]", "3:19: trusted_proxies[0]: has no value: give it one, or leave it out"),
    ("max_body: 5MB", "3:11: max_body: must be a size such as 64KiB, 32MiB or 1GiB, not '5MB'"),
    ("max_body: 0KiB", "3:11: max_body: must be more than 0, not '0KiB'"),
    ("max_body: 33554432", "3:11: max_body: must be a size such as 64KiB, 32MiB or 1GiB, not 33554432"),
    ("max_body: 99999999999GiB", "3:11: max_body: must be less than 8589934592GiB, not '99999999999GiB'"),
    ("max_connections: 0", "3:18: max_connections: must be at least 1, not 0"),
    ("max_connections: 1.5", "3:18: max_connections: must be a whole number, not 1.5"),
    ("max_connections: many", "3:18: max_connections: must be a whole number, not 'many'"),
    ("max_connections: true", "3:18: max_connections: must be a whole number, not true"),
    ("max_connections: 0x10", "3:18: max_connections: must be a whole number, not '0x10'"),
    ("max_connections: 1_000", "3:18: max_connections: must be a whole number, not '1_000'"),
    ("max_connections: 1000001", "3:18: max_connections: must be at most 1000000, not 1000001"),
    ("client_keepalive: 5", "3:19: client_keepalive: must be a duration such as 250ms, 5s, 2min, 1h or 30d, not 5"),
    ("client_keepalive: 5m", "3:19: client_keepalive: must be a duration such as 250ms, 5s, 2min, 1h or 30d, not '5m'"),
    ("client_keepalive: -5s", "3:19: client_keepalive: must be a duration such as 250ms, 5s, 2min, 1h or 30d, not '-5s'"),
    ("client_keepalive: 1.5s", "3:19: client_keepalive: must be a duration such as 250ms, 5s, 2min, 1h or 30d, not '1.5s'"),
    ("client_keepalive: 99999d", "3:19: client_keepalive: must be at most 3650d, not '99999d'"),
    ("client_keepalive: on", "3:19: client_keepalive: must be a duration such as 250ms, 5s, 2min, 1h or 30d, not 'on'"),
    ("client_keepalive: " + "x" * 60, "3:19: client_keepalive: must be a duration such as 250ms, 5s, 2min, 1h or 30d, not 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…'"),
    ("timeouts: {conect: 5s}", "3:12: timeouts.conect: unknown key (did you mean 'connect'?)"),
    ("timeouts: {idle: 5}", "3:18: timeouts.idle: must be a duration such as 250ms, 5s, 2min, 1h or 30d, not 5"),
    ("timeouts: 5s", "3:11: timeouts: must be a mapping, not text"),
    ("retries: 11", "3:10: retries: must be at most 10, not 11"),
    ("retries: -1", "3:10: retries: must be at least 0, not -1"),
    ("streams: {keepalive: no}", "3:22: streams.keepalive: must be a duration such as 250ms, 5s, 2min, 1h or 30d, not 'no'"),
    ("streams: {on_disconnect: finish}", "3:26: streams.on_disconnect: must be cancel, not 'finish'"),
    ("drain: {delay: 5}", "3:16: drain.delay: must be a duration such as 250ms, 5s, 2min, 1h or 30d, not 5"),
    ("log: {level: warn}", "3:14: log.level: must be debug, info, warning or error, not 'warn' (did you mean 'warning'?)"),
    ("log: {format: yaml, level: []}", "3:15: log.format: must be auto, console or json, not 'yaml'", "3:28: log.level: must be debug, info, warning or error, not a list"),
    ("log: [json]", "3:6: log: must be a mapping, not a list"),
    ("sessions: {store: sqlite:x}", "3:19: sessions.store: must be memory:, sqlite:/PATH (absolute) or redis://HOST:PORT/DB"),
    ("sessions: {store: redis://h/0}", "3:19: sessions.store: redis is not supported yet: use memory: or sqlite:PATH"),
    ("sessions: {store: mysql:/x}", "3:19: sessions.store: must be memory:, sqlite:/PATH (absolute) or redis://HOST:PORT/DB"),
    ("sessions: {ttl: 31}", "3:17: sessions.ttl: must be a duration such as 250ms, 5s, 2min, 1h or 30d, not 31"),
    ("sessions: {max_turns: 0}", "3:23: sessions.max_turns: must be at least 1, not 0"),
    ("limiter: {store: sqlite:/x}", "3:18: limiter.store: must be memory: or redis://HOST:PORT/DB"),
    ("limiter: {reserve: most}", "3:20: limiter.reserve: must be p90 or max, not 'most'"),
    ("limiter: {on_error: deny}", "3:21: limiter.on_error: not supported yet: only the default, degrade, is accepted"),
    ("tracing: {otlp: ftp://x}", "3:17: tracing.otlp: must begin with http:// or https://"),
    ("tracing: {content: true}", "3:1: tracing.otlp: is required"),
    ("keys_default: {limits: {requests: 5/m, tokens: [5/s, {rate: 5/s, burst: 0}], concurrent: x}}", "3:35: keys_default.limits.requests: must be a rate such as 10/s, 600/min, 1000/h or 5000/day, not '5/m'", "3:73: keys_default.limits.tokens[1].burst: must be at least 1, not 0", "3:90: keys_default.limits.concurrent: must be a whole number, not 'x'"),
    ("keys_default: {limits: {tokens: {burst: 5}}}", "3:25: keys_default.limits.tokens.rate: is required"),
]

UPSTREAM: list[tuple[str, ...]] = [
    ("name: x", "6:5: upstreams.u.name: unknown key"),
    ("url: http://y", "6:5: upstreams.u.url: this key is already on line 4"),
    ("ulr: http://y", "6:5: upstreams.u.ulr: unknown key (did you mean 'url'?)"),
    ("credential: sk-live-1", "6:17: upstreams.u.credential: must be {env: NAME} or {file: PATH}: a literal secret is never accepted"),
    ("credential: {}", "6:17: upstreams.u.credential: must have env or file"),
    ("credential: {env: A, file: B}", "6:17: upstreams.u.credential: must have one of env and file, not both"),
    ("credential: {env: sk-live-1}", "6:23: upstreams.u.credential.env: must be the name of an environment variable, never a literal secret"),
    ("credential: {env: 5}", "6:23: upstreams.u.credential.env: must be text, not a number: quote it"),
    ("credential: {envv: A}", "6:18: upstreams.u.credential.envv: unknown key (did you mean 'env'?)"),
    ("credential: {env: NOPE}", "6:23: upstreams.u.credential.env: environment variable NOPE is not set"),
    ("credential: {env: EMPTY}", "6:23: upstreams.u.credential.env: the secret in environment variable EMPTY is empty"),
    ("credential: {env: SPACE}", "6:23: upstreams.u.credential.env: the secret in environment variable SPACE must be printable ASCII, without spaces at its ends"),
    ("credential: {env: CONTROL}", "6:23: upstreams.u.credential.env: the secret in environment variable CONTROL must be printable ASCII, without spaces at its ends"),
    ("credential: {env: ACCENT}", "6:23: upstreams.u.credential.env: the secret in environment variable ACCENT must be printable ASCII, without spaces at its ends"),
    ("credential: {file: token}", "6:24: upstreams.u.credential.file: file 'token' is relative, and $CREDENTIALS_DIRECTORY, where it would be looked up, is not set"),
    ("credential: {file: /nonexistent/token}", "6:24: upstreams.u.credential.file: file '/nonexistent/token' cannot be read: No such file or directory"),
    ("credential: {file: /}", "6:24: upstreams.u.credential.file: file '/' is not a regular file"),
    ("auth: baerer", "6:11: upstreams.u.auth: must be auto, bearer, x-api-key, api-key or none, not 'baerer' (did you mean 'bearer'?)"),
    ("auth: sk-live-1", "6:11: upstreams.u.auth: must be auto, bearer, x-api-key, api-key or none, not 'sk-…'"),
    ("auth: none\n    credential: {env: SECRET}", "6:11: upstreams.u.auth: is none, but there is a credential"),
    ("headers: {Host: a}", "6:15: upstreams.u.headers.Host: aiproxy sets this header itself, or it concerns one connection only"),
    ("headers: {X Y: a}", "6:15: upstreams.u.headers.X Y: must be the name of a header"),
    ("headers: {X: 5}", "6:18: upstreams.u.headers.X: must be text, not a number: quote it"),
    ('headers: {X: "a\\nb"}', "6:18: upstreams.u.headers.X: must not have control characters"),
    ("headers: {X: a, x: b}", "6:21: upstreams.u.headers.x: the same header as 'X': case makes no difference"),
    ("headers: {Authorization: secret}", "6:15: upstreams.u.headers.Authorization: with auth: auto this header carries the credential"),
    ("auth: api-key\n    headers: {Api-Key: secret}", "7:15: upstreams.u.headers.Api-Key: with auth: api-key this header carries the credential"),
    ("headers: {proxy-foo: a}", "6:15: upstreams.u.headers.proxy-foo: aiproxy sets this header itself, or it concerns one connection only"),
    ("headers: [a]", "6:14: upstreams.u.headers: must be a mapping, not a list"),
    ("header_allow: [Cookie]", "6:20: upstreams.u.header_allow[0]: 'cookie' never passes: it concerns this connection or this client"),
    ("header_allow: [a b]", "6:20: upstreams.u.header_allow[0]: must be the name of a header"),
    ("header_allow: x", "6:19: upstreams.u.header_allow: must be a list, not text"),
    ("idle_connections: 5", "6:23: upstreams.u.idle_connections: must be a duration such as 250ms, 5s, 2min, 1h or 30d, not 5"),
    ("ca_file: 5", "6:14: upstreams.u.ca_file: must be text, not a number: quote it"),
    ("ca_file: [a]", "6:14: upstreams.u.ca_file: must be text, not a list"),
    ("ca_file: ca.pem", "6:14: upstreams.u.ca_file: must be an absolute path"),
    ("ca_file: /nonexistent/ca.pem", "6:14: upstreams.u.ca_file: file '/nonexistent/ca.pem' cannot be read: No such file or directory"),
    ("ca_file: /dev/null", "6:14: upstreams.u.ca_file: file '/dev/null' is not a regular file"),
    ("timeouts: {client_body: 5s}", "6:16: upstreams.u.timeouts.client_body: unknown key"),
    ("timeouts: {idle: }", "6:22: upstreams.u.timeouts.idle: has no value: give it one, or leave it out"),
    ("sessions: mine", "6:15: upstreams.u.sessions: must be replay or upstream, not 'mine'"),
    ("sessions: x", "6:15: upstreams.u.sessions: must be replay or upstream, not 'x'"),
    ("normalize: yes", "6:16: upstreams.u.normalize: must be true or false, not 'yes'"),
    ("max_concurrent: 0", "6:21: upstreams.u.max_concurrent: must be at least 1, not 0"),
    ("propagate_trace: 1", "6:22: upstreams.u.propagate_trace: must be true or false, not 1"),
]

URL: list[tuple[str, ...]] = [
    ("http://", "2:36: upstreams.u.url: is no URL: its host is wrong"),
    ("ftp://h/v1", "2:36: upstreams.u.url: must begin with http:// or https://"),
    ("127.0.0.1:80", "2:36: upstreams.u.url: must begin with http:// or https://"),
    ("http://u:p@h/v1", "2:36: upstreams.u.url: must not hold a user name or password: use credential"),
    ("http://h/v1#f", "2:36: upstreams.u.url: must not have a fragment ('#')"),
    ("http://h:99999/v1", "2:36: upstreams.u.url: is no URL: its host or its port is wrong"),
    ("http://h:0", "2:36: upstreams.u.url: is no URL: its port is wrong"),
    ("http://h:/v1", "2:36: upstreams.u.url: is no URL: its port is wrong"),
    ("http://[::1/v1", "2:43: not valid YAML: a '{' that is never closed, or a comma missing"),
    ("'http://h /v1'", "2:36: upstreams.u.url: must be a URL of ASCII characters without spaces"),
    ("http://é/v1", "2:36: upstreams.u.url: must be a URL of ASCII characters without spaces"),
    ("http://1.2.3/v1", "2:36: upstreams.u.url: is no URL: its host is wrong"),
    ("http://a\\b/v1", "2:36: upstreams.u.url: is no URL: its host is wrong"),
    ("5", "2:36: upstreams.u.url: must be text, not a number: quote it"),
]

APIS: list[tuple[str, ...]] = [
    ("chat", "2:38: upstreams.u.apis: must be a list, not text"),
    ("[]", "2:38: upstreams.u.apis: must not be empty"),
    ("[chat, responces]", "2:45: upstreams.u.apis[1]: must be responses, chat, messages or embeddings, not 'responces' (did you mean 'responses'?)"),
    ("[5]", "2:39: upstreams.u.apis[0]: must be responses, chat, messages or embeddings, not 5"),
    ("~", "2:38: upstreams.u.apis: has no value: give it one, or leave it out"),
]

ROUTE: list[tuple[str, ...]] = [
    ("upstreams: [u]", "5:3: routes[0].upstreams: this key is already on line 4"),
    ("upstream: u", "5:3: routes[0].upstream: unknown key (did you mean 'upstreams'?)"),
    ("list: [a]", "5:3: routes[0].list: only a glob has a list: the model of this route is one name"),
    ("max_output_tokens: 0", "5:22: routes[0].max_output_tokens: must be at least 1, not 0"),
    ("max_output_tokens: 16KiB", "5:22: routes[0].max_output_tokens: must be a whole number, not '16KiB'"),
    ("retry_unsafe: maybe", "5:17: routes[0].retry_unsafe: must be true or false, not 'maybe'"),
    ("account_objects: deny", "5:20: routes[0].account_objects: must be allow or refuse, not 'deny'"),
    ("unsupported_tools: x", "5:22: routes[0].unsupported_tools: must be refuse or drop, not 'x'"),
    ("limits: {concurrent: many}", "5:24: routes[0].limits.concurrent: must be a whole number, not 'many'"),
]

GLOB: list[tuple[str, ...]] = [
    ("list: [ga, ha]", "5:14: routes[0].list[1]: 'ha' does not match 'g*'"),
    ("list: ['g*']", "5:10: routes[0].list[0]: must be a name, not the glob 'g*'"),
    ("list: ga", "5:9: routes[0].list: must be a list, not text"),
    ("list: [5]", "5:10: routes[0].list[0]: must be text, not a number: quote it"),
]

TARGET: list[tuple[str, ...]] = [
    ("x", "5:5: routes[0].upstreams[0]: no upstream 'x'"),
    ("5", "5:5: routes[0].upstreams[0]: must be text, not a number: quote it"),
    ("{name: x}", "5:12: routes[0].upstreams[0].name: no upstream 'x'"),
    ("{model: x}", "5:5: routes[0].upstreams[0].name: is required"),
    ("{name: u, weight: 0}", "5:23: routes[0].upstreams[0].weight: must be at least 1, not 0"),
    ("{name: u, reasoning: yes}", "5:26: routes[0].upstreams[0].reasoning: must be auto, true or false, not 'yes'"),
    ("{name: u, reasoning: maybe}", "5:26: routes[0].upstreams[0].reasoning: must be auto, true or false, not 'maybe'"),
    ("{name: u, model: 5}", "5:22: routes[0].upstreams[0].model: must be text, not a number: quote it"),
    ("{name: u, url: x}", "5:15: routes[0].upstreams[0].url: unknown key"),
    ("[u]", "5:5: routes[0].upstreams[0]: must be text, not a list"),
    ("upp", "5:5: routes[0].upstreams[0]: no upstream 'upp'"),
]

KEY: list[tuple[str, ...]] = [
    ("name: x", "6:5: keys.k.name: unknown key"),
    ("models: [n]", "6:14: keys.k.models[0]: matches no route"),
    ("models: [mm]", "6:14: keys.k.models[0]: matches no route (did you mean 'm'?)"),
    ("models: m", "6:13: keys.k.models: must be a list, not text"),
    ("models: []", "6:13: keys.k.models: must not be empty"),
    ("models:", "6:12: keys.k.models: has no value: give it one, or leave it out"),
    ("expires: 2027", "6:14: keys.k.expires: must be a day such as 2027-06-30 or an instant such as 2027-06-30T12:00:00Z, not 2027"),
    ("expires: 2027-02-30", "6:14: keys.k.expires: there is no such time as '2027-02-30'"),
    ("expires: soon", "6:14: keys.k.expires: must be a day such as 2027-06-30 or an instant such as 2027-06-30T12:00:00Z, not 'soon'"),
    ("expires: 2027-06-30T25:00:00Z", "6:14: keys.k.expires: there is no such time as '2027-06-30T25:00:00Z'"),
    ("expires: 2027-06-30T12:00:00", "6:14: keys.k.expires: must be a day such as 2027-06-30 or an instant such as 2027-06-30T12:00:00Z, not '2027-06-30T12:00:00'"),
    ("expires: 9999-12-31", "6:14: keys.k.expires: there is no such time as '9999-12-31'"),
    ("disabled: no", "6:15: keys.k.disabled: must be true or false, not 'no'"),
    ("deny: [service tier]", "6:12: keys.k.deny[0]: must be a field such as service_tier or tools.web_search"),
    ("deny: [tools., input]", "6:12: keys.k.deny[0]: must be a field such as service_tier or tools.web_search", "6:20: keys.k.deny[1]: every request needs input: to refuse the key, disable it"),
    ("deny: x", "6:11: keys.k.deny: must be a list, not text"),
    ("limits: {requests: 600}", "6:24: keys.k.limits.requests: must be a rate such as 10/s, 600/min, 1000/h or 5000/day, not 600"),
]

SHA256: list[tuple[str, ...]] = [
    ("sk-aip-0123456789", "5:13: keys.k.sha256: a literal key is never accepted: `aiproxy key` prints its hash"),
    ("5e88", "5:13: keys.k.sha256: must be text, not a number: quote it"),
    ("[]", "5:13: keys.k.sha256: must not be empty"),
    (f"[{HASH}, {HASH}, {HASH}, {HASH}, {HASH}]", "5:13: keys.k.sha256: must have at most 4 items"),
    ("5", "5:13: keys.k.sha256: must be text, not a number: quote it"),
    (f"[{HASH}, x]", "5:80: keys.k.sha256[1]: must be the 64 hexadecimal digits of a SHA-256"),
]

KEYS: list[tuple[str, ...]] = [
    ("keys: []", "3:7: keys: must be a mapping, not a list"),
    (f"keys: {{a b: {{sha256: {HASH}}}}}", "3:8: keys.a b: must be 1 to 64 of the characters A-Z a-z 0-9 . _ -"),
    ("keys: {k: }", "3:11: keys.k: has no value: give it one, or leave it out"),
    ("keys: {k: x}", "3:11: keys.k: must be a mapping, not text"),
    ("keys: {k: {}}", "3:8: keys.k.sha256: is required"),
    (f"keys: {{a: {{sha256: {HASH}}}, b: {{sha256: [{HASH.upper()}]}}}}", "3:100: keys.b.sha256[0]: the same hash as that of key 'a': who calls would be ambiguous"),
    (f"keys: {{5: {{sha256: {HASH}}}, '5': {{sha256: {HASH}}}}}", "3:87: keys.5: this key is already on line 3"),
]

# fmt: on

UPSTREAMS = "upstreams: {u: {url: http://127.0.0.1/v1, apis: [chat]}}\n"
ROUTES = "routes: [{model: m, upstreams: [u]}]\n"
GROUPS: list[tuple[str, list[tuple[str, ...]]]] = [
    ("@", YAML),
    (UPSTREAMS + ROUTES + "@\n", TOP + KEYS),
    (
        ROUTES + "upstreams:\n  u:\n    url: http://127.0.0.1/v1\n    apis: [chat]\n    @\n",
        UPSTREAM,
    ),
    (ROUTES + "upstreams: {u: {apis: [chat], url: @}}\n", URL),
    (ROUTES + "upstreams: {u: {url: http://h, apis: @}}\n", APIS),
    (UPSTREAMS + "routes:\n- model: m\n  upstreams: [u]\n  @\n", ROUTE),
    (UPSTREAMS + "routes:\n- model: g*\n  upstreams: [u]\n  @\n", GLOB),
    (UPSTREAMS + "routes:\n- model: m\n  upstreams:\n  - @\n", TARGET),
    (UPSTREAMS + ROUTES + f"keys:\n  k:\n    sha256: {HASH}\n    @\n", KEY),
    (UPSTREAMS + ROUTES + "keys:\n  k:\n    sha256: @\n", SHA256),
]
CASES = [
    (file.replace("@", written, 1), expected)
    for file, cases in GROUPS
    for written, *expected in cases
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_each_mistake_has_its_sentence(text: str, expected: list[str]) -> None:
    """A file with a mistake is refused with its one sentence, at the offending key or value."""
    with pytest.raises(ConfigError) as caught:
        loads(text, path=Path("FILE"), environ=ENVIRON)

    assert str(caught.value) == "\n".join(f"FILE:{mistake}" for mistake in expected)


MINIMAL = """\
upstreams:
  u:
    url: http://127.0.0.1:8001/v1/
    apis: [chat]
routes:
- model: m
  upstreams: [u]
"""
LIMITLESS = f"keys:\n  k:\n    sha256: {HASH}\n"
CREDENTIAL = MINIMAL.replace("  u:\n", "  u:\n    credential: {env: A}\n")
OFF = LIMITLESS + "    disabled: true\n"


# fmt: off
WARNINGS = [
    (MINIMAL, "1:1: keys: there is no key, so no client can call"),
    (MINIMAL + LIMITLESS, "9:3: keys.k: has no limit"),
    (MINIMAL + OFF, ""),
    (MINIMAL + OFF + "    expires: 2026-12-31\n", "12:14: keys.k.expires: is past: this key is refused"),
    (MINIMAL + OFF + "    expires: 2027-01-01\n", ""),
    (MINIMAL + OFF + '    models: ["n*"]\n', "12:14: keys.k.models[0]: matches no route"),
    (MINIMAL + OFF + '    models: ["?*"]\n', ""),
    (MINIMAL + OFF + "listen: 0.0.0.0:80\n", "12:9: listen: is beyond loopback, and aiproxy ends no TLS: put HAProxy, Caddy or nginx before it"),
    (MINIMAL + OFF + "admin: '[::]:80'\n", "12:8: admin: is beyond loopback: whoever reaches it can read the metrics"),
    (MINIMAL + OFF + "max_buffered: 1MiB\n", "12:15: max_buffered: is less than max_body, 32MiB: larger bodies get 503"),
    (OFF + MINIMAL + "- {model: m, upstreams: [u]}\n", "12:11: routes[1].model: never used: routes[0], 'm', always matches first"),
    (OFF + MINIMAL.replace(" m\n", " '*'\n") + "- {model: x, upstreams: [u]}\n", "12:11: routes[1].model: never used: routes[0], '*', always matches first"),
    (OFF + MINIMAL + "- {model: '?', upstreams: [u]}\n", ""),
    (OFF + CREDENTIAL, ""),
    (OFF + CREDENTIAL.replace("127.0.0.1", "h"), "8:10: upstreams.u.url: the credential crosses the network in clear: use https"),
]
# fmt: on


@pytest.mark.parametrize(("text", "expected"), WARNINGS)
def test_warnings(text: str, expected: str) -> None:
    """What is allowed but doubtful is a warning with its place."""
    warnings = loads(text, path=Path("FILE"), environ=ENVIRON, now=NOW).warnings

    assert "\n".join(w.text("FILE") for w in warnings) == (f"FILE:{expected}" if expected else "")
