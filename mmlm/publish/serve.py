"""Verb serve: one model behind HTTP. `GET /health`, `POST /predict` with {text, image, audio, fields}, `POST /embed` with the
same for models that make embeddings, and a page at `GET /`.

Media come as base64 (a `data:` URI is fine) or as a list of such, never as a path. What is wrong with a request is said in JSON:
`{"error": sentence}` with a 4xx status. `generation` says how the answer is worded; with `"stream": true` it comes as
server-sent events, `{"piece": text}` as soon as it is certain, and in the end the same JSON as without.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.config import blank_credentials
from mmlm.errors import ConfigError, DataError, ServeError
from mmlm.publish.asked_keys import ASKED, check_keys
from mmlm.publish.asked_keys import KEYS as ANSWERED

if TYPE_CHECKING:
    from fastapi import FastAPI

    from mmlm.publish.answering import Responder

KEYS = (*ANSWERED, "stream")
MEDIA = ("image", "audio")
MAX_BODY = 32 << 20
"""A request body larger than this, bytes, is refused while it arrives."""
PAGE = Path(__file__).with_name("page.html")
POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; media-src blob: data:; form-action 'none'; frame-ancestors 'none'"
)
_log = logging.getLogger("mmlm.serve")


class RequestError(Exception):
    """A request that gets a 4xx answer."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def serve(model: str, *, port: int, host: str = "127.0.0.1", tracking_uri: str | None = None) -> None:
    """Answer until SIGTERM or Ctrl-C, then return. Port 0 takes a free one.

    Raises ServeError when the port is taken, before the model is loaded; ArtifactError when there is no such model.
    """
    with bind(host, port) as listener, _ending() as ending:
        from mmlm.publish.answering import Responder

        app = application(Responder.load(model, tracking_uri=tracking_uri), model)
        import uvicorn

        class Server(uvicorn.Server):
            """uvicorn would die of the signal that ended it; ours ends well."""

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=3,
            limit_concurrency=64,
            lifespan="off",
        )
        server = Server(config)
        ending.server = server
        address = f"[{host}]" if ":" in host else host
        print(
            f"{model} answers on http://{address}:{listener.getsockname()[1]} (Ctrl-C ends)",
            file=sys.stderr,
            flush=True,
        )
        server.run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """A socket on the port. Raises ServeError with what to do."""
    if not 0 <= port <= 65535:
        raise ServeError(f"there is no port {port}", wanted="0 to 65535", cure="choose another with --port")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ServeError(
            f"cannot listen on {host}:{port} ({error.strerror or error})",
            cure="choose another with --port, or end what uses it",
        ) from None
    return listener


class _Ending:
    """What a signal does: ends the server if it runs already, else the process."""

    server: Any = None

    def __call__(self, number: int, frame: object) -> None:
        if self.server is None:
            raise SystemExit(0)
        self.server.should_exit = True


