"""`meshbolt checkpoint import`: a checkpoint from a file or directory of another format."""

from __future__ import annotations

from collections.abc import Sequence

from meshbolt.checkpoint.formats import SOURCES, import_checkpoint
from meshbolt.cli.checkpoint.arguments import add_output, parser_of
from meshbolt.cli.checkpoint.progress import watched
from meshbolt.cli.checkpoint.told import tell_conversion
from meshbolt.cli.commands import DONE


def run(arguments: Sequence[str]) -> int:
    """Import a checkpoint.

    Args:
        arguments: "import", then the source, the output and flags.

    Raises:
        MeshboltError: it cannot be done.
    """
    parser = parser_of(
        "import",
        usage="SOURCE OUT [--from FORMAT] [--tag TAG] [--prefix PREFIX] [--force] [--weights-only false] [--json]",
        description=f"Make a checkpoint, which any plan loads, from {'; or '.join(each.help for each in SOURCES.values())}.",
        example="runs/deepspeed/ start.ckpt --from deepspeed --tag global_step1000",
    )
    parser.add_argument("source", help="file or directory to read")
    add_output(parser, what="directory")
    parser.add_argument(
        "--from", choices=list(SOURCES), help="format of SOURCE; left out, it is found by looking", metavar="FORMAT"
    )
    parser.add_argument(
        "--tag",
        type=str,
        help="which of the saves of a DeepSpeed directory, instead of the one that `latest` names",
    )
    parser.add_argument(
        "--prefix", default="", help="put before each weight's name, such as the module's attribute: model."
    )
    given = parser.parse_args(list(arguments[1:]))
    with watched("importing", show=not given.json) as watch:
        done = import_checkpoint(
            given.source,
            given.out,
            format=given["from"],
            tag=given.tag,
            prefix=given.prefix,
            weights_only=None if given.weights_only else False,
            overwrite=given.force,
            watch=watch,
        )
    tell_conversion(done, verb="imported", as_json=given.json)
    return DONE
