"""The recipe in PyTorch against float64 NumPy, where PyTorch is installed; its numbers everywhere."""

import ast
import importlib
import math
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from jax_speedrun.tools.comparison.reference_run import PendingLoss
from tests.numpy_model import forward_loss, visible
from tests.paths import ROOT

SOURCE = ROOT / "jax_speedrun" / "tools" / "comparison" / "reference_torch.py"
TOKENS = 512
SMALL = {
    "padded_vocab_size": 256,
    "layers": 6,
    "width": 32,
    "heads": 2,
    "head_width": 16,
    "mlp_width": 48,
    "long_layers": (0, 2, 5),
    "attention_free_layers": (3,),
    "value_embedding_tables": 2,
    "table_dtype": "float32",
    "compute_dtype": "float32",
    "head_precision": "float32",
    "evaluation_precision": "float32",
}


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch", reason="PyTorch is not installed; pip install -e '.[torch]' to test the reference")
    return importlib.import_module("jax_speedrun.tools.comparison.reference_torch")


def some_tokens(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, TOKENS).astype(np.int32)
    # One document longer than three blocks, so that windows cut it.
    tokens[[0, 20, 60, 500]] = 50256
    return tokens, rng.integers(0, 256, TOKENS).astype(np.int32)


def training(reference, **changes):
    torch = reference.torch
    config = reference.ModelConfig(**{**SMALL, **changes})
    optimizer = reference.OptimizerConfig(newton_schulz_dtype="float32")
    made = reference.Training(config, optimizer, 100, device=torch.device("cpu"), compile=False)
    made.head_chunks = 1
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            if p.ndim == 1 or not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.ndim == 1 else p.shape[-1] ** -0.5))
            assert p.any(), name
    return made


def nested(model):
    """The parameters in numpy_model's layout."""
    tree = {}
    for name, p in model.named_parameters():
        node = tree
        *path, leaf = [int(key) if key.isdigit() else key for key in name.split(".")]
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = p.detach().double().numpy()
    return tree


def numpy_loss(params, tokens, targets, window):
    return forward_loss(
        params,
        tokens,
        targets,
        window,
        heads=2,
        head_width=16,
        long_layers={0, 2, 5},
        attention_free_layers={3},
        value_embedding_layers={0: 0, 1: 1, 4: 0, 5: 1},
    )[0]


@pytest.mark.parametrize("window", [1, 2, 3, 14])
def test_loss_equals_numpy(reference, window):
    made = training(reference)
    tokens, targets = some_tokens()
    loss = made.micro_step(*(reference.torch.from_numpy(x) for x in (tokens, targets)), window)
    np.testing.assert_allclose(loss.item(), numpy_loss(nested(made.model), tokens, targets, window), rtol=1e-5)


def test_gradient_equals_finite_differences(reference):
    made = training(reference)
    tokens, targets = some_tokens()
    made.micro_step(*(reference.torch.from_numpy(x) for x in (tokens, targets)), 2)
    rng = np.random.default_rng(2)
    for name in (
        "embed",
        "value_embeds.1",
        "blocks.1.attention.qkv_3CD",
        "blocks.1.attention.lambdas",
        "blocks.4.attention.out_DC",
        "blocks.2.lambdas",
        "blocks.3.mlp.fc_FD",
        "blocks.3.mlp.proj_DF",
        "skip_weights",
        "head",
    ):
        p = dict(made.model.named_parameters())[name]
        direction = rng.standard_normal(p.shape)
        if "embed" in name:
            direction[np.setdiff1d(np.arange(len(direction)), tokens)] = 0

        def moved(step, name=name, direction=direction):
            tree = nested(made.model)
            node = tree
            *path, leaf = [int(key) if key.isdigit() else key for key in name.split(".")]
            for key in path:
                node = node[key]
            node[leaf] = node[leaf] + step * direction
            return numpy_loss(tree, tokens, targets, 2)

        difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
        along = float((p.grad.double().numpy() * direction).sum())
        assert abs(along - difference) < 2e-4 * max(abs(difference), 1e-3), (name, along, difference)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 9])
