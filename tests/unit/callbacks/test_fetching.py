from __future__ import annotations

from contextlib import ExitStack

from lightning.pytorch.profilers import PassThroughProfiler

from meshbolt.callbacks.fetching import FetchTimer

ACTION = "[_TrainingEpochLoop].train_dataloader_next"


def test_listeners_come_and_go_in_any_order_and_nothing_stays_behind() -> None:
    profiler, heard = PassThroughProfiler(), list[str]()
    before = dict(vars(profiler))

    def listening(name: str) -> tuple[FetchTimer, ExitStack]:
        timer = FetchTimer(begins=lambda: heard.append(f"{name} begins"), ends=lambda: heard.append(f"{name} ends"))
        stack = ExitStack()
        stack.enter_context(timer.listening(profiler))
        return timer, stack

    (first, leave_first), (second, leave_second) = listening("first"), listening("second")
    with profiler.profile(ACTION):
        assert first.under_way
    leave_first.close()
    with profiler.profile(ACTION), profiler.profile("something else"):
        assert second.under_way
        assert not first.under_way
    leave_second.close()
    with profiler.profile(ACTION):
        pass

    assert heard == ["first begins", "second begins", "first ends", "second ends", "second begins", "second ends"]
    assert vars(profiler) == before
    assert second.take() > 0
    assert second.take() == 0


def test_updates_are_heard_of_when_they_are_over() -> None:
    profiler, heard = PassThroughProfiler(), list[str]()
    timer = FetchTimer(updated=lambda: heard.append("updated"))
    with timer.listening(profiler):
        profiler.start("optimizer_step")
        assert heard == []
        profiler.stop("optimizer_step")
        profiler.stop("[Strategy]MeshStrategy.optimizer_step")
    assert heard == ["updated"]
