"""How long the explorer's pages take, over real connections: activations of SmolLM2-135M.

    python -m bench.explorer -K 8192

A mixture of K regions of layer 18 (K-means and the cluster PCA, no EM: pages take as long with it), and the 300,000
rows of `bench/real.py`. Requests come one at a time; of each kind, the median, the 95th percentile and the longest are
printed in milliseconds. The first request of each kind, which may prepare something, is printed apart.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from bench.real import LAYER, RANK, Real
from mfa_kernels import MFA, fit
from mfa_kernels.explorer import Explorer, server
from mfa_kernels.models import load_language_model

TEXT = "In the beginning God created the heaven and the earth. def main(): return the number of the beast, she said. "
TOKEN = "bench"


def mixture(real: Real, components: int) -> MFA:
    """Returns a mixture from K-means and the cluster PCA, kept in the cache."""
    folder = real.folder / f"start-layer{LAYER}-K{components}-R{RANK}"
    if not (folder / "config.json").exists():
        fit(real.split()[0], components, RANK, epochs=0).save_pretrained(folder)
    return MFA.from_pretrained(folder)


@contextmanager
def served(explorer: Explorer) -> Iterator[Callable[..., Any]]:
    """Serves an explorer in a thread, and yields a function from a path (and a body) to the bytes of the answer."""
    listening = server.bound(0)
    port = listening.getsockname()[1]
    app = server.create_app(explorer, TOKEN, port)
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()

    def ask(path: str, body: Any = None) -> bytes:
        connection = http.client.HTTPConnection(server.HOST, port)
        data = None if body is None else json.dumps(body).encode()
        headers = {"cookie": f"mfa_kernels_{port}={server.cookie_of(TOKEN)}", "accept-encoding": "gzip"}
        connection.request("GET" if body is None else "POST", path, data, headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {content[:200]!r}")
        return content

    yield ask
    running.should_exit = True
    thread.join()


def requests(explorer: Explorer) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Returns kinds of requests: each a function to the arguments of one."""
    chance = random.Random(0)
    columns = ("share", "entropy", "distinct", "purity", "responsibility", "label")
    words = ("kingdom", "return", "the lord", "def ", "water", "theory")

    def k() -> int:
        return chance.choice(explorer.owning)

    return {
        "map": lambda: ("/api/map",),
        "table": lambda: (
            f"/api/regions?sort={chance.choice(columns)}&descending=1&offset={100 * chance.randrange(9)}&limit=100",
        ),
        "table, filtered": lambda: (f"/api/regions?sort=share&limit=100&query={chance.choice(('the', 'ing', '12'))}",),
        "region": lambda: (f"/api/regions/{k()}",),
        "contexts": lambda: (f"/api/regions/{k()}/contexts?by=spread&offset=20&limit=20",),
        "latent": lambda: (f"/api/regions/{k()}/latents/{chance.randrange(RANK)}",),
        "lens": lambda: (f"/api/regions/{k()}/lens",),
        "search": lambda: (f"/api/search?query={chance.choice(words).replace(' ', '%20')}",),
        "own text, 100 tokens": lambda: ("/api/text", {"text": TEXT * 4}),
        "own text, 256 tokens": lambda: ("/api/text", {"text": TEXT * 12}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-K", "--components", type=int, nargs="+", default=[8192])
    parser.add_argument("--rounds", type=int, default=60, help="requests of each kind")
    options = parser.parse_args()
    real = Real()
    model, tokenizer = load_language_model("smollm2")
    for components in options.components:
        mfa = mixture(real, components)
        started = time.perf_counter()
        explorer = Explorer(mfa, real.store, tokenizer, model, LAYER)
        print(f"K={components}, {len(real.store):,} rows: opened in {time.perf_counter() - started:.1f} s")
        explorer.layout.refine()
        explorer.layout.wait()
        print(f"{explorer.layout.name} after {time.perf_counter() - started:.1f} s\n")
        print(f"{'milliseconds':<24}{'first':>8}{'median':>8}{'95%':>8}{'most':>8}{'kB':>8}")
        with served(explorer) as ask:
            ask("/api/about")
            for kind, make in requests(explorer).items():
                times, size = [], 0
                for _ in range(options.rounds + 1):
                    arguments = make()
                    began = time.perf_counter()
                    size = max(size, len(ask(*arguments)))
                    times.append(1000 * (time.perf_counter() - began))
                first, *rest = times
                rest.sort()
                row = (first, rest[len(rest) // 2], rest[int(0.95 * (len(rest) - 1))], rest[-1])
                print(f"{kind:<24}" + "".join(f"{value:8.1f}" for value in row) + f"{size / 1000:8.1f}")


if __name__ == "__main__":
    main()
