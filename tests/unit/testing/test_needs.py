"""`needs` skips with the reason, and only then."""

from __future__ import annotations

from meshbolt.testing import needs


def test_what_is_there_skips_nothing():
    assert needs(packages=["torch"]).args == (False,)
    assert needs().args == (False,)


def test_all_that_is_missing_is_in_the_reason():
    mark = needs(gpus=4096, packages=["torch", "no_such_module"])
    assert mark.args == (True,)
    assert mark.kwargs["reason"].startswith("needs no_such_module, which is not installed and 4096 GPUs and sees ")