def test_block_lists_cover_the_visible_keys_nearest_first(reference, window):
    torch = reference.torch
    for starts in ([], [0], [0, 128, 129, 300], [127], list(range(0, TOKENS, 40))):
        tokens = np.zeros(TOKENS, np.int32)
        tokens[starts] = 50256
        masks = reference.long_short_masks(torch.from_numpy(tokens), torch.tensor(window, dtype=torch.int32))
        for mask, blocks in zip(masks, (window, window // 2), strict=True):
            np.testing.assert_array_equal(reference.dense_mask(mask).numpy(), visible(tokens, blocks))
            for counts, indices in (
                (mask.kv_num_blocks, mask.kv_indices),
                (mask.full_kv_num_blocks, mask.full_kv_indices),
            ):
                assert counts.min() >= 0
                for count, row in zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True):
                    assert row[:count] == sorted(row[:count], reverse=True)


def test_full_blocks_need_no_mask_function(reference):
    torch = reference.torch
    tokens, _ = some_tokens()
    mask, _ = reference.long_short_masks(torch.from_numpy(tokens), torch.tensor(3, dtype=torch.int32))
    seen = visible(tokens, 99)
    blocks = [
        (row, column)
        for row, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist())
        for column in mask.full_kv_indices[0, 0, row, :count].tolist()
    ]
    assert blocks
    for row, column in blocks:
        assert seen[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)].all()


def test_one_graph_serves_every_window(reference):
    torch = reference.torch
    made = training(reference)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(made.model, backend=backend, fullgraph=True, dynamic=False)
    tokens, targets = (torch.from_numpy(x) for x in some_tokens())
    for window in (1, 2, 4):
        arguments = tokens, targets, torch.tensor(window, dtype=torch.int32), "float32"
        with torch.no_grad():
            assert compiled(*arguments).item() == pytest.approx(made.model(*arguments).item(), rel=1e-5)
    assert len(graphs) == 1


def numpy_muon(parameter, gradients, rate, momentum):
    """One (rows, columns) matrix in float64, straight from the recipe."""
    buffer = np.zeros_like(parameter)
    for g in gradients:
        buffer = momentum * buffer + (1 - momentum) * g
        x = (1 - momentum) * g + momentum * buffer
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        parameter = parameter - rate * math.sqrt(max(1, parameter.shape[0] / parameter.shape[1])) * (x.T if tall else x)
    return parameter


def test_batched_muon_equals_one_matrix_at_a_time(reference):
    torch = reference.torch
    rng = np.random.default_rng(3)
    shapes = [(3, 16, 16), (16, 16), (40, 16), (16, 40), (40, 16)]
    start = [rng.standard_normal(shape) for shape in shapes]
    gradients = [[rng.standard_normal(shape) for shape in shapes] for _ in range(3)]
    parameters = [torch.nn.Parameter(torch.from_numpy(x).float()) for x in start]
    muon = reference.Muon(parameters, "float32", compile=False)
    assert sorted(buffer.shape for _, buffer in muon.stacks) == [(3, 16, 40), (4, 16, 16)]
    for step in gradients:
        for p, g in zip(parameters, step, strict=True):
            p.grad = torch.from_numpy(g).float()
        muon.step(0.05, 0.9)
    for i, p in enumerate(parameters):
        matrices = start[i].reshape(-1, *shapes[i][-2:])
        want = [
            numpy_muon(m, [g[i].reshape(matrices.shape)[j] for g in gradients], 0.05, 0.9)
            for j, m in enumerate(matrices)
        ]
        np.testing.assert_allclose(p.detach().numpy().reshape(matrices.shape), want, atol=2e-5)


def test_fp8_head_stays_near_float32_and_chunks_change_nothing(reference):
    """On the CPU, where PyTorch multiplies FP8 as well; a wrong scale would be off by a power of two."""
    torch = reference.torch
    torch.manual_seed(0)
    x_TD = reference.norm(torch.randn(256, 64)).bfloat16().requires_grad_()
    w_VD = (0.3 * torch.randn(512, 64)).requires_grad_()
    targets = torch.randint(0, 512, (256,))

    def run(precision, chunks=1):
        loss = reference.head_loss(x_TD, w_VD, targets, precision, chunks)
        d_x_TD, d_w_VD = torch.autograd.grad(loss, (x_TD, w_VD))
        return loss.item(), d_x_TD.double().numpy(), d_w_VD.double().numpy()

    def close(got, want, tolerance):
        for a, b in zip(got, want, strict=True):
            assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)

    exact = run("float32")
    close(run("bfloat16"), exact, 1e-2)
    with torch.compiler.set_stance("force_eager"):
        fp8 = run("fp8")
        close(fp8, exact, 0.08)
        close(run("fp8", chunks=4), fp8, 1e-5)
        for got, scaled in zip(reference._fp8_matmul(x_TD, w_VD)[1:], (2 * x_TD, 32 * w_VD), strict=True):
            rounded_once = scaled.detach().float().numpy().astype(ml_dtypes.float8_e4m3fn)
            np.testing.assert_array_equal(got.detach().float().numpy(), rounded_once.astype(np.float32))


