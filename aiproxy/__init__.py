"""aiproxy: a reverse proxy daemon for LLM APIs."""

__version__ = "0.1.0"
