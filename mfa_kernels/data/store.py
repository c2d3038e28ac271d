"""Activations on disk: safetensors shards that are read by row, with the tokens that they came from.

A store is a folder:

    manifest.json                    format, features, dtype, meta, and for each shard its file, rows, bytes and sha256;
                                     a checksum of all this
    activations-00000.safetensors    activations (n, D); document (n,) and position (n,) int32, of each row;
                                     tokens (T,) and lengths (d,) int32, of the documents that begin in this shard;
                                     in its header, `sources`: the origin of each of these, as a JSON list

A document is a stretch of tokens that the model read at once. Its rows may run over into the next shard; its tokens are
in the shard where it begins. Shards are whole before the manifest names them, so an aborted write leaves a store that
opens and that a writer can resume; until the store is complete, `progress` in the manifest says from where.

There is one writer at a time: it holds a lock on the folder (an empty file `.lock`), which ends with its process.
Readers need no lock.

A read returns what was written, or raises: a manifest is compared with its checksum when a store is opened (those of
earlier versions have none), a shard with the manifest when it is first read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mfa_kernels.common import checksum
from mfa_kernels.common.checks import (
    check_component,
    check_dtype,
    check_flag,
    check_floats,
    check_integer,
    check_integers,
    check_path,
    check_tensor,
    check_text,
)
from mfa_kernels.common.files import StrPath, atomic_save_safetensors, atomic_write_json, sweep
from mfa_kernels.common.locks import hold
from mfa_kernels.common.modes import door, made
from mfa_kernels.common.places import STORE, check_place
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.common.reading import (
    COUNT,
    FLAG,
    OBJECT,
    SHA256,
    TEXT,
    check_fields,
    check_file,
    choice,
    every,
    integer,
    member,
    naming,
    opened,
    parse_json,
    read_json,
    shown,
)
from mfa_kernels.common.sharing import shareable

FORMAT = "mfa_kernels.activations"
VERSION = 1
MANIFEST = "manifest.json"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FIELDS = {
    "n_features": integer(1), "dtype": choice(*_DTYPES), "complete": FLAG, "meta": OBJECT, "shards": every(OBJECT),
}  # fmt: skip
_SHARD_FIELDS = {"file": TEXT, "rows": COUNT, "documents": COUNT, "bytes": COUNT, "sha256": SHA256}
_SHARD = r"activations-\d{5,}\.safetensors"
_NAMES = rf"{_SHARD}|manifest\.json"
# Names of files that a killed process of an earlier version has left; the second is that of safetensors.
_TEMPORARY = re.compile(r"\.(activations-\d+\.safetensors|manifest\.json)\.\w+\.tmp|\.tmp\w+")


class _Shard(NamedTuple):
    """One shard's tensors, mapped from its file: nothing is read before it is used."""

    activations: Tensor
    document: Tensor
    position: Tensor
    tokens: Tensor
    ends: Tensor  # (d,) int64, where each of its documents ends in `tokens`
    sources: list[str]


