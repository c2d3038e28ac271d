"""The server over real connections: what it answers, and whom it refuses."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import uvicorn

from mfa_kernels.explorer import Explorer, region, server
from mfa_kernels.explorer.texts import whole
from mfa_kernels.interpret.labels import Label

TOKEN = "a-token-of-tests"


def cookie(port: int) -> str:
    return f"mfa_kernels_{port}={server.cookie_of(TOKEN)}"


class Client(NamedTuple):
    """A browser that has brought the token."""

    port: int

    def ask(
        self, path: str, body: Any = None, *, method: str = "", headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {"cookie": cookie(self.port)} if headers is None else headers
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, data, given)
        return connection.getresponse()

    def json(self, path: str, body: Any = None, status: int = 200) -> Any:
        answer = self.ask(path, body)
        content = json.loads(answer.read())
        assert answer.status == status, content
        return content


@contextmanager
def served(explorer: Explorer) -> Iterator[Client]:
    listening = server.bound(0)
    port = listening.getsockname()[1]
    app = server.create_app(explorer, TOKEN, port)
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield Client(port)
    finally:
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def client(explorer: Explorer) -> Iterator[Client]:
    with served(explorer) as made:
        yield made


def test_it_listens_on_the_loopback_interface_only() -> None:
    with server.bound(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError, match=rf"port: {listening.getsockname()[1]} cannot be listened on"):
            server.bound(listening.getsockname()[1])


def test_nobody_without_the_token_gets_anything(client: Client) -> None:
    for path in ("/", "/api/about", "/api/map", "/static/app.js", "/nowhere"):
        answer = client.ask(path, headers={})
        assert answer.status == 401
        assert "token" in json.loads(answer.read())["error"]
    for wrong in ("", "wrong", "é", TOKEN):  # the token itself is in no cookie
        brought = f"mfa_kernels_{client.port}={wrong}".encode().decode("latin-1")
        assert client.ask("/api/about", headers={"cookie": brought}).status == 401
    assert client.ask("/?token=wrong", headers={}).status == 401
    assert client.ask("/api/steer", {"prompt": "w1"}, headers={}).status == 401


def test_the_token_becomes_a_cookie(client: Client) -> None:
    answer = client.ask(f"/?token={TOKEN}", headers={})
    assert answer.status == 303
    assert answer.headers["location"] == "/"
    made = answer.headers["set-cookie"]
    assert made.startswith(f"{cookie(client.port)};")
    assert "HttpOnly" in made
    assert "samesite=lax" in made.lower()
    assert TOKEN not in made


def test_other_host_names_are_refused(client: Client) -> None:
    own = cookie(client.port)
    for host in ("evil.example", f"evil.example:{client.port}", "127.0.0.1", f"127.0.0.1:{client.port + 1}"):
        assert client.ask("/api/about", headers={"cookie": own, "host": host}).status == 400
    assert client.ask("/api/about", headers={"cookie": own, "host": f"localhost:{client.port}"}).status == 200


def test_pages_of_other_ports_can_ask_for_nothing(client: Client) -> None:
    own = {"cookie": cookie(client.port), "content-type": "text/plain"}
    for origin in (
        "http://127.0.0.1:8888",
        "http://evil.example",
        "null",
        f"http://127.0.0.1:{client.port}.evil.example",
    ):
        assert client.ask("/api/steer", {"prompt": "w1"}, headers={**own, "origin": origin}).status == 403
    answer = client.ask("/api/text", {"text": "w1"}, headers={**own, "origin": f"http://127.0.0.1:{client.port}"})
    assert answer.status == 200


def test_every_answer_tells_the_browser_to_run_our_files_alone(client: Client) -> None:
    for answer in (
        client.ask("/"),
        client.ask("/api/about"),
        client.ask("/static/app.js"),
        client.ask("/", headers={}),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_files_beside_the_static_ones_are_not_served(client: Client) -> None:
    for path in ("/static/../server.py", "/static/..%2fserver.py", "/static/%2e%2e/server.py", "/static//etc/passwd"):
        assert client.ask(path).status == 404


def test_answers_are_what_the_explorer_says(client: Client, explorer: Explorer) -> None:
    about = client.json("/api/about")
    assert about == json.loads(json.dumps(explorer.about))
    assert (about["n_components"], about["genres"]) == (8, ["cooking", "law", "sea"])
    assert about["can_steer"] is about["can_read"] is True
    k = explorer.owning[0]
    assert client.json(f"/api/regions/{k}") == json.loads(json.dumps(region.page(explorer, k)))
    assert client.json(f"/api/regions/{k}/latents/1") == json.loads(json.dumps(region.latent(explorer, k, 1)))
    assert client.json(f"/api/regions/{k}/lens") == json.loads(json.dumps(region.lens(explorer, k)))
    part = client.json("/api/regions?sort=entropy&descending=0&offset=1&limit=2&genre=0")
    total, lines = explorer.catalog.select("entropy", False, 1, 2, genre=0)
    assert part == {"total": total, "regions": json.loads(json.dumps(lines))}
    contexts = client.json(f"/api/regions/{k}/contexts?by=distance&offset=1&limit=2")
    assert contexts == json.loads(json.dumps(region.contexts(explorer, k, "distance", 1, 2)))
    assert client.json("/api/topics/2") == json.loads(json.dumps(explorer.topic(2)))
    found = client.json("/api/search?query=w12")
    assert found == json.loads(json.dumps(explorer.search("w12")))
    assert found["found"] > 0


def test_the_map_comes_at_once_and_improves(client: Client, explorer: Explorer) -> None:
    first = client.json("/api/map")
    assert first["components"] == explorer.owning
    explorer.layout.wait(60)
    final = client.json("/api/map")
    assert final["is_final"] is True
    assert final["layout"] == "t-SNE"
    assert len(final["x"]) == len(final["y"]) == len(final["label"]) == len(explorer.owning)
    assert max(map(abs, final["x"] + final["y"])) <= 1


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/api/regions/8", 404, "region must be in [0, 8), got 8"),
        ("/api/regions/-1", 404, "region must be in [0, 8), got -1"),
        ("/api/regions/x", 400, "region must be an integer, got 'x'"),
        ("/api/regions/0/latents/2", 404, "latent must be in [0, 2), got 2"),
        ("/api/topics/3", 404, "genre must be in [0, 3), got 3"),
        ("/api/regions?sort=evil", 400, "sort must be one of"),
        ("/api/regions?offset=-1", 400, "offset"),
        ("/api/regions?limit=9e9", 400, "limit must be an integer"),
        ("/api/regions/0/contexts?by=rank", 400, "by must be one of"),
    ],
)
def test_wrong_requests_are_told_why(client: Client, path: str, status: int, says: str) -> None:
    assert says in client.json(path, status=status)["error"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "JSON"),
        (b"[]", "JSON object"),
        (b"\xff", "JSON"),
        (b"[" * 200_000, "JSON"),
        (b'{"text": 3}', "text must be a string"),
        (b" " * ((1 << 20) + 1), "at most"),
    ],
)
def test_wrong_bodies_are_told_why(client: Client, body: bytes, says: str) -> None:
    assert says in client.json("/api/text", body, 400)["error"]


def test_a_text_is_read(client: Client) -> None:
    found = client.json("/api/text", {"text": "w1 w2 w11"})
    assert [token["text"] for token in found["tokens"]] == ["w1", "w2", "w11"]
    assert set(found["regions"]) == {str(token["component"]) for token in found["tokens"]} - {"-1"}


def _lines(answer: http.client.HTTPResponse) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.read().splitlines()]


def test_a_steered_text_streams(client: Client) -> None:
    lines = _lines(client.ask("/api/steer", {"prompt": "w1 w2", "component": 1, "alpha": 0.5, "new_tokens": 6}))
    assert list(lines[0]) == ["run"]
    assert all(list(line) == ["text"] for line in lines[1:-1])
    assert lines[-1]["done"] is True
    assert 0 < lines[-1]["tokens"] <= 6
    assert lines[-1]["nll"] > 0


def test_pieces_come_as_they_are_written(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the browser takes compressed answers, which some servers would hold back until the end."""
    seen = threading.Event()

    def slow(model: Any, tokenizer: Any, *options: Any, streamer: Any, **more: Any) -> None:
        streamer.put(torch.tensor([[5]]))  # the prompt
        streamer.put(torch.tensor([6]))
        assert seen.wait(30), "the first piece has not arrived"
        streamer.end()

    monkeypatch.setattr("mfa_kernels.explorer.playground.continuation", slow)
    headers = {"cookie": cookie(client.port), "accept-encoding": "gzip, br"}
    answer = client.ask("/api/steer", {"prompt": "w1"}, headers=headers)
    assert list(json.loads(answer.readline())) == ["run"]
    assert list(json.loads(answer.readline())) == ["text"]
    seen.set()
    assert json.loads(answer.readline())["done"] is True


