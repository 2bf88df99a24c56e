"""Where the time of a step goes: every kernel of a profile, attributed to a part of the step.

A profile names the HLO instruction each kernel came from, and the compiled program
says what that instruction stands for: which scope of the model it lies in, whether
it belongs to the backward pass, whether it multiplies matrices.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData

from ..errors import UsageError


class Part(NamedTuple):
    """A part of the step, with what it should take on an H100, in ms: for one sequence of 65,536 tokens, or a step."""

    name: str
    floor_ms: float | None
    target_ms: float | None
    once_a_step: bool = False


HIDDEN_MATMULS = Part("hidden matmuls, with what their kernels add", 41, 43)
ATTENTION = Part("attention", 8, 12)
HEAD_MATMULS = Part("head matmuls", 9.5, 11)
HEAD_PASSES = Part("softcap, cross-entropy, quantisation", 4, 7)
EMBEDDING = Part("embedding lookups and gradients", 0.5, 1.5)
ELEMENTWISE = Part("other norms, residuals, value mixing", 12, 16)
MASKS = Part("masks", None, 0.15)
OPTIMIZER = Part("optimisers", None, 8, once_a_step=True)
COMMUNICATION = Part("communication", None, 3, once_a_step=True)
UNKNOWN = Part("not attributed", None, 0, once_a_step=True)
PARTS = (
    HIDDEN_MATMULS,
    ATTENTION,
    HEAD_MATMULS,
    HEAD_PASSES,
    EMBEDDING,
    ELEMENTWISE,
    MASKS,
    OPTIMIZER,
    COMMUNICATION,
    UNKNOWN,
)
"""Floors and targets: memory passes at 3 TB/s and matmuls at the rates measured on an H100 80GB HBM3."""

_COMMUNICATION = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)")
_MATMUL = re.compile(r"(cublas|gemm|matmul|onednn)", re.IGNORECASE)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
# %name = type opcode(operands), attributes
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(([^)]*)\)")
_NAME = re.compile(r"%?([\w.\-]+)(?:,|$)")
_CONTROL_FLOW = ("while", "conditional", "call")
_WRAPPERS = ("fusion", "async-start", "async-done")
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


class _Instruction(NamedTuple):
    opcode: str
    op_name: str
    matmul: bool
    calls: str | None
    operands: tuple[str, ...]


def instruction_parts(hlo: str) -> dict[str, Part]:
    """Return the part of each instruction in the text of an optimised HLO module, by the instruction's name.

    What XLA added itself, copies and fills, has no name in the model: it counts to the part of who uses it. Loops are
    left out, since their bodies' instructions are there.
    """
    computations: dict[str, dict[str, _Instruction]] = {}
    current: dict[str, _Instruction] = {}
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[1], {})
        elif found := _INSTRUCTION.match(line):
            name, opcode, operands = found.groups()
            op_name, target, calls = (pattern.search(line) for pattern in (_OP_NAME, _TARGET, _CALLS))
            matmul = opcode in ("dot", "convolution") or bool(target and _MATMUL.search(target[1]))
            # A Triton matmul fusion says so in its name, whatever was fused into it.
            matmul = matmul or (opcode == "fusion" and bool(_MATMUL.search(name)))
            current[name] = _Instruction(
                opcode,
                op_name[1] if op_name else "",
                matmul,
                calls[1] if calls else None,
                tuple(_NAME.findall(operands)),
            )

    def inside(instruction: _Instruction) -> Iterable[_Instruction]:
        yield instruction
        if instruction.opcode in _WRAPPERS and instruction.calls in computations:
            # Backwards: the root, which is last, says best what a fusion without a name of its own is for.
            yield from reversed(computations[instruction.calls].values())

    def part(instruction: _Instruction) -> Part:
        members = list(inside(instruction))
        op_name = next((member.op_name for member in members if "jit(" in member.op_name), "")
        opcodes = " ".join(member.opcode for member in members)
        return _part(opcodes, op_name, any(member.matmul for member in members))

    parts: dict[str, Part] = {}
    for instructions in computations.values():
        users = {operand: name for name, instruction in instructions.items() for operand in instruction.operands}
        # Users come later in the text, so they are known when the instruction's turn comes.
        for name, instruction in reversed(instructions.items()):
            if (found_part := part(instruction)) is UNKNOWN:
                found_part = parts.get(users.get(name, ""), UNKNOWN)
            parts[name] = found_part
    control_flow = {n for i in computations.values() for n, x in i.items() if x.opcode in _CONTROL_FLOW}
    return {name: found_part for name, found_part in parts.items() if name not in control_flow}


def _part(opcodes: str, op_name: str, matmul: bool) -> Part:
    scopes = set(re.findall(r"\w+", op_name))
    if _COMMUNICATION.search(opcodes):
        return COMMUNICATION
    if not op_name:
        return UNKNOWN
    if "masks" in scopes:
        return MASKS
    if "jvp" not in scopes:  # what is not differentiated comes after the gradients
        return OPTIMIZER
    if "attention" in scopes:
        return ATTENTION
    if "head" in scopes:
        return HEAD_MATMULS if matmul else HEAD_PASSES
    if "embedding" in scopes:
        return EMBEDDING
    return HIDDEN_MATMULS if matmul or "matmul" in scopes else ELEMENTWISE


class Kernel(NamedTuple):
    """All launches of one instruction in a profile; `instruction` is None where the profile names none."""

    name: str
    instruction: str | None
    launches: int
    ms: float


def kernels(profile: Path, module: str) -> list[Kernel]:
    """Return every kernel in a profile's folder (of `jax.profiler.trace`) that belongs to the HLO module `module`.

    On a GPU, kernels that name no module are listed as well: better not attributed than not counted.

    Raises:
      UsageError: there is no profile in the folder.
    """
    totals: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    for launch in _launches(profile, module):
        totals[launch.name, launch.instruction].append(launch.end_ns - launch.start_ns)
    return [Kernel(name, instruction, len(times), sum(times) / 1e6) for (name, instruction), times in totals.items()]


def exposed_communication(profile: Path, module: str, parts: dict[str, Part]) -> float:
    """Return the milliseconds in which a device ran communication and no other kernel, summed over the devices.

    Raises:
      UsageError: there is no profile in the folder.
    """
    devices: dict[str, list[tuple[float, int, bool]]] = defaultdict(list)
    for launch in _launches(profile, module):
        communicates = _communicates(launch.name, launch.instruction, parts)
        devices[launch.device] += [(launch.start_ns, 1, communicates), (launch.end_ns, -1, communicates)]
    exposed = 0.0
    for borders in devices.values():
        running, since = {True: 0, False: 0}, 0.0
        for now, change, communicates in sorted(borders):
            if running[True] and not running[False]:
                exposed += now - since
            running[communicates] += change
            since = now
    return exposed / 1e6


class _Launch(NamedTuple):
    device: str
    name: str
    instruction: str | None
    start_ns: float
    end_ns: float


def _launches(profile: Path, module: str) -> Iterator[_Launch]:
    files = sorted(profile.glob("**/*.xplane.pb"))
    if not files:
        raise UsageError(f"{profile}: no *.xplane.pb in it; profile again, into an empty folder")
    for plane in ProfileData.from_file(str(files[-1])).planes:
        on_gpu = plane.name.startswith("/device:GPU")
        if not (on_gpu or plane.name == "/host:CPU"):
            continue
        for line in plane.lines:
            # A GPU plane has derived lines as well (XLA Ops, ...), which would count everything twice.
            if on_gpu and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                statistics = dict(event.stats)
                instruction, of_module = statistics.get("hlo_op"), statistics.get("hlo_module")
                if of_module == module or (on_gpu and of_module is None):
                    end = event.start_ns + event.duration_ns
                    yield _Launch(plane.name, event.name, instruction, event.start_ns, end)


def _communicates(kernel: str, instruction: str | None, parts: dict[str, Part]) -> bool:
    """Return whether a kernel is communication: NCCL's may name an instruction that the module wraps in another."""
    return kernel.startswith("nccl") or parts.get(instruction or "") is COMMUNICATION


def attribute(found: Iterable[Kernel], parts: dict[str, Part]) -> dict[Part, list[Kernel]]:
    """Return the kernels of each part, longest first. Instructions that `parts` leaves out are dropped."""
    grouped: dict[Part, list[Kernel]] = {part: [] for part in PARTS}
    for kernel in sorted(found, key=lambda kernel: -kernel.ms):
        if _communicates(kernel.name, kernel.instruction, parts):
            grouped[COMMUNICATION].append(kernel)
        elif kernel.instruction is None:
            grouped[UNKNOWN].append(kernel)
        elif kernel.instruction in parts:
            grouped[parts[kernel.instruction]].append(kernel)
    return grouped