class ActivationStore:
    """Activations on disk, read by row.

    It follows the protocol that `mfa_kernels.fit` takes: `len()`, `n_features` and `rows(index)`. Row numbers are in
    [0, n); the rows of a document follow one another.

    Args:
        folder: a folder that `ActivationStoreWriter` or `harvest` wrote.

    Attributes:
        folder: its path.
        n_features: D.
        dtype: the dtype of the activations on disk.
        meta: facts that the writer was given: model, layer, tokenizer, ...
        complete: False where the writer did not come to its end.
        progress: the note of the writer with its last shard, in a store that is not complete.
        n_documents: the number of documents.

    Raises:
        FileNotFoundError: naming the manifest or shard that is missing.
        ValueError: naming the file that is not what the manifest says, or that this version cannot read; for the
            content of a shard, once it is read.
    """

    @door
    def __init__(self, folder: StrPath):
        self.folder = _folder(folder).absolute()  # wherever the process goes meanwhile
        manifest = _read_manifest(self.folder)
        self.n_features: int = manifest["n_features"]
        self.dtype: torch.dtype = _DTYPES[manifest["dtype"]]
        self.meta: dict[str, Any] = manifest["meta"]
        self.complete: bool = manifest["complete"]
        self.progress: dict[str, Any] = manifest.get("progress", {})
        self.shards: list[dict[str, Any]] = manifest["shards"]
        for shard in self.shards:
            path = member(self.folder, shard["file"], self.folder / MANIFEST)
            check_file(path, f"{path}: this shard is in the manifest, but not in the folder")
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(f"{path}: {path.stat().st_size} bytes found, {shard['bytes']} expected: truncated?")
        self._row_ends = np.cumsum([shard["rows"] for shard in self.shards], dtype=np.int64)
        self._document_ends = np.cumsum([shard["documents"] for shard in self.shards], dtype=np.int64)
        self.n_documents = int(self._document_ends[-1]) if self.shards else 0
        self._open: dict[int, _Shard] = {}
        self._sound: dict[int, tuple[int, ...]] = {}  # shards that were compared with the manifest, as they were then

    def __len__(self) -> int:
        return int(self._row_ends[-1]) if self.shards else 0

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        state = "" if self.complete else ", incomplete"
        return f"ActivationStore({str(self.folder)!r}: {len(self)} rows x {self.n_features} {dtype}{state})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # another process maps the files itself

    @door
    def rows(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the activations of some rows, (n, D), on the CPU, in the order of `index`.

        Args:
            index: (n,) integers in [0, len(self)), in any order, repeated or not.
            dtype: the dtype of the result; None: the store's own.

        Raises:
            IndexError, TypeError, ValueError: naming the argument, or the shard that is damaged.
        """
        index = _integers(index, "index")
        out = torch.empty(index.numel(), self.n_features, dtype=self.dtype if dtype is None else check_dtype(dtype))
        if not index.numel():
            return out
        # In sorted order, the rows of a shard are a slice, and the pages of its file are visited in order.
        in_order = bool((index[1:] >= index[:-1]).all())
        index, order = (index, None) if in_order else index.sort()
        if index[0] < 0 or index[-1] >= len(self):
            wrong = index[0] if index[0] < 0 else index[-1]
            raise IndexError(f"index must be in [0, {len(self)}), got {int(wrong)}")
        stops = np.searchsorted(index.numpy(), self._row_ends).tolist()
        self._open_all(i for i, (start, stop) in enumerate(zip([0, *stops], stops)) if stop > start)
        start = 0
        for i, stop in enumerate(stops):
            if stop > start:
                local = index[start:stop] - self._first_row(i)
                place = slice(start, stop) if order is None else order[start:stop]
                out[place] = self._shard(i).activations.index_select(0, local).to(out.dtype)
            start = stop
        return out

    @door
    def tensor(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns all the activations, (len(self), D), in memory."""
        check_dtype(dtype)
        self._open_all(range(len(self.shards)))
        out = torch.empty(len(self), self.n_features, dtype=dtype)
        for i in range(len(self.shards)):
            out[self._first_row(i) : self._row_ends[i]] = self._shard(i).activations
        return out

    def batches(
        self, batch_size: int, shuffle: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Batches:
        """Returns an iterable with a length that gives every row once, in batches (B, D); the last may be smaller.

        Args:
            batch_size: B.
            shuffle: True for a random order over the whole store (8 bytes of memory per row), False for the stored one.
            seed: seed of that order; iterating again gives the same batches, so give each epoch a seed of its own.
            dtype: the dtype of the batches; None: the store's own.
        """
        batch_size, seed = check_integer(batch_size, "batch_size", 1), check_integer(seed, "seed")
        return Batches(self, batch_size, check_flag(shuffle, "shuffle"), seed, check_dtype(dtype))

    @property
    @door
    def tokens(self) -> Tensor:
        """Returns the token id of every row, (len(self),) int32."""
        self._open_all(range(len(self.shards)))
        parts = []
        for i in range(len(self.shards)):
            document, position = self._shard(i).document.long(), self._shard(i).position.long()
            token = torch.empty(len(document), dtype=torch.int32)
            # The first rows of a shard may belong to a document that begins in an earlier one.
            owners = np.searchsorted(self._document_ends, document.numpy(), side="right")
            for owner in np.unique(owners).tolist():
                mine = torch.from_numpy(owners == owner)
                shard = self._shard(owner)
                starts = torch.nn.functional.pad(shard.ends, (1, 0))
                number = document[mine] - self._first_document(owner)
                self._check_positions(i, position[mine], starts.diff()[number])
                token[mine] = shard.tokens[starts[number] + position[mine]]
            parts.append(token)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)

    @property
    def texts(self) -> Tensor:
        """Returns the number of the text of every row, (len(self),) int64.

        Successive documents of the same source are windows of one text.
        """
        self._open_all(range(len(self.shards)))
        shards = [self._shard(i) for i in range(len(self.shards))]
        sources = [source for shard in shards for source in shard.sources]
        begins = [0] + [not source or source != before for before, source in pairwise(sources)]
        text = torch.tensor(begins, dtype=torch.int64).cumsum(0)
        return text[torch.cat([torch.empty(0, dtype=torch.int64), *(shard.document.long() for shard in shards)])]

    @property
    @door
    def places(self) -> tuple[Tensor, Tensor]:
        """Returns `document` and `position` of every row, each (len(self),) int64."""
        self._open_all(range(len(self.shards)))
        nothing = [torch.empty(0, dtype=torch.int64)]
        shards = [self._shard(i) for i in range(len(self.shards))]
        documents = torch.cat(nothing + [shard.document.long() for shard in shards])
        positions = torch.cat(nothing + [shard.position.long() for shard in shards])
        lengths = torch.cat(nothing + [torch.nn.functional.pad(shard.ends, (1, 0)).diff() for shard in shards])
        if not bool(((positions >= 0) & (positions < lengths[documents])).all()):
            raise ValueError(f"{self.folder}: rows stand beyond the end of their documents")
        return documents, positions

    def document(self, row: int) -> int:
        """Returns the number of a row's document, in [0, n_documents)."""
        i, local = self._locate(row)
        return int(self._shard(i).document[local])

    def position(self, row: int) -> int:
        """Returns the position of a row's token in its document; the model made the row from tokens [0, position]."""
        i, local = self._locate(row)
        return int(self._shard(i).position[local])

    def source(self, document: int) -> str:
        """Returns the origin of a document, such as the name of a file."""
        i, local = self._locate_document(document)
        return self._shard(i).sources[local]

    def document_tokens(self, document: int) -> Tensor:
        """Returns all the token ids of a document, (length,) int32, also those whose rows were not kept."""
        i, local = self._locate_document(document)
        shard = self._shard(i)
        return shard.tokens[int(shard.ends[local - 1]) if local else 0 : int(shard.ends[local])].clone()

    def token(self, row: int) -> int:
        """Returns the token id at a row."""
        return int(self._tokens_of(row)[0][self.position(row)])

    def context(self, row: int, before: int = 10, after: int = 10) -> tuple[list[int], int]:
        """Returns the tokens around a row, as far as its document reaches.

        Returns:
            At most before + 1 + after token ids, and the index of the row's own token among them.
        """
        before, after = check_integer(before, "before"), check_integer(after, "after")
        tokens, position = self._tokens_of(row)
        start = max(0, position - before)
        return tokens[start : position + after + 1].tolist(), position - start

    def verify(self, progress: bool = True) -> list[str]:
        """Reads every shard and compares its size and checksum with the manifest.

        Returns:
            One line per shard that is missing or corrupt, beginning with its name; an empty list when all are sound.
        """
        problems = []
        total = sum(shard["bytes"] for shard in self.shards)
        with progress_bar(total=total, desc="verify", unit="B", unit_scale=True, progress=progress) as bar:
            for shard in self.shards:
                name, path = shard["file"], self.folder / shard["file"]
                if not path.is_file():
                    problems.append(f"{name}: missing")
                elif path.stat().st_size != shard["bytes"]:
                    problems.append(f"{name}: {path.stat().st_size} bytes, {shard['bytes']} expected")
                elif checksum.of_file(path) != shard["sha256"]:
                    problems.append(f"{name}: corrupt, its sha256 is not the one in {MANIFEST}")
                bar.update(shard["bytes"])
        return problems

    @door
    def _tokens_of(self, row: int) -> tuple[Tensor, int]:
        """Returns the token ids of a row's document, and the index of the row's own."""
        tokens, position = self.document_tokens(self.document(row)), self.position(row)
        self._check_positions(self._locate(row)[0], torch.tensor(position), torch.tensor(len(tokens)))
        return tokens, position

    def _check_positions(self, shard: int, positions: Tensor, lengths: Tensor) -> None:
        """Raises ValueError where positions of a shard's rows are outside of their documents."""
        if not bool(((positions >= 0) & (positions < lengths)).all()):
            raise ValueError(
                f"{self.folder / self.shards[shard]['file']}: rows stand beyond the end of their documents"
            )

    def _first_row(self, shard: int) -> int:
        return int(self._row_ends[shard]) - self.shards[shard]["rows"]

    def _first_document(self, shard: int) -> int:
        return int(self._document_ends[shard]) - self.shards[shard]["documents"]

    def _locate(self, row: int) -> tuple[int, int]:
        """Returns a row's shard, and its number there."""
        row = check_component(row, len(self), "row")
        i = int(np.searchsorted(self._row_ends, row, side="right"))
        return i, row - self._first_row(i)

    def _locate_document(self, document: int) -> tuple[int, int]:
        """Returns the shard where a document begins, and its number there."""
        document = check_component(document, self.n_documents, "document")
        i = int(np.searchsorted(self._document_ends, document, side="right"))
        return i, document - self._first_document(i)

    def _shard(self, i: int) -> _Shard:
        if i not in self._open:
            self._open[i] = self._map(i)
        return self._open[i]

    def _open_all(self, shards: Iterable[int]) -> None:
        """Opens shards in parallel, because each is read as a whole then."""
        new = [i for i in shards if i not in self._open]
        if len(new) > 1:
            checksum.threaded(self._shard, new)

    def _map(self, i: int) -> _Shard:
        entry = self.shards[i]
        path = self.folder / entry["file"]
        with opened(path, ": not a readable shard") as file:
            # On the CPU these are views of the mapped file.
            tensors = {name: file.get_tensor(name) for name in (*_Shard._fields[:4], "lengths")}
            strings = file.metadata() or {}
        found = (tuple(tensors["activations"].shape), tensors["activations"].dtype, tuple(tensors["lengths"].shape))
        expected = ((entry["rows"], self.n_features), self.dtype, (entry["documents"],))
        if found != expected:
            raise ValueError(f"{path}: shape, dtype and documents are {found}, the manifest says {expected}")
        self._verify(i, path)
        with naming(path, "a shard of activations"):
            sources = parse_json(strings["sources"], path, ": its sources are not JSON")
            ends = _checked_ends(tensors, sources, path)
            document, first, after = tensors["document"], self._first_document(i), int(self._document_ends[i])
            if len(document):
                low, high = map(int, document.aminmax())
                if low < 0 or high >= after:
                    raise ValueError(f"{path}: documents are from {low} to {high}, expected from 0 to {after - 1}")
                here = document.long() - first
                own = here >= 0
                self._check_positions(i, tensors["position"][own], tensors["lengths"][here[own]])
        del tensors["lengths"]
        return _Shard(**tensors, ends=ends, sources=sources)

    def _verify(self, i: int, path: Path) -> None:
        """Compares a shard with the manifest, unless this store has done so, here or where it was pickled."""
        status = path.stat()
        state = (status.st_size, status.st_mtime_ns, status.st_ino)
        if self._sound.get(i) != state:
            found, expected = checksum.of_file(path), self.shards[i]["sha256"]
            if found != expected:
                raise ValueError(
                    f"{path}: corrupt, its sha256 is {found[:16]}..., the one in {MANIFEST} is {expected[:16]}..."
                )
            self._sound[i] = state


def _checked_ends(tensors: dict[str, Tensor], sources: Any, path: Path) -> Tensor:
    """Returns the ends of a shard's documents in its tokens, (d,) int64; raises ValueError if its parts do not fit."""
    lengths, rows = tensors["lengths"], len(tensors["activations"])
    for name, size in (("document", rows), ("position", rows), ("tokens", None), ("lengths", len(lengths))):
        tensor = tensors[name]
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or size not in (None, len(tensor)):
            raise ValueError(
                f"{path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected torch.int32 of shape "
                f"({'T' if size is None else size},)"
            )
    ends = lengths.long().cumsum(0)
    if (len(lengths) and int(lengths.min()) < 0) or (int(ends[-1]) if len(ends) else 0) != len(tensors["tokens"]):
        raise ValueError(f"{path}: the lengths of its documents do not sum to its {len(tensors['tokens'])} tokens")
    if not every(TEXT, len(lengths)).holds(sources):
        raise ValueError(f"{path}: sources must be {len(lengths)} strings, got {shown(sources)}")
    return ends


class Batches:
    """An iterable of batches, for any number of passes; `len()` is their number."""

    def __init__(self, store: ActivationStore, batch_size: int, shuffle: bool, seed: int, dtype: torch.dtype):
        self.store, self.batch_size, self.shuffle, self.seed, self.dtype = store, batch_size, shuffle, seed, dtype

    def __len__(self) -> int:
        return -(-len(self.store) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return made(self._in_order())

    def _in_order(self) -> Iterator[Tensor]:
        n = len(self.store)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed)) if self.shuffle else None
        for start in range(0, n, self.batch_size):
            stop = min(n, start + self.batch_size)
            yield self.store.rows(torch.arange(start, stop) if order is None else order[start:stop], self.dtype)


