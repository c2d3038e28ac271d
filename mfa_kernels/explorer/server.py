"""The explorer's server: pages and JSON for a browser on this machine, and for nobody else.

It listens on the loopback interface only, wants the token of its URL (as Jupyter does), answers no other host name
than its own, which keeps pages of other sites out, and tells the browser to run nothing but its own files.
"""

from __future__ import annotations

import hmac
import html
import json
import secrets
import socket
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any

import uvicorn
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mfa_kernels.common.checks import check_choice, check_component, check_integer, check_text
from mfa_kernels.explorer import reading, region
from mfa_kernels.explorer.catalog import Catalog
from mfa_kernels.explorer.explorer import Explorer

HOST = "127.0.0.1"
STATIC = Path(__file__).parent / "static"
_MOST_BYTES = 1 << 20  # of a request
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


def create_app(explorer: Explorer, token: str, port: int) -> Starlette:
    """Returns the application: routes are those of the page's `api.js`.

    Args:
        explorer: what is shown.
        token: the secret that a browser must bring once, as `/?token=...`.
        port: where it is served; a cookie is named by it, because all ports of a host share their cookies.
    """

    def answer(work: Callable[[Request], dict[str, Any]]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            return await _answered(partial(run_in_threadpool, work, request))

        return endpoint

    def k(request: Request) -> int:
        return check_component(_integer(request.path_params["k"], "region"), explorer.mfa.n_components, "region")

    def regions(request: Request) -> dict[str, Any]:
        sort = check_choice(request.query_params.get("sort", "share"), Catalog.COLUMNS, "sort")
        genre = _asked(request, "genre", -1, least=-1)
        total, found = explorer.catalog.select(
            sort, request.query_params.get("descending", "1") == "1", *_part(request),
            None if genre < 0 else genre, request.query_params.get("query", ""),
        )  # fmt: skip
        return {"total": total, "regions": found}

    def contexts(request: Request) -> dict[str, Any]:
        by = check_choice(request.query_params.get("by", "responsibility"), region.ORDERS, "by")
        return region.contexts(explorer, k(request), by, *_part(request))

    def topic(request: Request) -> dict[str, Any]:
        number = _integer(request.path_params["genre"], "genre")
        return explorer.topic(check_component(number, len(explorer.texts.genres), "genre"))

    def latent(request: Request) -> dict[str, Any]:
        axis = check_component(_integer(request.path_params["axis"], "latent"), explorer.mfa.rank, "latent")
        return region.latent(explorer, k(request), axis)

    def lens(request: Request) -> dict[str, Any]:
        number = k(request)
        if explorer.lens is None:
            raise LookupError("no logit lens: no language model is loaded, or it makes its logits in another way")
        return region.lens(explorer, number)

    drawn: dict[str, bytes] = {}  # the map when it is final, which is large and does not change any more

    async def map_(request: Request) -> Response:
        if not drawn:
            found = await run_in_threadpool(explorer.map)
            content = JSONResponse(found).body
            if not found["is_final"]:
                return Response(content, media_type="application/json")
            drawn["map"] = bytes(content)
        return Response(drawn["map"], media_type="application/json")

    one = CapacityLimiter(1)  # more would wait for the model, each in a thread

    async def text(request: Request) -> Response:
        async def work() -> dict[str, Any]:
            given = await _body(request)
            text = check_text(given.get("text"), "text")
            return await to_thread.run_sync(reading.read, explorer, text, limiter=one)

        return await _answered(work)

    async def begin(request: Request) -> Response:
        try:
            run = explorer.playground.begin(await _body(request))
        except _REFUSED as error:
            return _refusal(error)
        # Of what is compressed, some servers send nothing before the end.
        headers = {"content-encoding": "identity"}
        return StreamingResponse(_streamed(run.lines()), media_type="application/x-ndjson", headers=headers)

    async def change(request: Request) -> Response:
        async def work() -> dict[str, Any]:
            explorer.playground.run(request.path_params["run"]).change(await _body(request))
            return {"ok": True}

        return await _answered(work)

    async def stop(request: Request) -> Response:
        async def work() -> dict[str, Any]:
            explorer.playground.run(request.path_params["run"]).stop()
            return {"ok": True}

        return await _answered(work)

    async def index(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    routes = [
        Route("/", index),
        Route("/api/about", answer(lambda request: explorer.about)),
        Route("/api/map", map_),
        Route("/api/regions", answer(regions)),
        Route("/api/regions/{k}", answer(lambda request: region.page(explorer, k(request)))),
        Route("/api/regions/{k}/contexts", answer(contexts)),
        Route("/api/regions/{k}/latents/{axis}", answer(latent)),
        Route("/api/regions/{k}/lens", answer(lens)),
        Route("/api/topics/{genre}", answer(topic)),
        Route("/api/search", answer(lambda request: explorer.search(request.query_params.get("query", "")))),
        Route("/api/text", text, methods=["POST"]),
        Route("/api/steer", begin, methods=["POST"]),
        Route("/api/steer/{run}", change, methods=["POST"]),
        Route("/api/steer/{run}/stop", stop, methods=["POST"]),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    middleware = [Middleware(_Guard, token=token, port=port), Middleware(GZipMiddleware, minimum_size=2000)]
    return Starlette(routes=routes, middleware=middleware)


class _Guard:
    """Lets in whoever brings the token, under this host's own name; headers of safety go on every answer."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token, self._cookie = app, token, f"mfa_kernels_{port}"
        self._hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self._choose(Request(scope))(scope, receive, guarded)

    def _choose(self, request: Request) -> ASGIApp:
        if request.headers.get("host") not in self._hosts:
            return JSONResponse({"error": "this server answers under its own name only"}, 400)
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] not in self._hosts:
            return JSONResponse({"error": "this server answers its own pages only"}, 403)
        given = request.query_params.get("token")
        if request.url.path == "/" and given is not None and _is(given, self._token):
            response = RedirectResponse("/", 303)
            # "strict" would keep it from the redirection, whose chain begins at a file. Requests that change something
            # are guarded by their origin.
            response.set_cookie(self._cookie, cookie_of(self._token), httponly=True, samesite="lax")
            return response
        if _is(request.cookies.get(self._cookie, ""), cookie_of(self._token)):
            return self._app
        return JSONResponse({"error": "open the address that `mfa-kernels explore` printed: it has the token"}, 401)


def _is(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), secret.encode())


def cookie_of(token: str) -> str:
    """Returns the value of the cookie: other servers of this host see cookies, and do not learn the token by it."""
    return hmac.new(token.encode(), b"mfa_kernels", "sha256").hexdigest()


_REFUSED = (IndexError, LookupError, TypeError, ValueError)


async def _answered(work: Callable[[], Any]) -> Response:
    try:
        return JSONResponse(await work())
    except _REFUSED as error:
        return _refusal(error)


def _refusal(error: Exception) -> Response:
    missing = isinstance(error, LookupError)
    return JSONResponse({"error": str(error.args[0]) if error.args else str(error)}, 404 if missing else 400)


async def _streamed(lines: Iterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for line in iterate_in_threadpool(lines):
            yield json.dumps(line) + "\n"
    finally:
        lines.close()  # type: ignore[attr-defined]  # where the browser has gone, the text ends


async def _body(request: Request) -> dict[str, Any]:
    """Returns the JSON object of a request.

    Raises:
        ValueError: it is none, or is too long.
    """
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise ValueError(f"the request must be at most {_MOST_BYTES:,} bytes")
    try:
        given = json.loads(b"".join(parts))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError("the request must be JSON") from error
    if not isinstance(given, dict):
        raise ValueError("the request must be a JSON object")
    return given


def _integer(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {text[:40]!r}") from None


def _asked(request: Request, name: str, otherwise: int, least: int = 0) -> int:
    return check_integer(_integer(request.query_params.get(name, str(otherwise)), name), name, least)


def _part(request: Request) -> tuple[int, int]:
    """Returns the offset and limit that a request asks for."""
    return _asked(request, "offset", 0), min(500, _asked(request, "limit", 100))


def bound(port: int) -> socket.socket:
    """Returns a socket of the loopback interface; of any free port for 0.

    Raises:
        OSError: naming the port that another program has.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen(128)  # now, so that a browser that comes early waits
    except OSError as error:
        listening.close()
        raise OSError(f"port: {port} cannot be listened on ({error.strerror}); name another, or 0 for any") from error
    return listening


def serve(explorer: Explorer, listening: socket.socket, *, browser: bool = True) -> None:
    """Serves the pages until Ctrl-C, and prints their address.

    Args:
        explorer: what is shown.
        listening: from `bound`.
        browser: open the address in the user's browser.
    """
    token, port = secrets.token_urlsafe(24), listening.getsockname()[1]
    address = f"http://{HOST}:{port}/?token={token}"
    app = create_app(explorer, token, port)
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=2)
    print(f"The explorer is at {address}\n(Ctrl-C ends it)", flush=True)
    with ExitStack() as stack:
        stack.callback(explorer.playground.close)
        if browser:
            page = redirection(Path(stack.enter_context(TemporaryDirectory())), address)
            Timer(0.5, webbrowser.open, [page.as_uri()]).start()
        _Server(config, explorer).run(sockets=[listening])


def redirection(folder: Path, address: str) -> Path:
    """Writes a page that leads to an address: a browser's command line, which others can see, has no token then."""
    page = folder / "explorer.html"
    page.touch(0o600)
    page.write_text(f'<meta http-equiv="refresh" content="0; url={html.escape(address)}">')
    return page


class _Server(uvicorn.Server):
    """Ends the text that is being written with the first Ctrl-C, so that its connection can close in peace."""

    def __init__(self, config: uvicorn.Config, explorer: Explorer) -> None:
        super().__init__(config)
        self._explorer = explorer

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._explorer.playground.stop()
        super().handle_exit(sig, frame)
