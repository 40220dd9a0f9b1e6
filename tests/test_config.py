"""Loading a configuration: its values, its secrets, its warnings, and what it never shows."""

import hashlib
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from aiproxy.config import Address, Config, ConfigError, Mistake, json_schema, load, loads

EXAMPLE = Path(__file__).parent.parent / "etc" / "aiproxy.yaml"
FILE = Path("FILE")
HASH = hashlib.sha256(b"sk-aip-test").hexdigest()
SECRET = "sk-live-0123456789"
NOW = datetime(2027, 1, 1, tzinfo=UTC)
MINIMAL = """\
upstreams:
  u:
    url: http://127.0.0.1:8001/v1/
    apis: [chat]
routes:
- model: m
  upstreams: [u]
"""
WHOLE = f"""\
listen: '[::1]:8443'
admin: unix:/run/aiproxy/admin.sock
trusted_proxies: [10.0.0.0/8, 192.0.2.1, fd00::/8]
max_body: 64KiB
max_buffered: 1MiB
max_connections: 8
client_keepalive: 0s
upstreams:
  u:
    url: https://api.example/v1/?api-version=1
    credential: {{env: KEY}}
    auth: x-api-key
    apis: [responses, chat, messages, embeddings]
    headers: {{OpenAI-Organization: org-canary}}
    header_allow: [X-Tenant]
    idle_connections: 1min
    timeouts: {{first_byte: 250ms, total: 1h}}
  v: {{url: http://127.0.0.1, apis: [chat], auth: none}}
routes:
- {{model: a, upstreams: [{{name: v, model: b}}], max_output_tokens: 9}}
- {{model: "g*", upstreams: [u], list: [g1, g2]}}
keys:
  123: {{sha256: [{HASH.upper()}], models: [a, "g*"], expires: 2027-06-30, disabled: true}}
timeouts: {{connect: 1s, idle: 0s}}
streams: {{keepalive: 0s}}
drain: {{delay: 0s, timeout: 1min}}
log: {{level: debug, format: json}}
"""


def read(text: str, **environ: str) -> Config:
    """Return the configuration of a text."""
    return loads(text, path=FILE, environ=environ, now=NOW).config


def warned(text: str, **environ: str) -> list[str]:
    """Return the warnings of a text as they are printed."""
    return [w.text("FILE") for w in loads(text, path=FILE, environ=environ, now=NOW).warnings]


def refused(text: str, **environ: str) -> list[str]:
    """Return the mistakes of a text as they are printed."""
    with pytest.raises(ConfigError) as caught:
        loads(text, path=FILE, environ=environ, now=NOW)
    return str(caught.value).split("\n")


def with_credential(source: str) -> str:
    """Return a file whose upstream has this credential, on line 3."""
    return MINIMAL.replace("  u:\n", f"  u:\n    credential: {source}\n")


def test_defaults() -> None:
    """What a file leaves out has the documented default, in seconds and bytes."""
    config = read(MINIMAL)

    assert (str(config.listen), str(config.admin)) == ("127.0.0.1:8080", "127.0.0.1:9090")
    assert (config.max_body, config.max_buffered) == (32 << 20, 512 << 20)
    assert (config.max_connections, config.client_keepalive, config.retries) == (4096, 75.0, 2)
    assert [seconds for _, seconds in config.timeouts] == [5.0, 600.0, 300.0, 0.0, 10.0, 30.0, 60.0]
    assert (config.streams.keepalive, config.drain.delay, config.drain.timeout) == (
        15.0,
        5.0,
        600.0,
    )
    assert (config.log.level, config.log.format, config.tracing) == ("info", "auto", None)
    upstream = config.upstreams["u"]
    assert (upstream.auth, upstream.credential, upstream.idle_connections) == ("auto", None, 15.0)
    assert (upstream.url, upstream.ca_file) == ("http://127.0.0.1:8001/v1", None)


