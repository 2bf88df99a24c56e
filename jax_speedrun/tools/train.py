"""Train the speedrun recipe: `python scripts/train.py --preset tiny`.

Exit codes: 0 when the last step is done; 2 for what the options, the data or the machine must be put right for, in one
line; 1 for a loss that is not finite and for other failures. SIGTERM, SIGHUP or Ctrl-C end a run after a checkpoint of
the step it is at, with code 143, 129 or 130: 128 and the signal's number. So `train.py ... && next` never goes on with
an unfinished run, and the same command with --auto-resume finishes it.
"""

import argparse
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any, get_args

from ..config import KERNELS, PRESETS, Config, from_dict, recipe_differences, resolve
from ..data.batches import TINY_DATA, find_shards
from ..errors import SIGNALLED, Interrupted, UsageError, interruptible
from ..kernels.attention.op import Implementation
from ..run import checkpoint, distributed
from ..run.compilation import keep_compiled_programs
from ..run.failures import explain
from ..run.last_words import LastWords
from ..run.loop import DivergedError
from ..run.output import unfailing_output
from ..run.program_cache import cache_for
from ..run.train import train
from ..sharding import make_mesh, start_devices
from .command import make_parser
from .cost_model import describe, describe_scaling, planned_device

FINEWEB_DATA = Path("data/fineweb10B")


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    p = make_parser("train.py", __doc__)
    run = p.add_argument_group("the run")
    run.add_argument(
        "--preset",
        default=None,
        help=f"auto (default), {', '.join(PRESETS)}: sub3min is the record; eighth one of its eight sequences a step, "
        "for one GPU; tiny every part of it on two CPU cores; auto takes sub3min where a GPU and FineWeb shards are "
        "found, else tiny",
    )
    run.add_argument(
        "--mesh",
        type=int,
        metavar="N",
        help="devices, over all processes (default: all that share the batch evenly); on a machine without a GPU, N "
        "virtual CPU devices",
    )
    run.add_argument(
        "--data",
        type=_folder,
        metavar="DIR",
        help=f"folder of *_train_*.bin and *_val_*.bin shards "
        f"(default: the tiny data in the package for tiny, else {FINEWEB_DATA})",
    )
    run.add_argument("--out", type=_folder, metavar="DIR", help="the run's folder (default: runs/<time>-<preset>)")
    run.add_argument(
        "--resume",
        type=_folder,
        metavar="DIR",
        help="go on from the last checkpoint of the run in DIR, with its recipe and, unless --data is given, its data",
    )
    run.add_argument(
        "--auto-resume",
        action="store_true",
        help="with --out: go on from the last checkpoint there, or begin where there is none yet; for jobs that a "
        "scheduler submits again by the same command",
    )
    run.add_argument(
        "--resume-step", type=int, metavar="N", help="with --resume: from the checkpoint of step N, not the last one"
    )
    run.add_argument(
        "--profile", action="store_true", help="trace a few steps into the run's folder, for xprof or Perfetto"
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="print devices, batch layout, tokens, a memory estimate, what the devices send each other and a predicted "
        "time; compile and write nothing",
    )
    several = p.add_argument_group(
        "several processes", "started with the same arguments each; Slurm and Open MPI need none of these"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 runs, and a port free there")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process-id", type=int, metavar="I", help="which of them this is, 0 to N - 1")
    change = p.add_argument_group("changes to the preset")
    change.add_argument("--steps", type=int, metavar="N")
    change.add_argument("--seed", type=int, metavar="N", help="of the initial weights")
    change.add_argument("--sequences", type=int, metavar="N", help="sequences a step, over all devices")
    change.add_argument("--sequence-length", type=int, metavar="T", help="tokens a sequence, a multiple of 128")
    change.add_argument("--epochs", type=int, metavar="N", help="how often the data may be gone through")
    change.add_argument("--validation-every", type=int, metavar="N", help="steps between validations")
    change.add_argument(
        "--checkpoint-every", type=int, metavar="N", help="steps between checkpoints, 0: only at the end"
    )
    change.add_argument(
        "--attention",
        choices=get_args(Implementation),
        help="attention implementation; auto (default) picks the fastest that runs here",
    )
    change.add_argument(
        "--kernels",
        choices=KERNELS,
        help="implementation of everything but attention: kernels for H100 and H200 (hopper), or JAX alone (xla); auto "
        "(default) picks hopper where it runs",
    )
    return p


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    last_words = LastWords()
    with unfailing_output(), interruptible():
        try:
            distributed.start(args.coordinator, args.processes, args.process_id, args.mesh, last_words)
            code = _run(args, None if args.dry_run else keep_compiled_programs(), last_words)
        except BaseException as error:
            code, message = _failure(error, last_words)
            print(f"train.py: error: {message}", file=sys.stderr)
            # Nobody waits for those who will not come, nor for a compilation that was interrupted.
            if isinstance(error, KeyboardInterrupt) or distributed.fails_alone(error):
                distributed.end_alone(code, last_words)
        last_words.dismiss()
    return code


