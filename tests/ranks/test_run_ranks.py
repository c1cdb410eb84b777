"""`run_ranks` on ranks that behave: what they find, what they return, and how they differ from each other."""

from __future__ import annotations

import gc
import logging
import os
import random
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from meshbolt.errors import ConfigError, MeshboltError
from meshbolt.testing import RankFailure, run_ranks, run_ranks_expecting


def sharded_step() -> torch.Tensor:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model[0].weight.full_tensor()


def summed(factor: float) -> float:
    value = torch.tensor(dist.get_rank() * factor)
    dist.all_reduce(value)
    return value.item()


def described() -> dict[str, object]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return {
        "variables": {name: os.environ[name] for name in names},
        "group": (dist.get_rank(), dist.get_world_size(), dist.get_backend()),
        "threads": torch.get_num_threads(),
        "draws": (random.random(), torch.rand(()).item()),
    }


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_sharded_step_gives_the_same_parameters_on_every_number_of_ranks(n: int):
    alone = run_ranks(sharded_step, 1)[0]
    for weight in run_ranks(sharded_step, n):
        torch.testing.assert_close(weight, alone)


def test_arguments_reach_every_rank_and_results_come_back_in_the_order_of_the_ranks():
    assert run_ranks(summed, 3, 2.0) == [6.0, 6.0, 6.0]
    assert run_ranks(dist.get_rank, 4) == [0, 1, 2, 3]


def test_a_rank_finds_its_place_in_the_environment_and_in_the_group():
    for rank, found in enumerate(run_ranks(described, 2)):
        assert found["variables"] == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
        }
        assert found["group"] == (rank, 2, "gloo")
        assert found["threads"] == 1


def test_random_numbers_do_not_depend_on_what_ran_before():
    first = [found["draws"] for found in run_ranks(described, 2)]
    torch.rand(3)
    random.random()
    assert [found["draws"] for found in run_ranks(described, 2)] == first
    assert first[0] == first[1]


def test_the_parent_keeps_its_environment_and_stays_fit_to_be_forked():
    before = dict(os.environ)
    run_ranks(summed, 2, 1.0)
    assert dict(os.environ) == before
    assert not dist.is_initialized()


def test_large_results_come_through_from_every_rank_at_once():
    def large() -> torch.Tensor:
        return torch.full((10 * 2**20 // 4,), float(dist.get_rank()))

    sizes = [(tensor.numel() * 4, tensor[-1].item()) for tensor in run_ranks(large, 2)]
    assert sizes == [(10 * 2**20, 0.0), (10 * 2**20, 1.0)]


def test_nested_tensors_come_back_by_value():
    def nested() -> dict[str, object]:
        weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        return {"weights": [weight, (weight[0, 1:], torch.tensor(2, dtype=torch.int8))], "rank": dist.get_rank()}

    for rank, value in enumerate(run_ranks(nested, 2)):
        assert value["rank"] == rank
        assert torch.equal(value["weights"][1][0], torch.tensor([1.0, 2.0]))
        assert value["weights"][1][1].dtype is torch.int8


def test_a_result_that_cannot_travel_is_an_error_that_says_so():
    with pytest.raises(RankFailure, match="a value of type lock cannot travel between processes") as failure:
        run_ranks(threading.Lock, 2)
    assert all(outcome.raised(TypeError) for outcome in failure.value.outcomes)


def test_a_sharded_result_is_an_error_with_the_way_out():
    def sharded() -> object:
        model = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (2,)))
        return model.weight

    run_ranks_expecting(sharded, 2, error=TypeError, match=r"return `x.full_tensor\(\)` or `x.to_local\(\)`")


def test_the_traceback_of_every_rank_is_in_the_error():
    def fail() -> None:
        names = "first", "second"
        raise KeyError(names[dist.get_rank()])

    with pytest.raises(RankFailure, match="2 of 2 ranks failed") as failure:
        run_ranks(fail, 2)
    text = str(failure.value)
    assert "KeyError: 'first'" in text
    assert "KeyError: 'second'" in text
    assert text.count("raise KeyError(names[dist.get_rank()])") == 2


def test_an_expected_error_must_be_raised_by_every_rank():
    def refuse(*, ranks: int) -> None:
        if dist.get_rank() < ranks:
            raise ConfigError(f"rank {dist.get_rank()} says 3 is not 4")

    def refuse_on_one() -> None:
        refuse(ranks=1)

    def refuse_on_both() -> None:
        refuse(ranks=2)

    messages = run_ranks_expecting(refuse_on_both, 2, error=MeshboltError, match=r"3 is not \d")
    assert messages == ["rank 0 says 3 is not 4", "rank 1 says 3 is not 4"]
    with pytest.raises(RankFailure, match=r"every rank should raise ConfigError; ranks \[1\] did not"):
        run_ranks_expecting(refuse_on_one, 2, error=ConfigError)
    with pytest.raises(RankFailure, match=r"ranks \[0\] did not"):
        run_ranks_expecting(refuse_on_both, 2, error=ConfigError, match="rank 1")
    with pytest.raises(RankFailure, match=r"every rank should raise KeyError; ranks \[0, 1\] did not"):
        run_ranks_expecting(refuse_on_both, 2, error=KeyError)


