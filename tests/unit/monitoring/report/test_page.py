"""If these fail, a report is no file by itself, lets a name run as code, or grows with the length of a run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.unit.monitoring.report.made_up import BEGUN, Writer, make_run

from meshbolt.monitoring.report import find_runs, summary_of, write_report

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' &amp; \u2028"
VOID = {"meta", "link", "br", "img", "path"}


class Tree(HTMLParser):
    """Notes elements, and which are not closed in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def written(directory: Path) -> str:
    return write_report(find_runs(directory)[-1], directory / "out" / "report.html").read_text()


def parsed(page: str) -> Tree:
    tree = Tree()
    tree.feed(page)
    tree.close()
    return tree


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(make_run(tmp_path_factory.mktemp("whole")))


def test_a_page_has_every_section_with_its_figures(whole: str) -> None:
    tree = parsed(whole)
    ids = [attributes.get("id") for tag, attributes in tree.tags if tag == "section"]
    text = " ".join(tree.text)

    assert ids == [
        *("training", "time", "memory", "communication", "pipeline", "offload"),
        *("ranks", "events", "settings", "environment"),
    ]
    assert 'class="missing"' not in whole
    for expected in (
        "ByteGPT",
        "finished",
        "2,000",
        "46.8 GiB",
        "MFU",
        "reduce_scatter",
        "rank 1",
        "bf16-mixed",
        "2.13.0",
    ):
        assert expected in text
    assert "command line: trainer.precision" in text, "settings tell where they are from"


def test_every_element_is_closed_in_its_order(whole: str) -> None:
    tree = parsed(whole)

    assert tree.wrong == []
    assert tree.open == []


def test_a_page_asks_for_nothing_outside_of_it(whole: str) -> None:
    tree = parsed(whole)
    asked = [
        value
        for _, attributes in tree.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]

    assert all(value and value.startswith(("#", "data:,")) for value in asked), asked
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", whole)


def test_what_a_run_is_called_cannot_become_code(tmp_path: Path) -> None:
    with Writer(tmp_path, 0) as writer:
        start = {"title": EVIL, "strategy": EVIL, "call": EVIL, "settings": [[EVIL, EVIL, EVIL]], "device": EVIL}
        writer.write(
            "run", 0, {"what": "start"}, **start, environment=[[EVIL, EVIL, EVIL]], precision=EVIL, world_size=2
        )
        writer.write("rank", 0, {EVIL: EVIL})
        for step in (1, 2, 3):
            writer.write("metrics", step, {EVIL: 1.0 * step, f"train_{EVIL}": 2.0})
            writer.write("odd", step, {f"odd/{EVIL}": 1.0 * step, f"odd/{EVIL}text": EVIL})
        row = {"axis": EVIL, "collective": EVIL, "calls": 1, "bytes": 2, "seconds": 3}
        writer.write("communication", 3, {}, rows=[row])
        writer.write("event", 3, {"what": EVIL, "text": EVIL})
        drawn = {"name": EVIL, "end_seconds": 1.0, "bubble": 0.1, "spans": [[0, 0, 0, EVIL, 0.0, 1.0]]}
        writer.write("pipeline", 3, {}, schedule=EVIL, stages=EVIL, microbatches=EVIL, timelines=[drawn])
        writer.write("run", 3, {"what": "end", "status": EVIL, "text": EVIL}, traceback=EVIL)
    page = written(tmp_path)
    tree = parsed(page)
    scripts = [attributes for tag, attributes in tree.tags if tag == "script"]

    assert [each for each in scripts if each.get("type") != "application/json"] == [{}], "one script, and it is ours"
    assert not any(tag == "img" for tag, _ in tree.tags)
    assert not any(name.startswith("on") for _, attributes in tree.tags for name in attributes)
    assert tree.wrong == []
    assert "alert(1)" in page, "it is shown, as text"
    for data in re.findall(r'<script type="application/json">(.*?)</script>', page):
        json.loads(data)
        assert not set("<>&") & set(data), "nothing in it can begin or end an element, or a comment"


def test_a_page_of_nothing_says_how_to_have_more(tmp_path: Path) -> None:
    with Writer(tmp_path, 0) as writer:
        writer.write("event", 0, {"what": "warning", "text": "lonely"})
    page = written(tmp_path)

    for call in ("RunReport()", "ThroughputMonitor()", "MemoryMonitor()", "CommunicationMonitor()"):
        assert call in page
    assert "no end recorded" in page
    assert "lonely" in page
    assert parsed(page).wrong == []


