"""What the programs that read manual pages think of ours."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.man

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = "man/aiproxy.8"


SOURCE = ("aiproxy", "man", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def said(*command: str) -> str:
    """Return all that a program says about the page, which it must take."""
    ran = subprocess.run(  # noqa: S603 - written here
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def test_mandoc_has_nothing_to_say() -> None:
    """Mandoc's lint finds no error and no warning."""
    assert said("mandoc", "-Tlint", "-Wwarning", PAGE) == ""


def test_groff_has_nothing_to_say() -> None:
    """Groff, which most Linux systems show pages with, formats it without a warning."""
    assert said("groff", "-mandoc", "-ww", "-z", PAGE) == ""


def test_it_is_installed(tmp_path: Path) -> None:
    """An installation has the page where `man` looks for what is on the PATH."""
    copy, prefix = tmp_path / "source", tmp_path / "prefix"
    copy.mkdir()
    for name in SOURCE:  # pip builds in the tree that it installs
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name)
        else:
            shutil.copy(ROOT / name, copy)
    # Without --ignore-installed pip removes the aiproxy that these tests run with.
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed")
    said(*pip, "--prefix", str(prefix), str(copy))
    assert (prefix / "share/man/man8/aiproxy.8").read_text() == (ROOT / PAGE).read_text()
    text = said("man", "--manpath", f"{prefix}/share/man", "8", "aiproxy")
    assert "aiproxy demo [--once | --upstream PORT]" in text