def test_every_supported_key() -> None:
    """What a file says is in the configuration."""
    config = read(WHOLE, KEY="s3cret")

    assert config.listen == Address("::1", 8443)
    assert config.admin.path == "/run/aiproxy/admin.sock"
    assert config.trusted_proxies == tuple(
        map(ip_network, ["10.0.0.0/8", "192.0.2.1/32", "fd00::/8"])
    )
    assert (config.max_body, config.client_keepalive) == (65_536, 0.0)
    upstream = config.upstreams["u"]
    assert (upstream.name, upstream.url) == ("u", "https://api.example/v1?api-version=1")
    assert upstream.apis == {"responses", "chat", "messages", "embeddings"}
    assert upstream.header_allow == {"x-tenant"}
    assert dict(upstream.headers) == {"OpenAI-Organization": "org-canary"}
    assert upstream.credential is not None
    assert upstream.credential.get_secret_value() == "s3cret"
    renamed, glob = config.routes
    assert (renamed.is_glob, glob.is_glob, glob.listed) == (False, True, ("g1", "g2"))
    assert (renamed.targets[0].model, renamed.max_output_tokens) == ("b", 9)
    key = config.keys["123"]
    assert (key.name, key.sha256, key.models) == ("123", (HASH,), ("a", "g*"))
    assert (key.expires, key.disabled) == (datetime(2027, 7, 1, tzinfo=UTC), True)
    assert (config.streams.keepalive, config.log.level) == (0.0, "debug")


def test_a_target_has_its_upstream() -> None:
    """The upstream of a target is the one object that the configuration has by that name."""
    config = read(WHOLE, KEY="x")

    assert config.routes[0].targets[0].upstream is config.upstreams["v"]
    assert config.routes[1].targets[0].upstream is config.upstreams["u"]


def test_timeouts_of_an_upstream() -> None:
    """An upstream's timeouts are its own over the global ones."""
    config = read(WHOLE, KEY="x")
    own = config.upstreams["u"].timeouts

    assert (own.connect, own.first_byte, own.idle, own.total) == (1.0, 0.25, 0.0, 3600.0)
    assert config.upstreams["v"].timeouts == config.timeouts


def test_a_configuration_cannot_be_changed() -> None:
    """Neither a field nor a mapping of it can be assigned to."""
    config: Any = read(MINIMAL)

    with pytest.raises(ValidationError, match="frozen"):
        config.max_body = 1
    for mapping in (config.upstreams, config.keys, config.upstreams["u"].headers):
        with pytest.raises(TypeError):
            mapping["x"] = None


def test_two_readings_differ_where_the_secret_does() -> None:
    """A reload can tell that a secret has changed, although nothing in the file has."""
    assert read(WHOLE, KEY="x") == read(WHOLE, KEY="x") != read(WHOLE, KEY="y")


@pytest.mark.parametrize("written", ["s3cret", "s3cret\n", "s3cret\r\n"])
def test_a_secret_loses_one_newline(written: str, tmp_path: Path) -> None:
    """A secret is the text of its variable or file without one newline at its end."""
    (tmp_path / "token").write_bytes(written.encode())
    sources = {
        "{env: KEY}": {"KEY": written},
        f"{{file: '{tmp_path}/token'}}": {},
        "{file: token}": {"CREDENTIALS_DIRECTORY": str(tmp_path)},
    }
    for source, environ in sources.items():
        credential = read(with_credential(source), **environ).upstreams["u"].credential
        assert credential is not None
        assert credential.get_secret_value() == "s3cret"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the secret in {} is empty"),
        (b"s3\x00cret", "the secret in {} must be printable ASCII, without spaces at its ends"),
        (b"s3cret\n\n", "the secret in {} must be printable ASCII, without spaces at its ends"),
        (b"\xffs3cret", "the secret in {} must be printable ASCII, without spaces at its ends"),
        (b"s" * 70_000, "{} is larger than 64 KiB"),
    ],
)
def test_a_bad_secret_is_not_repeated(content: bytes, what: str, tmp_path: Path) -> None:
    """The mistake about a file's secret names the file, and nothing that is in it."""
    (tmp_path / "token").write_bytes(content)
    origin = f"file '{tmp_path}/token'"

    assert refused(with_credential("{file: token}"), CREDENTIALS_DIRECTORY=str(tmp_path)) == [
        f"FILE:3:24: upstreams.u.credential.file: {what.format(origin)}"
    ]


