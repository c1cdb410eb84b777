"""`meshbolt checkpoint export`: a checkpoint in another format."""

from __future__ import annotations

from collections.abc import Sequence

from meshbolt.checkpoint.formats import FORMATS, ExportOptions, export_checkpoint
from meshbolt.cli.checkpoint.arguments import add_output, parser_of
from meshbolt.cli.checkpoint.progress import watched
from meshbolt.cli.checkpoint.told import tell_conversion
from meshbolt.cli.commands import DONE
from meshbolt.errors import ConfigError
from meshbolt.units import MIB, parse_bytes


def run(arguments: Sequence[str]) -> int:
    """Export a checkpoint.

    Args:
        arguments: "export", then the checkpoint, the output and flags.

    Raises:
        MeshboltError: it cannot be done.
    """
    formats = "; ".join(f"{name}: {each.help}" for name, each in FORMATS.items())
    parser = parser_of(
        "export",
        usage=f"CKPT OUT --to {'|'.join(FORMATS)} [OPTIONS]",
        description=f"Write a checkpoint in another format, tensor by tensor. {formats}.",
        example="run.ckpt weights/ --to safetensors --dtype bfloat16",
    )
    default = ExportOptions()
    parser.add_argument("checkpoint", help="its directory; one that DeepSpeed has saved, too")
    add_output(parser, what="file or directory")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument(
        "--max-shard-size",
        default=f"{default.max_shard_bytes // MIB}MiB",
        metavar="SIZE",
        help="no file of weights gets larger unless one tensor is; such as 512MiB or 5GB",
    )
    parser.add_argument(
        "--weights", default=default.weights, help="entry with the weights: what Fabric's user called it, or state_dict"
    )
    parser.add_argument(
        "--everything", action="store_true", help="every tensor under its full key, not only the weights"
    )
    parser.add_argument("--strip-prefix", metavar="PREFIX", help="only weights whose names begin so, named without it")
    parser.add_argument("--dtype", help="cast floating-point weights: bfloat16, float16, float32 or float64")
    parser.add_argument(
        "--config", help="for hf: a config.json, or the directory of a model, to copy beside the weights"
    )
    given = parser.parse_args(list(arguments[1:]))
    options = ExportOptions(
        max_shard_bytes=_size(given.max_shard_size),
        weights=given.weights,
        everything=given.everything,
        strip_prefix=given.strip_prefix,
        dtype=given.dtype,
        config=given.config,
        weights_only=None if given.weights_only else False,
    )
    with watched("exporting", show=not given.json) as watch:
        done = export_checkpoint(
            given.checkpoint, given.out, to=given.to, options=options, overwrite=given.force, watch=watch
        )
    tell_conversion(done, verb="exported", as_json=given.json)
    return DONE


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--max-shard-size: {error}") from error
