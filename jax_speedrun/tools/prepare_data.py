"""Make token shards for training: from your own text, or FineWeb as the record used it."""

import argparse
from pathlib import Path

from ..data.fineweb import FINEWEB_REVISION, FINEWEB_TRAIN_SHARDS, fetch_fineweb
from ..data.tokenise import load_encoding, prepare_text
from .command import make_parser, run_command
from .layout import wrap


def parser() -> argparse.ArgumentParser:
    p = make_parser("prepare_data.py", __doc__)
    commands = p.add_subparsers(dest="command", required=True)

    text = commands.add_parser("text", help="encode .txt and .jsonl files with GPT-2's byte-pair encoding")
    text.add_argument("files", type=Path, nargs="+", metavar="FILE", help=".txt (one document a file) or .jsonl")
    text.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    text.add_argument("--name", default="text", help="what the shards' names start with (default: %(default)s)")
    text.add_argument(
        "--val-tokens",
        type=int,
        default=1_048_577,
        metavar="N",
        help="the first N tokens are for validation (default: %(default)s, 16 sequences of 65,536 and one token)",
    )
    text.add_argument(
        "--shard-tokens", type=int, default=100_000_000, metavar="N", help="of a training shard (default: %(default)s)"
    )
    text.add_argument(
        "--separator", metavar="LINE", help="a line that ends a document inside a .txt file, such as '<|endoftext|>'"
    )
    text.add_argument(
        "--field", default="text", metavar="KEY", help="of the text in each .jsonl object (default: %(default)s)"
    )
    text.add_argument(
        "--bpe-files",
        type=Path,
        nargs=2,
        metavar=("VOCAB_BPE", "ENCODER_JSON"),
        help="GPT-2's vocab.bpe and encoder.json, for a machine without network",
    )
    text.add_argument("--overwrite", action="store_true", help="replace the shards of this name in DIR")

    fineweb = commands.add_parser("fineweb", help="fetch FineWeb-10B, already encoded, from the Hugging Face hub")
    fineweb.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    fineweb.add_argument(
        "--shards",
        type=int,
        default=10,
        metavar="N",
        help=f"training shards of 100 M tokens (200 MB) each, at most {FINEWEB_TRAIN_SHARDS} (default: %(default)s)",
    )
    fineweb.add_argument(
        "--revision",
        default=FINEWEB_REVISION,
        metavar="COMMIT",
        help="of the hub's repository, for the very same bytes for ever (default: %(default)s, as it is now)",
    )
    return p


def run(options: argparse.Namespace) -> int:
    if options.command == "fineweb":
        shards = fetch_fineweb(options.out, options.shards, options.revision)
    else:
        shards = prepare_text(
            options.files,
            options.out,
            load_encoding(tuple(options.bpe_files) if options.bpe_files else None),
            name=options.name,
            val_tokens=options.val_tokens,
            shard_tokens=options.shard_tokens,
            separator=options.separator,
            field=options.field,
            overwrite=options.overwrite,
        )
    print(wrap(f"{len(shards)} shards in {options.out}; train on them with --data {options.out}"))
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), run, arguments)
