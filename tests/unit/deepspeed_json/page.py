"""The page of keys and the receipts of the files, generated: `python -m tests.unit.deepspeed_json.page` writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from meshbolt.deepspeed import receipt
from meshbolt.deepspeed_json.key import OUTCOMES
from meshbolt.deepspeed_json.optimizers import REFUSED_OPTIMIZERS
from meshbolt.deepspeed_json.schedules import SCHEDULES
from meshbolt.deepspeed_json.table import KEYS

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "deepspeed.md"
CONFIGS = ROOT / "configs" / "deepspeed"
RECEIPTS = CONFIGS / "receipts"

HEAD = """\
# From DeepSpeed: its JSON as it is

```python
from lightning.pytorch import Trainer
from meshbolt.deepspeed import trainer_arguments

trainer = Trainer(**trainer_arguments("ds_config.json"), devices=8, max_epochs=1)
trainer.fit(model, loader)
```

`trainer_arguments` returns what the file sets of a Trainer: the strategy, precision, clipping and accumulation. With
`MeshStrategy.from_deepspeed("ds_config.json")` you write the Trainer's flags yourself, and a flag that disagrees with the
file is an error when a run begins, which names both. In the YAML of `meshbolt fit`:

```yaml
trainer:
  accumulate_grad_batches: 4
  gradient_clip_val: 1.0
  strategy:
    class_path: meshbolt.MeshStrategy.from_deepspeed
    init_args:
      config: configs/deepspeed/zero2_bf16.json
```

Both take `auto={"optimizer.params.lr": 1e-4}` for keys that are "auto" in the file, `deepspeed_version="0.19.8"` for a file
that counts on the defaults of a version, `data_parallel_size=` where accumulation is to follow from `train_batch_size` and
`train_micro_batch_size_per_gpu`, and `recompute`, `compile`, `start_method` as `MeshStrategy` has them.

**The receipt** says what became of each key of the file. It is printed on rank 0 (`show=False`: not), and is
`strategy.deepspeed_receipt`, whose `to_json()` a program can read; `meshbolt.deepspeed.receipt("ds_config.json")` makes
nothing but the receipt. Keys that do not exist are refused with the nearest that does, and so is a file that is no JSON,
with line and column.

**Precision.** A `fp16` or `bf16` block runs everything in 16 bits over float32 master weights, as DeepSpeed does:
`MixedPrecision("bf16-mixed", autocast=False)`. `torch_autocast` is the Trainer's `precision="bf16-mixed"`, which casts
operation by operation. Gradients are summed over ranks and batches in float32; `communication_data_type` changes the former.

**Batches** come from your DataLoader. The three sizes must go with it, with accumulation and with the data-parallel ranks;
nothing is rounded.

**Optimizer and scheduler** blocks serve where the module has no `configure_optimizers`, or where it returns None; the
scheduler also where it returns a plain optimizer. They are torch's optimizers, and the schedules below with DeepSpeed's
rates to the last digits. "Adam" is AdamW unless `adam_w_mode` is false, and `weight_decay` is 0 unless `torch_adam` is true,
as there.

**Defaults of DeepSpeed that differ between its versions** and matter: `gradient_clipping` is 0.0 before 0.19.3 and 1.0
since. Without the key and without `deepspeed_version` the Trainer decides, which does not clip unless you say so; the
receipt says this.

`configs/deepspeed/` has files as they are in use, and under `receipts/` what becomes of each.

## Checkpoints

What DeepSpeed has saved is read without DeepSpeed, and without running code from its files. Give its directory as `ckpt_path`
(to `fabric.load`, to `engine.load_checkpoint`), or make a checkpoint of it that any plan loads:

```console
$ meshbolt checkpoint import --from deepspeed runs/deepspeed start.ckpt --tag global_step1000
imported runs/deepspeed to start.ckpt: deepspeed, 75 tensors, 1.1 GiB
note: Tag 'global_step1000': ZeRO stage 3, written by 8 data-parallel ranks of DeepSpeed 0.19.8 after 1000 steps.
```

The directory is the one that DeepSpeed was told to save to, the one of a tag in it, or the `.ckpt` directory of Lightning's
`DeepSpeedStrategy`. Without `--tag` it is the save that `latest` names. `--prefix model.` is put before the names, where a
LightningModule has as `self.model` what DeepSpeed's engine had. `meshbolt checkpoint ls` and `inspect` know these directories.

