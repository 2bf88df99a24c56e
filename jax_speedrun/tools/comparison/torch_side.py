"""The PyTorch side of compare.py: reference_torch.py as `worker.Side` wants it.

PyTorch and the reference come in as an argument, so that nothing in this package imports them.
"""

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np


class TorchSide:
    """A `reference_torch.Training` on the first GPU, or the CPU; see `worker.Side` for the methods."""

    def __init__(self, job: Mapping[str, Any], reference: ModuleType):
        self.reference, self.torch = reference, reference.torch
        self.on_gpu = self.torch.cuda.is_available()
        self.device = self.torch.device("cuda" if self.on_gpu else "cpu")
        config = job["config"]
        model = {name: tuple(v) if isinstance(v, list) else v for name, v in config["model"].items()}
        self.fallbacks = []
        if model["head_precision"] == "fp8" and not reference.fp8_supported(self.device):
            model["head_precision"] = "bfloat16"
            self.fallbacks.append("PyTorch: no FP8 on this device, head matmuls in bfloat16")
        self.compile = job["compile"] and self.on_gpu
        self.training = reference.Training(
            reference.ModelConfig(**model),
            # It rounds no updates: what `update_dtype` is for, JAX's sharded Adam, it does in another way.
            reference.OptimizerConfig(**{k: v for k, v in config["optimizer"].items() if k != "update_dtype"}),
            config["steps"],
            seed=config["seed"],
            device=self.device,
            compile=self.compile,
        )
        self.dtype = getattr(self.torch, self.training.config.compute_dtype)

    def describe(self) -> dict[str, Any]:
        return {
            "device": self.torch.cuda.get_device_name() if self.on_gpu else "cpu",
            "platform": "gpu" if self.on_gpu else "cpu",
            "versions": {"torch": str(self.torch.__version__)},
            "fallbacks": self.fallbacks,
            "reduced": None if self.on_gpu else "dense attention and no torch.compile, for want of a GPU",
            "attention": "FlexAttention" if self.on_gpu else "dense",
            "kernels": "torch.compile" if self.on_gpu else "eager",
            "peak_flops": None,
            "matmul_size": 8192 if self.on_gpu else 1024,
        }

    def dispatcher(
        self, part: str, tokens_T: np.ndarray, targets_T: np.ndarray, window: int, step: int
    ) -> Callable[[], object]:
        training, torch = self.training, self.torch
        tokens, targets = self._place(tokens_T), self._place(targets_T)
        match part:
            case "step":
                return functools.partial(training.step, tokens[None], targets[None], step)
            case "micro":

                def micro() -> object:
                    loss = training.micro_step(tokens, targets, window)
                    training.model.zero_grad(set_to_none=True)
                    return loss

                return micro
            case "attention_forward" | "attention":
                return self._attention(part, tokens, window)
            case "head":
                return self._head(targets)
            case "optimizer":
                for p in training.model.parameters():
                    p.grad = p.detach().clone()
                return functools.partial(training.update, step)
            case "matmul":
                size = self.describe()["matmul_size"]
                return functools.partial(torch.matmul, self._normal(size, size), self._normal(size, size))
        raise ValueError(f"unknown part {part!r}")

    def wait(self, result: object) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.on_gpu else None

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        named = dict(self.training.model.named_parameters())
        if named.keys() != weights.keys():
            raise ValueError(f"weights of one side only: {sorted(named.keys() ^ weights.keys())}")
        with self.torch.no_grad():
            for name, p in named.items():
                p.copy_(self._place(weights[name]).reshape(p.shape))
        for _, buffer in self.training.muon.stacks:
            buffer.zero_()
        self.training.adam.state.clear()

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: self._array(p) for name, p in self.training.model.named_parameters()}

    def gradients(
        self, tokens_T: np.ndarray, targets_T: np.ndarray, window: int
    ) -> tuple[float, dict[str, np.ndarray]]:
        loss = self.training.micro_step(self._place(tokens_T), self._place(targets_T), window)
        arrays = {name: self._array(p.grad) for name, p in self.training.model.named_parameters()}
        self.training.model.zero_grad(set_to_none=True)
        return loss.item(), arrays

    def step(self, tokens_T: np.ndarray, targets_T: np.ndarray, step: int) -> float:
        loss: float = self.training.step(self._place(tokens_T[None]), self._place(targets_T[None]), step).item()
        return loss

    def evaluate(self, tokens_NT: np.ndarray, targets_NT: np.ndarray, step: int) -> float:
        loss: float = self.training.evaluate(self._place(tokens_NT), self._place(targets_NT), step)
        return loss

    def _place(self, array: np.ndarray) -> Any:
        return self.torch.from_numpy(array).to(self.device)

    def _array(self, tensor: Any) -> np.ndarray:
        array: np.ndarray = tensor.detach().float().cpu().numpy().copy()
        return array

    def _normal(self, *shape: int) -> Any:
        return self.torch.randn(shape, dtype=self.dtype, device=self.device)

    def _attention(self, part: str, tokens_T: Any, window: int) -> Callable[[], object]:
        torch, model = self.torch, self.training.config
        mask, _ = self.reference.long_short_masks(tokens_T, torch.tensor(window, dtype=torch.int32).to(self.device))
        q, k, v, d_y = (self._normal(tokens_T.shape[0], model.heads, model.head_width) for _ in range(4))
        attend = self.reference.block_sparse_attention
        if part == "attention_forward":

            @torch.no_grad()
            def forward() -> object:
                return attend(q, k, v, mask)

            return forward
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        return lambda: torch.autograd.grad(attend(q, k, v, mask), (q, k, v), d_y)

    def _head(self, targets_T: Any) -> Callable[[], object]:
        torch, model = self.torch, self.training.config
        x_TD = self._normal(targets_T.shape[0], model.width).requires_grad_()
        head_VD = self.training.model.head
        head_loss = self.reference.head_loss
        if self.compile:
            head_loss = torch.compile(head_loss, dynamic=False)
        chunks = self.training.head_chunks
        return lambda: torch.autograd.grad(
            head_loss(x_TD, head_VD, targets_T, model.head_precision, chunks), (x_TD, head_VD)
        )
