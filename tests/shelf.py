"""A storage for tests: an fsspec scheme over local files that several ranks share, and that cannot rename."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Shelf(LocalFileSystem):
    """Files under `shelf:///absolute/path`; as an object store has it, to move is not one step, so nobody should."""

    protocol = "shelf"

    def __init__(self, *, token: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.token = token

    def mv(self, *args: Any, **options: Any) -> None:
        raise AssertionError("an object store cannot rename")

    mv_file = rename = move = mv


fsspec.register_implementation("shelf", Shelf, clobber=True)
