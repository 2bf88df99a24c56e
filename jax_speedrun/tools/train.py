"""Train the speedrun recipe: `python scripts/train.py --preset tiny`."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, get_args

from ..config import KERNELS, PRESETS, Config, from_dict, recipe_differences, resolve
from ..data.batches import TINY_DATA, find_shards
from ..errors import UsageError
from ..kernels.attention.op import Implementation
from ..run import checkpoint, distributed
from ..run.compilation import keep_compiled_programs
from ..run.loop import DivergedError
from ..run.program_cache import cache_for
from ..run.train import train
from ..sharding import make_mesh, start_devices
from .command import make_parser
from .cost_model import describe, describe_scaling, planned_device

FINEWEB_DATA = Path("data/fineweb10B")


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
        type=Path,
        metavar="DIR",
        help=f"folder of *_train_*.bin and *_val_*.bin shards "
        f"(default: the tiny data in the package for tiny, else {FINEWEB_DATA})",
    )
    run.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/<time>-<preset>)")
    run.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on from the last checkpoint of the run in DIR, with its recipe"
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
    try:
        distributed.start(args.coordinator, args.processes, args.process_id, args.mesh)
        _run(args, None if args.dry_run else keep_compiled_programs())
    except (UsageError, DivergedError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, UsageError) else 1
        if distributed.fails_alone(error):
            distributed.end_alone(code)
        return code
    except (Exception, KeyboardInterrupt) as error:
        if not distributed.fails_alone(error):
            raise
        print(f"train.py: error: {distributed.describe_failure(error)}", file=sys.stderr)
        distributed.end_alone(1)
    return 0


def _run(args: argparse.Namespace, compiled: Path | None) -> None:
    fields = {field.name for field in dataclasses.fields(Config)} - {"preset"}
    changes = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    with distributed.together():
        if args.resume_step is not None and args.resume is None:
            raise UsageError(f"--resume-step {args.resume_step}: needs --resume DIR")
        config = _resumed_config(args, changes) if args.resume else _preset(args, changes)
        mesh = make_mesh(args.mesh, config.sequences)
        distributed.require_whole(mesh)
        device = mesh.devices.flat[0]
        if args.dry_run:
            device = planned_device(config, device)
        config = resolve(config, device)
    distributed.require_same(config, args.dry_run, args.resume is None, args.resume_step)
    distributed.say(describe(config, mesh, device))
    if args.dry_run:
        distributed.say(describe_scaling(config, mesh.size, device))
        return
    data = args.data or (TINY_DATA if config.preset == "tiny" else FINEWEB_DATA)
    named = args.resume or args.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.preset}"
    out = Path(distributed.exchange(str(named))[0])  # clocks differ
    distributed.say(f"data:       {data}\nrun:        {out}")
    train(
        config,
        mesh,
        data,
        out,
        resume=args.resume is not None,
        resume_step=args.resume_step,
        profile=args.profile,
        programs=cache_for(mesh, compiled),
    )


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
    except UsageError:
        shards = []
    if not shards:
        return "tiny", f"there are no FineWeb shards in {data} (scripts/prepare_data.py fineweb fetches them)"
    return "sub3min", f"there is a GPU ({device.device_kind}) and {data} holds {len(shards)} FineWeb shards"


def _resumed_config(args: argparse.Namespace, changes: dict[str, Any]) -> Config:
    if args.out is not None and args.out != args.resume:
        raise UsageError(f"--out {args.out}: a resumed run goes on in its own folder; leave out --out")
    saved = from_dict(checkpoint.latest(args.resume, args.resume_step).metadata["config"])
    base = saved if args.preset in (None, "auto") else _preset(args, {"seed": saved.seed, "steps": saved.steps})
    wanted = dataclasses.replace(base, **changes)
    if differences := recipe_differences(saved, wanted):
        raise UsageError(f"--resume {args.resume}: the checkpoint has another configuration: {'; '.join(differences)}")
    return wanted
