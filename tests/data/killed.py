"""Stores whose writers get signals at random moments: what is left is whole, or says that it is not.

Run as a module by `tests.data.test_killed`, in a process of its own that forks; see `tests.helpers.killed`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch

from mfa_kernels import harvest
from mfa_kernels.common.locks import LOCK
from mfa_kernels.data import ActivationStore, ActivationStoreWriter
from mfa_kernels.data.store import MANIFEST
from tests.helpers.killed import Job, apart, begin, contents, live
from tests.helpers.language import make_model, make_tokenizer, words

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WIDTH = 64


def stream() -> Iterator[str]:
    for i in count():
        yield words(*range(i, i + 9 + i % 17))


def harvesting(folder: Path, resume: bool) -> None:
    """Two layers, of texts without an end."""
    harvest(
        make_model("llama"), make_tokenizer(bos=True), stream(), [0, 2], folder, context=12, batch_size=4,
        rows_per_shard=60, max_tokens=500, buffer_size=20, progress=False, resume=resume,
    )  # fmt: skip


def add(writer: ActivationStoreWriter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number in range(25):
        rows = torch.randn(5, WIDTH, generator=generator)
        writer.add_document(range(5), range(5), rows, source=f"document {number} of {seed}")


def writing(folder: Path, resume: bool) -> None:
    if (folder / MANIFEST).exists() and ActivationStore(folder).complete:
        return
    with ActivationStoreWriter(folder, WIDTH, rows_per_shard=7, resume=resume) as writer:
        add(writer, 0)


def replacing(seed: int) -> Job:
    def job(folder: Path, resume: bool) -> None:
        with ActivationStoreWriter(folder, WIDTH, rows_per_shard=7 - seed, overwrite=True) as writer:
            add(writer, seed)

    return job


def stores(folder: Path) -> list[Path]:
    """Folders of stores; a temporary folder that a killed process has left is none."""
    return [path.parent for path in folder.rglob(MANIFEST) if path.parent.suffix != ".tmp"]


def check_sound(folder: Path, whole: list[dict]) -> None:
    """Every store that is there is one of `whole`, or says that it is cut off; what it names is as it was written."""
    for path in stores(folder):
        store = ActivationStore(path)
        assert store.verify(progress=False) == []
        assert not store.complete or contents(path) in whole, f"{path} is complete, and not as it was written"
        try:
            ActivationStoreWriter(path, store.n_features)
        except FileExistsError:
            continue
        raise AssertionError(f"{path}: a second writer was not refused")


def check_nothing_left(folder: Path) -> None:
    """The next writer removes what the killed ones have left."""
    for path in stores(folder):
        ActivationStoreWriter(path, 1, overwrite=True)
        assert {entry.name for entry in path.iterdir()} == {LOCK, MANIFEST}


def check_resumed(name: str, job: Job, folder: Path, kills: int) -> None:
    """A run that is cut off `kills` times by each of the signals ends as the one that nobody touched."""
    for attempt in ("warm-up", "whole"):
        began = time.perf_counter()
        assert live(job, folder / attempt, False, None)
        seconds = time.perf_counter() - began
    whole = [contents(path) for path in stores(folder / "whole")]
    left = [number for number in SIGNALS for _ in range(kills)]
    random.shuffle(left)
    runs = 0
    while left:
        run = folder / f"{runs}"
        while left:
            if live(job, run, True, random.uniform(0, 0.7 * seconds), left[-1]):
                seconds *= 0.8  # else all signals may come too late, where the machine was busier when it was measured
                break
            left.pop()
            apart(check_sound, run, whole)
        assert live(job, run, True, None)
        assert contents(run) == contents(folder / "whole"), f"{name}: run {runs} ended differently"
        apart(check_nothing_left, run)
        shutil.rmtree(run)
        runs += 1


def check_replaced(name: str, folder: Path, kills: int) -> None:
    """Writers replace a store, two at a time; one of them is killed."""
    jobs = [replacing(seed) for seed in (0, 1)]
    whole = []
    for job in jobs:
        began = time.perf_counter()
        assert live(job, folder, False, None)
        seconds = time.perf_counter() - began
        whole.append(contents(folder))
    assert whole[0] != whole[1]
    for number in SIGNALS * kills:
        children = [begin(job, folder, False) for job in random.sample(jobs, 2)]
        time.sleep(random.uniform(0, seconds))
        os.kill(children[0], number)
        ended = dict(os.waitpid(child, 0) for child in children)
        apart(check_sound, folder, whole)
        # The other one has waited, and found the folder free.
        assert ended[children[1]] == 0, f"{name}: the second writer failed"
        assert contents(folder) in whole
    apart(check_nothing_left, folder)


def check_left(folder: Path) -> None:
    """Checks that the next writer of a file removes the temporary files of killed ones."""
    assert live(writing, folder / "whole", False, None)

    def killed_at(rename: int) -> Job:
        def job(folder: Path, resume: bool) -> None:
            replace, left = os.replace, [rename]

            def die(source: Path, target: Path) -> None:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)

            os.replace = die
            writing(folder, resume)

        return job

    for rename in (1, 2, 3, 4):  # the first manifest, a shard, its manifest, another shard
        for resume in (True, False):
            run = folder / f"{rename} {resume}"
            child = begin(killed_at(rename), run, False)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            assert [path for path in run.iterdir() if path.suffix == ".tmp"], "nothing is left"
            assert live(writing if resume else replacing(0), run, True, None)
            assert contents(run) == contents(folder / "whole")
            assert {path.name for path in run.iterdir() if path.name[0] == "."} == {LOCK}


if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(0)
    make_model("llama")
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    check_left(folder / "left")
    for name, job in {"harvest": harvesting, "write": writing}.items():
        check_resumed(name, job, folder / name, kills)
        print(f"{name}: {3 * kills} kills", flush=True)
    check_replaced("replace", folder / "replace", kills)
    print(f"replace: {3 * kills} kills", flush=True)
