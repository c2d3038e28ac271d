"""The examples run, and print what they promise."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
PROGRAMS = {
    "callbacks.py": ("wandb", r"\d+ records, the best [\d.]+ nats per token"),
    "datasets_streaming.py": ("datasets", r"5,000 activations, read once: [\d.]+ nats per token"),
    "trainer_loss.py": ("accelerate", r"activations under the mixture: ([\d.]+) -> ([\d.]+) nats per token"),
    "transformer_lens_hook.py": ("transformer_lens", r"(\+\d+\.\d\d nats  .+\n){5}"),
    "nnsight_trace.py": ("nnsight", r"(\+\d+\.\d\d nats  .+\n){5}"),
}
NOTEBOOKS = {
    "fit_and_look.ipynb": r"scripture +\d+%",
    "steer.ipynb": r"scripture +\d+\.\d% of its words",
    "trust_and_train.ipynb": r"errors above their bounds: 0 of 512",
}


@pytest.mark.more
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_example_runs(program: str, tmp_path: Path) -> None:
    package, printed = PROGRAMS[program]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    done = subprocess.run(
        [sys.executable, FOLDER / program], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(printed, done.stdout), done.stdout


def asked(address: str, body: str, **headers: str) -> tuple[int, dict[str, str]]:
    """A status, and the JSON that came with it; keywords are headers, with _ for -."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        wanted = urllib.request.Request(address, body.encode(), {"Content-Type": "application/json", **headers})
        with urllib.request.urlopen(wanted, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.more
@pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="needs uvicorn: the extra explore")
def test_the_server_steers_each_request_by_its_own_region(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    serving = subprocess.Popen(
        [sys.executable, FOLDER / "serve.py", "--port", port], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        address = serving.stdout.readline().strip()
        assert address == f"http://127.0.0.1:{port}/generate"
        prompt = {"prompt": "    def close(self):\n        self."}
        bodies = [json.dumps({**prompt, **({} if k is None else {"region": k, "alpha": 0.6})}) for k in (None, 3, 3, 5)]
        for _ in range(100):
            with contextlib.suppress(urllib.error.URLError):  # it has printed its address, but does not listen yet
                asked(address, bodies[0])
                break
            time.sleep(0.1)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda body: asked(address, body), bodies))
        assert [status for status, _ in answers] == [200] * 4
        plain, three, again, five = (said["text"] for _, said in answers)
        assert three == again
        assert len({plain, three, five}) == 3
        wrong = {
            '{"prompt": "a", "region": 99}': "region must be in [0, 16), got 99",
            '{"prompt": "a", "region": true}': "region must be in [0, 16), got True",
            '{"prompt": "a", "region": 3, "alpha": NaN}': "alpha must be from 0 to 1, got nan",
            '{"prompt": "a", "region": 3, "alpha": "x"}': "alpha must be from 0 to 1, got 'x'",
            '{"region": 3}': "prompt must be a text, got None",
            json.dumps({"prompt": "a " * 3000}): "prompt must have 1 to 512 tokens",
            "[]": "the request must be a JSON object",
        }
        with ThreadPoolExecutor(8) as pool:  # beside each other, and beside a right one
            right = pool.submit(asked, address, bodies[1])
            found = list(pool.map(lambda body: asked(address, body), wrong))
        assert found == [(400, {"error": message}) for message in wrong.values()]
        assert right.result() == (200, {"text": three})
        assert asked(address, "x")[0] == 400
        assert asked(address, bodies[0], Content_Type="text/plain")[0] == 415
        assert asked(address, json.dumps({"prompt": "a" * 70_000}))[0] == 413
        try:
            status, _ = asked(address, bodies[0], Host="elsewhere.org")
        except ValueError:  # not JSON: it was the middleware
            status = 400
        assert status == 400
    finally:
        serving.terminate()
        serving.wait()


@pytest.mark.more
@pytest.mark.skipif(importlib.util.find_spec("nbclient") is None, reason="needs nbclient: the extra docs")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_prints_what_it_shows(name: str, tmp_path: Path) -> None:
    """Executed anew, the same cells print and draw; what they print depends on the machine, down to topics."""
    import nbformat

    from scripts.notebooks import executed

    shown = nbformat.read(FOLDER / "notebooks" / name, as_version=4)
    found = executed(FOLDER / "notebooks" / name, tmp_path)
    text = "\n".join(output.get("text", "") for cell in found.cells for output in cell.get("outputs", []))
    assert re.search(NOTEBOOKS[name], text), text
    for one, other in zip(found.cells, shown.cells, strict=True):
        kinds = [[output.output_type for output in cell.get("outputs", [])] for cell in (one, other)]
        assert kinds[0] == kinds[1], f"python scripts/notebooks.py {name}: {one.source[:200]}"


def test_notebooks_are_kept_with_what_they_print() -> None:
    """No machine's paths, no warnings, no errors, and every cell executed in its order."""
    folder = FOLDER / "notebooks"
    assert {path.name for path in folder.glob("*.ipynb")} == set(NOTEBOOKS)
    for name in NOTEBOOKS:
        text = (folder / name).read_text()
        assert not re.search(r"/(root|home|tmp|Users|work)/", text), name
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert outputs
        assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
        assert {output.get("name", "stdout") for output in outputs} == {"stdout"}


def test_every_example_is_named_and_run() -> None:
    programs = {path.name for path in FOLDER.glob("*.py")} - {"_small.py"}
    assert programs == {*PROGRAMS, "serve.py"}
    assert set(re.findall(r"\]\((\w+\.py)\)", (FOLDER / "README.md").read_text())) == programs