def test_what_a_run_does_not_have_is_no_section(tmp_path: Path) -> None:
    start = {"mesh": {"dp_shard": 1}, "world_size": 1, "offloads": False}
    with Writer(tmp_path, 0) as writer:
        writer.write("run", 0, {"what": "start"}, **start)
    ids = [attributes.get("id") for tag, attributes in parsed(written(tmp_path)).tags if tag == "section"]

    assert not {"pipeline", "communication", "offload"} & set(ids)


def test_ranks_whose_records_are_elsewhere_are_missed(tmp_path: Path) -> None:
    make_run(tmp_path, ranks=4, steps=20)
    (tmp_path / "rank_3.jsonl").unlink()

    assert "Records of 1 of 4 ranks are not in this directory" in written(tmp_path)


def test_a_failed_run_tells_its_error_at_the_top(tmp_path: Path) -> None:
    make_run(tmp_path, ranks=1, steps=20, end={"status": "failed", "text": "ValueError: boom", "traceback": "in step"})
    page = written(tmp_path)

    assert page.index("ValueError: boom") < page.index('id="training"')
    assert "in step" in page


def test_a_time_that_nobody_knows_is_no_time(whole: str) -> None:
    rows = re.findall(r"<tr><td>([a-z_]+)</td><td>([a-z_]+)</td>(.*?)</tr>", whole)
    cells = {row[1]: re.findall(r">([^<]+)</td>", row[2]) for row in rows}

    assert cells["send"] == ["12,800", "9.3 GiB", "–", "–", "–", "–"]
    assert cells["reduce_scatter"] == ["2,400", "55.9 GiB", "2.8 s", "1.2 s", "20.0 GiB/s", "51.0 %"]


def test_ranks_are_counted_and_not_averaged(whole: str) -> None:
    assert re.search(r"rank 1: 161 of 200, rank 3: 39 of 200", whole)
    assert "What each rank does by itself in a step" in whole
    assert ">rank 3</li>" in whole


def test_a_restart_is_marked_in_the_charts(tmp_path: Path) -> None:
    make_run(tmp_path, ranks=1, steps=90, run="1")
    make_run(tmp_path, ranks=1, steps=120, first=50, run="2", begun=BEGUN + 1000)
    page = written(tmp_path)

    assert page.count('data-tip="restart from step 50"') == page.count('class="chart"')
    assert "in 2 attempts" in page


def test_a_warning_about_an_event_is_told_once(tmp_path: Path) -> None:
    with Writer(tmp_path, 0) as writer:
        writer.write("event", 3, {"what": "slow rank", "text": "Rank 1 is slow."})
        writer.write("event", 3, {"what": "warning", "text": "UserWarning: Rank 1 is slow."})
        writer.write("event", 3, {"what": "warning", "text": "UserWarning: another"})
    page = written(tmp_path)

    assert page.count("Rank 1 is slow.") == 1
    assert "UserWarning: another" in page


def test_a_loss_that_is_no_number_is_an_event_and_a_gap(tmp_path: Path) -> None:
    with Writer(tmp_path, 0) as writer:
        for step in range(10):
            writer.write("metrics", step, {"loss": "nan" if step == 4 else 1.0})
    page = written(tmp_path)
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', page)

    assert json.loads(data)["series"][0]["mean"][4] is None
    assert "loss was no finite number, 1 times in all" in page
    assert re.search(r'class="line l0" d="M[\d ]+(L[\d ]+){3}M', page), "the line is broken there"


def test_a_long_run_of_many_ranks_stays_small(tmp_path: Path) -> None:
    make_run(tmp_path, ranks=16, steps=10_000, every=100)
    with Writer(tmp_path, 0) as writer:
        for step in range(0, 100_000, 5):
            writer.write("metrics", step, {"train_loss": 1.0 / (step + 1), "lr": 1e-3})
    page = written(tmp_path)

    assert len(page) < 3_000_000
    assert "Of 16 ranks" in page


def test_many_metrics_are_a_table_beyond_what_one_looks_at(tmp_path: Path) -> None:
    with Writer(tmp_path, 0) as writer:
        for step in range(3):
            writer.write("metrics", step, {f"metric_{number:03}": number + step for number in range(300)})
    page = written(tmp_path)

    assert page.count('class="chart"') < 60
    assert "metric_299" in page


def test_the_summary_is_what_the_page_begins_with(tmp_path: Path) -> None:
    summary: dict[str, Any] = summary_of(find_runs(make_run(tmp_path, ranks=2, steps=200))[0])

    assert summary["status"] == "finished"
    assert summary["ranks"] == 2
    assert summary["figures"]["steps"] == 200
    assert summary["figures"]["tokens_per_second"] == pytest.approx(65536 / 0.213, rel=0.02)
    assert json.dumps(summary, allow_nan=False)
