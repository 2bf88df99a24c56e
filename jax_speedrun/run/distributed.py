"""Several processes, one run: how they find each other, agree, share the data, and end when one of them is lost.

All of them run the same program on the same arguments. A single process passes through
here untouched.
"""

import contextlib
import hashlib
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from ..errors import UsageError
from .last_words import LastWords

ADDRESS = re.compile(r"([\w.-]+|\[[\da-fA-F:.]+\]):(\d+)", re.ASCII)
REACH_SECONDS = 45
"""How long the others look for process 0 before they say that it is not there."""
HEARTBEAT_SECONDS = 40
"""A process not heard of for so long is taken for dead, and the others end. Well over the pauses of starting up."""
JOIN_SECONDS = 300
"""How long the first waits for the last: a cluster's nodes do not start at once."""
MESSAGE_BYTES = 4096

SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
LAUNCHERS = (
    (SLURM_VARIABLES, "SLURM_PROCID", "SLURM_NTASKS"),
    (OPEN_MPI_VARIABLES, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
"""Variables by which JAX knows a launcher, and those of this process's number and of how many there are."""


class Identity(NamedTuple):
    """Which process of a run this is, of how many."""

    process: int
    processes: int


_identity = Identity(0, 1)  # until `start` says otherwise; JAX could say only once its backends run


class SharedError(Exception):
    """An error that all processes of a run raise at the same point, so that each can end in an orderly way."""


class SharedUsageError(SharedError, UsageError):
    """A `UsageError` of one process that all of them have been told of."""


def start(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    devices: int | None,
    last_words: LastWords | None = None,
) -> None:
    """Join the run's other processes, if it has any: those the three options name, or else Slurm or Open MPI.

    Must come before JAX's first computation: it starts the backends.

    Args:
      coordinator: HOST:PORT of process 0, on a port free there.
      processes: how many there are.
      process_id: which of them this is, from 0.
      devices: `--mesh`, over all processes. On a CPU machine each gets its share as virtual devices.
      last_words: to be said for this process if it is one of several.

    Raises:
      UsageError: some of the three options without the others, values that cannot be, or processes that do not come.
    """
    options = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    missing = [name for name, value in options.items() if value is None]
    if missing and len(missing) < len(options):
        raise UsageError(f"{', '.join(missing)} missing: --coordinator, --processes and --process-id go together")
    if processes is not None and process_id is not None and coordinator is not None:
        identity = _check(coordinator, processes, process_id)
    elif (identity := _launched()).processes == 1:
        return
    count = identity.processes
    if devices is not None and (devices < 1 or devices % count):
        raise UsageError(f"--mesh {devices} does not divide evenly among {count} processes; use a multiple of {count}")
    global _identity
    _identity = identity
    if last_words is not None:
        last_words.watch(f"process {identity.process} of {count}")
    if coordinator is not None:
        _require_coordinator(coordinator, identity.process)
    jax.config.update("jax_enable_preemption_service", False)  # preemption.py says why
    # On a GPU machine these are not the devices that the run uses.
    jax.config.update("jax_num_cpu_devices", (devices or count) // count)
    where = f"--coordinator {coordinator}" if coordinator else "the launcher's environment"
    complaint = (
        f"{where}: process {identity.process}: the {count} processes do not find each other (%s); start all, with "
        "process 0 in reach"
    )
    # JAX aborts the process, with a stack trace, when it has waited long enough.
    timer = threading.Timer(JOIN_SECONDS, _give_up, [complaint % f"waited {JOIN_SECONDS} s", last_words])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=2 * JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        jax.devices()
    except (ValueError, RuntimeError, AssertionError) as error:  # the last where JAX finds no device
        raise UsageError(complaint % first_line(error)) from error
    finally:
        timer.cancel()


def _give_up(message: str, last_words: LastWords | None) -> None:
    print(f"train.py: error: {message}", file=sys.stderr)
    end_alone(2, last_words)


def _check(coordinator: str, processes: int, process_id: int) -> Identity:
    _, port = _address(coordinator)
    if processes < 1:
        raise UsageError(f"--processes {processes}: at least 1 is needed")
    if not 0 <= process_id < processes:
        raise UsageError(f"--process-id {process_id}: must be 0 to {processes - 1} for --processes {processes}")
    if process_id == 0:
        # JAX's service crashes on a port that is taken.
        try:
            _listen(port).close()
        except OSError as error:
            raise UsageError(f"--coordinator {coordinator}: {error.strerror}; name a free port of process 0") from error
    return Identity(process_id, processes)


def _address(coordinator: str) -> tuple[str, int]:
    match = ADDRESS.fullmatch(coordinator)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UsageError(f"--coordinator {coordinator}: must be HOST:PORT, such as node0:12345")
    return match[1].strip("[]"), int(match[2])


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def _require_coordinator(coordinator: str, process: int) -> None:
    """Wait until the coordinator can be reached; process 0, who is to be it, only looks whether it will be.

    Raises:
      UsageError: it cannot be, for `REACH_SECONDS`.
    """
    host, port = _address(coordinator)
    deadline = time.monotonic() + REACH_SECONDS
    with _listen(port) if process == 0 else contextlib.nullcontext():
        while True:
            try:
                socket.create_connection((host, port), timeout=5).close()
                return
            except OSError as error:
                if process != 0 and time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                waited = "" if process == 0 else f", waited {REACH_SECONDS} s"
                raise UsageError(
                    f"--coordinator {coordinator}: process {process} cannot reach process 0 there "
                    f"({error.strerror or error}{waited}); start all of them, and see that the name and the port are "
                    "those of process 0"
                ) from error


def _launched() -> Identity:
    """Return what Slurm or Open MPI says of this process.

    JAX would join a single one as well, and then confine it to the first of its GPUs.
    """
    for variables, process, processes in LAUNCHERS:
        if all(name in os.environ for name in variables):
            return Identity(int(os.environ[process]), int(os.environ[processes]))
    return Identity(0, 1)


def several() -> bool:
    """Return whether the run has more processes than this one. Starts no backend, unlike `jax.process_count`."""
    return _identity.processes > 1


def is_main_process() -> bool:
    """Return whether this process writes what there is one of in a run: log, metrics, plot, messages."""
    return _identity.process == 0


def say(message: str) -> None:
    """Print a message of the run, once for all processes."""
    if is_main_process():
        print(message, flush=True)


def require_whole(mesh: Mesh) -> None:
    """Raise UsageError unless all devices of all processes are in `mesh`."""
    if several() and mesh.size != jax.device_count():
        raise UsageError(
            f"--mesh {mesh.size}: {jax.process_count()} processes have {jax.device_count()} devices, and all of them "
            f"have to take part; use --mesh {jax.device_count()} with a --sequences it divides, or fewer processes"
        )


def exchange(text: str) -> list[str]:
    """Return what each process says here, by process. All wait for the last."""
    if not several():
        return [text]
    encoded = np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
    longest = max(multihost_utils.process_allgather(np.int32(encoded.size)))
    said = np.zeros(longest + -longest % MESSAGE_BYTES, np.uint8)  # few lengths: each is a program to compile
    said[: encoded.size] = encoded
    heard = multihost_utils.process_allgather(said)
    return [row.tobytes().rstrip(b"\0").decode(errors="surrogateescape") for row in heard]


def announce(what: str, value: str) -> None:
    """Tell all processes, who need not wait for it. If several announce the same thing, the first one counts."""
    # Raised also if there is a value already; any other reason shows in `announced`.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{what}/value", value)


def announced(what: str) -> str | None:
    """Return what a process announced, None if none has: a message to process 0 and back."""
    found = _client().key_value_dir_get(what)
    return found[0][1] if found else None


def _client() -> Any:
    """Return the client of JAX's key-value store, which has no public name, and JAX no other word without waiting."""
    from jax._src.distributed import global_state

    assert global_state.client is not None, "announcements are for several processes"
    return global_state.client


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let a block succeed in all processes, or fail in all of them.

    Raises:
      SharedUsageError: if it raised UsageError in any of several processes.
    """
    error: UsageError | None = None
    try:
        yield
    except UsageError as own:
        if not several():
            raise
        error = own
    said = exchange("" if error is None else str(error))
    if error is not None:
        raise SharedUsageError(str(error)) from error
    for process, text in enumerate(said):
        if text:
            raise SharedUsageError(f"process {process}: {text}")


def require_same(*run: object) -> None:
    """Raise UsageError, in all processes, unless all of them have been given the same `run`, as its repr shows it."""
    digests = exchange(hashlib.sha256(repr(run).encode()).hexdigest())
    if others := [str(process) for process, digest in enumerate(digests) if digest != digests[0]]:
        raise SharedUsageError(f"process {', '.join(others)}: other options than process 0; start all of them alike")


def own_share() -> slice:
    """Return which things this process does, of those that any process could do."""
    return slice(jax.process_index(), None, jax.process_count())


def own_rows(sharding: NamedSharding, rows: int) -> list[int]:
    """Return which of the first axis' `rows` lie on this process's devices, in ascending order."""
    found: set[int] = set()
    for index in sharding.addressable_devices_indices_map((rows,)).values():
        assert index is not None
        found.update(range(rows)[index[0]])
    return sorted(found)


def place(sharding: NamedSharding, rows: int, array: np.ndarray) -> Array:
    """Return a global array of `rows` rows, from this process's `own_rows` of it."""
    return jax.make_array_from_process_local_data(sharding, array, (rows, *array.shape[1:]))


def fails_alone(error: BaseException | None) -> bool:
    """Return whether `error` ends this process while others go on or are gone: then nothing may wait for them."""
    return error is not None and several() and not isinstance(error, SharedError)


def end_alone(code: int, last_words: LastWords | None = None) -> NoReturn:
    """End this process now, without waiting for the others to end as well, as the interpreter's exit would.

    That breaks off their collectives, or else their heartbeats notice it; so they end too.
    """
    if last_words is not None:
        last_words.dismiss()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def describe_failure(error: BaseException) -> str:
    """Return what one of several processes says when it ends alone and by no mistake of the user's."""
    who = f"process {_identity.process} of {_identity.processes} stops"
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return f"{who}, and with it the others: {''.join(traceback.format_exception(error)).strip()}"
    return (
        f"{who}: a computation broke off ({first_line(error)}); unless that says why, another process has died, see "
        "what it said"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where there is none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
