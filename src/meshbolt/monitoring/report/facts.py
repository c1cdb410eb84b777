"""The few numbers by which people know a run: how far it came, how fast it was, what it held."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

from meshbolt.monitoring.report.envelope import Envelope
from meshbolt.monitoring.report.gather import Gathered
from meshbolt.monitoring.report.wording import format_duration, plain, write

_RATES = (("throughput/tokens_per_second", "tokens/s"), ("throughput/samples_per_second", "samples/s"))


class Fact(NamedTuple):
    """A number of a run.

    Attributes:
        key: for programs.
        name: for people.
        value: the number, or a text.
        text: as people read it.
        note: what belongs to it.
    """

    key: str
    name: str
    value: float | str | None
    text: str
    note: str = ""


def status_of(found: Gathered) -> tuple[str, str]:
    """Return how a run ended, in a word, and in a sentence.

    Args:
        found: of the run.
    """
    end = found.run.end
    if end is None:
        return "open", "It did not record its end: it is still running, or it was ended from outside."
    return str(end["values"].get("status", "finished")), str(end["values"].get("text") or "")


def facts_of(found: Gathered) -> list[Fact]:
    """Return the numbers of a run, as many as there are.

    Args:
        found: of the run.
    """
    start, run = found.run.start, found.run
    total = start.get("max_steps")
    seconds = sum(attempt.ended - attempt.begun for attempt in run.attempts)
    facts = [
        Fact("steps", "Steps", run.last_step, f"{run.last_step:,}", f"of {total:,}" if total and total > 0 else ""),
        Fact("seconds", "Time", seconds, format_duration(seconds), _attempts(len(run.attempts))),
        *_losses(found),
        *_speed(found),
        *_memory(found),
    ]
    return [fact for fact in facts if fact.value is not None]


def loss_of(names: Iterable[str], stages: tuple[str, ...]) -> str | None:
    """Return the name under which a loss is logged; None where there is none.

    Args:
        names: of what is logged.
        stages: how the name begins, the most likely first.
    """
    found = sorted(names, key=lambda name: (not name.endswith("loss"), len(name)))
    for stage in stages:
        for name in found:
            if "loss" in name and name.startswith(stage) and (stage or not name.startswith(("val", "test"))):
                return name
    return None


def _attempts(count: int) -> str:
    return f"in {count} attempts" if count > 1 else ""


def _losses(found: Gathered) -> list[Fact]:
    facts = []
    training = loss_of(found.logged, ("train", "loss", ""))
    if training is not None and (last := found.logged[training].last):
        facts.append(Fact("loss", "Loss", last[1], write(last[1]), f"{training}, step {last[0]:,}"))
    validation = loss_of(found.logged, ("val",))
    if validation is not None and (best := found.logged[validation].lowest):
        facts.append(
            Fact("best_validation_loss", "Best validation", best[1], write(best[1]), f"{validation}, step {best[0]:,}")
        )
    return facts


def _speed(found: Gathered) -> list[Fact]:
    facts = []
    for name, unit in _RATES:
        if (value := _middle(found, name)) is not None:
            facts.append(Fact(unit.replace("/s", "_per_second"), unit, value, plain(value), "all ranks, median"))
            break
    step = _middle(found, "throughput/step_seconds")
    if step is not None:
        facts.append(Fact("step_seconds", "Step", step, write(step, "seconds"), "median"))
    mfu = _middle(found, "throughput/mfu")
    if mfu is not None:
        facts.append(Fact("mfu", "MFU", mfu, write(mfu, "fraction"), "of the devices' peak"))
    return facts


def _memory(found: Gathered) -> list[Fact]:
    curves = found.measured.get("memory/peak_bytes")
    if curves is None or curves.whole.highest is None:
        return []
    most = curves.whole.highest[1]
    rank = max(curves.ranks, key=lambda rank: (curves.ranks[rank].highest or (0, 0.0))[1])
    return [Fact("peak_memory_bytes", "Peak memory", most, write(most, "bytes"), f"rank {rank}")]


def _middle(found: Gathered, name: str) -> float | None:
    return _median(found.measured[name].whole) if name in found.measured else None


def _median(envelope: Envelope) -> float | None:
    means = [each.mean for each in envelope.stretches() if each.count]
    return median(means) if means else None