def test_what_ranks_print_is_shown_rank_by_rank(capsys: pytest.CaptureFixture[str]):
    def speak() -> None:
        print("hello ×")
        logging.getLogger("tests").warning("logged")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)

    print("before, unflushed ", end="")
    run_ranks(speak, 2)
    written = capsys.readouterr().out
    assert written.count("before, unflushed") == 1
    assert [line for line in written.splitlines() if "hello" in line] == [
        "before, unflushed [rank 0] hello ×",
        "[rank 1] hello ×",
    ]
    assert "[rank 1] from a child" in written


def test_an_error_in_a_thread_of_a_rank_is_shown(capsys: pytest.CaptureFixture[str]):
    def fail_in_a_thread() -> None:
        thread = threading.Thread(target=int, args=("no number",))
        thread.start()
        thread.join()

    run_ranks(fail_in_a_thread, 1)
    assert "[rank 0] ValueError: invalid literal for int()" in capsys.readouterr().out


def test_a_warning_is_an_error_in_the_ranks_as_it_is_in_the_test():
    def warn() -> None:
        warnings.warn("beware", UserWarning, stacklevel=1)

    run_ranks_expecting(warn, 2, error=UserWarning, match="beware")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_ranks(warn, 2) == [None, None]


def test_a_rank_may_have_processes_of_its_own():
    def load() -> list[float]:
        loader = torch.utils.data.DataLoader(torch.arange(4.0), num_workers=1, persistent_workers=True)
        return [batch.item() for batch in loader]

    assert run_ranks(load, 2) == [[0.0, 1.0, 2.0, 3.0]] * 2


def test_a_rank_may_end_its_group_and_meet_the_others_by_torchruns_variables():
    def meet_again() -> float:
        dist.destroy_process_group()
        dist.init_process_group("gloo")
        return summed(1.0)

    assert run_ranks(meet_again, 2) == [1.0, 1.0]


def test_a_rank_that_hosts_the_store_waits_for_those_that_use_it():
    def read_late() -> bytes:
        rank, port = dist.get_rank(), int(os.environ["MASTER_PORT"])
        store = dist.TCPStore("127.0.0.1", port, world_size=2, is_master=rank == 0)
        # Held by more than this call: the server ends with the object, and in real life the group holds it.
        read_late.store = store
        store.set(str(rank), "here")
        time.sleep(0.5 * rank)
        return store.get("0")

    assert run_ranks(read_late, 2) == [b"here", b"here"]


def test_garbage_of_the_test_is_not_finalised_by_its_ranks(capsys: pytest.CaptureFixture[str]):
    class Noisy:
        def __del__(self) -> None:
            print("finalised")

    gc.disable()
    try:
        noisy = Noisy()
        noisy.itself = noisy
        del noisy
        run_ranks(gc.collect, 2)
        assert "finalised" not in capsys.readouterr().out
    finally:
        gc.enable()
        gc.collect()


def trained() -> tuple[int, int, float]:
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    model = BoringModel()
    trainer.fit(model)
    return trainer.global_rank, trainer.world_size, model.layer.weight.sum().item()


# Lightning's own, with torch 2.13: nothing that this test is about.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_a_lightning_trainer_finds_its_ranks():
    (rank0, world0, sum0), (rank1, world1, sum1) = run_ranks(trained, 2)
    assert (rank0, rank1, world0, world1) == (0, 1, 2, 2)
    assert sum0 == sum1


def test_spawned_ranks_do_the_same_as_forked_ones():
    for spawned, forked in zip(run_ranks(sharded_step, 2, start="spawn"), run_ranks(sharded_step, 2), strict=True):
        assert torch.equal(spawned, forked)


def warn_at_top_level() -> None:
    warnings.warn("beware", UserWarning, stacklevel=1)


def test_spawned_ranks_raise_typed_errors_and_heed_the_warning_filters():
    run_ranks_expecting(warn_at_top_level, 2, error=UserWarning, match="beware", start="spawn")


def test_a_trivial_step_takes_a_fraction_of_a_second():
    def timed(n: int) -> float:
        began = time.perf_counter()
        run_ranks(sharded_step, n)
        return time.perf_counter() - began

    # Ten times the quiet figures (0.06 s and 0.25 s): a cold rank, which is what this guards against, takes seconds.
    assert min(timed(2) for _ in range(3)) < 0.6
    assert min(timed(4) for _ in range(3)) < 2.5