| what wrote it | what is taken |
|---|---|
| ZeRO 1, 2 and 3, any number of ranks | Master weights in float32, frozen ones in the same dtype, buffers in their own, tied ones under each name; what the optimizer keeps for each parameter, its settings, the count of steps. |
| DeepSpeed's optimizer for bfloat16 (stage 1 with gradients in float32) | The same. |
| no ZeRO | The same, where it kept master weights: its files do not name them, so they are found by their values. In float32 the optimizer's state has numbers, as torch's has; a run takes them in the order of its own optimizer's parameters. |
| `PipelineModule`, with ZeRO 1 or without | The same under the names of the module: `3.weight`, `tied_modules.embed.weight`. Without ZeRO no file has the key of a tied layer: its weights have the number of its first use. |
| `ds_to_universal.py` | The same. Of a pipeline, buffers are missing there. |
| Lightning's `DeepSpeedStrategy` | Loops, callbacks, hyperparameters and schedulers besides, so that a run goes on as after a save of ours. |

The learning rate scheduler, a dynamic loss scale with its counters, and what the user saved as `client_state` are taken, too; of
an engine without Lightning, the latter stands in the imported checkpoint under `client_state`, and DeepSpeed's counters and JSON
under `deepspeed`. `meshbolt.checkpoint.deepspeed.open_deepspeed(path)` gives all of it to a program.

Where `zero_to_fp32.py` and its kin go wrong, this does not: frozen weights of stage 1 are there, frozen weights come in
float32, the optimizer for bfloat16 is read, integers stay integers, and with `round_robin_gradients` each parameter has its own
values (`safe_get_full_fp32_param` and `ds_to_universal.py` of 0.19.8 mix them up; what that converter has made of such a run is
refused).

Refused, with what to do instead: slices of tensor parallelism (make them universal with `ds_to_universal.py`, which joins them,
and import that), experts of a mixture, and optimizer state in NVMe swap files. A file that is missing, cut off, left over from
another number of ranks or of another save is named. DeepSpeed's files have no checksums: a bit that has changed in them is
not noticed. Classes of your own in `client_state` or in Lightning's hyperparameters are named and refused, unless you trust the
files: `--weights-only false`.

Tensors stay in the files until they are used; memory holds the one at hand. Files in torch's old kind
(`"checkpoint_serialization": false`) are read whole.
"""


def page() -> str:
    """Return the page as it should be."""
    outcomes = "".join(f"- *{name}*: {words}\n" for name, words in OUTCOMES.items())
    rows = [[f"`{key.path}`", key.outcome, _code(key.becomes), key.why, key.values.words] for key in KEYS.values()]
    types = [[f"`{name}`", reason] for name, reason in REFUSED_OPTIMIZERS.items()]
    return "\n".join(
        [
            HEAD,
            "## Keys\n",
            outcomes,
            'A refused key whose value asks for nothing, such as `false` or `"enabled": false`, is ignored. Every key may be '
            '"auto".\n',
            _table(["key", "outcome", "becomes", "why", "values"], rows),
            "## Schedules\n",
            f"{', '.join(f'`{name}`' for name in SCHEDULES)}: from `meshbolt.deepspeed`, named as `scheduler.type`.\n",
            "## Optimizers that are refused\n",
            "All others of `torch.optim` may be named, but LBFGS and Muon, in any case of letters.\n",
            _table(["type", "why"], types),
        ]
    )


def receipts() -> dict[Path, str]:
    """Return the receipt of each file, by where it is kept."""
    made = {}
    for path in sorted(CONFIGS.glob("*.json")):
        rows = receipt(path).cells()
        made[RECEIPTS / f"{path.stem}.json"] = (
            json.dumps([dict(zip(_NAMES, row, strict=True)) for row in rows], indent=2) + "\n"
        )
    return made


_NAMES = ("key", "value", "outcome", "becomes", "why")


def _code(text: str) -> str:
    return f"`{text}`" if text and any(mark in text for mark in "(=.'") else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    DOCUMENT.write_text(page(), encoding="utf-8")
    RECEIPTS.mkdir(exist_ok=True)
    for where, text in receipts().items():
        where.write_text(text, encoding="utf-8")