def test_training_steps_lower_the_loss_and_read_schedules(reference):
    made = training(reference)
    tokens, targets = (reference.torch.from_numpy(x) for x in some_tokens())
    losses = [PendingLoss(step, made.step(tokens[None], targets[None], step)).wait() for step in range(8)]
    assert losses[-1] < losses[0] - 0.5
    assert made.evaluate(tokens[None], targets[None], 8) < losses[0]
    assert [reference.window_blocks(step, 1385, 1728) for step in (0, 102, 103, 1384, 1385)] == [1, 1, 2, 14, 14]
    assert reference.learning_rate_factor(1385, 1385) == pytest.approx(0.1)
    assert reference.learning_rate_factor(831, 1385) == pytest.approx(1.0)
    assert reference.momentum_at(150, 300) == pytest.approx(0.9)


PROCESS = """
import os, sys
import numpy as np
from jax_speedrun.tools.comparison import reference_torch as reference
from tests.tools.comparison.test_reference_torch import some_tokens, training

torch, dist = reference.torch, reference.dist
rank, count = int(sys.argv[3]), int(sys.argv[4])
if count > 1:
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=count)
made = training(reference)
share = 4 // reference.processes()
losses = []
for step in range(3):
    pairs = [some_tokens(seed=4 * step + i) for i in range(rank * share, (rank + 1) * share)]
    tokens, targets = (torch.from_numpy(np.stack(x)) for x in zip(*pairs))
    losses.append(made.step(tokens, targets, step).item())
tokens, targets = (torch.from_numpy(np.stack(x)) for x in zip(*[some_tokens(seed=i) for i in (20, 21, 22)]))
losses.append(made.evaluate(tokens, targets, 3))
if rank == 0:
    arrays = {name: p.detach().float().numpy() for name, p in made.model.named_parameters()}
    np.savez(sys.argv[1], losses=losses, **arrays)
"""


def test_several_processes_train_as_one_does(reference, tmp_path):
    """Four sequences a step and stacks of matrices, done by one process and by four."""
    results = {}
    for count in (1, 4):
        out, meeting = tmp_path / f"{count}.npz", tmp_path / f"meeting{count}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen([sys.executable, "-c", PROCESS, out, meeting, str(rank), str(count)], env=environment)
            for rank in range(count)
        ]
        assert [process.wait(timeout=240) for process in started] == [0] * count
        results[count] = dict(np.load(out))
    for name, want in results[1].items():
        # Of the whole array: where a gradient is nothing but rounding, Adam makes a step of the noise.
        assert np.linalg.norm(results[4][name] - want) <= 1e-4 * np.linalg.norm(want), name


def defaults(path, names):
    """Class -> field -> literal default, without importing."""
    return {
        node.name: {
            field.target.id: ast.literal_eval(field.value)
            for field in node.body
            if isinstance(field, ast.AnnAssign) and field.value is not None
        }
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name in names
    }


def test_numbers_are_those_of_the_jax_recipe():
    names = {"ModelConfig", "OptimizerConfig"}
    ours = defaults(ROOT / "jax_speedrun" / "config.py", names)
    # How JAX rounds the updates that travel between devices; the reference's travel in another way.
    del ours["OptimizerConfig"]["update_dtype"]
    assert defaults(SOURCE, names) == ours
    assert ours.keys() == names


def test_it_imports_pytorch_and_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." if node.level else node.module.partition(".")[0])
    assert "torch" in imported
    assert imported - {"torch"} <= sys.stdlib_module_names