def test_secrets_are_never_shown() -> None:
    """No dump or representation has a credential, a header's value or a key's hash."""
    loaded = loads(WHOLE, path=FILE, environ={"KEY": SECRET}, now=NOW)
    config = loaded.config
    upstream = config.upstreams["u"]
    shown = [repr(loaded), str(config), repr(upstream), repr(upstream.credential)]
    shown += [repr(config.keys), repr(config.routes), config.model_dump_json()]
    shown += [str(config.model_dump(by_alias=alias)) for alias in (True, False)]

    for text in shown:
        for secret in (SECRET, "org-canary", HASH):
            assert secret not in text
            assert secret.upper() not in text


@pytest.mark.parametrize("text", [WHOLE, EXAMPLE.read_text()])
def test_mistakes_do_not_repeat_secrets(text: str) -> None:
    """A credential, hash or header written in the wrong place is not in the mistakes."""
    tree = yaml.safe_load(text)
    for stanza in (tree, *tree["upstreams"].values(), *tree["routes"], *tree["keys"].values()):
        for key in list(stanza):
            kept, stanza[key] = stanza[key], SECRET
            try:
                loads(yaml.safe_dump(tree), path=FILE, environ={"KEY": SECRET})
            except ConfigError as error:
                assert SECRET not in f"{error} {error!r}"  # noqa: PT017 - some places take it
            stanza[key] = kept


def test_dump_is_written_like_the_file() -> None:
    """A JSON dump has the file's own names and units, for people to compare."""
    dump = read(WHOLE, KEY="x").model_dump(mode="json", by_alias=True)

    assert dump["listen"] == "[::1]:8443"
    assert dump["max_body"] == "64KiB"
    assert dump["timeouts"]["idle"] == "0s"
    assert dump["upstreams"]["u"]["credential"] == {"env": "KEY", "file": None}
    assert dump["upstreams"]["u"]["headers"] == {"OpenAI-Organization": "**********"}
    assert dump["routes"][0]["upstreams"][0]["name"] == "v"


