"""The three sizes of a batch, which must go together: samples of a step = those of a loader's batch x accumulation x ranks."""

from __future__ import annotations

from dataclasses import dataclass

from meshbolt.deepspeed_json.given import Given
from meshbolt.errors import ConfigError

TOTAL, EACH, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sizes as far as they are known.

    Attributes:
        total: samples of an optimizer step on all ranks; None where the loader and the ranks decide.
        each: samples of a batch that one rank's loader gives; None where the loader decides.
        steps: batches of a window; None where the Trainer decides.
        ranks: data-parallel ranks; None where they are not known yet.
    """

    total: int | None
    each: int | None
    steps: int | None
    ranks: int | None

    @property
    def quotient(self) -> int | None:
        """What accumulation and data-parallel ranks are to multiply to, where neither is known; else None."""
        is_open = self.total is not None and self.each is not None and self.steps is None
        return self.total // self.each if is_open else None  # type: ignore[operator]

    def needs_ranks(self) -> str:
        """Return what to say where accumulation has to be known, and is not."""
        return (
            f"{_sizes(self.total, self.each, None, None)}: their quotient {self.quotient} is accumulation x data-parallel ranks, "
            f"and the ranks are not known yet. Add {STEPS!r}, or give data_parallel_size=."
        )

    def each_on(self, ranks: int, *, steps: int) -> int | None:
        """Return the samples of a loader's batch in a run; None where the loader decides.

        Args:
            ranks: that see different samples.
            steps: batches of a window.

        Raises:
            ConfigError: the sizes do not go with them.
        """
        if self.ranks is not None and self.ranks != ranks:
            raise ConfigError(
                f"data_parallel_size={self.ranks} was given for the DeepSpeed configuration, and this run has {ranks} "
                "data-parallel ranks. Give their number, or leave it out."
            )
        return _resolve(self.total, self.each, steps, ranks)[1]


def batch_of(given: Given, *, ranks: int | None) -> Batch:
    """Return the sizes that a file comes to.

    Args:
        given: the file.
        ranks: data-parallel ranks, where they are known.

    Raises:
        ConfigError: the sizes do not go together.
    """
    try:
        batch = _batch(given.get(TOTAL), given.get(EACH), given.get(STEPS), ranks)
    except ConfigError as error:
        raise ConfigError(f"{given.source}: {error}") from error
    _note(given, batch)
    return batch


def _batch(total: int | None, each: int | None, steps: int | None, ranks: int | None) -> Batch:
    if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1):
        raise ConfigError(f"data_parallel_size={ranks!r} is not a number of ranks. Use 1 or more, or leave it out.")
    if ranks is None and total is not None and (divisor := (each or 1) * (steps or 1)) and total % divisor:
        raise ConfigError(
            f"{_sizes(total, each, steps, None)}: {total} is no multiple of {divisor}, so that no number of ranks fits. "
            f"{_closest(total, divisor)}"
        )
    if ranks is not None:
        total, each, steps = _resolve(total, each, steps, ranks)
    return Batch(total=total, each=each, steps=steps, ranks=ranks)


def _resolve(
    total: int | None, each: int | None, steps: int | None, ranks: int
) -> tuple[int | None, int | None, int | None]:
    """Fill in the sizes that follow from the others; what the Trainer or the loader decides stays None.

    Raises:
        ConfigError: they do not go together on so many ranks.
    """
    if total is None:
        return (each * steps * ranks if each and steps else None), each, steps
    known = (each or 1) * (steps or 1) * ranks
    asked = _sizes(total, each, steps, ranks)
    if each is not None and steps is not None:
        if total != known:
            raise ConfigError(
                f"{asked}: {each} x {steps} x {ranks} = {known}, not {total}. Make {TOTAL!r} {known}, or leave one out."
            )
        return total, each, steps
    if total % known:
        raise ConfigError(f"{asked}: {total} is no multiple of {known}. {_closest(total, known)}")
    if each is not None:
        return total, each, total // known
    return total, (None if steps is None else total // known), steps


def _closest(total: int, divisor: int) -> str:
    below, above = total // divisor * divisor, -(-total // divisor) * divisor
    choices = f"{below} or {above}" if below else str(above)
    return f"Make {TOTAL!r} {choices}, or change the others."


def _sizes(total: int | None, each: int | None, steps: int | None, ranks: int | None) -> str:
    parts = [f"{name!r} {value}" for name, value in ((TOTAL, total), (EACH, each), (STEPS, steps)) if value is not None]
    if ranks is not None:
        parts.append(f"{ranks} data-parallel ranks")
    return ", ".join(parts)


def _note(given: Given, batch: Batch) -> None:
    ranks = "the data-parallel ranks" if batch.ranks is None else f"{batch.ranks} data-parallel ranks"
    if given.is_auto(STEPS):
        given.note(STEPS, "Trainer(accumulate_grad_batches=...)", why="auto: the Trainer decides", outcome="mapped")
    else:
        given.note(STEPS, f"Trainer(accumulate_grad_batches={batch.steps})")
        why = "follows from the other sizes" if batch.steps else "the Trainer decides"
        if batch.quotient is not None:
            why = f"{batch.quotient} / data-parallel ranks, checked when a run begins"
        given.add(STEPS, becomes=f"Trainer(accumulate_grad_batches={batch.steps or '...'})", why=why)
    for key, value in ((TOTAL, batch.total), (EACH, batch.each)):
        if given.is_auto(key):
            given.note(key, "", why="auto: follows from the loader's batch and the ranks", outcome="mapped")
        elif value is not None:
            given.note(key, f"checked: {value}", why=f"with {ranks}, when a run begins")
