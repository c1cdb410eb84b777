from __future__ import annotations

from tests.unit.monitoring.page import DOCUMENT, page


def test_the_page_lists_the_metrics_of_the_catalogue() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == page(), "run `python -m tests.unit.monitoring.page`"
