from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshbolt.cli.planned import Row, explain_plan
from meshbolt.config.load import load
from meshbolt.environment import DEBUG, FAST_PATH
from meshbolt.errors import ConfigError, TopologyError

MESH = "{class_path: meshbolt.MeshStrategy, init_args: {%s}}"
FP16 = "{class_path: meshbolt.plugins.MixedPrecision, init_args: {precision: 16-mixed, device: cpu}}"


@pytest.fixture(autouse=True)
def without_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (DEBUG, FAST_PATH):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    """Explain a configuration that is written in parts, as rows by their key."""

    def explain(**trainer: str) -> dict[str, Row]:
        parts = {"strategy": "zero2", "accelerator": "cpu", "devices": "2"} | trainer
        path = tmp_path / "f.yaml"
        path.write_text("trainer:\n" + "\n".join(f"  {key}: {value}" for key, value in parts.items() if value))
        return {row.key: row._replace(origin=row.origin.replace(str(path), "f")) for row in explain_plan(load([path]))}

    return explain


def test_a_preset_is_named_as_the_origin_of_what_it_sets(plan: Any) -> None:
    rows = plan()

    assert rows["zero.stage"][1:] == (2, "preset zero2, f: trainer.strategy")
    assert rows["zero.replicate"][1:] == (1, "default")


def test_a_plain_value_and_a_field_are_both_traced_to_where_they_stand(plan: Any) -> None:
    rows = plan(strategy=MESH % "zero: {stage: 3, replicate: 2}, recompute: full, compile: true", devices="4")

    assert rows["zero.stage"][1:] == (3, "f: trainer.strategy.init_args.zero.stage")
    assert rows["zero.reduce_dtype"][1:] == ("auto", "default")
    assert rows["recompute.mode"][1:] == ("full", "f: trainer.strategy.init_args.recompute")
    assert rows["recompute.every"][1:] == (1, "default")
    assert rows["compile"][1:] == (True, "f: trainer.strategy.init_args.compile")
    assert (rows["mesh.dp_replicate"].value, rows["mesh.dp_shard"].value) == (2, 2)
    assert rows["mesh.dp_shard"].origin == "follows from world_size and zero"


def test_tensor_parallelism_is_traced_in_all_forms_that_it_is_written_in(plan: Any) -> None:
    preset = plan(strategy="tensor_parallel", devices="4", num_nodes="2")
    assert preset["tensor_parallel.size"][1:] == ("node", "preset tensor_parallel, f: trainer.strategy")
    assert preset["zero.stage"][1:] == (0, "preset tensor_parallel, f: trainer.strategy")
    assert (preset["mesh.dp_replicate"].value, preset["mesh.tp"].value) == (2, 4)
    assert preset["mesh.tp"].origin == "follows from world_size, zero and tensor_parallel"

    written = "f: trainer.strategy.init_args.tensor_parallel"
    number = plan(strategy=MESH % "tensor_parallel: 2", devices="4")
    assert number["tensor_parallel.size"][1:] == (2, written)
    fields = plan(strategy=MESH % "tensor_parallel: {size: 2, plan: {a.*: colwise}}", devices="4")
    assert fields["tensor_parallel.size"][1:] == (2, f"{written}.size")
    assert fields["tensor_parallel.plan"][1:] == ({"a.*": "colwise"}, f"{written}.plan")
    kind = "{class_path: meshbolt.TensorParallel, init_args: {size: 2, loss_parallel: true}}"
    of_class = plan(strategy=MESH % f"tensor_parallel: {kind}", devices="4")
    assert of_class["tensor_parallel.loss_parallel"][1:] == (True, f"{written}.init_args.loss_parallel")
    assert of_class["tensor_parallel.plan"][1:] == ("auto", "default")
    assert [rows["mesh.tp"].value for rows in (number, fields, of_class)] == [2, 2, 2]


