"""The command `mmlm`: one subcommand per verb, and those for people. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mmlm import __version__, leaving, model_commands
from mmlm.errors import ConfigError, GateFailed, Interrupted, MmlmError, explain_os_error

VERBS = {
    "scan": "read the raw corpora into a manifest: ids, hashes, splits, what was refused and why",
    "shard": "turn the manifest's records into feature shards (WebDataset tars), with Ray",
    "train": "train the fused Transformer on the shards, with DeepSpeed on all ranks",
    "distill": "teach a smaller model from the trained one",
    "evaluate": "score the models with intervals and write the report",
    "register": "log the model in MLflow, compare it with the champion, move the alias or say why not",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 our fault, 2 wrong input, 3 failed gate, 4 resumable."""
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
    except MmlmError as error:  # a flag whose value is refused
        return _fail(error, argparse.Namespace())
    if not getattr(arguments, "command", None):
        parser.print_help()
        return 0
    from mmlm.progress import Progress
    from mmlm.world import adopt_slurm, apply_quiet_environment

    apply_quiet_environment()
    adopt_slurm()
    Progress.quiet = getattr(arguments, "quiet", False)
    if os.environ.get("RANK") is None:
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGUSR1, _stop)  # a scheduler's notice, as Slurm's --signal sends it
        return _guarded(arguments)
    from mmlm.launch.leader import lead  # torchrun or Slurm made this process one rank of several

    return lead(lambda: _guarded(arguments), lambda follow: _guarded(arguments, follow))


def _guarded(arguments: argparse.Namespace, call: Callable[[], int | None] | None = None) -> int:
    """The exit code of the command (or of `call`), whatever happens; people see a sentence, never a traceback."""
    try:
        return (call() if call else arguments.command(arguments)) or 0
    except KeyboardInterrupt:
        return _fail(Interrupted("interrupted", cure="run the same command again to go on"), arguments)
    except MmlmError as error:
        return _fail(error, arguments)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        return _fail(explain_os_error(error) or error, arguments)
    except Exception as error:
        return _fail(error, arguments)


