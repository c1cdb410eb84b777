"""`meshbolt checkpoint consolidate`: a checkpoint as the single file that Lightning writes."""

from __future__ import annotations

from collections.abc import Sequence

from meshbolt.checkpoint.formats import ExportOptions, export_checkpoint
from meshbolt.cli.checkpoint.arguments import add_output, parser_of
from meshbolt.cli.checkpoint.progress import watched
from meshbolt.cli.checkpoint.told import tell_conversion
from meshbolt.cli.commands import DONE


def run(arguments: Sequence[str]) -> int:
    """Write a checkpoint as one file.

    Args:
        arguments: "consolidate", then the checkpoint, the output and flags.

    Raises:
        MeshboltError: it cannot be done.
    """
    parser = parser_of(
        "consolidate",
        usage="CKPT OUT [--force] [--weights-only false] [--json]",
        description="Write a checkpoint as the single file that Lightning writes, which its own load_from_checkpoint and every "
        "strategy of its own read. The same as export --to lightning.",
        example="run.ckpt whole.ckpt",
    )
    parser.add_argument("checkpoint", help="its directory; one that DeepSpeed has saved, too")
    add_output(parser, what="file")
    given = parser.parse_args(list(arguments[1:]))
    options = ExportOptions(weights_only=None if given.weights_only else False)
    with watched("consolidating", show=not given.json) as watch:
        done = export_checkpoint(
            given.checkpoint, given.out, to="lightning", options=options, overwrite=given.force, watch=watch
        )
    tell_conversion(done, verb="consolidated", as_json=given.json)
    return DONE
