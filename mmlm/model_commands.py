"""The commands that ask a model something, or give it to others: predict, embed, explain, export, serve."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmlm.errors import ConfigError

Command = Callable[[Any, str, str, Callable[[argparse.Namespace], int | None]], argparse.ArgumentParser]
"""Adds a command by its name, what it does, and the function that does it."""


def add(commands: Any, command: Command) -> None:
    """Add them all. Nothing heavy is imported before one of them is called."""
    _add_predict(commands, command)
    _add_embed(commands, command)
    _add_explain(commands, command)
    _add_export(commands, command)
    _add_serve(commands, command)


def folder(text: str, cure: str = "") -> Path:
    """The type of a flag that names a folder to write into."""
    from mmlm.storage import local_folder  # with pydantic, which `--help` does without

    return local_folder(text, cure)


def _add_predict(commands: Any, command: Command) -> None:
    predict = command(commands, "predict", "answer one question by flags, or many by --input", _predict)
    _asked(predict)
    predict.add_argument("--adapter", metavar="NAME", help="of a model with adapters: which answers, or `none`")
    predict.add_argument("--json", action="store_true", help="print answers as JSON lines")
    predict.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="how answers are worded, such as "
        "generation.temperature=0.7, generation.stop=[。] or generation.choices=[yes, no]; a line's own `generation` counts",
    )  # fmt: skip
    predict.add_argument("--stream", action="store_true", help="print the answer to one question as it is made")


def _add_embed(commands: Any, command: Command) -> None:
    embed = command(commands, "embed", "the vector of a text, picture or sound: what means the same lies near", _embed)
    _asked(embed)


def _add_explain(commands: Any, command: Command) -> None:
    why = command(
        commands,
        "explain",
        "show which words, patches and moments an answer rests on: a page, JSON and colours",
        _explain,
    )
    why.add_argument("--model", required=True, metavar="URI", help="models:/NAME@champion, or a folder")
    why.add_argument("--text", help="the question")
    _media_flags(why)
    why.add_argument("--fields", metavar="JSON", help='named numbers and categories: {"age": 50}')
    _encoder_flag(why)
    why.add_argument("--label", metavar="CLASS", help="explain this class instead of what is answered")
    why.add_argument("--answer", metavar="TEXT", help="explain this text instead of what is answered")
    why.add_argument(
        "--out",
        type=folder,
        default=Path("explanation"),
        metavar="DIR",
        help="where the page goes (default: explanation)",
    )
    why.add_argument(
        "--steps", type=int, default=64, metavar="N", help="points of the integral (at first; default: 64)"
    )
    why.add_argument("--json", action="store_true", help="print the figures as JSON")
    why.add_argument("--tracking-uri", metavar="URI")


def _add_export(commands: Any, command: Command) -> None:
    export = command(commands, "export", "write a model as a folder that other programs read", _export)
    export.add_argument("model", metavar="MODEL", help="models:/NAME@champion, or a folder")
    export.add_argument("--to", type=folder, required=True, metavar="DIR", help="a new folder")
    export.add_argument(
        "--format", choices=["llama", "hf", "safetensors"], default="llama",
        help="llama: the trunk, for transformers and what reads its models; hf: the whole, with its own code for "
        "transformers; safetensors: the whole, as it is",
    )  # fmt: skip
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    export.add_argument("--adapter", metavar="NAME", help="of a model with adapters: which is merged in, or `none`")
    export.add_argument("--tracking-uri", metavar="URI")


def _add_serve(commands: Any, command: Command) -> None:
    serve = command(commands, "serve", "answer over HTTP: GET /health, POST /predict, and a page to try it", _serve)
    serve.add_argument("--model", required=True, metavar="URI", help="models:/NAME@champion, or a folder")
    _encoder_flag(serve)
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--tracking-uri", metavar="URI")


def _asked(command: argparse.ArgumentParser) -> None:
    """The flags of what a model is asked about."""
    command.add_argument("--model", required=True, metavar="URI", help="models:/NAME@champion, or a folder")
    command.add_argument("--text", help="the question")
    _media_flags(command)
    command.add_argument("--fields", metavar="JSON", help='named numbers and categories: {"age": 50}')
    _encoder_flag(command)
    command.add_argument("--input", type=Path, metavar="FILE.jsonl", help="one {text, image, audio, fields} a line")
    command.add_argument("--tracking-uri", metavar="URI")


def _media_flags(command: argparse.ArgumentParser) -> None:
    for kind, word in (("image", "picture"), ("audio", "sound")):
        several = f"a {word}; given several times, all of them in this order"
        command.add_argument(f"--{kind}", action="append", metavar="FILE", help=several)


def _encoder_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--encoder", action="append", default=[], metavar="KIND=FOLDER",
        help="of a model that reads a pretrained encoder's features: where that lies, such as image=/models/vit",
    )  # fmt: skip


def _place_encoders(arguments: argparse.Namespace) -> None:
    """The flag above, as the environment that the model reads."""
    from mmlm.publish.asked_encoders import PLACES, places

    if arguments.encoder:
        os.environ[PLACES] = ",".join(
            f"{kind}={folder}" for kind, folder in places(",".join(arguments.encoder)).items()
        )


def _predict(arguments: argparse.Namespace) -> int:
    from mmlm.publish.answering import Responder
    from mmlm.publish.asked_generation import from_overrides

    if arguments.stream and (arguments.input or arguments.json):
        raise ConfigError("--stream beside --input or --json", wanted="one question, answered as plain text")
    _place_encoders(arguments)
    generation = from_overrides(arguments.set)
    rows = _asked_rows(arguments)
    given = {"generation": generation, **({"adapter": arguments.adapter} if arguments.adapter else {})}
    good = [{**given, **row} for row in rows if "error" not in row]
    responder = Responder.load(arguments.model, tracking_uri=arguments.tracking_uri)
    if arguments.stream:
        return _say_streaming(responder.stream(good[0]))
    answers = iter(responder.answer(good))
    failed = False
    for row in rows:
        answer = row if "error" in row else next(answers)
        failed = failed or "error" in answer
        if "error" in answer and not arguments.input:
            print(f"mmlm: {answer['error']}", file=sys.stderr)
        elif arguments.json or arguments.input:
            print(json.dumps(answer, ensure_ascii=False))
        else:
            print(answer["answer"] + ("" if answer["score"] is None else f"   ({answer['score']:.3f})"))
    return 2 if failed else 0


def _say_streaming(pieces: Iterator[str | dict[str, Any]]) -> int:
    for piece in pieces:
        if isinstance(piece, str):
            print(piece, end="", flush=True)
        elif "error" in piece:
            print(f"mmlm: {piece['error']}", file=sys.stderr)
            return 2
        else:
            print("" if piece["score"] is None else f"   ({piece['score']:.3f})")
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    from mmlm.publish.answering import Responder

    _place_encoders(arguments)
    rows = _asked_rows(arguments)
    good = [row for row in rows if "error" not in row]
    found = iter(Responder.load(arguments.model, tracking_uri=arguments.tracking_uri).embed(good) if good else [])
    lines = [row if "error" in row else next(found) for row in rows]
    for line in lines:
        print(json.dumps(line, ensure_ascii=False))
    return 2 if any("error" in line for line in lines) else 0


def _asked_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    keys = ("text", "image", "audio", "fields")
    one = {key: getattr(arguments, key) for key in keys if getattr(arguments, key) is not None}
    if bool(one) == bool(arguments.input):
        raise ConfigError(
            "nothing to answer" if not one else "both a question and --input",
            wanted="--text, --image, --audio, --fields in any combination, or --input FILE.jsonl",
        )
    return _questions(arguments.input) if arguments.input else [one]


def _explain(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from mmlm.evals import explain_page
    from mmlm.evals.explain import explain
    from mmlm.publish.answering import Responder

    question = {
        key: value for key in ("text", "image", "audio", "fields") if (value := getattr(arguments, key)) is not None
    }
    if not question:
        raise ConfigError("nothing to explain", wanted="--text, --image, --audio, --fields in any combination")
    _place_encoders(arguments)
    responder = Responder.load(arguments.model, tracking_uri=arguments.tracking_uri)
    found = explain(
        responder.answerer, responder.sample(question), label=arguments.label, text=arguments.answer,
        steps=arguments.steps, encode=responder.add_features,
    )  # fmt: skip
    page = explain_page.write(found, {**question, "model": arguments.model}, arguments.out)
    if arguments.json:
        print(json.dumps(explain_page.as_json(found), ensure_ascii=False))
    else:
        Console(highlight=False, soft_wrap=True).print(explain_page.words(found))
        print(page)
    return 0


def _questions(path: Path) -> list[dict[str, Any]]:
    """One dict a line; a line that is not one becomes {"error"}. Relative media paths start at the working directory."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text", wanted="JSON lines with text, image, audio, fields") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            rows.append({"error": f"line {number} is not JSON ({error})"})
            continue
        rows.append(
            row if isinstance(row, dict) and "error" not in row else {"error": f"line {number} is not an object"}
        )
    if not rows:
        raise ConfigError(f"{path} holds no questions", wanted='lines such as {"text": "…", "image": "…"}')
    return rows


def _serve(arguments: argparse.Namespace) -> int:
    from mmlm.publish.serve import serve

    _place_encoders(arguments)
    serve(arguments.model, port=arguments.port, host=arguments.host, tracking_uri=arguments.tracking_uri)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from mmlm.publish.export import export

    made = export(
        arguments.model, arguments.to, arguments.format, dtype=arguments.dtype, adapter=arguments.adapter,
        tracking_uri=arguments.tracking_uri,
    )  # fmt: skip
    print(f"export: {made.words()}")
    return 0
