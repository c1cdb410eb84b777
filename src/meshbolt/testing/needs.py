"""Skip a test, with the reason, where the machine lacks what the test needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from meshbolt.errors import MissingPackageError

if TYPE_CHECKING:
    import pytest


def needs(*, gpus: int = 0, packages: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Return a pytest mark that skips the test unless the machine has what it needs.

    Args:
        gpus: How many GPUs the test uses.
        packages: Names of the modules that must be importable.

    Raises:
        MissingPackageError: pytest itself is not installed.

    Example:
        >>> needs(packages=["no_such_module"]).kwargs["reason"]
        'needs no_such_module, which is not installed'
    """
    try:
        import pytest
    except ImportError:
        raise MissingPackageError("meshbolt.testing.needs marks tests for pytest: pip install pytest") from None
    lacking = [f"{name}, which is not installed" for name in packages if importlib.util.find_spec(name) is None]
    # Counted through NVML where it can be, which leaves this process fit to be forked.
    found = torch.cuda.device_count() if gpus else 0
    if found < gpus:
        lacking.append(f"{gpus} GPU{'s' if gpus > 1 else ''} and sees {found}")
    return pytest.mark.skipif(bool(lacking), reason=f"needs {' and '.join(lacking)}")