@contextlib.contextmanager
def _ending() -> Iterator[_Ending]:
    ending = _Ending()
    if threading.current_thread() is not threading.main_thread():
        yield ending
        return
    before = {number: signal.signal(number, ending) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def application(responder: Responder, model: str) -> FastAPI:
    """The web application, for any ASGI server."""
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
    from starlette.concurrency import run_in_threadpool

    app = FastAPI(title="mmlm", docs_url=None, redoc_url=None, openapi_url=None)
    facts = describe(responder, model)
    page = PAGE.read_text(encoding="utf-8")

    async def health() -> Any:
        return JSONResponse(facts)

    async def home() -> Any:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def streamed(pieces: Iterator[str | dict[str, Any]]) -> Any:
        """What is wrong with the question shows before the first piece, and so gets a status."""
        first = await run_in_threadpool(next, pieces)
        if isinstance(first, dict) and "error" in first:
            return JSONResponse(first, 422)
        return StreamingResponse(
            map(event, itertools.chain([first], pieces)), media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )  # fmt: skip

    async def asked(request: Any, keys: Sequence[str], ask: Callable[..., Any]) -> Any:
        """What `ask` makes of the question in a request, or what is wrong with it."""
        try:
            question = parse(await read_body(request), request.headers.get("content-type", ""), keys)
            if question.pop("stream", None):
                return await streamed(responder.stream(question, paths=False))
            answer = (await run_in_threadpool(ask, [question], paths=False))[0]
        except RequestError as error:
            return JSONResponse({"error": error.sentence}, error.status)
        except ConfigError as error:
            return JSONResponse({"error": str(error)}, 422)
        except Exception:
            _log.exception("a request failed")
            return JSONResponse({"error": "the server failed at this request; its log says why"}, 500)
        return JSONResponse(answer, 422 if "error" in answer else 200)

    async def predict(request: Any) -> Any:
        return await asked(request, KEYS, responder.answer)

    async def embed(request: Any) -> Any:
        return await asked(request, ASKED, responder.embed)

    # annotations are text in this module, and FastAPI cannot see names that live in a function
    calls: list[Callable[..., Any]] = [health, home, predict, embed]
    for call in calls:
        call.__annotations__.pop("return", None)
        if "request" in call.__annotations__:
            call.__annotations__["request"] = Request
    app.get("/health")(health)
    app.get("/")(home)
    app.post("/predict")(predict)
    app.post("/embed")(embed)
    return app


def event(piece: str | dict[str, Any]) -> str:
    """A server-sent event (WHATWG HTML, section 9.2): one line of data, since JSON holds no line breaks."""
    data = {"piece": piece} if isinstance(piece, str) else piece
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def describe(responder: Responder, model: str) -> dict[str, Any]:
    """What `GET /health` says: that the model is there, and what it can be asked."""
    spec = responder.spec
    return {
        "status": "ok",
        "model": blank_credentials(model),
        "parameters": responder.answerer.parameters,
        "takes": ["text", *(m for m in ("image", "audio", "fields") if m in spec.modalities)],
        **({"fields": spec.fields.model_dump(mode="json")} if spec.fields else {}),
        **({"adapters": responder.adapters} if responder.adapters else {}),
        **({"embedding": size} if (size := responder.answerer.model.config.embedding) else {}),
        "tasks": [{"name": t.name, "labels": t.labels[:100], "questions": t.questions[:4]} for t in spec.tasks],
    }


async def read_body(request: Any) -> bytes:
    """The body, up to MAX_BODY bytes. Raises RequestError 413 beyond that, without reading on."""
    too_large = RequestError(413, f"the request is larger than {MAX_BODY >> 20} MB")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            raise too_large
    return bytes(body)


def parse(body: bytes, content_type: str, keys: Sequence[str] = KEYS) -> dict[str, Any]:
    """The question in a request, of these keys. Raises RequestError with a sentence."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        # also keeps other web sites from posting here behind a person's back: this type makes browsers ask first
        raise RequestError(415, "the content type must be application/json")
    try:
        question = json.loads(body)
    except (ValueError, RecursionError):
        wanted = '{"text": …, "image": base64, "audio": base64, "fields": {…}}'
        raise RequestError(400, f"the body is not JSON; wanted {wanted}") from None
    if not isinstance(question, dict):
        raise RequestError(422, f"the body must be one object with {', '.join(keys)}")
    try:
        check_keys(question, keys)
    except DataError as error:
        raise RequestError(422, str(error)) from None
    for key, value in question.items():
        if key in ("fields", "generation"):
            if value is not None and not isinstance(value, dict):
                raise RequestError(422, f"`{key}` must be an object, not {type(value).__name__}")
        elif key == "stream":
            if value is not None and not isinstance(value, bool):
                raise RequestError(422, f"`stream` must be true or false, not {type(value).__name__}")
        elif value is not None and not isinstance(value, str) and not (key in MEDIA and _texts(value)):
            wanted = "base64 text, or a list of such" if key in MEDIA else "a text"
            raise RequestError(422, f"`{key}` must be {wanted}, not {type(value).__name__}")
    return question


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