def test_a_pipeline_is_traced_with_the_number_of_its_stages(plan: Any) -> None:
    preset = plan(strategy="mesh_3d", devices="8")
    assert preset["pipeline_parallel.size"][1:] == (2, "preset mesh_3d, f: trainer.strategy")
    assert [preset[f"mesh.{axis}"].value for axis in ("pp", "dp_shard", "tp")] == [2, 2, 2]
    assert preset["mesh.pp"].origin == "follows from world_size, zero, tensor_parallel and pipeline_parallel"

    written = "f: trainer.strategy.init_args.pipeline_parallel"
    rows = plan(strategy=MESH % "pipeline_parallel: {size: 2, schedule: zbv}", devices="4")
    assert rows["pipeline_parallel.schedule"][1:] == ("zbv", f"{written}.schedule")
    assert rows["pipeline_parallel.stages"][1] == 4
    assert "pipeline_parallel.stages" not in plan()


def test_a_setting_beside_a_plain_one_is_the_default(plan: Any) -> None:
    rows = plan(strategy=MESH % "zero: 1")

    assert rows["zero.stage"][1:] == (1, "f: trainer.strategy.init_args.zero")
    assert rows["zero.replicate"].origin == "default"


@pytest.mark.parametrize(
    ("devices", "nodes", "world_size"),
    [
        ("3", "", 3),
        ('"2"', "", 2),
        ("[0, 2]", "", 2),
        ('"0,1,3"', "", 3),
        ("2", "4", 8),
        ("auto", "", 1),
        ("-1", "", 1),
    ],
)
def test_devices_are_counted_as_lightning_counts_them(plan: Any, devices: str, nodes: str, world_size: int) -> None:
    row = plan(devices=devices, num_nodes=nodes)["world_size"]

    assert row.value == world_size
    assert "f: trainer.devices" in row.origin
    assert ("f: trainer.num_nodes" in row.origin) == bool(nodes)


def test_no_devices_given_is_one_cpu_by_default(plan: Any) -> None:
    assert plan(devices="")["world_size"][1:] == (1, "default")


@pytest.mark.parametrize(
    ("precision", "flag"), [("", "32-true"), ("bf16", "bf16-mixed"), ("64", "64-true"), ("bf16-true", "bf16-true")]
)
def test_precision_is_named_as_lightning_names_it(plan: Any, precision: str, flag: str) -> None:
    rows = plan(precision=precision)

    assert rows["precision.flag"][1:] == (flag, "f: trainer.precision" if precision else "default")
    assert rows["precision.param_dtype"].origin == "follows from precision.flag"


def test_fp16_on_a_cpu_is_shown_as_what_lightning_makes_of_it(plan: Any) -> None:
    row = plan(precision="16-mixed")["precision.flag"]

    assert row[1:] == ("bf16-mixed", "Lightning's choice on a CPU instead of 16-mixed (f: trainer.precision)")
    assert plan(precision="16-mixed", accelerator="gpu")["precision.flag"].value == "16-mixed"


@pytest.mark.parametrize("plugins", [FP16, f"[{FP16}]"])
def test_a_precision_plugin_is_taken_as_it_is(plan: Any, plugins: str) -> None:
    rows = plan(plugins=plugins)

    assert rows["precision.flag"].value == "16-mixed"
    assert "f: trainer.plugins" in rows["precision.flag"].origin
    assert rows["precision.scales_loss"].value is True


def test_a_precision_plugin_may_be_given_to_the_strategy(plan: Any) -> None:
    rows = plan(strategy=MESH % f"precision_plugin: {FP16}")

    assert rows["precision.flag"].value == "16-mixed"
    assert "init_args.precision_plugin" in rows["precision.flag"].origin


def test_the_reduction_follows_the_setting_that_names_it(plan: Any) -> None:
    rows = plan(strategy=MESH % "zero: {stage: 2, reduce_dtype: float64}")

    assert rows["precision.reduce_dtype"][1:] == ("float64", "follows from zero.reduce_dtype")


