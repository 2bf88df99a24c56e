"""Write text with a trained model: `python scripts/sample.py RUN --prompt "It was"`.

One token at a time, by running the whole model on everything so far.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ..config import Config, from_dict, resolve
from ..data.tokenise import load_encoding
from ..errors import UsageError
from ..kernels.block_mask import BLOCK_SIZE, DOCUMENT_START
from ..model import GPT, model_graph
from ..run import checkpoint
from ..schedules import window_blocks
from ..sharding import make_mesh
from ..step import Params, make_program
from .command import make_parser, run_command

OPTIONS = checkpoint.Options(folder="{run}", step="--step {step}", without="train.py --out {run} makes one")


class Trained(NamedTuple):
    """A model after `step` steps."""

    config: Config
    params: Params
    step: int


def load(run: Path, step: int | None = None) -> Trained:
    """Return parameters and configuration of a run's newest complete checkpoint, or that of `step`.

    Raises:
      UsageError: if the folder holds none, or it is damaged.
    """
    step, metadata = checkpoint.latest(run, step, OPTIONS)
    checkpoint.verify(run, step, OPTIONS)
    mesh = make_mesh(1, 1)
    config = resolve(from_dict(metadata["config"]), mesh.devices.flat[0])
    program = make_program(config, mesh)
    return Trained(config, checkpoint.restore(run, step, program.saved).params, step)


def generate(
    trained: Trained, prompt: list[int], count: int, *, temperature: float = 1.0, top_k: int = 50, seed: int = 0
) -> list[int]:
    """Continue `prompt` (token ids, without a document start) by `count` tokens, or up to the document's end.

    Args:
      temperature: 0 takes the likeliest token each time.
      top_k: sample among so many of the likeliest tokens only.

    Raises:
      UsageError: if an option is out of range, or prompt and answer are longer than the sequences trained on.
    """
    config = trained.config
    if count < 1:
        raise UsageError(f"--tokens must be at least 1, got {count}")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"--temperature must be 0 or more, got {temperature}")
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed must be between 0 and {2**32 - 1}, got {seed}")
    if not 1 <= top_k <= config.model.vocab_size:
        raise UsageError(f"--top-k must be between 1 and {config.model.vocab_size}, got {top_k}")
    length = 1 + len(prompt) + count
    if length > config.sequence_length:
        raise UsageError(
            f"prompt and --tokens make {length} tokens, but the model saw sequences of {config.sequence_length}; "
            "shorten one of them"
        )
    graph = model_graph(config.model)
    window = window_blocks(trained.step, config.steps, config.optimizer.window_tokens)

    @jax.jit
    def next_token(params: Params, tokens_T: Array, position: Array, key: Array) -> Array:
        model: GPT = nnx.merge(graph, params)
        logits_V = model.logits(tokens_T, position[None], window, attention=config.attention)[0]
        logits_V = logits_V[: config.model.vocab_size]  # the padded words do not exist
        likeliest_K, words_K = jax.lax.top_k(logits_V, top_k)
        if temperature == 0:
            return words_K[0]
        return words_K[jax.random.categorical(key, likeliest_K / temperature)]

    # Attention is causal, so what lies beyond `position` in the buffer changes nothing.
    tokens = np.zeros(-(-length // BLOCK_SIZE) * BLOCK_SIZE, np.int32)
    tokens[: 1 + len(prompt)] = [DOCUMENT_START, *prompt]
    keys = jax.random.split(jax.random.key(seed), count)
    answer: list[int] = []
    for position, key in enumerate(keys, start=len(prompt)):
        token = int(next_token(trained.params, tokens, jnp.int32(position), key))
        if token == DOCUMENT_START:
            break
        answer.append(token)
        tokens[position + 1] = token
    return answer


def parser() -> argparse.ArgumentParser:
    p = make_parser("sample.py", __doc__)
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of a run with a checkpoint")
    p.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the last)")
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
    p.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    p.add_argument(
        "--bpe-files",
        type=Path,
        nargs=2,
        metavar=("VOCAB_BPE", "ENCODER_JSON"),
        help="GPT-2's vocab.bpe and encoder.json, for a machine without network",
    )
    return p


def sample(options: argparse.Namespace) -> int:
    encoding = load_encoding(tuple(options.bpe_files) if options.bpe_files else None)
    answer = generate(
        load(options.run, options.step),
        encoding.encode_ordinary(options.prompt),
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    print(options.prompt + encoding.decode(answer))
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), sample, arguments)
