"""Rows of parametrized tests that only the full runs take (`tox -e ranks-full`, `parity-full`, `faults`)."""

from __future__ import annotations

import functools

import pytest

full = functools.partial(pytest.param, marks=pytest.mark.full)
