"""Harvesting: runs texts through a language model and writes activations of its layers to stores."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mfa_kernels.common.checks import check_device, check_dtype, check_flag, check_integer, check_path
from mfa_kernels.common.files import StrPath, check_writable
from mfa_kernels.common.locks import alone
from mfa_kernels.common.modes import door, made
from mfa_kernels.common.places import STORE, check_not_read
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.common.reading import COUNT, TEXT, check_fields, shown
from mfa_kernels.data.language_model import (
    PassEnds,
    bos_prefix,
    check_loaded,
    decoder_of_two,
    from_pretrained,
    hidden_states,
    input_device,
    layer_index,
    origin,
    resolve_layer,
    text_tokens,
    weights_fingerprint,
)
from mfa_kernels.data.store import MANIFEST, ActivationStore, ActivationStoreWriter, differences, refuse_existing
from mfa_kernels.data.text import check_texts, is_finite, named_texts
from mfa_kernels.data.twin import check_output
from mfa_kernels.ops.common.finite import finite_rows

_PASSES = 8  # are read ahead of the rows, so that windows of similar lengths meet
MOST_BARREN = 100_000  # after so many texts in a row without a token to keep, none is expected
_NOTHING = (
    "hold no token to keep: special, first and non-finite positions are left out (an iterator can be read only once)"
)

Layer = int | str


@door
def harvest(
    model: Any,
    tokenizer: Any,
    texts: StrPath | Iterable[str | tuple[str, str] | Mapping[str, Any] | os.PathLike[str]],
    layer: Layer | Sequence[Layer],
    out: StrPath | None = None,
    *,
    max_tokens: int | None = None,
    context: int = 256,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    skip_first: int = 1,
    drop_special: bool = True,
    device: torch.device | str | None = None,
    seed: int | None = 0,
    buffer_size: int = 1000,
    progress: bool = True,
    rows_per_shard: int = 65536,
    overwrite: bool = False,
    resume: bool = False,
) -> ActivationStore | Any:  # Any: a dict, when there are several layers
    """Runs texts through a causal language model and keeps the hidden states that leave a layer.

    Texts are cut into windows of `context` tokens, each beginning with the tokenizer's BOS token where that is its
    convention (one, where a chat template has written it already); each window is one document of the store. The
    forward pass ends at the last layer wanted. It is made in the model's own dtype: autocast is off meanwhile.

    Args:
        model: a Hugging Face causal language model, or the folder or hub id of one; of an encoder-decoder, layers of
            the encoder alone, by path. Training flags and device are given back as they were. Whether one with bfloat16
            weights is faster depends on the processor (`python -m bench.bench_harvest --dtype bfloat16`).
        tokenizer: its tokenizer, or the folder or hub id of one; None when `model` is a folder or id that has it.
        texts: strings, (name, string) pairs, mappings with a "text" entry, or paths (`pathlib.Path`) as for
            `read_texts`; a lone string is a path.
        layer: an index (negative counts from the end) or a module path whose output is (batch, positions, D); or
            several of these, for as many stores from one pass over the model. Digits, as "2", are an index.
        out: the folder of the store; with several layers, the folder in which each has a folder, named by module path.
            None: a temporary folder, removed with the store object.
        max_tokens: rows to keep; None: all.
        context: tokens per window, BOS included.
        batch_size: windows of `context` tokens per forward pass. Windows are put together by their lengths, and shorter
            ones are more per pass: as many as hold the same number of tokens, padding included.
        dtype: of the activations on disk: float32, float16 or bfloat16.
        skip_first: positions without rows at the beginning of each window, where attention sinks live.
        drop_special: keep no rows of special tokens (the tokenizer's `all_special_ids`).
        device: where the model runs meanwhile; None: where it is, or on a GPU if there is one and the model is loaded
            here. A model that is spread over devices, or offloaded, runs where it is.
        seed: seed of the order of texts, so that `max_tokens` takes from all of them. A sequence or a path is read as a
            whole and then permuted; any other iterable, which may be endless, goes through a shuffle buffer. None:
            the order given, texts read as they are needed.
        buffer_size: texts in that buffer, as in `datasets`: the next text is a random one of the buffer, and the next
            one of the iterable takes its place. At most so many are read beyond those that the model reads.
        progress: show a progress bar.
        rows_per_shard: rows in each file of the store; a shard is held in memory while it fills.
        overwrite: replace stores that are in `out` already.
        resume: resume stores in `out` that were cut off, with the same texts and settings: they become, to the bit,
            what they would have been. Texts are cut up again from the first, but the model reads only what is missing.
            If there is no store yet, one is begun; a complete one is returned.

    Returns:
        The store, or a dict of stores by layer as given. Stores of one pass have the same rows: those that are not
        finite in every layer (`mfa_kernels.ops.common.finite`) are left out, counted in
        `store.meta["nonfinite_rows"]`, and warned of.

    Raises:
        FileExistsError: `out` holds a store, and neither `overwrite` nor `resume`; or a mixture, or a checkpoint.
        FileNotFoundError, ValueError: naming the missing or corrupt shards of a store to resume, or the settings that
            differ.
        TimeoutError: naming the folder that another harvest is writing to.
        ValueError, TypeError, IndexError: naming the argument; ValueError when the texts hold no token to keep.
    """
    settings = _Settings(context, batch_size, max_tokens, skip_first, drop_special, seed, buffer_size).checked(texts)
    progress, overwrite = check_flag(progress, "progress"), check_flag(overwrite, "overwrite")
    resume = check_flag(resume, "resume")
    rows_per_shard = check_integer(rows_per_shard, "rows_per_shard", 1)
    check_dtype(dtype)
    if out is not None:
        check_path(out, "out")
    if resume and (overwrite or out is None):
        raise ValueError(f"resume goes on with the stores in out: it needs {'out' if out is None else 'no overwrite'}")
    layers = _several(layer)
    several = not _is_one(layer)
    if out is not None:
        check_not_read(out, STORE, "out", (), _paths(texts))
    model, tokenizer, device = _load(model, tokenizer, device)
    modules = _modules(model, layers)
    with ExitStack() as failed:
        temporaries: dict[str, tempfile.TemporaryDirectory[str]] = {}
        for path in modules if out is None else ():
            temporaries[path] = tempfile.TemporaryDirectory(prefix="activations-")
            failed.enter_context(temporaries[path])
        if out is None:
            folders = {path: Path(temporary.name) for path, temporary in temporaries.items()}
        else:
            folders = {path: Path(out) / path if several else Path(out) for path in modules}
        facts = {**origin(model, tokenizer), "weights_fingerprint": weights_fingerprint(model), "site": "output"}
        meta = {**facts, **settings._asdict()}
        if settings.seed is None or is_finite(texts):  # then the buffer has no part in the order
            del meta["buffer_size"]
        metas = {path: {**meta, "layer": path} for path in modules}
        reached = _reached(folders, metas, dtype) if resume else dict.fromkeys(modules, _BEGINNING)
        _check_folders((folders[path] for path in reached), overwrite or resume)
        if reached:
            windows = _windows(texts, tokenizer, settings)

            def writer(path: str, n_features: int) -> ActivationStoreWriter:
                return ActivationStoreWriter(
                    folders[path], n_features, dtype, metas[path], rows_per_shard, overwrite=overwrite, resume=resume
                )

            reader = _reader(model, modules, device)
            nonfinite = _run(reader, windows, writer, reached, settings, dtype, progress)
            if nonfinite:
                warnings.warn(f"{nonfinite} activations were not finite in {dtype} and were left out", stacklevel=3)

        stores = {path: ActivationStore(folder) for path, folder in folders.items()}
        for path, temporary in temporaries.items():
            weakref.finalize(stores[path], temporary.cleanup)
        failed.pop_all()  # the stores own the temporary folders now
    if not several:
        return next(iter(stores.values()))
    return {wanted: stores[resolve_layer(model, wanted)[0]] for wanted in layers}


def stream(
    model: Any,
    tokenizer: Any,
    texts: StrPath | Iterable[str | tuple[str, str] | Mapping[str, Any] | os.PathLike[str]],
    layer: Layer | Sequence[Layer],
    *,
    max_tokens: int | None = None,
    context: int = 256,
    batch_size: int = 16,
    skip_first: int = 1,
    drop_special: bool = True,
    seed: int | None = 0,
    buffer_size: int = 1000,
) -> Iterator[Any]:  # Any: a tensor, or a dict of them when there are several layers
    """Yields the activations that `harvest` would keep, in its order, as the model makes them, without a store.

    `mfa_kernels.fit(stream(...), ...)` fits online while it reads; `mfa_kernels.fit_many` fits several mixtures, also
    to several layers, in one pass over the model. Between two batches the model is as it was, without hooks, and may be
    used for something else.

    Args:
        model: as for `harvest`; it runs where it is (if it is loaded here: on a GPU if there is one).
        tokenizer, texts, max_tokens, context, batch_size, skip_first, drop_special, seed, buffer_size: as for
            `harvest`. The model reads some 8 batches before the first is yielded.
        layer: an index, or a module path; or several of these. The forward pass ends at the last of them.

    Yields:
        Rows (n, D) of `batch_size` windows, on the layer's device and in its dtype; for several layers, a dict of them
        by layer as given, to the bit those that a stream of that layer alone yields. Rows that are not finite are among
        them: `fit` leaves them out and counts them.

    Raises:
        TypeError, ValueError, IndexError: naming the argument; where that needs the texts, once they are read.
    """
    settings = _Settings(context, batch_size, max_tokens, skip_first, drop_special, seed, buffer_size).checked(texts)
    layers = _several(layer)
    model, tokenizer, _ = _load(model, tokenizer, None)
    modules = _modules(model, layers)
    paths = {wanted: resolve_layer(model, wanted)[0] for wanted in layers}

    def batches() -> Iterator[Any]:
        windows = _windows(texts, tokenizer, settings)
        left, found = settings.max_tokens, False
        while group := _group(windows, settings, left):
            with _reader(model, modules, None) as read:
                rows = _read(read, group, settings)
            counts = [len(window.positions) for window in group]
            sizes = [sum(counts[i : i + settings.batch_size]) for i in range(0, len(group), settings.batch_size)]
            for pieces in zip(*(states.split(sizes) for states in rows.values())):
                batch = {path: states[:left] for path, states in zip(rows, pieces)}
                first = batch[paths[layers[0]]]
                yield first if _is_one(layer) else {wanted: batch[path] for wanted, path in paths.items()}
                left, found = None if left is None else left - len(first), True
        if not found:
            raise ValueError(f"texts {_NOTHING}")

    return made(batches())


def read_tokens(model: Any, tokens: Sequence[int], layer: Layer) -> Tensor:
    """Returns the output of a layer for each of n tokens that the model reads at once, (n, D), where the model is.

    Later layers are not run, and nothing is kept.

    Args:
        model: a Hugging Face language model.
        tokens: their ids.
        layer: an index, or a module path.

    Raises:
        IndexError, TypeError, ValueError: naming the argument that does not fit.
    """
    window = _Window("", list(tokens), list(range(len(tokens))))
    with _reader(model, _modules(model, [layer]), None) as read:
        (states,) = read([window]).values()
    return states


def _paths(texts: Any) -> list[StrPath]:
    """Returns the files and folders among the texts, as far as that can be told without reading any."""
    if isinstance(texts, str | os.PathLike):
        return [texts]
    return [text for text in texts if isinstance(text, os.PathLike)] if isinstance(texts, list | tuple) else []


def _is_one(layer: Any) -> bool:
    """True for one layer, False for a sequence of layers."""
    return isinstance(layer, str) or not (isinstance(layer, Sequence) or getattr(layer, "ndim", 0) > 0)


def _several(layer: Layer | Sequence[Layer]) -> list[Layer]:
    layers = [layer] if _is_one(layer) else list(cast(Sequence[Layer], layer))
    if not layers:
        raise ValueError("layer must name at least one layer, got none")
    layers = [wanted if isinstance(wanted, str) else layer_index(wanted) for wanted in layers]
    for i, wanted in enumerate(layers):
        if wanted in layers[:i]:
            raise ValueError(f"layer must name each layer once, got {wanted!r} twice")
    return layers


def _modules(model: Any, layers: list[Layer]) -> dict[str, nn.Module]:
    """Returns the modules of layers by their paths; raises for those that cannot be harvested."""
    modules = dict(resolve_layer(model, wanted) for wanted in layers)
    check_loaded(model)
    _check_layers(model, modules)
    return modules


class _Settings(NamedTuple):
    """Arguments of `harvest` that say which windows of the texts are read, and which rows of them are kept."""

    context: int
    batch_size: int
    max_tokens: int | None
    skip_first: int
    drop_special: bool
    seed: int | None
    buffer_size: int

    @property
    def most(self) -> int:
        """Tokens of a pass."""
        return self.context * self.batch_size

    def checked(self, texts: Any) -> _Settings:
        """Returns the settings as Python's own numbers; raises for a wrong one, and for texts that are none."""
        check_texts(texts)
        return _Settings(
            max_tokens=None if self.max_tokens is None else check_integer(self.max_tokens, "max_tokens", 1),
            context=check_integer(self.context, "context", 1),
            batch_size=check_integer(self.batch_size, "batch_size", 1),
            skip_first=check_integer(self.skip_first, "skip_first"),
            drop_special=check_flag(self.drop_special, "drop_special"),
            seed=None if self.seed is None else check_integer(self.seed, "seed"),
            buffer_size=check_integer(self.buffer_size, "buffer_size", 1),
        )


def _check_folders(folders: Iterable[Path], replace: bool) -> None:
    """Raises the errors of the writers now, before the texts are read and the model runs."""
    for folder in folders:
        check_writable(folder / MANIFEST, "out")
        if folder.exists():
            with alone(folder):
                refuse_existing(folder, replace, "out")


class _Reached(NamedTuple):
    """The place of a harvest before a group of windows."""

    windows: int
    documents: int
    rows: int
    nonfinite: int
    texts: str  # a hash of the windows read


_PROGRESS = {name: TEXT if name == "texts" else COUNT for name in _Reached._fields}
_BEGINNING = _Reached(0, 0, 0, 0, hashlib.sha256().hexdigest())


def _reached(folders: dict[str, Path], metas: dict[str, dict[str, Any]], dtype: torch.dtype) -> dict[str, _Reached]:
    """Returns the place at which each store that is not complete resumes."""
    out = {}
    for path, folder in folders.items():
        out[path] = _BEGINNING
        if (folder / MANIFEST).exists():
            store = ActivationStore(folder)
            different = differences(store, dtype, metas[path])
            if different:
                raise ValueError(f"resume: {folder} was written with other settings: here {'; '.join(different)}")
            if store.complete:
                del out[path]
            elif store.progress:
                where = f"resume: {folder / MANIFEST}: progress"
                if "batches" in store.progress:
                    raise ValueError(
                        f"resume: {folder} was begun by an earlier version, which put other windows together, and "
                        "would not become what it would have been: begin anew (overwrite)"
                    )
                check_fields(store.progress, _PROGRESS, where)
                if unknown := store.progress.keys() - _PROGRESS.keys():
                    raise ValueError(f"{where} has no {shown(sorted(unknown))}")
                out[path] = _Reached(**store.progress)
    return out


class _Window(NamedTuple):
    """A stretch of tokens that the model reads at once."""

    source: str
    tokens: list[int]
    positions: list[int]  # whose rows are kept


def _run(
    reader: AbstractContextManager[Callable[[list[_Window]], dict[str, Tensor]]],
    windows: Iterator[_Window],
    make_writer: Callable[[str, int], ActivationStoreWriter],
    reached: dict[str, _Reached],
    settings: _Settings,
    dtype: torch.dtype,
    progress: bool,
) -> int:
    """Writes one store per module in `reached`, and returns the number of rows left out as not finite."""
    first = min(reached.values(), key=lambda position: position.windows)
    passed, documents, kept, nonfinite, _ = first
    max_tokens = settings.max_tokens
    digest = hashlib.sha256()
    for window in islice(windows, passed):
        digest.update(repr(window).encode())
    if digest.hexdigest() != first.texts:
        raise ValueError(f"resume: the first {passed} windows of texts are not those of the stores")
    writers: dict[str, ActivationStoreWriter] = {}
    with ExitStack() as stack:
        read = stack.enter_context(reader)
        options: dict[str, Any] = {"total": max_tokens, "initial": kept, "progress": progress}
        bar = stack.enter_context(progress_bar(desc="harvest", unit=" tokens", unit_scale=True, **options))
        while group := _group(windows, settings, None if max_tokens is None else max_tokens - kept):
            rows = _read(lambda batch: _stored(read(batch), dtype, bar), group, settings)
            if not writers:
                for path in reached:
                    writers[path] = stack.enter_context(make_writer(path, rows[path].shape[1]))
                    writers[path].rewind(documents, kept)
            # This group may fill a shard and have more rows: after that shard, a harvest resumes at this group.
            position = _Reached(passed, documents, kept, nonfinite, digest.hexdigest())._asdict()
            for writer in writers.values():
                writer.progress = position
            finite = torch.stack([finite_rows(states) for states in rows.values()]).all(0)
            nonfinite += int((~finite).sum())
            keep = torch.zeros_like(finite)
            keep[finite.nonzero().squeeze(1)[: None if max_tokens is None else max_tokens - kept]] = True
            start = 0
            for window in group:
                stop = start + len(window.positions)
                chosen = keep[start:stop]
                if chosen.any():
                    positions = torch.tensor(window.positions)[chosen]
                    for path, writer in writers.items():
                        writer.add_document(window.tokens, positions, rows[path][start:stop][chosen], window.source)
                    documents += 1
                start = stop
                digest.update(repr(window).encode())
            passed += len(group)
            kept += int(keep.sum())
            bar.update(int(keep.sum()) - len(keep))  # all rows were counted as the model made them
        if not kept:
            raise ValueError(f"texts {_NOTHING}")
        for writer in writers.values():
            writer.meta["nonfinite_rows"] = nonfinite
    return nonfinite


def _stored(rows: dict[str, Tensor], dtype: torch.dtype, bar: Any) -> dict[str, Tensor]:
    """Returns rows as a store keeps them, and counts them on the bar."""
    bar.update(len(next(iter(rows.values()))))
    return {path: states.to(dtype).cpu() for path, states in rows.items()}


def _group(windows: Iterator[_Window], settings: _Settings, rows: int | None) -> list[_Window]:
    """Takes the next windows: `_PASSES` passes full of tokens, or fewer windows, which hold as many rows."""
    group: list[_Window] = []
    tokens = _PASSES * settings.most
    while tokens > 0 and (rows is None or rows > 0) and (window := next(windows, None)):
        group.append(window)
        tokens -= len(window.tokens)
        rows = None if rows is None else rows - len(window.positions)
    return group


def similar_lengths(lengths: list[int], most: int) -> list[list[int]]:
    """Puts windows of similar lengths together, each pass of at most `most` tokens with its padding.

    A pass ends where its padding comes to `most / 64` tokens, about what one more pass costs.

    Args:
        lengths: the length of each window, none above `most`.
        most: tokens.

    Returns:
        The numbers of the windows of each pass, the longest first.
    """
    passes: list[list[int]] = []
    longest = padding = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padding += longest - lengths[i]
        if not passes or padding > most // 64 or (len(passes[-1]) + 1) * longest > most:
            passes.append([])
            longest, padding = lengths[i], 0
        passes[-1].append(i)
    return passes


def _read(
    read: Callable[[list[_Window]], dict[str, Tensor]], group: list[_Window], settings: _Settings
) -> dict[str, Tensor]:
    """Returns the wanted rows (n, D) of a group per module, in the order of its windows."""
    parts: dict[str, list[Tensor]] = {}
    for chosen in similar_lengths([len(window.tokens) for window in group], settings.most):
        counts = [len(group[i].positions) for i in chosen]
        for path, states in read([group[i] for i in chosen]).items():
            own = parts.setdefault(path, [states] * len(group))
            for i, rows in zip(chosen, states.split(counts)):
                own[i] = rows
    return {path: torch.cat(own) for path, own in parts.items()}


@contextmanager
def _reader(
    model: Any, modules: dict[str, nn.Module], device: torch.device | str | None
) -> Iterator[Callable[[list[_Window]], dict[str, Tensor]]]:
    """Yields a function from windows to their wanted rows, (n, D) per module; the model is as it was afterwards."""
    rows: dict[str, Tensor] = {}
    index: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))  # window and position of every row wanted
    shape = torch.Size()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def hook(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden = hidden_states(output)
            if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != shape:
                found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
                raise ValueError(f"layer {path!r} must give hidden states of shape {(*shape, 'D')}, it gives {found}")
            # Rows are taken here, not after the pass, because the next module may write over its input.
            rows[path] = hidden[index[0].to(hidden.device), index[1].to(hidden.device)]
            if len(rows) == len(modules):
                raise PassEnds

        return keep

    def read(batch: list[_Window]) -> dict[str, Tensor]:
        nonlocal index, shape
        rows.clear()
        longest = max(len(window.tokens) for window in batch)
        if limit is not None and longest > limit:
            raise ValueError(f"context must be at most {limit}, the positions this model has; a window has {longest}")
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)  # any id may pad, because it is masked
        mask = torch.zeros_like(tokens)
        for i, window in enumerate(batch):
            tokens[i, : len(window.tokens)] = torch.tensor(window.tokens)
            mask[i, : len(window.tokens)] = 1
        if int(tokens.max()) >= vocabulary:
            raise ValueError(f"tokenizer gives token {int(tokens.max())}, the model knows {vocabulary}")
        index = (
            torch.repeat_interleave(torch.tensor([len(window.positions) for window in batch])),
            torch.tensor([position for window in batch for position in window.positions]),
        )
        shape, place = tokens.shape, input_device(model)
        try:
            model(input_ids=tokens.to(place), attention_mask=mask.to(place), use_cache=False)
        except PassEnds:
            return dict(rows)
        missing = ", ".join(modules.keys() - rows.keys())
        raise ValueError(f"layer: {missing} took no part in the forward pass of {type(model).__name__}")

    home = _one_device(model) if device is not None else None
    training = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        if device is not None:
            model.to(device)
        model.eval()
        handles = [module.register_forward_hook(hook(path)) for path, module in modules.items()]
        # no_grad, not inference_mode: tensors that a model caches (rotary tables, ...) must remain usable in training.
        with torch.no_grad():
            yield read
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag
        if device is not None:
            model.to(home)


