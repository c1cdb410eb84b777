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
from meshbolt.errors import MeshboltError

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "deepspeed.md"
CONFIGS = ROOT / "configs" / "deepspeed"
RECEIPTS, REFUSED = CONFIGS / "receipts", CONFIGS / "refused"

HEAD = (Path(__file__).parent / "head.md").read_text(encoding="utf-8")


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
    return made | {RECEIPTS / f"{path.stem}.txt": _refusal(path) for path in sorted(REFUSED.glob("*.json"))}


def _refusal(path: Path) -> str:
    """Return what is said of a file that is refused."""
    try:
        receipt(path)
    except MeshboltError as error:
        return f"{type(error).__name__}: {error}\n".replace(f"{ROOT}/", "")
    raise AssertionError(f"{path.name} is not refused any more. Move it up.")


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
