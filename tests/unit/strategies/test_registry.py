from __future__ import annotations

import pytest
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from meshbolt import MeshStrategy
from meshbolt.fabric import MeshStrategy as FabricMeshStrategy
from meshbolt.strategies import PRESETS, register_presets

CALLS = {
    "zero2_offload": "MeshStrategy(zero=2, offload='cpu')",
    "zero3_offload": "MeshStrategy(zero=3, offload='cpu')",
    "zero_infinity": "MeshStrategy(zero=3, offload=Offload(optimizer='nvme', parameters='nvme', path='$MESHBOLT_NVME_PATH'))",
    "tensor_parallel": "MeshStrategy(zero=0, tensor_parallel='node')",
    "pipeline_parallel": "MeshStrategy(zero=1, pipeline_parallel=2)",
    "mesh_3d": "MeshStrategy(zero=1, tensor_parallel=2, pipeline_parallel=2)",
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_call_it_is_described_as_in_both_registries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHBOLT_NVME_PATH", "somewhere")
    for registry, kind in ((StrategyRegistry, MeshStrategy), (STRATEGY_REGISTRY, FabricMeshStrategy)):
        strategy = registry.get(name)

        assert type(strategy) is kind
        assert strategy.settings == kind(**PRESETS[name]).settings
        assert registry[name]["description"] == CALLS.get(name, f"MeshStrategy(zero={strategy.settings.zero.stage})")


def test_presets_can_be_registered_again() -> None:
    register_presets(MeshStrategy, FabricMeshStrategy)

    ours = {
        name
        for name in StrategyRegistry.available_strategies()
        if name.startswith(("zero", "tensor", "pipeline", "mesh"))
    }
    assert ours == set(PRESETS)