def _stop(*_: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt  # not an Exception: a handler for bad samples must not take it for one


def _fail(error: BaseException, arguments: argparse.Namespace) -> int:
    if getattr(arguments, "debug", False):
        traceback.print_exception(error)
    if isinstance(error, MmlmError):
        print(f"mmlm: {error}", file=sys.stderr)
        return error.exit_code
    text = str(error).strip().splitlines()
    print(
        f"mmlm: this is a fault of ours: {type(error).__name__}: {text[0] if text else ''}; `--debug` shows where",
        file=sys.stderr,
    )
    return 1


def build_parser() -> argparse.ArgumentParser:
    """All commands with their flags."""
    parser = argparse.ArgumentParser(
        prog="mmlm",
        description="Raw text, pictures and sound in; an evaluated, registered and served multimodal model out.",
        epilog="Begin with `mmlm run demo`, or `mmlm new my-story --data MY_FILES` and `mmlm run my-story`.",
    )
    parser.add_argument("--version", action="version", version=f"mmlm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    run = _command(commands, "run", "run a whole story: all stages in order; what is already there is skipped", _run)
    _story_flags(run)
    run.add_argument("--require-promotion", action="store_true", help="exit 3 when the champion stays")
    for verb, text in VERBS.items():
        command = _command(commands, verb, text, _verb)
        command.set_defaults(verb=verb)
        _story_flags(command)
        if verb == "scan":
            command.add_argument(
                "--explain", action="store_true", help="say what would become of the corpora, and write nothing; "
                "STORY may be a folder or table without a story",
            )  # fmt: skip
            command.add_argument("--json", action="store_true", help="with --explain: as JSON")
        command.add_argument(
            "--replace", action="store_true", help="set aside what other settings or data made there, as `run` does"
        )
        if verb in ("train", "distill"):  # `run` and `tune` begin trainings that have no checkpoint yet
            command.add_argument("--resume", action="store_true", help="training must find a checkpoint to go on from")
        if verb in ("train", "distill", "evaluate"):
            command.add_argument(
                "--shards",
                metavar="URI",
                help="read this shard set (s3://…, gs://…, https://… or a folder) instead of the one below --out",
            )
        if verb == "shard":
            command.add_argument(
                "--retry", metavar="REASON", help="make the shards again that lost samples for REASON (or `all`)"
            )
            command.add_argument(
                "--mirror",
                metavar="URI",
                help="then publish them to s3://, gs:// or a folder; nothing there is replaced",
            )
    _before_training(commands)
    model_commands.add(commands, _command)
    _looking(commands)
    return parser


def _command(commands: Any, name: str, text: str, call: Callable[[argparse.Namespace], int | None]) -> Any:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(command=call)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.add_argument("--quiet", action="store_true", help="no progress")
    return command


def _story_flags(command: Any) -> None:
    command.add_argument("story", metavar="STORY", help="a built-in story (demo, stamps, almanac) or the folder of one")
    folder = functools.partial(
        model_commands.folder, cure="`mmlm shard STORY --mirror URI` publishes the finished shards"
    )
    command.add_argument("--out", type=folder, metavar="DIR", help="where everything goes (default: runs/STORY)")
    command.add_argument(
        "--data", metavar="DIR", help="where the raw corpora lie: a folder, s3://… or gs://…; never part of identity"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting, such as train.seed=1"
    )
    command.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow (default: MLFLOW_TRACKING_URI, or sqlite in runs/)"
    )
    command.add_argument(
        "--on", choices=["local", "ray", "slurm", "kuberay"], default="local", help="here, or as a job of a cluster"
    )
    command.add_argument(
        "--address", metavar="URL", help="the Ray cluster's job address, such as http://127.0.0.1:8265"
    )
    command.add_argument(
        "--cluster", action="append", default=[], metavar="FILE|KEY=VALUE",
        help="with --on slurm or kuberay: what to ask for, such as nodes=2 or gpus_per_node=4",
    )  # fmt: skip
    command.add_argument("--print", action="store_true", help="with --on slurm or kuberay: show the job, send nothing")
    command.add_argument("--workers", type=int, metavar="N", help="processes that make shards (default: one a core)")
    command.add_argument(
        "--ranks", type=int, metavar="N", help="training processes (default: one a GPU, or 2 on a CPU)"
    )
    command.add_argument("--stop-on-interrupt", action="store_true", help="with --on ray: Ctrl-C also stops the job")
    command.add_argument("--inside-ray", action="store_true", help=argparse.SUPPRESS)
    _training_flags(command)


def _training_flags(command: Any) -> None:
    """Where and how long training runs; none of it changes what comes out."""
    command.add_argument(
        "--time-limit", metavar="TIME", default=os.environ.get("MMLM_TIME_LIMIT"),
        help="training saves and exits with 4 before this is over: 3:59:00, 45m, 4h",
    )  # fmt: skip
    command.add_argument("--hang", metavar="TIME", help="a training step that takes longer is a hang (default: 30m)")
    command.add_argument("--ledger", action="store_true", help="write the ids of every step's records into ledger/")


def _training_environment(arguments: argparse.Namespace) -> None:
    """The flags above, as the environment that the training stages read."""
    from mmlm.train.control import seconds_of

    if arguments.time_limit:
        os.environ["MMLM_DEADLINE"] = str(time.time() + seconds_of(arguments.time_limit))
    if arguments.hang:
        os.environ["MMLM_HANG_SECONDS"] = str(seconds_of(arguments.hang, "--hang"))
    for flag in ("ledger", "resume"):
        if getattr(arguments, flag, False):
            os.environ[f"MMLM_{flag.upper()}"] = "1"


def _before_training(commands: Any) -> None:
    """Commands that come before a training: they write a story, or say what would suit it."""
    new = _command(commands, "new", "look at somebody's files and write a story for them", _new)
    new.add_argument("story", type=model_commands.folder, metavar="DIR", help="the story folder to write")
    new.add_argument("--data", required=True, metavar="PATH", help="a folder, CSV, JSON, JSONL or Parquet file")
    new.add_argument("--name", help="the story's name (default: the folder's)")

    tune = _command(
        commands, "tune", "search for better settings of training and data, bad trials stopped early (Ray Tune)", _tune
    )
    _story_flags(tune)
    tune.add_argument(
        "--search", action="append", default=[], metavar="KEY=SPACE", help="such as train.optimizer.lr=log(1e-4,1e-2), "
        "uniform(…), int(…) or shard.features.image.size=[16,32], of train, shard or scan; or write the story's tune.yaml",
    )  # fmt: skip
    tune.add_argument("--trials", type=int, metavar="N", help="settings that are tried (default: 16)")
    tune.add_argument("--parallel", type=int, metavar="N", help="trials side by side (default: one a GPU, or a core)")
    tune.add_argument(
        "--metric", metavar="NAME", help="of metrics.jsonl (default: val/loss if the story validates, else loss)"
    )
    tune.add_argument("--mode", choices=["min", "max"], help="which way is better (default: min)")
    tune.add_argument("--replace", action="store_true", help="set aside what another search left there")
    tune.add_argument("--json", action="store_true", help="print the trials as JSON")

    plan = _command(commands, "plan", "say what a training would take, on one device or many, before it starts", _plan)
    plan.add_argument("story", metavar="STORY|CONFIG", help="a story, or a train.yaml")
    plan.add_argument(
        "--out",
        type=model_commands.folder,
        metavar="DIR",
        help="where the story's shards lie, if made (default: runs/STORY)",
    )
    plan.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.model.width=2048")
    plan.add_argument("--gpus", metavar="N,N", help="numbers of devices (default: 1,2,4,8; on a CPU up to its cores)")
    plan.add_argument(
        "--gpu", metavar="NAME", help="h100, a100-80 …, or cpu: this machine, measured (default: what is here)"
    )
    plan.add_argument("--zero", metavar="N,N", help="ZeRO stages (default: all)")
    plan.add_argument("--price", type=float, metavar="MONEY", help="of one device for an hour")
    plan.add_argument("--presets", action="store_true", help="instead: every size by name, on one device")
    plan.add_argument("--json", action="store_true")

    advise = _command(
        commands, "advise", "say which model, size and settings suit some data on this machine, and why", _advise
    )
    advise.add_argument(
        "given", metavar="DIR|STORY", help="a manifest, a shard set, a run's folder, or a scanned story"
    )
    advise.add_argument(
        "--out", type=model_commands.folder, metavar="DIR", help="where the story's run lies (default: runs/STORY)"
    )
    advise.add_argument(
        "--hours", type=float, default=8.0, metavar="N", help="a training may take so long (default: 8)"
    )
    advise.add_argument("--write", type=Path, metavar="FILE", help="write the train.yaml; nothing is written without")
    advise.add_argument("--json", action="store_true")


def _looking(commands: Any) -> None:
    """Commands that look at what is there."""
    inspect = _command(commands, "inspect", "say what is in a manifest, shard set, checkpoint or report", _inspect)
    inspect.add_argument("path", type=Path, metavar="DIR")
    inspect.add_argument("--json", action="store_true")

    verify = _command(commands, "verify", "check every checksum and count of a shard set", _verify)
    verify.add_argument("path", metavar="DIR", help="a folder, s3:// or gs://")
    verify.add_argument(
        "--rebuild", type=int, metavar="N", help="also make N random shards again and compare their bytes"
    )
    verify.add_argument("--seed", type=int, help="which N shards (with --rebuild; default: others each time)")
    verify.add_argument("--manifest", type=Path, metavar="DIR", help="with --rebuild (default: `manifest` beside DIR)")
    verify.add_argument("--data", metavar="DIR", help="with --rebuild: the raw corpora (default: `raw` beside DIR)")

    doctor = _command(commands, "doctor", "say what this machine can do, and what is missing", _doctor)
    doctor.add_argument("--json", action="store_true")


def _prepare(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The story and the places that the flags describe. Tracking is opened here: it must start."""
    from mmlm import story as stories
    from mmlm.launch import local
    from mmlm.tracking import Tracker

    _training_environment(arguments)
    story = stories.load(arguments.story, arguments.set)
    out = (arguments.out or Path("runs") / story.name).resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = stories.data_folder(story, arguments.data, out)
    launch: Any = local.choose(arguments.ranks)
    if arguments.inside_ray:
        from mmlm.launch import ray_train

        launch = ray_train.ranks(arguments.ranks)
    tracker = Tracker.start(arguments.tracking_uri, story=story.name, out=out)
    places = stories.Places(
        out=out, data=data, launch=launch, tracker=tracker, tracking_uri=tracker.uri, workers=arguments.workers,
        ray_address="auto" if arguments.inside_ray else None, retry=getattr(arguments, "retry", None),
        shards=getattr(arguments, "shards", None),
    )  # fmt: skip
    return story, places


def _say(text: str) -> None:
    from mmlm.progress import Progress

    if not Progress.quiet:
        print(text, file=sys.stderr, flush=True)


def _run(arguments: argparse.Namespace) -> int:
    if _elsewhere(arguments):
        return _submit(arguments, "run")
    from mmlm import artifacts, summary
    from mmlm import story as stories

    started = time.time()
    story, places = _prepare(arguments)
    with contextlib.closing(artifacts.hold(places.out)), summary.PeakMemory() as memory, places.tracker:
        stages = stories.run(story, places, _say)
    written = summary.write(story, places, stages, time.time() - started, memory.peak)
    print(summary.table(written, places.out))
    if arguments.require_promotion and not written["registered"].get("promoted"):
        raise GateFailed(f"the champion stays: {written['registered'].get('reason', '')}")
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from mmlm import story as stories
    from mmlm.corpus import explain, explain_words
    from mmlm.storage import is_remote

    path = Path(arguments.story)
    files = path.exists() or is_remote(arguments.story)
    is_story = (path / "story.yaml").is_file() or arguments.story in stories.built_in() or not files
    if is_story:
        story = stories.load(arguments.story, arguments.set)
        out = (arguments.out or Path("runs") / story.name).resolve()
        found = explain.explain(story.scan, stories.data_folder(story, arguments.data, out))
    else:
        found = explain.explain_files(arguments.story)
    shown = str(story.folder) if is_story else ""
    print(json.dumps(found, ensure_ascii=False, indent=1) if arguments.json else explain_words.words(found, shown))
    return 0


def _verb(arguments: argparse.Namespace) -> int:
    if getattr(arguments, "explain", False):
        return _explain(arguments)
    if _elsewhere(arguments):
        return _submit(arguments, arguments.verb)
    from mmlm import story as stories

    story, places = _prepare(arguments)
    if getattr(story, arguments.verb) is None:
        raise ConfigError(f"the story {story.name} has no {arguments.verb}.yaml")
    started = time.time()
    make = functools.partial(stories.perform, story, arguments.verb, places)
    with places.tracker:
        artifact, _ = stories.settle(make) if arguments.replace else make()
    state = "already there" if artifact.path.joinpath("artifact.json").stat().st_mtime < started else "done"
    print(f"{arguments.verb}: {state}: {artifact.path}  {stories.describe(artifact.counts)}")
    if getattr(arguments, "mirror", None):
        from mmlm.shards.mirror import mirror
        from mmlm.stores import blank

        place, counts = mirror(artifact.path, arguments.mirror)
        print(f"mirror: {blank(place)}  {stories.describe(counts)}")
    return 0


def _elsewhere(arguments: argparse.Namespace) -> bool:
    return not arguments.inside_ray and bool(arguments.on != "local" or arguments.cluster or arguments.print)


def _submit(arguments: argparse.Namespace, verb: str) -> int:
    from mmlm import submission

    return submission.submit(arguments, verb)


def _new(arguments: argparse.Namespace) -> int:
    from mmlm import scaffold
    from mmlm.storage import is_remote

    data = arguments.data if is_remote(arguments.data) else Path(arguments.data)
    for line in scaffold.write_story(arguments.story, data, arguments.name):
        print(line)
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    if _elsewhere(arguments):
        return _submit(arguments, "tune")
    from mmlm import search_space, tuning
    from mmlm import story as stories

    story, places = _prepare(arguments)
    config = search_space.read(
        story.folder, arguments.search, trials=arguments.trials, metric=arguments.metric, mode=arguments.mode
    )
    where = tuning.Where.choose(
        places.out, places.tracker.uri, arguments.parallel, arguments.ranks, inside_ray=arguments.inside_ray
    )
    make = functools.partial(tuning.tune, config, story, places, where)
    with places.tracker:
        made = stories.settle(make) if arguments.replace else make()
    found = json.loads((made.path / "results.json").read_text(encoding="utf-8"))
    print(json.dumps(found, ensure_ascii=False, indent=1) if arguments.json else tuning.words(found, places.out))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from mmlm import plans
    from mmlm.train import devices
    from mmlm.world import cores

    what, device = plans.subject(arguments.story, arguments.set, arguments.out), devices.find(arguments.gpu)
    if arguments.presets:
        sizes = plans.presets(what, device)
        print(json.dumps(sizes, indent=1) if arguments.json else plans.words_of_presets(what, device, sizes))
        return 0
    usual = [n for n in (1, 2, 4, 8) if not device.is_cpu or n <= cores()]
    counts = plans.numbers(arguments.gpus, "--gpus", least=1) if arguments.gpus else usual
    told = plans.plan(what, device, counts, plans.stages_of(arguments.zero), arguments.price)
    print(json.dumps(told, ensure_ascii=False, indent=1) if arguments.json else plans.words(told))
    return 0


def _advise(arguments: argparse.Namespace) -> int:
    from mmlm.advise import page

    if arguments.write:
        page.require_new(arguments.write)
    found = page.compose(arguments.given, arguments.out, arguments.hours)
    print(json.dumps(found, ensure_ascii=False, indent=1) if arguments.json else page.words(found))
    if arguments.write:
        page.write(found, arguments.write)
        print(f"wrote {arguments.write}", file=sys.stderr)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from mmlm import inspection

    found = inspection.look(arguments.path)
    print(json.dumps(found, ensure_ascii=False, indent=1) if arguments.json else inspection.words(found))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from mmlm.shards.verify import rebuild, verify
    from mmlm.shards.verify_remote import verify_remote
    from mmlm.storage import is_remote
    from mmlm.stores import blank

    shown, elsewhere, again = blank(arguments.path), is_remote(arguments.path), arguments.rebuild is not None
    if again and elsewhere:
        raise ConfigError(f"--rebuild of {shown}", wanted="a folder", cure="rebuild where the set was made")
    if again and arguments.rebuild < 1:
        raise ConfigError(f"--rebuild {arguments.rebuild}", wanted="the number of shards to make again, 1 or more")
    path = arguments.path.removeprefix("file://")
    problems, told = verify_remote(path) if elsewhere else verify(path), ""
    if again and not problems:
        beside = Path(path).resolve().parent
        seed = random.randrange(1 << 31) if arguments.seed is None else arguments.seed
        problems, count = rebuild(
            path, arguments.manifest or beside / "manifest", arguments.data or beside / "raw", arguments.rebuild, seed
        )
        told = f", and {count:,} shards made again (--seed {seed})"
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"mmlm: {shown}: {len(problems)} problem(s){told}; make the shards again", file=sys.stderr)
        return 2
    print(f"{shown}: every checksum and count holds" + (f"{told} have the same bytes" if told else ""))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from mmlm import doctor

    found = doctor.examine()
    print(json.dumps(found, ensure_ascii=False, indent=1) if arguments.json else doctor.words(found))
    return 0


def command() -> NoReturn:
    """`mmlm` in a shell."""
    leaving.run(main)


if __name__ == "__main__":
    command()