def _failure(error: BaseException, last_words: LastWords) -> tuple[int, str]:
    """Return the exit code and the line for an error, or raise it again if it is none of ours or the user's."""
    way_on = f"; {last_words.advice}" if last_words.advice else ""
    if isinstance(error, UsageError | DivergedError):
        return 2 if isinstance(error, UsageError) else 1, str(error)
    if isinstance(error, KeyboardInterrupt):
        number = error.signal if isinstance(error, Interrupted) else signal.SIGINT
        return SIGNALLED + number, f"interrupted by {number.name}, without a checkpoint of where it was{way_on}"
    if (explanation := explain(error)) is not None:
        return 1, f"{explanation}{way_on}"
    if distributed.fails_alone(error):
        return 1, f"{distributed.describe_failure(error)}{way_on}"
    raise error


def _run(args: argparse.Namespace, compiled: Path | None, last_words: LastWords) -> int:
    fields = {field.name for field in dataclasses.fields(Config)} - {"preset"}
    changes = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    with distributed.together():
        _check_options(args)
        step = _step_to_resume(args)
    step = json.loads(distributed.exchange(json.dumps(step))[0])  # a shared file system may show it late to the others
    with distributed.together():
        saved = None if step is None else checkpoint.latest(args.resume or args.out, step).metadata
        config = _preset(args, changes) if saved is None else _resumed_config(args, changes, saved)
        mesh = make_mesh(args.mesh, config.sequences)
        distributed.require_whole(mesh)
        device = mesh.devices.flat[0]
        if args.dry_run:
            device = planned_device(config, device)
        config = resolve(config, device)
    distributed.require_same(config, args.dry_run, args.resume is None, args.auto_resume, args.resume_step)
    distributed.say(describe(config, mesh, device))
    if args.dry_run:
        distributed.say(describe_scaling(config, mesh.size, device))
        return 0
    recorded = TINY_DATA if config.preset == "tiny" else FINEWEB_DATA
    data = args.data or (recorded if saved is None else Path(saved["data"]["folder"]))
    named = args.resume or args.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.preset}"
    out = Path(distributed.exchange(str(named))[0])  # clocks differ
    distributed.say(f"data:       {data}\nrun:        {out}")
    last_words.advise(f"go on with --out {out} --auto-resume")
    outcome = train(
        config,
        mesh,
        data,
        out,
        resume_step=step,
        replace=args.auto_resume,
        profile=args.profile,
        programs=cache_for(mesh, compiled),
    )
    return SIGNALLED + outcome.preempted_by if outcome.preempted_by else 0


def _check_options(args: argparse.Namespace) -> None:
    if args.resume_step is not None and args.resume is None:
        raise UsageError(f"--resume-step {args.resume_step}: needs --resume DIR")
    if args.auto_resume and (args.out is None or args.resume is not None):
        raise UsageError("--auto-resume: needs --out DIR, and no --resume")
    if args.resume is not None and args.out not in (None, args.resume):
        raise UsageError(f"--out {args.out}: a resumed run goes on in its own folder; leave out --out")


def _step_to_resume(args: argparse.Namespace) -> int | None:
    """Return the step of the checkpoint to go on from, None where the run begins."""
    if args.resume is not None:
        return checkpoint.latest(args.resume, args.resume_step).step
    steps = checkpoint.complete_steps(args.out) if args.auto_resume else []
    return steps[-1] if steps else None


def _preset(args: argparse.Namespace, changes: dict[str, Any]) -> Config:
    name = args.preset or "auto"
    if name == "auto":
        name, why = _auto_preset(args)
        distributed.say(f"preset auto: {name}, since {why}")
    if name not in PRESETS:
        raise UsageError(f"--preset {name}: unknown; choose one of auto, {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


def _auto_preset(args: argparse.Namespace) -> tuple[str, str]:
    device = start_devices(args.mesh)[0]
    if device.platform != "gpu":
        return "tiny", f"the device is a {device.platform}, not a GPU"
    data = args.data or FINEWEB_DATA
    try:
        shards = [path for path in find_shards(data, "train") if path.name.startswith("fineweb")]
    except UsageError as error:
        return "tiny", f"there are no FineWeb shards: {error}"
    if not shards:
        return "tiny", f"there are no FineWeb shards in {data} (prepare_data.py fineweb fetches them)"
    return "sub3min", f"there is a GPU ({device.device_kind}) and {data} holds {len(shards)} FineWeb shards"


def _resumed_config(args: argparse.Namespace, changes: dict[str, Any], metadata: checkpoint.Metadata) -> Config:
    saved = from_dict(metadata["config"])
    base = saved if args.preset in (None, "auto") else _preset(args, {"seed": saved.seed, "steps": saved.steps})
    wanted = dataclasses.replace(base, **changes)
    if differences := recipe_differences(saved, wanted):
        named = f"--resume {args.resume}" if args.resume else f"--out {args.out} --auto-resume"
        raise UsageError(f"{named}: the checkpoint has another configuration: {'; '.join(differences)}")
    return wanted
