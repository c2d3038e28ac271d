"""A server that steers every request toward a region of its own; requests that wait are generated as one batch.

python examples/serve.py                                     # prints its address
curl -d '{"prompt": "def close(", "region": 3, "alpha": 0.3}' http://127.0.0.1:8000/generate
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch
import uvicorn
from _small import LAYER, model_and_mixture, parser
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mfa_kernels import MFA, steer
from mfa_kernels.steering import Toward

BATCH, NEW_TOKENS = 8, 24


class Server:
    """A model, a mixture of one of its layers, and the requests that wait for them."""

    def __init__(self, model: Any, tokenizer: Any, mfa: MFA) -> None:
        self.model, self.tokenizer, self.mfa = model.eval(), tokenizer, mfa
        self.waiting: asyncio.Queue[tuple[str, Toward | None, asyncio.Future[str]]] = asyncio.Queue()

    @torch.inference_mode()
    def written(self, prompts: list[str], interventions: list[Toward | None]) -> list[str]:
        """Returns what the model writes after each prompt, each row steered by its own intervention, or by none."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with steer(self.model, self.mfa, LAYER, rows=interventions):
            ids = self.model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                max_new_tokens=NEW_TOKENS, do_sample=False,
            )  # fmt: skip
        texts: list[str] = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts

    async def work(self) -> None:
        """Takes what waits, one batch after the other: a model has one forward pass, and one handle, at a time."""
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < BATCH and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            prompts, interventions, answers = (list(part) for part in zip(*batch))
            try:
                texts = await run_in_threadpool(self.written, prompts, interventions)
                for answer, text in zip(answers, texts):
                    answer.set_result(text)
            except Exception as error:
                for answer in answers:
                    answer.set_exception(error)

    async def generate(self, request: Request) -> JSONResponse:
        try:
            given = await request.json()
            prompt, region, alpha = given.get("prompt"), given.get("region"), float(given.get("alpha", 0.3))
            if not isinstance(prompt, str) or not prompt:
                raise ValueError(f"prompt must be a text, got {prompt!r}")
            if region is not None and region not in range(self.mfa.n_components):
                raise ValueError(f"region must be in [0, {self.mfa.n_components}), got {region!r}")
        except (ValueError, TypeError, AttributeError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await self.waiting.put((prompt, None if region is None else Toward(region, alpha), answer))
        return JSONResponse({"text": await answer})


async def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--port", type=int, default=8000)
    given = arguments.parse_args()
    server = Server(*model_and_mixture(given.model))
    server.written(["a", "b"], [Toward(0, 0.1), None])  # the first pass builds and checks kernels
    app = Starlette(routes=[Route("/generate", server.generate, methods=["POST"])])
    worker = asyncio.create_task(server.work())
    print(f"http://127.0.0.1:{given.port}/generate", flush=True)
    await uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=given.port, log_level="warning")).serve()
    worker.cancel()


if __name__ == "__main__":
    asyncio.run(main())
