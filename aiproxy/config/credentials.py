"""What a file refers to outside itself: the secrets of upstreams, the files of authorities.

No message repeats a secret: a mistake names the variable or the file it was looked for in.
"""

from __future__ import annotations

import os
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from aiproxy.config import texts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiproxy.config.document import Document, Mistake

_MAX_SECRET = 64 * 1024


def read_credentials(
    document: Document, environ: Mapping[str, str]
) -> tuple[dict[str, SecretStr], list[Mistake]]:
    """Return the secret of each upstream that refers to one, by its name, and what is wrong."""
    secrets: dict[str, SecretStr] = {}
    found = []
    for steps, source in document.find("upstreams.*.credential"):
        if not isinstance(source, dict) or len(source) != 1:
            continue  # the grammar says what is wrong
        ((origin, value),) = source.items()
        if not isinstance(value, str):
            continue
        try:
            if origin == "env":
                secrets[str(steps[1])] = SecretStr(_from_variable(value, environ))
            elif origin == "file":
                secrets[str(steps[1])] = SecretStr(_from_file(value, environ))
        except ValueError as error:
            found.append(document.mistake((*steps, origin), str(error)))
    return secrets, found


def check_authorities(document: Document) -> list[Mistake]:
    """Return a mistake for each `ca_file` that cannot be read as PEM certificates."""
    found = []
    for steps, value in document.find("upstreams.*.ca_file"):
        if isinstance(value, str) and value.startswith("/"):
            try:
                _check_regular(Path(value))
                ssl.create_default_context(cafile=value)
            except ssl.SSLError:
                found.append(document.mistake(steps, f"file {value!r} has no PEM certificate"))
            except OSError as error:
                found.append(document.mistake(steps, _unreadable(value, error)))
            except ValueError as error:
                found.append(document.mistake(steps, str(error)))
    return found


def _from_variable(name: str, environ: Mapping[str, str]) -> str:
    texts.variable(name)
    if (value := environ.get(name)) is None:
        raise ValueError(f"environment variable {name} is not set")
    return _checked(value, f"environment variable {name}")


def _from_file(name: str, environ: Mapping[str, str]) -> str:
    path = Path(name)
    if not path.is_absolute():
        if not (directory := environ.get("CREDENTIALS_DIRECTORY")):
            raise ValueError(
                f"file {name!r} is relative, and $CREDENTIALS_DIRECTORY, where it would be looked "
                "up, is not set"
            )
        path = Path(directory, name)
    try:
        _check_regular(path)
        with path.open("rb") as file:
            data = file.read(_MAX_SECRET + 1)
    except OSError as error:
        raise ValueError(_unreadable(str(path), error)) from None
    if len(data) > _MAX_SECRET:
        raise ValueError(f"file {str(path)!r} is larger than {_MAX_SECRET // 1024} KiB")
    return _checked(data.decode("latin-1"), f"file {str(path)!r}")


def _checked(text: str, origin: str) -> str:
    try:
        return texts.secret(text)
    except ValueError as error:
        raise ValueError(f"the secret in {origin} {error}") from None


def _check_regular(path: Path) -> None:
    """Refuse what blocks or never ends: a pipe, a device."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"file {str(path)!r} is not a regular file")


def _unreadable(path: str, error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else "it cannot be opened"
    return f"file {path!r} cannot be read: {reason}"
