"""A server that steers every request toward a region of its own; requests that wait are generated as one batch.

    python examples/serve.py                              # the small model, and a mixture that is fitted at the start
    python examples/serve.py --mfa mfa                    # a mixture of yours, with the model and layer that it names
    curl -H 'Content-Type: application/json' -d '{"prompt": "def close(", "region": 3, "alpha": 0.3}' \\
        http://127.0.0.1:8000/generate

It listens on this machine alone, answers to its own names, and takes JSON: a page of another site that is open in a
browser cannot send that unasked. It knows no users and no quotas: before what others are to reach belongs a proxy that
does.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import torch
import uvicorn
from _small import LAYER, model_and_mixture, parser
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mfa_kernels import MFA, steer
from mfa_kernels.models import encoded, load_language_model
from mfa_kernels.steering import Toward

BATCH, NEW_TOKENS = 8, 24
WAITING, BYTES, TOKENS = 64, 1 << 16, 512  # at most: requests, of one of them, of its prompt


class Refused(Exception):
    """What a request is told, and its status."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Server:
    """A model, a mixture of one of its layers, and the requests that wait for them."""

    def __init__(self, model: Any, tokenizer: Any, mfa: MFA, layer: int | str) -> None:
        self.model, self.tokenizer, self.mfa, self.layer = model.eval(), tokenizer, mfa, layer
        self.waiting: asyncio.Queue[tuple[str, Toward | None, asyncio.Future[str]]] = asyncio.Queue(WAITING)

    @torch.inference_mode()
    def written(self, prompts: list[str], interventions: list[Toward | None]) -> list[str]:
        """Returns what the model writes after each prompt, each row steered by its own intervention, or by none."""
        inputs = encoded(self.model, self.tokenizer, prompts, padding=True, padding_side="left")
        with steer(self.model, self.mfa, self.layer, rows=interventions):
            ids = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        texts: list[str] = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts

    async def work(self) -> None:
        """Takes what waits, one batch after the other: a model has one forward pass, and one handle, at a time."""
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < BATCH and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            batch = [each for each in batch if not each[2].done()]  # somebody may have gone
            if not batch:
                continue
            prompts, interventions, answers = (list(part) for part in zip(*batch))
            try:
                texts: list[Any] = await run_in_threadpool(self.written, prompts, interventions)
            except Exception as error:
                texts = [error] * len(answers)
            for answer, text in zip(answers, texts):
                if answer.done():
                    continue
                if isinstance(text, Exception):
                    answer.set_exception(Refused(500, f"{type(text).__name__}: {text}"))
                else:
                    answer.set_result(text)

    async def generate(self, request: Request) -> JSONResponse:
        try:
            prompt, intervention = self.understood(await self.body(request))
            answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            try:
                self.waiting.put_nowait((prompt, intervention, answer))
            except asyncio.QueueFull:
                raise Refused(503, f"{WAITING} requests wait already") from None
            return JSONResponse({"text": await answer})
        except Refused as refused:
            return JSONResponse({"error": str(refused)}, status_code=refused.status)

    async def body(self, request: Request) -> Any:
        """The JSON of a request of bounded size."""
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        read = b""
        async for part in request.stream():
            read += part
            if len(read) > BYTES:
                raise Refused(413, f"a request has at most {BYTES} bytes")
        try:
            return json.loads(read)
        except ValueError as error:
            raise Refused(400, f"the request is no JSON: {error}") from None

    def understood(self, given: Any) -> tuple[str, Toward | None]:
        """The prompt and the intervention that a request asks for; whatever is wrong is its own error alone."""
        if not isinstance(given, dict):
            raise Refused(400, "the request must be a JSON object")
        prompt, region, alpha = given.get("prompt"), given.get("region"), given.get("alpha", 0.3)
        if not isinstance(prompt, str) or not prompt:
            raise Refused(400, f"prompt must be a text, got {prompt!r}")
        if not 0 < len(self.tokenizer(prompt)["input_ids"]) <= TOKENS:
            raise Refused(400, f"prompt must have 1 to {TOKENS} tokens")
        if region is None:
            return prompt, None
        if type(region) is not int or not 0 <= region < self.mfa.n_components:
            raise Refused(400, f"region must be in [0, {self.mfa.n_components}), got {region!r}")
        if type(alpha) not in (int, float) or not (math.isfinite(alpha) and 0 <= alpha <= 1):
            raise Refused(400, f"alpha must be from 0 to 1, got {alpha!r}")
        return prompt, Toward(region, float(alpha))


def made(name: str | None, folder: str | None) -> Server:
    """The server of a mixture in a folder or of the hub, or of a small one that is fitted now."""
    if folder is None:
        return Server(*model_and_mixture(name), LAYER)
    mfa = MFA.from_pretrained(folder)
    if "layer" not in mfa.extra or not (name or mfa.extra.get("model")):
        raise SystemExit(f"{folder} does not say its model and layer: save_pretrained(folder, extra={{...}})")
    return Server(*load_language_model(name or mfa.extra["model"]), mfa, mfa.extra["layer"])


async def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--mfa", help="folder or hub id of a mixture; without it, a small one is fitted")
    arguments.add_argument("--port", type=int, default=8000)
    given = arguments.parse_args()
    server = made(given.model, given.mfa)
    server.written(["a", "b"], [Toward(0, 0.1), None])  # the first pass builds and checks kernels
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    app = Starlette(routes=[Route("/generate", server.generate, methods=["POST"])], middleware=[hosts])
    listening = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=given.port, log_level="warning"))
    worker = asyncio.create_task(server.work())
    worker.add_done_callback(lambda task: setattr(listening, "should_exit", True))  # without it, requests would hang
    print(f"http://127.0.0.1:{given.port}/generate", flush=True)
    await listening.serve()
    worker.cancel()


if __name__ == "__main__":
    asyncio.run(main())
