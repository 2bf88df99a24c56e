"""Write text with a trained model: `python scripts/sample.py RUN --prompt "It was"`."""

import argparse
import sys
from pathlib import Path

from jax_speedrun.data.tokenise import load_encoding
from jax_speedrun.errors import UsageError
from jax_speedrun.tools.sampling import generate, load


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of a run with a checkpoint")
    p.add_argument("--prompt", default="", help="how the text begins (default: nothing)")
    p.add_argument("--tokens", type=int, default=100, metavar="N", help="tokens to write (default: %(default)s)")
    p.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="0 takes the likeliest token each time (default: %(default)s)",
    )
    p.add_argument(
        "--top-k", type=int, default=50, metavar="N", help="choose among so many tokens (default: %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument(
        "--bpe-files",
        type=Path,
        nargs=2,
        metavar=("VOCAB_BPE", "ENCODER_JSON"),
        help="GPT-2's vocab.bpe and encoder.json, for a machine without network",
    )
    args = p.parse_args(arguments)
    try:
        encoding = load_encoding(tuple(args.bpe_files) if args.bpe_files else None)
        trained = load(args.run)
        prompt = encoding.encode_ordinary(args.prompt)
        answer = generate(trained, prompt, args.tokens, temperature=args.temperature, top_k=args.top_k, seed=args.seed)
    except UsageError as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2
    print(args.prompt + encoding.decode(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
