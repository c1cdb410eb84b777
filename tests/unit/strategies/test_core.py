from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch.plugins.precision as trainer_plugins
import pytest
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from meshbolt import Checkpoint, ConfigError, MeshStrategy, Offload, Recompute, UnsupportedError, Zero
from meshbolt.fabric import MeshStrategy as FabricMeshStrategy
from meshbolt.plugins import convert_precision
from meshbolt.strategies.arguments import ARGUMENTS

BOTH: list[Callable[..., Any]] = [MeshStrategy, FabricMeshStrategy]


@pytest.mark.parametrize("strategy", BOTH)
@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"zero": 4}, ConfigError, "zero=4"),
        ({"zero": True}, ConfigError, "zero=True"),
        ({"zero": "3"}, ConfigError, "zero='3'"),
        ({"recompute": "some"}, ConfigError, "recompute='some'"),
        ({"compile": "max-autotune"}, ConfigError, "compile='max-autotune'"),
        ({"tensor_parallel": 0}, ConfigError, "tensor_parallel=0"),
        ({"tensor_parallel": {"size": 2}}, ConfigError, r"Write tensor_parallel=TensorParallel\(size=2\)"),
        ({"offload": "disk"}, ConfigError, r"Offload\(optimizer='disk'\): there is no such place"),
        ({"offload": "nvme"}, ConfigError, r"Offload\(optimizer='nvme'\) needs a directory"),
        ({"offload": {"optimizer": "cpu"}}, ConfigError, r"Write offload=Offload\(optimizer='cpu'\)"),
        ({"checkpoint_io": TorchCheckpointIO()}, UnsupportedError, "TorchCheckpointIO"),
        ({"zero": 2.0}, ConfigError, r"zero=2\.0"),
        ({"zero": {"stage": 2, "replicate": 4}}, ConfigError, r"Write zero=Zero\(stage=2, replicate=4\)"),
        ({"zero": {"stag": 2}}, ConfigError, "it has stage, replicate, unit, reduce_dtype"),
        ({"recompute": {"mode": "full"}}, ConfigError, r"Write recompute=Recompute\(mode='full'\)"),
        ({"recompute": ""}, ConfigError, "recompute=''"),
        ({"checkpoint": True}, ConfigError, r"checkpoint=True is not a Checkpoint"),
        ({"checkpoint": {"verify": False}}, ConfigError, r"Write checkpoint=Checkpoint\(verify=False\)"),
        ({"tensor_parallel": True}, ConfigError, "tensor_parallel=True"),
        ({"pipeline_parallel": 0}, ConfigError, "pipeline_parallel=0"),
        ({"timeout": 30}, ConfigError, r"timeout=30 .*timedelta\(seconds=30\)"),
        ({"timeout": None}, ConfigError, "timeout=None"),
        ({"timeout": timedelta(0)}, ConfigError, r"timeout=datetime\.timedelta\(0\)"),
        ({"start_method": "popn"}, ConfigError, "start_method='popn' must be one of popen, spawn, fork, forkserver"),
        ({"process_group_backend": "glo"}, ConfigError, "process_group_backend='glo'"),
        ({"process_group_backend": "cpu:gloo,cuda:ncl"}, ConfigError, "process_group_backend='cpu:gloo,cuda:ncl'"),
        ({"parallel_devices": 2}, ConfigError, "parallel_devices=2"),
        ({"parallel_devices": ["cpu"]}, ConfigError, "parallel_devices="),
        ({"accelerator": "cpu"}, ConfigError, "accelerator='cpu'"),
        ({"cluster_environment": "slurm"}, ConfigError, "cluster_environment='slurm'"),
        ({"checkpoint_io": AsyncCheckpointIO()}, UnsupportedError, r"Checkpoint\(asynchronous=True\)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_argument_that_cannot_be_honoured_is_refused_with_its_value(
    strategy: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        strategy(**arguments)


@pytest.mark.parametrize("name", ["TransformerEnginePrecision", "BitsandbytesPrecision", "FSDPPrecision"])
def test_a_precision_plugin_of_another_kind_is_refused_by_name(name: str) -> None:
    plugin = object.__new__(getattr(trainer_plugins, name))  # as it would be, were its package installed

    with pytest.raises(UnsupportedError, match=name):
        convert_precision(plugin)


def test_both_strategies_have_the_same_arguments_from_one_place() -> None:
    assert inspect.signature(MeshStrategy) == inspect.signature(FabricMeshStrategy)
    assert MeshStrategy.__init__ is FabricMeshStrategy.__init__
    kinds = {argument.kind for argument in inspect.signature(MeshStrategy).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


def test_plain_values_and_dataclasses_say_the_same() -> None:
    plain = MeshStrategy(zero=2, recompute="full")
    written = MeshStrategy(
        zero=Zero(2), recompute=Recompute("full"), checkpoint=Checkpoint(), timeout=timedelta(hours=1)
    )

    assert plain.settings == written.settings


def test_what_is_known_late_says_when() -> None:
    strategy = MeshStrategy()

    for early in ("plan", "device_mesh", "engine", "root_device"):
        with pytest.raises(ConfigError, match=r"`setup` or later|not set up yet|Trainer or Fabric"):
            getattr(strategy, early)


def test_every_argument_that_lightning_has_too_is_checked() -> None:
    settings = {"zero", "tensor_parallel", "pipeline_parallel", "offload", "recompute", "compile", "checkpoint"}
    signature = inspect.signature(MeshStrategy).parameters

    assert set(ARGUMENTS) == set(signature) - settings
    assert all(signature[name].default == argument.default for name, argument in ARGUMENTS.items())


@pytest.mark.parametrize("backend", ["gloo", "nccl", "NCCL", "cpu:gloo,cuda:nccl"])
def test_a_backend_is_named_as_torch_names_it(backend: str) -> None:
    assert MeshStrategy(process_group_backend=backend).process_group_backend == backend


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        (MeshStrategy(), "zero=3"),
        (MeshStrategy(zero=Zero(1), recompute=Recompute("full"), checkpoint=Checkpoint()), "zero=1, recompute='full'"),
        (
            MeshStrategy(
                recompute=Recompute("full", 2), compile=True, timeout=timedelta(seconds=30), start_method="fork"
            ),
            "zero=3, recompute=Recompute(mode='full', every=2), compile=True, timeout=datetime.timedelta(seconds=30), "
            "start_method='fork'",
        ),
    ],
)
def test_the_text_of_a_strategy_has_every_setting_that_is_not_the_default(strategy: MeshStrategy, text: str) -> None:
    assert repr(strategy).startswith(f"meshbolt.MeshStrategy({text}) for ")


def test_the_text_of_a_strategy_is_the_call_that_makes_it_and_what_it_is_for() -> None:
    assert repr(MeshStrategy(zero=2)).startswith("meshbolt.MeshStrategy(zero=2) for lightning.pytorch.Trainer")
    assert repr(FabricMeshStrategy(zero=Zero(3, replicate=2))) == (
        "meshbolt.fabric.MeshStrategy(zero=Zero(stage=3, replicate=2, unit='auto', reduce_dtype='auto')) "
        "for lightning.fabric.Fabric"
    )


def test_fabric_which_is_told_what_to_load_refuses_to_be_told_so_by_a_setting() -> None:
    asked = Checkpoint(load_weights_only=True)
    assert MeshStrategy(checkpoint=asked).settings.checkpoint == asked
    with pytest.raises(ConfigError, match=r'fabric\.load\(path, \{"model": model\}\)'):
        FabricMeshStrategy(checkpoint=asked)


def test_fabric_does_not_take_overlapping_updates_that_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match=r"overlap=True.*leave overlap out"):
        FabricMeshStrategy(offload=Offload("cpu", overlap=True))
    assert FabricMeshStrategy(offload=Offload("cpu", overlap=False)).settings.offload.overlap is False
