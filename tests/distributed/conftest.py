"""Four processes are started once: what they find, as two and as four, is compared with one process by the tests."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from tests.distributed import worker

_SECONDS = 300  # after which they hang


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what each process wrote; see `worker.main`."""
    folder = tmp_path_factory.mktemp("ranks")
    worker.save_checkpoints_of_one_process(folder)
    processes = mp.spawn(worker.main, (str(folder),), nprocs=worker.PROCESSES, join=False)
    deadline = time.monotonic() + _SECONDS
    try:
        while not processes.join(timeout=1):  # raises, and ends the others, when one fails
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in processes.processes:
            process.kill()
    return folder


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...