def test_halves_of_characters_are_sent_as_escapes(explorer: Explorer) -> None:
    explorer.texts.sources[0] = whole(os.fsdecode(b"caf\xe9.txt"))
    made = Explorer(
        explorer.mfa, explorer.store, explorer.tokenizer, labels={0: Label("\ud800 label")}, layer=2, progress=False
    )
    with served(made) as client:
        assert "\\ud800 label" in client.json("/api/map")["label"]
        assert client.json("/api/regions/0")["label"] == "\\ud800 label"
    assert explorer.texts.sources[0] == "caf\\udce9.txt"


def test_a_run_that_is_over_cannot_be_changed(client: Client) -> None:
    (first, *_) = _lines(client.ask("/api/steer", {"prompt": "w1", "new_tokens": 1}))
    assert "written already" in client.json(f"/api/steer/{first['run']}", {"alpha": 1.0}, 404)["error"]
    assert "written already" in client.json("/api/steer/none/stop", {}, 404)["error"]


@pytest.mark.parametrize(
    ("given", "status", "says"),
    [
        ({}, 400, "prompt must be a string"),
        ({"prompt": "w1", "component": 8}, 404, "component must be in [0, 8), got 8"),
        ({"prompt": "w1", "component": 1, "alpha": "far"}, 400, "alpha"),
        ({"prompt": "w1", "component": 1, "latents": {"2": 1}}, 404, "latents must be in [0, 2)"),
        ({"prompt": "w1", "component": 1, "latents": [1]}, 400, "latents must be numbers by latent"),
        ({"prompt": "w1", "component": 1, "mode": "push"}, 400, "mode must be one of"),
        ({"prompt": "w1", "component": 1, "latents": {"x": 1}}, 400, "latents must be numbers by latent, got 'x'"),
        ({"prompt": "w1 \ud800"}, 400, "prompt must be text"),
        ({"prompt": "w1", "new_tokens": 0}, 400, "new_tokens"),
    ],
)
def test_wrong_steering_is_told_why(client: Client, given: dict[str, Any], status: int, says: str) -> None:
    assert says in client.json("/api/steer", given, status)["error"]


