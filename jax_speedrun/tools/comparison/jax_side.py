"""The JAX side of compare.py: jax_speedrun's own step and its parts, as `worker.Side` wants them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.stages import Compiled, Wrapped

from ...config import ATTENTION_SCALE, cache_key, from_dict, peak_flops, resolve
from ...kernels.attention import block_sparse_attention
from ...kernels.block_mask import long_short_masks
from ...kernels.head import fp8_supported, head_loss
from ...optimizer import recipe_optimizer
from ...run.compilation import Call, compile_together
from ...run.program_cache import cache_for
from ...sharding import compiler_options, make_mesh, replicate, split_sequences
from ...step import Params, TrainState, loss_function, make_program


class JaxSide:
    """A run's program and state on the first device; see `worker.Side` for the methods."""

    def __init__(self, job: Mapping[str, Any]):
        self.mesh = make_mesh(1, 1)
        self.device = self.mesh.devices.flat[0]
        config = from_dict(job["config"])
        self.fallbacks = []
        if config.model.head_precision == "fp8" and not fp8_supported(self.device):
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, head_precision="bfloat16"))
            self.fallbacks.append("JAX: no FP8 on this device, head matmuls in bfloat16")
        self.config = resolve(config, self.device)
        if self.config.model.compute_dtype == "float32":
            jax.config.update("jax_default_matmul_precision", "highest")
        self._sequence_loss = loss_function(self.config)
        self.optimizer = recipe_optimizer(self.config.optimizer, self.config.steps)
        self.program = make_program(self.config, self.mesh)
        self._seed = jax.device_put(np.uint32(self.config.seed), replicate(self.mesh))
        self._state: TrainState | None = None
        # Parts of the step are compiled as the step is.
        self._jit = functools.partial(jax.jit, compiler_options=compiler_options(self.mesh))
        self._value_and_grad = self._jit(jax.value_and_grad(self._loss))
        self._compiled: dict[Wrapped, Compiled] = {}
        self._ahead = self._needed(job)
        cache = jax.config.jax_compilation_cache_dir
        self._cache = cache_for(self.mesh, Path(cache) if cache else None)

    @property
    def state(self) -> TrainState:
        if self._state is None:
            self._state = self._call(self.program.init, self._seed)
        return self._state

    def describe(self) -> dict[str, Any]:
        on_gpu = self.device.platform == "gpu"
        return {
            "device": self.device.device_kind,
            "platform": self.device.platform,
            "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
            "fallbacks": self.fallbacks,
            "reduced": None,
            "attention": self.config.attention,
            "kernels": self.config.kernels,
            "peak_flops": peak_flops(self.device),
            "matmul_size": 8192 if on_gpu else 1024,
        }

    def dispatcher(
        self, part: str, tokens_T: np.ndarray, targets_T: np.ndarray, window: int, step: int
    ) -> Callable[[], object]:
        tokens, targets, blocks = jnp.asarray(tokens_T), jnp.asarray(targets_T), jnp.int32(window)
        match part:
            case "step":
                sequences = jax.device_put((tokens_T[None], targets_T[None]), split_sequences(self.mesh))
                return lambda: self._train_step(sequences, step)
            case "micro":
                params = self.state.params
                return lambda: self._call(self._value_and_grad, params, tokens, targets, blocks)
            case "attention_forward" | "attention":
                return self._attention(part, tokens, blocks)
            case "head":
                return self._head(targets)
            case "optimizer":
                return self._optimizer()
            case "matmul":
                size = self.describe()["matmul_size"]
                a, b = self._normal((size, size), 0), self._normal((size, size), 1)
                return functools.partial(jax.jit(jnp.matmul), a, b)
        raise ValueError(f"unknown part {part!r}")

    def wait(self, result: object) -> None:
        jax.block_until_ready(result)

    def peak_bytes(self) -> int | None:
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        self._state = None

        def take(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> Array:
            value = weights[_name(path)]
            if value.shape != leaf.shape:
                raise ValueError(f"{_name(path)}: weights of shape {value.shape}, model of shape {leaf.shape}")
            return jax.device_put(value.astype(leaf.dtype), replicate(self.mesh))

        params = jax.tree.map_with_path(take, self.program.state.params)
        state = TrainState(params, self.optimizer.init(params), jnp.int32(0))
        self._state = jax.device_put(state, replicate(self.mesh))

    def parameters(self) -> dict[str, np.ndarray]:
        return _arrays(self.state.params)

    def gradients(
        self, tokens_T: np.ndarray, targets_T: np.ndarray, window: int
    ) -> tuple[float, dict[str, np.ndarray]]:
        batch = jnp.asarray(tokens_T), jnp.asarray(targets_T), jnp.int32(window)
        loss, gradient = self._call(self._value_and_grad, self.state.params, *batch)
        return float(loss), _arrays(gradient)

    def step(self, tokens_T: np.ndarray, targets_T: np.ndarray, step: int) -> float:
        sequences = jax.device_put((tokens_T[None], targets_T[None]), split_sequences(self.mesh))
        return float(self._train_step(sequences, step))

    def evaluate(self, tokens_NT: np.ndarray, targets_NT: np.ndarray, step: int) -> float:
        weights_N = np.ones(len(tokens_NT), np.float32)
        placed = jax.device_put((tokens_NT, targets_NT, weights_N), split_sequences(self.mesh))
        return float(self._call(self.program.evaluate, self._at(step), *placed))

    def _loss(self, params: Params, tokens_T: Array, targets_T: Array, window: Array) -> Array:
        return self._sequence_loss(params, tokens_T, targets_T, window, self.config.model.head_precision)

    def _at(self, step: int) -> TrainState:
        return self.state._replace(step=jax.device_put(np.int32(step), replicate(self.mesh)))

    def _needed(self, job: Mapping[str, Any]) -> list[Call]:
        """Return what the job will call for certain, to be compiled side by side as a run does."""
        split, tokens_T = split_sequences(self.mesh), jax.ShapeDtypeStruct((self.config.sequence_length,), jnp.int32)
        sequences = jax.ShapeDtypeStruct((1, *tokens_T.shape), jnp.int32, sharding=split)
        step = Call(self.program.train_step, (self.program.state, sequences, sequences))
        match job["task"]:
            case "parity":
                window = jax.ShapeDtypeStruct((), jnp.int32)
                gradient = Call(self._value_and_grad, (self.program.state.params, tokens_T, tokens_T, window))
                return [step, gradient]
            case "measure" if "step" in job["parts"]:
                return [step, Call(self.program.init, (self._seed,))]
        return []

    def _call(self, function: Wrapped, *arguments: Any) -> Any:
        """Call a jitted function, compiled as a run compiles it."""
        if function not in self._compiled:
            calls = {call.function: call for call in (*self._ahead, Call(function, arguments))}
            self._ahead = []
            programs = compile_together(*calls.values(), cache=self._cache, cache_key=cache_key(self.config))
            self._compiled.update(zip(calls, programs, strict=True))
        return self._compiled[function](*arguments)

    def _train_step(self, sequences: tuple[Array, Array], step: int) -> Array:
        self._state, metrics = self._call(self.program.train_step, self._at(step), *sequences)
        loss: Array = metrics.loss
        return loss

    def _normal(self, shape: tuple[int, ...], seed: int) -> Array:
        return jax.random.normal(jax.random.key(seed), shape, self.config.model.compute_dtype)

    def _attention(self, part: str, tokens_T: Array, window: Array) -> Callable[[], object]:
        model = self.config.model
        mask, _ = jax.jit(long_short_masks)(tokens_T, window)
        shape = (tokens_T.shape[0], model.heads, model.head_width)
        q, k, v, d_y = (self._normal(shape, seed) for seed in range(4))
        attend = functools.partial(block_sparse_attention, scale=ATTENTION_SCALE, implementation=self.config.attention)
        if part == "attention_forward":
            return functools.partial(self._jit(attend), q, k, v, mask)

        @self._jit
        def both(q: Array, k: Array, v: Array, d_y: Array) -> tuple[Array, tuple[Array, ...]]:
            y, backward = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
            return y, backward(d_y)

        return functools.partial(both, q, k, v, d_y)

    def _head(self, targets_T: Array) -> Callable[[], object]:
        model = self.config.model
        x_TD = self._normal((targets_T.shape[0], model.width), 0)
        gradient = self._jit(jax.value_and_grad(head_loss, argnums=(0, 1)), static_argnums=(3, 4))
        head_VD, kernels = self.state.params["head"], self.config.kernels
        return functools.partial(gradient, x_TD, head_VD, targets_T, model.head_precision, kernels)

    def _optimizer(self) -> Callable[[], object]:
        gradient = jax.tree.map(lambda p: p.astype(jnp.float32) + 0.0, self.state.params)

        @functools.partial(self._jit, donate_argnums=0)
        def update(state: TrainState, gradient: Params) -> TrainState:
            updates, optimizer_state = self.optimizer.update(gradient, state.optimizer_state, state.params)
            return state._replace(params=optax.apply_updates(state.params, updates), optimizer_state=optimizer_state)

        def dispatch() -> object:
            self._state = update(self.state, gradient)
            return self._state.step

        return dispatch


def _name(path: tuple[object, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _arrays(tree: Params) -> dict[str, np.ndarray]:
    return {_name(path): np.asarray(leaf).astype(np.float32) for path, leaf in jax.tree.leaves_with_path(tree)}