def _one_device(model: Any) -> torch.device:
    """Returns the device that a model is on and may be moved from; raises if it is on several, or offloaded."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        raise ValueError(
            f"device: {type(model).__name__} is on {', '.join(sorted(map(str, devices)))}, spread or offloaded, and is "
            "not moved: leave device out, and it runs where it is"
        )
    return next(iter(devices))


def _check_layers(model: Any, paths: Iterable[str]) -> None:
    """Raises for layers whose output is known not to belong to the tokens of the texts."""
    decoder = decoder_of_two(model)
    for path in paths:
        check_output(model, path)
        if decoder is not None and f"{path}.".startswith(f"{decoder}."):
            raise ValueError(
                f"layer: {path!r} is in the decoder of {type(model).__name__}, which reads texts with its encoder: "
                "name a layer of the encoder by its path, as in model.named_modules()"
            )


def _windows(texts: Any, tokenizer: Any, settings: _Settings) -> Iterator[_Window]:
    """Yields texts as windows of at most `context` tokens with at least one row to keep."""
    prefix = bos_prefix(tokenizer)
    step = settings.context - len(prefix)
    if step < 1:
        raise ValueError(f"context must be at least 2, BOS and one token, got {settings.context}")
    special = set(tokenizer.all_special_ids) if settings.drop_special else set()
    barren = 0
    for source, text in named_texts(texts, settings.seed, settings.buffer_size):
        barren += 1
        if barren > MOST_BARREN:
            raise ValueError(f"texts: {MOST_BARREN:,} in a row hold no token to keep, up to {source}")
        tokens = text_tokens(tokenizer, text, prefix)
        for start in range(0, len(tokens), step):
            window = prefix + tokens[start : start + step]
            positions = [p for p, token in enumerate(window) if p >= settings.skip_first and token not in special]
            if positions:
                barren = 0
                yield _Window(source, window, positions)


def _load(model: Any, tokenizer: Any, device: torch.device | str | None) -> tuple[Any, Any, torch.device | str | None]:
    """Returns model and tokenizer as objects, and where to move the model: None if it is in place."""
    named = isinstance(model, str | os.PathLike)
    if not named and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, or the name or folder of one, got {type(model).__name__}")
    if tokenizer is None and not named:
        raise TypeError("tokenizer must be given when model is an object")
    usable = callable(tokenizer) and hasattr(tokenizer, "decode")  # `bytes` has a decode, too
    if tokenizer is not None and not isinstance(tokenizer, str | os.PathLike) and not usable:
        raise TypeError(f"tokenizer must be one of transformers, or its name or folder, got {type(tokenizer).__name__}")
    device = device if device is None else check_device(device)
    if tokenizer is None or isinstance(tokenizer, str | os.PathLike):
        source, name = (model, "model") if tokenizer is None else (tokenizer, "tokenizer")
        tokenizer = from_pretrained("AutoTokenizer", source, name)
    if named:
        model = from_pretrained("AutoModelForCausalLM", model, "model")
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        device = None
    return model, tokenizer, device
