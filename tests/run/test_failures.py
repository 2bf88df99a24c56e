"""What JAX says on a GPU, put in one line that says what to do; the texts are those that H100s gave."""

import subprocess

import pytest

from jax_speedrun.run import failures

EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34359738368 bytes.\nBFCAllocator dump"
FULL = """INTERNAL: Failed to get configs for: 5 out of 175 instructions. See logs for all failures. Example failure:
All backends failed to find supported configs:
 - INTERNAL: BlasLt is unavailable"""
AUTOTUNED = """NOT_FOUND: Failed to get configs for: 35 out of 175 instructions. Example failure:
 - RESOURCE_EXHAUSTED: Out of memory while trying to allocate 67108864 bytes."""


@pytest.fixture
def smi(monkeypatch):
    """nvidia-smi, which says of GPUs' memory what a test sets, or is not there."""
    says = []

    def run(command, **_):
        if not says:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, stdout=says[0])

    monkeypatch.setattr(failures.subprocess, "run", run)
    return says


@pytest.mark.parametrize("text", [EXHAUSTED, FULL, AUTOTUNED], ids=["exhausted", "full", "autotuned"])
def test_out_of_memory_names_the_options_that_lower_it(text, smi):
    said = failures.explain(RuntimeError(text))
    assert said.startswith(f"out of memory ({text.splitlines()[0]}); lower --sequence-length, or spread over more GPUs")
    assert "\n" not in said


@pytest.mark.parametrize("text", [EXHAUSTED, FULL], ids=["exhausted", "full"])
def test_who_holds_the_gpu_is_named(text, smi):
    smi.append("4661, 79000 MiB\n")
    assert "; process 4661 holds 79000 MiB of a GPU: end it, or choose another GPU" in failures.explain(
        RuntimeError(text)
    )


def test_nccl_names_the_version_that_is_needed(smi):
    said = failures.explain(RuntimeError("INTERNAL: NCCL operation ncclGroupEnd() failed: invalid usage"))
    assert "XLA needs 2.29.2 or newer" in said
    assert "pip install -U nvidia-nccl-cu13" in said


@pytest.mark.parametrize("error", [RuntimeError("INTERNAL: something else"), ValueError("out of memory"), KeyError()])
def test_of_what_is_not_known_nothing_is_said(error, smi):
    assert failures.explain(error) is None