def test_switches_are_traced_to_their_environment_variables(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan()["fast_path"][1:] == (True, "default")
    monkeypatch.setenv(FAST_PATH, "0")

    assert plan()["fast_path"][1:] == (False, f"environment variable {FAST_PATH}")


DEEPSPEED = "{class_path: meshbolt.MeshStrategy.from_deepspeed, init_args: {config: %s%s}}"
FILE = "{zero_optimization: {stage: 1}, bf16: {enabled: true}, gradient_accumulation_steps: 2}"


def test_a_strategy_from_deepspeeds_file_is_traced_into_the_file(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = plan(strategy=DEEPSPEED % (FILE, ", compile: true"), accumulate_grad_batches="2")

    assert rows["zero.stage"][1:] == (1, "the DeepSpeed configuration: zero_optimization.stage")
    assert rows["precision.flag"][1:] == ("bf16-mixed", "the DeepSpeed configuration: bf16.enabled")
    assert (rows["precision.param_dtype"].value, rows["precision.autocast_dtype"].value) == ("bfloat16", None)
    assert rows["compile"][1:] == (True, "f: trainer.strategy.init_args.compile")
    assert rows["zero.replicate"].origin == "default of meshbolt"
    assert rows["world_size"].origin == "f: trainer.devices"
    assert capsys.readouterr().out == "", "the receipt is shown by who asks for it"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "accumulate_grad_batches=2, and the Trainer has accumulate_grad_batches=1"),
        ({"accumulate_grad_batches": "2", "precision": "32-true"}, ""),
        ({"accumulate_grad_batches": "2", "precision": "bf16-mixed"}, ""),
        ({"accumulate_grad_batches": "2", "precision": "64-true"}, "precision='64-true'"),
    ],
)
def test_flags_that_disagree_with_deepspeeds_file_are_refused_as_fit_refuses_them(
    plan: Any, flags: dict[str, str], said: str
) -> None:
    if not said:
        assert plan(strategy=DEEPSPEED % (FILE, ""), **flags)["precision.flag"].value == "bf16-mixed"
        return
    with pytest.raises(ConfigError, match=said):
        plan(strategy=DEEPSPEED % (FILE, ""), **flags)


def test_sizes_that_do_not_go_with_the_devices_are_refused(plan: Any) -> None:
    sizes = "{train_batch_size: 12, train_micro_batch_size_per_gpu: 2}"
    plan(strategy=DEEPSPEED % (sizes, ""), devices="2", accumulate_grad_batches="3")
    with pytest.raises(ConfigError, match="2 x 3 x 4 = 24, not 12"):
        plan(strategy=DEEPSPEED % (sizes, ""), devices="4", accumulate_grad_batches="3")


@pytest.mark.parametrize(
    ("trainer", "error", "message"),
    [
        ({"strategy": DEEPSPEED % ("no/such.json", "")}, ConfigError, "'no/such.json' cannot be read"),
        ({"strategy": DEEPSPEED % ("{fp61: {}}", "")}, ConfigError, "did you mean 'fp16'"),
        ({"strategy": "ddp"}, ConfigError, "'ddp' is a strategy of Lightning"),
        ({"strategy": ""}, ConfigError, "'auto' is a strategy of Lightning"),
        ({"strategy": "zerro2"}, ConfigError, "did you mean 'zero2'"),
        ({"strategy": "meshbolt.MeshStrategy"}, ConfigError, "class_path: meshbolt.MeshStrategy"),
        ({"strategy": MESH % "zero: 7"}, ConfigError, "zero=7 is not a ZeRO stage"),
        ({"strategy": MESH % "zeroo: 2"}, ConfigError, "zeroo"),
        ({"strategy": MESH % "offload: disk"}, ConfigError, "optimizer='disk'"),
        ({"strategy": MESH % "zero: {stage: 3, replicate: 3}"}, TopologyError, "replicate=3"),
        ({"devices": "many"}, ConfigError, "trainer.devices='many'"),
        ({"devices": "0"}, ConfigError, "trainer.devices=0"),
        ({"num_nodes": "x"}, ConfigError, "trainer.num_nodes='x'"),
        ({"num_nodes": "0"}, ConfigError, "trainer.num_nodes=0"),
        ({"num_nodes": "true"}, ConfigError, "trainer.num_nodes=True"),
        (
            {"device": "3"},
            ConfigError,
            r"trainer\.device \(.*f\.yaml\) is not a flag of the Trainer: did you mean 'devices'",
        ),
        ({"accelerator": "tpu"}, ConfigError, "trainer.accelerator='tpu'"),
        ({"precision": "8-true"}, ConfigError, "8-true"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_its_value(
    plan: Any, trainer: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(**trainer)
