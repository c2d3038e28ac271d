"""A fit to a stream that is read once: fed batch by batch, alone or with others in lock step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from mfa_kernels.common.modes import of_the_caller, read
from mfa_kernels.data.source import Source
from mfa_kernels.fitting import preparation
from mfa_kernels.fitting.online_em import StreamedEM
from mfa_kernels.fitting.options import checked
from mfa_kernels.fitting.stages import Stages
from mfa_kernels.fitting.streaming import RowQueue
from mfa_kernels.mixture.mfa import MFA


class StreamFit:
    """A fit that is fed: it starts when enough rows have come, and trains on the others as they come.

        fit = StreamFit(arguments)
        for batch in stream:
            fit.feed(batch)
            if fit.over:
                break
        mfa = fit.finish()

    Args:
        arguments: those of `fit`, by name, but for the activations.

    Attributes:
        over: true where it needs no more rows.

    Raises:
        TypeError, ValueError, OSError: naming the argument that a fit to a stream cannot be given.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        options = checked(arguments, streamed=True)
        self.over = False
        self._queue, self._stages = RowQueue(), Stages(options)
        self._run: StreamedEM | None = None  # once it trains on rows as they come
        self._head: Source | None = None  # the rows that it starts from, once they are here
        sample, processes = preparation.start_rows(options.n_components), options.processes
        self._wanted = math.ceil(sample / processes.count / (1 - options.held_out))
        self._is_alone = processes.count == 1
        self._open = ExitStack()
        self._open.enter_context(preparation.holding(options.checkpoint, options.log, options.group))

    def feed(self, batch: Any) -> None:
        """Takes a batch (..., D) over, and works as far as the rows suffice.

        Raises:
            TypeError, ValueError: naming the batch by its number.
        """
        self._queue.put(batch)
        self._work()

    def finish(self, interrupted: bool = False) -> MFA:
        """Works on the rows that are left, and returns the mixture.

        Args:
            interrupted: true where Ctrl-C has come: rows that are left are not used.

        Raises:
            KeyboardInterrupt: it came before the training.
        """
        with self._open:
            if not interrupted and not self.over:
                self._queue.ended = True
                self._work()
            elif interrupted:
                if self._run is None:
                    raise KeyboardInterrupt
                self._run.interrupt()
            if self._run is not None:
                self._run.leave()
            mfa: MFA = self._stages.report()
            return mfa

    def close(self) -> None:
        """Gives up, and lets other fits write to the places of this one."""
        self._open.close()

    def _work(self) -> None:
        if self._run is None:
            self._begin()
        if self._run is not None:
            try:
                self.over = self._run.work()
            except KeyboardInterrupt:
                self._run.interrupt()
                self.over = True

    def _begin(self) -> None:
        """Starts the fit as soon as enough rows are here."""
        if self._head is None:
            if not self._queue.holds(self._wanted):
                return
            self._head = self._queue.source()
            if self._queue.ended and self._is_alone:  # all rows are here: they are fitted as other data are
                self._stages.prepare(self._head)
                self._stages.start()
                self._stages.train()
                self.over = True
                return
        if not self._queue.holds(self._stages.n_unseen):
            return
        self._stages.prepare(self._head, self._queue)
        self._head = None
        self._stages.start()
        self.over = self._stages.was_done
        if not self.over:
            self._run = self._stages.streamed_run()
            self._open.callback(self._run.close)


def feed_all(
    fits: Mapping[str, Mapping[str, Any]],
    batches: Iterable[Any],
    part: Callable[[str, Any], Any] = lambda name, batch: batch,
) -> dict[str, MFA]:
    """Runs fits to their ends, each of them fed with every batch before the next one is read.

    A fit does not depend on the others. Ctrl-C ends the training of all of them, and each may return what it has; an
    error in one of them ends all, and its message begins with the name of the fit, if it has one.

    Args:
        fits: the arguments of each fit, by its name.
        batches: are read until they end or all fits are over.
        part: called as part(name, batch), returns what that fit is fed with.

    Returns:
        The mixtures, by name.
    """
    found: dict[str, MFA] = {}
    unfinished: dict[str, StreamFit] = {}

    def finish(name: str, interrupted: bool = False) -> None:
        with naming(name):
            found[name] = unfinished.pop(name).finish(interrupted)

    try:
        for name, arguments in fits.items():
            with naming(name):
                unfinished[name] = StreamFit(arguments)
        try:
            for batch in read(batches):
                for name, fit in list(unfinished.items()):
                    with naming(name):
                        with of_the_caller():
                            own = part(name, batch)
                        fit.feed(own)
                    if fit.over:
                        finish(name)
                if any(mfa.fit_report is not None and mfa.fit_report.interrupted for mfa in found.values()):
                    raise KeyboardInterrupt
                if not unfinished:
                    break
            for name in list(unfinished):
                finish(name)
        except KeyboardInterrupt:
            if len(found) + len(unfinished) < len(fits):  # it came while one of them was finishing
                raise
            for name in list(unfinished):
                finish(name, interrupted=True)
    finally:
        for fit in unfinished.values():
            fit.close()
    return {name: found[name] for name in fits}


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Makes the user's errors begin with the name of the fit, where it has one."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        if name and type(error) in (TypeError, ValueError, RuntimeError):  # others may take other arguments
            raise type(error)(f"{name}: {error}") from error
        raise
