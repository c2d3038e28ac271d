"""Jobs that are killed at random moments and started again, until they come to their end.

Run as a module by `tests.common.test_killed`, in a process of its own that imports once, hardly computes, and forks a
child for every life of a job. (To fork a process that has run threads is asking for trouble.)
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mfa_kernels import MFA, fit, fit_many, harvest
from mfa_kernels.common.files import atomic_write_text
from mfa_kernels.fitting import fit_sharded, preparation
from mfa_kernels.ops.common import cpp
from tests.fitting.planted import Store, draw, planted
from tests.helpers.language import make_model, make_tokenizer, words

Job = Callable[[Path, bool], None]  # works in a folder; whether it may find something there to go on with

TRUE = planted(8, 16, 2)
TEXTS = [words(*range(i, i + 9 + i % 17)) for i in range(100)]


def save(mfa: Any, out: Path) -> None:
    """Saves a fit that came to its end, without the times of its report; raises for an interrupted one."""
    report = mfa.fit_report
    if report.interrupted:
        raise KeyboardInterrupt
    report.run["began"] = None
    for record in report.history:
        del record["seconds"], record["tokens_per_second"], record["memory"]
    report.seconds = dict.fromkeys(report.seconds, 0.0)
    mfa.save_pretrained(out)


EXTENSION = """
#include <Python.h>
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "small", "", -1, methods};
PyMODINIT_FUNC PyInit_small() { return PyModule_Create(&module); }
"""


def building(folder: Path, resume: bool) -> None:
    """A library that is compiled on first use, by ninja and a compiler."""
    os.environ["MFA_KERNELS_CACHE"] = str(folder / "cache")
    source = folder / "small.cpp"
    atomic_write_text(source, EXTENSION)
    module = cpp.cached("small") or cpp.build("small", [source], "a test")
    assert Path(module.__file__) == folder / "cache" / "small" / "small.so"
    assert Path(module.__file__).exists()
    atomic_write_text(folder / "out" / "answer", str(module.answer()))


def fitting(method: str) -> Job:
    options = {"em": {"polish": 1}, "sgd": {}, "online": {"noise": "per_component"}}[method]

    def job(folder: Path, resume: bool) -> None:
        rows = Store(draw(TRUE, 3000))
        mfa = fit(
            rows, 8, 2, method=method, epochs=2, batch_size=300, seed=3, progress=False,
            checkpoint=folder / "checkpoint", checkpoint_seconds=0, resume=resume, **options,
        )  # fmt: skip
        save(mfa, folder / "out")

    return job


def fitting_parts(folder: Path, resume: bool) -> None:
    mfa = fit_sharded(
        Store(draw(TRUE, 3000)), 8, 2, method="online", epochs=2, batch_size=300, seed=3, progress=False,
        checkpoint=folder / "checkpoint", checkpoint_seconds=0, resume=resume,
    )  # fmt: skip
    save(mfa, folder / "out")


def fitting_several(folder: Path, resume: bool) -> None:
    sizes = {"small": {"n_components": 4}, "large": {"n_components": 8, "noise": "per_component"}}
    mixtures = fit_many(
        draw(TRUE, 3000).split(130), sizes, rank=2, batch_size=300, seed=3, progress=False,
        checkpoint=folder / "checkpoint", checkpoint_seconds=0, resume=resume,
    )  # fmt: skip
    for name, mfa in mixtures.items():
        save(mfa, folder / "out" / name)


def harvesting(folder: Path, resume: bool) -> None:
    harvest(
        make_model("llama"), make_tokenizer(bos=True), TEXTS, [0, 2], folder / "out",
        context=12, batch_size=4, rows_per_shard=100, progress=False, resume=resume,
    )  # fmt: skip


def saving(folder: Path, resume: bool) -> None:
    """Saves two mixtures in turn, `resume` or not: the second one in the end."""
    for seed in [1, 2] * 25:
        planted(8, 16, 2, seed=seed).save_pretrained(folder / "out")


JOBS: dict[str, Job] = {
    **{f"fit, {method}": fitting(method) for method in ("sgd", "em", "online")},
    "fit_sharded": fitting_parts,
    "fit_many": fitting_several,
    "harvest": harvesting,
    "save": saving,
    "build": building,
}


_HUNG = 100  # seconds; a life takes a few
INTERRUPTED = 130  # the status of a life that KeyboardInterrupt ends


def begin(job: Job, folder: Path, resume: bool) -> int:
    """Begins a life of a job; the number of its process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Python's own work after a fork is not what is tested
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return child
    status = 1
    try:
        try:
            faulthandler.dump_traceback_later(_HUNG, exit=True)  # a life that hangs says where
            signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs tests in the background ignores it
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            torch.set_num_threads(1)
            job(folder, resume)
            status = 0
        except KeyboardInterrupt:
            status = INTERRUPTED
        except BaseException:
            traceback.print_exc()
    finally:
        os._exit(status)


SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


def live(job: Job, folder: Path, resume: bool, seconds: float | None, number: signal.Signals = signal.SIGKILL) -> bool:
    """One life of a job, which gets a signal after so many seconds; whether it came to its end before."""
    child = begin(job, folder, resume)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, number)
    _, status = os.waitpid(child, 0)
    by_signal = os.WIFSIGNALED(status) and os.WTERMSIG(status) == number
    interrupted = number == signal.SIGINT and os.WIFEXITED(status) and os.WEXITSTATUS(status) == INTERRUPTED
    if seconds is not None and (by_signal or interrupted):
        return False
    assert status == 0, f"a life failed with status {status}"
    return True


def apart(check: Callable[..., None], *given: Any) -> None:
    """Makes a check in a process of its own: this one, which forks, must not have run threads, as checksums do."""
    assert live(lambda folder, resume: check(*given), Path(), False, None)


def contents(folder: Path) -> dict[str, Any]:
    """Every file there is, but those that a killed process left under a temporary name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return {str(path.relative_to(folder)): content(path) for path in files}


def content(path: Path) -> Any:
    """All bits of a file; but the order of the strings in a header of safetensors is random."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        bits = {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
        return file.metadata(), {name: (tensors[name].dtype, tensors[name].shape, bits[name]) for name in bits}


def readable(folder: Path) -> None:
    """Checks that one of the two mixtures is there after a kill, whole."""
    if (folder / "out").exists() and (folder / "out" / "config.json").exists():
        found = MFA.from_pretrained(folder / "out").state_dict()
        wanted = [planted(8, 16, 2, seed=seed).state_dict() for seed in (1, 2)]
        assert any(all(torch.equal(found[name], state[name]) for name in state) for state in wanted)


def check(name: str, job: Job, folder: Path, kills: int) -> None:
    """Kills a job `kills` times, over as many runs as that takes; each run ends as the one that nobody touched."""
    random.seed(0)
    for attempt in ("warm-up", "whole"):
        began = time.perf_counter()
        assert live(job, folder / attempt, False, None)
        seconds = time.perf_counter() - began
    expected = contents(folder / "whole" / "out")
    left, runs = kills, 0
    while left:
        run = folder / f"{runs}"
        while left:
            if live(job, run, True, random.uniform(0, 0.7 * seconds), SIGNALS[left % 3]):
                seconds *= 0.8  # else all signals may come too late, where the machine was busier when it was measured
                break
            left -= 1
            if job is saving:
                apart(readable, run)
        assert live(job, run, True, None)
        assert contents(run / "out") == expected, f"{name}: run {runs} ended differently"
        shutil.rmtree(run)
        runs += 1
    print(f"{name}: {kills} kills in {runs} runs of {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    preparation.LEAST_START_ROWS = 1000  # of a stream of 3000
    cpp.library()  # built and loaded once, as the model's classes are
    make_model("llama")
    for name, kills in json.loads(sys.argv[2]).items():
        check(name, JOBS[name], Path(sys.argv[1]) / name, kills)