def test_without_a_model_it_says_so(explorer: Explorer) -> None:
    explorer.model = None
    explorer.__dict__.pop("lens", None)
    with served(explorer) as client:
        about = client.json("/api/about")
        assert (about["can_read"], about["can_steer"], about["lens"]) == (False, False, False)
        for path, body in (("/api/text", {"text": "w1"}), ("/api/steer", {"prompt": "w1"})):
            assert "--model" in client.json(path, body, 404)["error"]
        assert "no logit lens" in client.json("/api/regions/0/lens", status=404)["error"]


def test_the_address_is_printed(explorer: Explorer, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    opened: list[tuple[str, str, int]] = []

    def browse(address: str) -> None:
        path = Path(urllib.request.url2pathname(urllib.parse.urlparse(address).path))
        opened.append((address, path.read_text(), path.stat().st_mode & 0o777))

    monkeypatch.setattr(server.webbrowser, "open", browse)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: time.sleep(1.0))
    for browser in (False, True):
        with server.bound(0) as listening:
            port = listening.getsockname()[1]
            server.serve(explorer, listening, browser=browser)
        printed = capsys.readouterr().out
        assert f"http://127.0.0.1:{port}/?token=" in printed
        assert len(opened) == browser
    ((address, page, mode),) = opened
    token = printed.split("token=")[1].split()[0]
    assert token in page
    assert token not in address, "others can see the command line of a browser"
    assert mode == 0o600