class ActivationStoreWriter:
    """Writes an `ActivationStore`, document by document.

    As a context manager it closes the store at the end of the block; when the block raises, the rows that do not fill
    a shard yet are lost and the store stays `complete: False`.

    It holds the folder against other writers until it is closed, its block ends, or the object does. What writers that
    were killed have left in the folder is removed.

    Args:
        folder: made if it is missing.
        n_features: D.
        dtype: the dtype on disk: float32, float16 or bfloat16.
        meta: a dict that JSON can hold, kept in the manifest; may be added to until the store is closed.
        rows_per_shard: rows in each shard but the last; one shard is held in memory while it fills.
        overwrite: replace a store that is already in the folder.
        resume: resume a store in the folder that was cut off. Add the same documents again, from the first or from the
            one that `rewind` names; those on disk are not written again, so that the store becomes the one that it
            would have been. Its shards are read, to find corrupt ones first.

    Attributes:
        progress: a value that JSON can hold, kept in the manifest with each shard until the store is complete; after
            `resume`, its value with the last shard.

    Raises:
        FileExistsError: when the folder holds a store, and neither `overwrite` nor `resume`.
        FileNotFoundError, ValueError: naming the missing or corrupt shards of a store to resume, or the settings of it
            that differ from the arguments.
        TimeoutError: naming the folder that another writer holds.
        RuntimeError: from a method, naming the folder, if another program has written there without the lock.
    """

    @door
    def __init__(
        self,
        folder: StrPath,
        n_features: int,
        dtype: torch.dtype = torch.float32,
        meta: dict[str, Any] | None = None,
        rows_per_shard: int = 65536,
        overwrite: bool = False,
        resume: bool = False,
    ):
        n_features = check_integer(n_features, "n_features", 1)
        rows_per_shard = check_integer(rows_per_shard, "rows_per_shard", 1)
        overwrite, resume = check_flag(overwrite, "overwrite"), check_flag(resume, "resume")
        if dtype not in _DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES.values()))}, got {dtype!r}")
        self.folder = _folder(folder).absolute()  # wherever the process goes meanwhile
        self.n_features, self.dtype, self.meta = n_features, dtype, _checked_meta(meta)
        self.rows_per_shard = rows_per_shard
        self._shards: list[dict[str, Any]] = []
        self.progress: dict[str, Any] = {}
        self._activations = torch.empty(rows_per_shard, n_features, dtype=dtype)
        self._rows_of = torch.empty(2, rows_per_shard, dtype=torch.int32)  # document and position of each row
        self._tokens: list[Tensor] = []
        self._sources: list[str] = []
        self._filled = 0
        self._rows = self._documents = 0  # added
        self._closed = False
        self._lock = hold(self.folder)
        try:
            self._begin(overwrite, resume)
        except BaseException:
            self._lock.release()
            raise
        self._rows_on_disk = sum(shard["rows"] for shard in self._shards)
        self._documents_on_disk = sum(shard["documents"] for shard in self._shards)

    def _begin(self, overwrite: bool, resume: bool) -> None:
        """Takes the folder over: resumes its store or begins one, and removes shards that are not in the manifest."""
        if resume and (self.folder / MANIFEST).exists():
            self._take_over()
        else:
            refuse_existing(self.folder, overwrite)
        self._manifest = self._seen()
        # The manifest comes first: files that it does not name are no part of the store, whenever this is cut off.
        known = self._manifest is not None
        self._write_manifest(complete=False)
        names = {shard["file"] for shard in self._shards}
        for path in self.folder.iterdir() if known else ():  # without a manifest, shards may belong to another program
            left = re.fullmatch(_SHARD, path.name) and path.name not in names
            if (left or _TEMPORARY.fullmatch(path.name)) and not path.is_dir():
                path.unlink()
        sweep(self.folder, _NAMES)

    def rewind(self, documents: int, rows: int) -> None:
        """Sets the document that is added next, and the number of rows before it; both at most those on disk."""
        if not 0 <= documents <= self._documents_on_disk or not 0 <= rows <= self._rows_on_disk:
            raise ValueError(
                f"documents and rows must be in [0, {self._documents_on_disk}] and [0, {self._rows_on_disk}], what "
                f"{self.folder} holds, got {documents} and {rows}"
            )
        self._documents, self._rows = documents, rows

    @door
    def add_document(self, token_ids: Any, positions: Any, activations: Tensor, source: str = "") -> None:
        """Adds one document and the rows that are kept of it.

        Args:
            token_ids: (length,) integers, all that the model read.
            positions: (n,) integers in [0, length), the token of each row.
            activations: (n, D), any float dtype and device; n may be 0.
            source: the origin of the document, such as the name of a file.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
            RuntimeError: another program has written to the folder.
        """
        if self._closed:
            raise ValueError(f"{self.folder}: this store is closed")
        check_text(source, "source")
        tokens = _integers(token_ids, "token_ids")
        places = _integers(positions, "positions")
        activations = check_floats(activations, "activations")
        if activations.is_meta:
            raise ValueError("activations must hold values, got a tensor on the meta device")
        if activations.shape != (len(places), self.n_features):
            raise ValueError(
                f"activations must be floats of shape ({len(places)}, {self.n_features}), one row per position, "
                f"got {activations.dtype} of shape {tuple(activations.shape)}"
            )
        if len(places) and (int(places.min()) < 0 or int(places.max()) >= len(tokens)):
            raise ValueError(
                f"positions must be in [0, {len(tokens)}), got values from {int(places.min())} to {int(places.max())}"
            )
        if self._documents >= self._documents_on_disk:
            self._tokens.append(tokens.int())
            self._sources.append(source)
        start = max(0, self._rows_on_disk - self._rows)
        while start < len(places):
            stop = min(len(places), start + self.rows_per_shard - self._filled)
            filling = slice(self._filled, self._filled + stop - start)
            self._activations[filling] = activations[start:stop].detach().to("cpu", self.dtype)
            self._rows_of[0, filling] = self._documents
            self._rows_of[1, filling] = places[start:stop]
            self._filled += stop - start
            start = stop
            if self._filled == self.rows_per_shard:
                self._flush()
        self._documents += 1
        self._rows += len(places)

    @door
    def close(self) -> None:
        """Writes the rest, and a manifest that says that the store is complete."""
        if self._closed:
            return
        if self._filled or self._tokens:
            self._flush()
        self._write_manifest(complete=True)
        self._closed = True
        self._lock.release()

    def __enter__(self) -> ActivationStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._closed = True
            self._lock.release()

    def _take_over(self) -> None:
        """Resumes the store in the folder."""
        store = ActivationStore(self.folder)
        different = differences(store, self.dtype, self.meta)
        if store.n_features != self.n_features:
            different.append(f"n_features = {self.n_features}, there {store.n_features}")
        sizes = [shard["rows"] for shard in store.shards]
        if any(size != self.rows_per_shard for size in sizes[:-1]) or max(sizes, default=0) > self.rows_per_shard:
            different.append(f"rows_per_shard = {self.rows_per_shard}, there {sizes[0]}")
        if different:
            raise ValueError(f"resume: {self.folder} was written with other settings: here {'; '.join(different)}")
        if store.complete:
            raise ValueError(f"resume: {self.folder} is complete")
        problems = store.verify(progress=False)
        if problems:
            raise ValueError(f"resume: {self.folder} cannot go on: {'; '.join(problems)}")
        self._shards, self.progress = store.shards, store.progress

    def _seen(self) -> bytes | None:
        """Returns the manifest on disk, or None."""
        try:
            return (self.folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            return None

    def _check_alone(self) -> None:
        """Raises RuntimeError if the manifest is not as this writer left it, so that no two stores are mixed.

        A lock may have been removed with its folder, or hold on one machine only, as on some network file systems.
        """
        if self._seen() != self._manifest:
            raise RuntimeError(
                f"{self.folder}: another process has changed or removed {MANIFEST}, though this folder is locked; "
                "nothing more is written to it"
            )

    def _flush(self) -> None:
        name = f"activations-{len(self._shards):05d}.safetensors"
        path = self.folder / name
        tensors = {
            "activations": self._activations[: self._filled],
            "document": self._rows_of[0, : self._filled],
            "position": self._rows_of[1, : self._filled],
            "tokens": torch.cat(self._tokens) if self._tokens else torch.empty(0, dtype=torch.int32),
            "lengths": torch.tensor([len(tokens) for tokens in self._tokens], dtype=torch.int32),
        }
        self._check_alone()
        atomic_save_safetensors(tensors, path, {"sources": json.dumps(self._sources)})
        size, digest = path.stat().st_size, checksum.of_file(path)
        self._shards.append(
            {"file": name, "rows": self._filled, "documents": len(self._tokens), "bytes": size, "sha256": digest}
        )
        self._tokens, self._sources, self._filled = [], [], 0
        self._write_manifest(complete=False)

    def _write_manifest(self, complete: bool) -> None:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "n_features": self.n_features,
            "dtype": str(self.dtype).removeprefix("torch."),
            "rows": sum(shard["rows"] for shard in self._shards),
            "documents": sum(shard["documents"] for shard in self._shards),
            "complete": complete,
            "meta": self.meta,
            "shards": self._shards,
        }
        if not complete:
            manifest["progress"] = self.progress
        self._check_alone()
        atomic_write_json(self.folder / MANIFEST, checksum.sealed(manifest))
        self._manifest = self._seen()


