"""Tests of the status page in a browser."""