def certificate() -> bytes:
    """Make a self-signed certificate."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    private = ec.generate_private_key(ec.SECP256R1())
    built = x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
    built = built.not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    return built.sign(private, SHA256()).public_bytes(Encoding.PEM)


def test_certificate_authorities(tmp_path: Path) -> None:
    """A ca_file must be a PEM file of certificates."""
    good, bad = tmp_path / "good.pem", tmp_path / "bad.pem"
    good.write_bytes(certificate())
    bad.write_text("nothing")
    text = MINIMAL.replace("  u:\n", "  u:\n    ca_file: CA\n")

    assert read(text.replace("CA", str(good))).upstreams["u"].ca_file == good
    assert refused(text.replace("CA", str(bad))) == [
        f"FILE:3:14: upstreams.u.ca_file: file '{bad}' has no PEM certificate"
    ]


@pytest.mark.parametrize(
    ("content", "line", "column", "what"),
    [
        (b"a: 1\nb: \xc3\xa9\xff\n", 2, 5, "is not UTF-8"),
        (b"#" * (1 << 20) + b"\n", 1, 1, "is larger than 1024 KiB"),
    ],
)
def test_a_file_that_is_no_text(
    content: bytes, line: int, column: int, what: str, tmp_path: Path
) -> None:
    """A file that is not UTF-8, or too large, is refused at the offending place."""
    path = tmp_path / "aiproxy.yaml"
    path.write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        load(path, environ={})
    assert caught.value.mistakes == [Mistake(line, column, "", what)]
    assert str(caught.value) == f"{path}:{line}:{column}: {what}"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a directory and an impossible path are mistakes like any other."""
    for path, reason in [
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (Path("a\0b"), "the path is wrong"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(path, environ={})
        assert caught.value.mistakes == [Mistake(1, 1, "", f"cannot be read: {reason}")]


@pytest.mark.parametrize("data", [MINIMAL.encode(), b"\xef\xbb\xbf" + MINIMAL.encode()])
def test_byte_order_mark_and_carriage_returns(data: bytes, tmp_path: Path) -> None:
    """A file from another system is read alike."""
    path = tmp_path / "aiproxy.yaml"
    path.write_bytes(data.replace(b"\n", b"\r\n"))

    assert load(path, environ={}).config == read(MINIMAL)


def test_all_mistakes_at_once() -> None:
    """Mistakes of YAML, grammar, references, secrets and missing functions come together."""
    text = """upstreams:
  openai: {url: https://h, apis: [chat], credential: {env: NOPE}}
  openai: {}
limiter: {on_error: deny}
routes:
- {model: *, upstreams: [opnai]}
"""
    assert refused(text.replace("*", "&a m").replace("model", "modl")) == [
        "FILE:2:60: upstreams.openai.credential.env: environment variable NOPE is not set",
        "FILE:3:3: upstreams.openai: this key is already on line 2",
        "FILE:4:21: limiter.on_error: not supported yet: only the default, degrade, is accepted",
        "FILE:6:3: routes[0].model: is required",
        "FILE:6:4: routes[0].modl: unknown key (did you mean 'model'?)",
        "FILE:6:10: routes[0].modl: an anchor is not allowed: write the value where it counts",
        "FILE:6:28: routes[0].upstreams[0]: no upstream 'opnai' (did you mean 'openai'?)",
    ]
    assert refused(text) == [
        "FILE:3:3: upstreams.openai: this key is already on line 2",
        'FILE:6:11: an unquoted * begins a YAML alias, which is not allowed: quote the glob, as in "*"',  # noqa: E501
    ]


def test_what_follows_from_a_mistake_is_none() -> None:
    """A value that could not be read is not called missing or wrong as well."""
    assert refused(MINIMAL.replace("http://127.0.0.1:8001/v1/", "!!str x")) == [
        "FILE:3:10: upstreams.u.url: a tag is not allowed: a value is what it looks like"
    ]


@pytest.mark.parametrize("written", ["yes", "0x10", "1_000", "2027-06-30", "1:30", "0o7", ".inf"])
def test_only_what_looks_like_a_number_is_one(written: str) -> None:
    """Words, dates and numbers of other bases are text, so they can name a model."""
    assert read(MINIMAL.replace("model: m", f"model: {written}")).routes[0].model == written


def test_keys_without_a_value() -> None:
    """`keys:` with nothing below it yet is no key at all, and a warning."""
    assert warned(MINIMAL + "keys:\n") == ["FILE:8:6: keys: there is no key, so no client can call"]


def loads_or_is_refused(text: str) -> None:
    """Fail if the loader raises anything but ConfigError, or that without a mistake."""
    try:
        loads(text, path=FILE, environ={})
    except ConfigError as error:
        assert error.mistakes  # noqa: PT017 - either outcome is right


@given(st.text())
def test_any_text(text: str) -> None:
    """Any text at all loads or is refused."""
    loads_or_is_refused(text)


@given(st.data())
def test_a_damaged_file(data: st.DataObject) -> None:
    """A good file with characters put in or taken out loads or is refused."""
    text = data.draw(st.sampled_from([MINIMAL, WHOLE]))
    start = data.draw(st.integers(0, len(text)))
    end = start + data.draw(st.integers(0, 20))
    put = data.draw(st.text(alphabet="\n :-[]{}*&!'\"#|>%@,?~ab1\0\u2028", max_size=6))
    loads_or_is_refused(text[:start] + put + text[end:])


STANZAS = [json_schema(), *json_schema()["$defs"].values()]
KEYS = sorted({key for stanza in STANZAS for key in stanza.get("properties", {})})
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["u", "m", "5s", "1MiB", "5/s", "sk-x", "http://h", HASH]),
)
TREES = st.recursive(
    LEAVES,
    lambda child: st.one_of(
        st.lists(child, max_size=3),
        st.dictionaries(st.sampled_from([*KEYS, "u", "k"]), child, max_size=4),
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(sorted(Config.model_fields)), TREES))
def test_any_tree(tree: dict[str, Any]) -> None:
    """Well-formed YAML of any shape below the file's own keys loads or is refused."""
    loads_or_is_refused(yaml.safe_dump(yaml.safe_load(MINIMAL) | tree))