def _folder(value: Any) -> Path:
    if isinstance(value, ActivationStore):
        raise TypeError(f"folder must be a path, got a store, which is open already: {value!r}")
    return check_path(value, "folder")


def _checked_meta(meta: Any) -> dict[str, Any]:
    """Returns a copy of a value for the manifest; raises where JSON cannot hold it."""
    if meta is not None and not isinstance(meta, Mapping):
        raise TypeError(f"meta must be a dict, got {type(meta).__name__}")
    try:
        json.dumps(dict(meta or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta must hold only what JSON can: {error}") from None
    return dict(meta or {})


def refuse_existing(folder: Path, overwrite: bool, name: str = "folder") -> None:
    """Raises FileExistsError where a folder holds a store, unless `overwrite`, or another thing of ours.

    Raises:
        ValueError: a manifest.json there is not of a store.
    """
    if (folder / MANIFEST).exists():
        if not overwrite:
            raise FileExistsError(f"{folder} already holds {MANIFEST}: give another folder, or overwrite=True")
        _read_manifest(folder)  # raises where the manifest is not of a store
    check_place(folder, STORE, name)


def differences(store: ActivationStore, dtype: torch.dtype, meta: dict[str, Any]) -> list[str]:
    """Returns one line for each setting of a store that is not as wanted."""
    wanted = {"dtype": str(dtype), **json.loads(json.dumps(meta))}  # a tuple, say, comes back as a list
    found = {"dtype": str(store.dtype), **store.meta}
    # Stores of earlier versions have paths of models in place of names, and no fingerprints.
    found |= {k: shareable(found[k]) for k in ("model", "tokenizer") if isinstance(found.get(k), str)}
    for name in ("model_fingerprint", "weights_fingerprint"):
        if name not in found:
            wanted.pop(name, None)
    return [f"{k} = {v!r}, there {found.get(k)!r}" for k, v in wanted.items() if found.get(k) != v]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    check_file(path, f"{path}: not found, so {folder} is no store of activations")
    manifest = read_json(path, says=": not JSON")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: not the manifest of a store of activations (its format is not {FORMAT!r})")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path}: format version {shown(manifest.get('version'))}, this library reads version {VERSION}"
        )
    check_fields(manifest, _FIELDS, str(path))
    checksum.check_json(manifest, path)
    check_fields(manifest, {"progress": OBJECT}, str(path), needed=False)
    for i, shard in enumerate(manifest["shards"]):
        check_fields(shard, _SHARD_FIELDS, f"{path}: shards[{i}]")
    names = [shard["file"] for shard in manifest["shards"]]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: names a shard twice")
    for key in ("rows", "documents"):
        total = sum(shard[key] for shard in manifest["shards"])
        if not COUNT.holds(total) or manifest.get(key, total) != total:
            raise ValueError(f"{path}: {key} is {shown(manifest.get(key))}, its shards have {total}")
    return manifest


def _integers(values: Any, name: str) -> Tensor:
    """Returns `values` as int64 (n,) on the CPU; raises otherwise."""
    tensor = check_tensor(values, name)
    if tensor.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")
    tensor = tensor.detach().cpu()
    if tensor.dim() != 1:
        raise ValueError(f"{name} must be integers of shape (n,), got {tensor.dtype} of shape {tuple(tensor.shape)}")
    return check_integers(tensor, name).long() if tensor.numel() else tensor.long()
