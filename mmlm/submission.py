"""A command of ours handed to a cluster: a Ray cluster that runs, Slurm, or Kubernetes with KubeRay.

What is run there is the same command, with the same flags. `--cluster` says what is asked of the cluster; nothing of it
is part of the identity of what comes out.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mmlm import story as stories
from mmlm import verbatim_yaml
from mmlm.config import Config, apply_override, parse, read_yaml, split_override
from mmlm.errors import ConfigError
from mmlm.storage import is_remote
from mmlm.story import Story

C = TypeVar("C", bound=Config)
FLAGS = ("workers", "ranks", "shards", "retry", "mirror", "time_limit", "hang", "trials", "parallel", "metric", "mode")
TRACKING = "MLFLOW_TRACKING_URI"
SWITCHES = ("replace", "require_promotion", "ledger", "resume", "json")


def submit(arguments: argparse.Namespace, verb: str) -> int:
    """Send the command that `arguments` describe where `--on` says; with `--print` only show what would be sent."""
    if arguments.on != "slurm" and arguments.on != "kuberay" and (arguments.cluster or arguments.print):
        raise ConfigError("--cluster and --print", wanted="--on slurm or --on kuberay beside them")
    story = stories.load(arguments.story, arguments.set)
    return {"ray": _ray, "slurm": _slurm, "kuberay": _kuberay}[arguments.on](arguments, verb, story)


def _ray(arguments: argparse.Namespace, verb: str, story: Story) -> int:
    from mmlm.launch import ray_jobs

    out = (arguments.out or Path("runs") / story.name).resolve()
    command = [sys.executable, "-m", "mmlm.cli", *_here(arguments, verb, story, out), "--inside-ray"]
    address = arguments.address or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    ray_jobs.submit(command, address, env=_tracking(arguments), stop_on_interrupt=arguments.stop_on_interrupt)
    return 0


def _slurm(arguments: argparse.Namespace, verb: str, story: Story) -> int:
    from mmlm.launch import slurm

    config = settings(slurm.SlurmConfig, arguments.cluster)
    if arguments.ranks:
        raise ConfigError(
            f"--ranks {arguments.ranks} with Slurm",
            wanted="nodes and ranks_per_node",
            cure="--cluster ranks_per_node=2",
        )
    out = (arguments.out or Path("runs") / story.name).resolve()
    command = [sys.executable, "-m", "mmlm.cli", *_here(arguments, verb, story, out)]
    script = slurm.render(config, command, f"mmlm-{verb}-{story.name}", _checkout() | _tracking(arguments))
    print(script.rstrip() if arguments.print else f"job {slurm.submit(script)} submitted to Slurm")
    return 0


def _kuberay(arguments: argparse.Namespace, verb: str, story: Story) -> int:
    """Paths are those of the image and its volume: nothing here is looked up on this machine."""
    from mmlm.launch import kuberay

    config = settings(kuberay.KubeRayConfig, arguments.cluster)
    uri = arguments.tracking_uri or os.environ.get(TRACKING)
    secret = TRACKING in config.secrets
    if not secret and (not uri or uri.startswith(("sqlite:", "file:"))):
        raise ConfigError(
            f"tracking to {uri or 'the default file'} from Kubernetes",
            wanted="a tracking server that its pods reach",
            cure=f"--tracking-uri http://mlflow.mlflow.svc:5000, or --cluster secrets.{TRACKING}=SECRET/KEY",
        )
    out = str(arguments.out or Path(config.mount) / story.name)
    command = ["mmlm", *_command(arguments, verb, arguments.story, out, arguments.data), "--inside-ray"]
    title = kuberay.title(config, verb, story.name, out)
    text = kuberay.render(config, command, title, {} if secret or not uri else {TRACKING: uri})
    if arguments.print:
        print(text.rstrip())
        return 0
    print(kuberay.submit(text, title, config.namespace))
    print(f"its log: kubectl logs -f job/{title.name}; to save and stop it: kubectl delete rayjob {title.name}")
    return 0


def _checkout() -> dict[str, str]:
    """What makes the ranks import this mmlm, where it is not installed."""
    root = Path(__file__).resolve().parents[1]
    path = {} if "site-packages" in root.parts else {"PYTHONPATH": str(root)}
    return {"PYTHONUNBUFFERED": "1", **path}


def settings(kind: type[C], given: list[str]) -> C:
    """`--cluster FILE` and `--cluster key=value`, the later ones over the earlier ones. Texts are as they were written."""
    data: dict[str, Any] = {}
    for part in given:
        if "=" in part and not os.path.isfile(part):
            key, raw = split_override(part, "--cluster", "environment.OMP_NUM_THREADS=8")
            apply_override(data, key, raw, read=partial(verbatim_yaml.read_value, kind, key))
        elif not os.path.exists(part):
            raise ConfigError(f"--cluster {part!r}", wanted="KEY=VALUE, or a YAML file that is there")
        else:
            found = read_yaml(Path(part), partial(verbatim_yaml.load, kind)) or {}
            if not isinstance(found, dict):
                raise ConfigError(f"{part} holds {type(found).__name__}", wanted="a mapping of keys to values")
            data.update(found)
    home = f"{kind.__module__.replace('.', '/')}.py"
    return parse(kind, data, "--cluster", f"the keys and their meanings: {kind.__name__} in {home}")


def _here(arguments: argparse.Namespace, verb: str, story: Story, out: Path) -> list[str]:
    """The command with absolute paths, for nodes that see this machine's files. It bears no credentials."""
    folder = story.folder.resolve()
    place = arguments.story if folder.parent == stories.library().resolve() else str(folder)
    data = str(stories.data_folder(story, arguments.data, out)) if arguments.data else None
    told = argparse.Namespace(**vars(arguments))
    told.set = [f"@{Path(given[1:]).resolve()}" if given.startswith("@") else given for given in arguments.set]
    for flag in ("shards", "mirror"):
        given = getattr(arguments, flag, None)
        if given and not is_remote(given):
            setattr(told, flag, str(Path(given.removeprefix("file://")).resolve()))
    return _command(told, verb, place, str(out), data)


def _tracking(arguments: argparse.Namespace) -> dict[str, str]:
    """Where the job tracks, as a variable: everybody on a node reads command lines, and the address may hold a password."""
    uri = arguments.tracking_uri or os.environ.get(TRACKING)
    return {TRACKING: uri or f"sqlite:///{Path('runs/mlflow.db').resolve()}"}


def _command(arguments: argparse.Namespace, verb: str, place: str, out: str, data: str | None) -> list[str]:
    command = [verb, place, "--out", out]
    if data:
        command += ["--data", data]
    for override in arguments.set:
        command += ["--set", override]
    for space in getattr(arguments, "search", []):
        command += ["--search", space]
    for flag in FLAGS:
        if getattr(arguments, flag, None):
            command += ["--" + flag.replace("_", "-"), str(getattr(arguments, flag))]
    for switch in SWITCHES:
        if getattr(arguments, switch, False):
            command.append("--" + switch.replace("_", "-"))
    return command
