"""The activation store: what is written is what is read, whatever happens in between."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfa_kernels.common import locks
from mfa_kernels.common.locks import LOCK
from mfa_kernels.data import ActivationStore, ActivationStoreWriter

D = 5


def documents(lengths: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(token ids, positions, activations) per document; every third position is left out."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for length in lengths:
        positions = torch.tensor([p for p in range(length) if p % 3], dtype=torch.long)
        tokens = torch.randint(0, 1000, (length,), generator=generator)
        out.append((tokens, positions, torch.randn(len(positions), D, generator=generator)))
    return out


def write(folder: Path, docs: list[tuple[Tensor, Tensor, Tensor]], **options: object) -> ActivationStore:
    options.setdefault("rows_per_shard", 7)
    with ActivationStoreWriter(folder, D, **options) as writer:  # type: ignore[arg-type]
        for i, document in enumerate(docs):
            writer.add_document(*document, source=f"doc {i}")
    return ActivationStore(folder)


def listing(folder: Path) -> list[str]:
    """Returns the names in a folder, but for the file that writers lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


# Documents without rows, one that fills four shards alone, an end that falls on the end of a shard (49 rows = 7 x 7).
LENGTHS = [4, 0, 1, 45, 9, 1, 8, 10]


@pytest.mark.parametrize("rows_per_shard", [1, 7, 1000])
def test_windows_of_a_text_are_known(tmp_path: Path, rows_per_shard: int) -> None:
    docs = documents([6, 6, 3, 0, 9, 6, 6])
    with ActivationStoreWriter(tmp_path, D, rows_per_shard=rows_per_shard) as writer:
        for document, source in zip(docs, ["a", "a", "b", "b", "b", "", ""]):
            writer.add_document(*document, source=source)
    store = ActivationStore(tmp_path)
    rows = [len(document[1]) for document in docs]
    of_row, positions = store.places
    assert of_row.tolist() == [store.document(row) for row in range(len(store))]
    assert positions.tolist() == [store.position(row) for row in range(len(store))]
    assert store.texts.tolist() == [0] * sum(rows[:2]) + [1] * sum(rows[2:5]) + [2] * rows[5] + [3] * rows[6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_per_shard", [1, 7, 1000])
def test_roundtrip(tmp_path: Path, dtype: torch.dtype, rows_per_shard: int) -> None:
    docs = documents(LENGTHS)
    expected = torch.cat([d[2] for d in docs]).to(dtype)
    store = write(tmp_path / "s", docs, dtype=dtype, rows_per_shard=rows_per_shard, meta={"layer": "model.layers.3"})
    assert len(store) == len(expected)
    assert (store.n_features, store.dtype, store.complete, store.n_documents) == (D, dtype, True, len(docs))
    assert store.meta == {"layer": "model.layers.3"}
    assert len(store.shards) == -(-len(expected) // rows_per_shard)

    shuffled = torch.randperm(len(expected), generator=torch.Generator().manual_seed(1))
    for index in (torch.arange(len(expected)), shuffled, torch.tensor([3, 3, 0, 3]), torch.tensor([0]), shuffled[:0]):
        rows = store.rows(index)
        assert rows.dtype == dtype
        assert torch.equal(rows, expected[index])
        assert torch.equal(store.rows(index.int(), dtype=torch.float64), expected[index].double())
    assert torch.equal(store.rows([2, 1]), expected[[2, 1]])  # type: ignore[arg-type]
    assert torch.equal(store.tensor(), expected.float())

    tokens = torch.cat([d[0][d[1]] for d in docs]).int()
    assert torch.equal(store.tokens, tokens)
    row = 0
    for number, (ids, positions, _) in enumerate(docs):
        assert torch.equal(store.document_tokens(number), ids.int())
        assert store.source(number) == f"doc {number}"
        for position in positions.tolist():
            assert (store.document(row), store.position(row), store.token(row)) == (number, position, tokens[row])
            row += 1
    assert store.verify(progress=False) == []


def test_rows_do_not_alias_the_file(tmp_path: Path) -> None:
    store = write(tmp_path, documents(LENGTHS))
    before = store.tensor()
    store.rows(torch.arange(5)).zero_()
    store.document_tokens(0).zero_()
    assert torch.equal(store.tensor(), before)
    assert torch.equal(ActivationStore(tmp_path).tensor(), before)
    assert store.verify(progress=False) == []


def test_a_pickled_store_does_not_carry_the_activations(tmp_path: Path) -> None:
    store = write(tmp_path, [(torch.arange(5000), torch.arange(5000), torch.randn(5000, D))], rows_per_shard=5000)
    expected = store.tensor()
    data = pickle.dumps(store)
    assert len(data) < 10_000
    assert torch.equal(pickle.loads(data).tensor(), expected)


def test_context_ends_where_the_document_does(tmp_path: Path) -> None:
    store = write(tmp_path, [(torch.arange(100, 120), torch.tensor([0, 5, 19]), torch.zeros(3, D))])
    assert store.context(0, before=3, after=2) == ([100, 101, 102], 0)
    assert store.context(1, before=3, after=2) == ([102, 103, 104, 105, 106, 107], 3)
    assert store.context(2, before=3, after=2) == ([116, 117, 118, 119], 3)
    assert store.context(1, before=0, after=0) == ([105], 0)
    with pytest.raises(ValueError, match="before must be an integer >= 0, got -1"):
        store.context(1, before=-1)


@pytest.mark.parametrize("batch_size", [1, 8, 49, 100])
def test_batches_give_every_row_once(tmp_path: Path, batch_size: int) -> None:
    store = write(tmp_path, documents(LENGTHS), dtype=torch.bfloat16)
    everything = store.tensor()
    in_order = store.batches(batch_size)
    assert len(list(in_order)) == len(in_order)
    assert torch.equal(torch.cat(list(in_order)), everything)
    assert all(len(batch) == batch_size for batch in list(in_order)[:-1])
    first, again, other = (torch.cat(list(store.batches(batch_size, shuffle=True, seed=s))) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32
    assert torch.equal(first[first[:, 0].argsort()], everything[everything[:, 0].argsort()])


def test_batches_leave_the_global_generator_alone(tmp_path: Path) -> None:
    store = write(tmp_path, documents(LENGTHS))
    state = torch.random.get_rng_state()
    list(store.batches(4, shuffle=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_empty_store(tmp_path: Path) -> None:
    store = write(tmp_path, [])
    assert (len(store), store.n_documents, store.complete) == (0, 0, True)
    assert store.tensor().shape == (0, D)
    assert store.tokens.shape == (0,)
    assert store.rows(torch.empty(0, dtype=torch.long)).shape == (0, D)
    assert list(store.batches(4, shuffle=True)) == []
    with pytest.raises(IndexError, match=r"\[0, 0\)"):
        store.rows(torch.tensor([0]))


def test_rows_outside_or_not_integers(tmp_path: Path) -> None:
    store = write(tmp_path, documents(LENGTHS))
    for wrong in (-1, len(store)):
        with pytest.raises(IndexError, match=f"index must be .*got {wrong}"):
            store.rows(torch.tensor([0, wrong]))
        with pytest.raises(IndexError, match=f"row must be .*got {wrong}"):
            store.token(wrong)
    for wrong in (torch.tensor([0.0]), torch.zeros(len(store), dtype=torch.bool)):
        with pytest.raises(TypeError, match="index must have an integer dtype"):
            store.rows(wrong)
    with pytest.raises(ValueError, match="index must be integers of shape"):
        store.rows(torch.tensor(0))
    with pytest.raises(IndexError, match="document must be"):
        store.document_tokens(store.n_documents)
    with pytest.raises(ValueError, match="batch_size"):
        store.batches(0)


def test_an_aborted_write_opens_with_what_was_complete(tmp_path: Path) -> None:
    docs = documents([6, 30])  # 4 and 20 rows, in shards of 7

    def interrupted() -> None:
        with ActivationStoreWriter(tmp_path, D, rows_per_shard=7) as writer:
            for document in docs:
                writer.add_document(*document)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    store = ActivationStore(tmp_path)
    assert not store.complete
    assert len(store) == 21
    assert torch.equal(store.tensor(), torch.cat([d[2] for d in docs])[:21])
    assert torch.equal(store.tokens, torch.cat([d[0][d[1]] for d in docs])[:21].int())
    assert store.verify(progress=False) == []
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ActivationStoreWriter(tmp_path, D)


def test_a_writer_that_vanishes_leaves_a_store_too(tmp_path: Path) -> None:
    writer = ActivationStoreWriter(tmp_path, D, rows_per_shard=7)
    assert (len(ActivationStore(tmp_path)), ActivationStore(tmp_path).complete) == (0, False)
    writer.add_document(torch.arange(10), torch.arange(10), torch.ones(10, D))
    assert (len(ActivationStore(tmp_path)), ActivationStore(tmp_path).complete) == (7, False)


def test_a_shard_that_cannot_be_written_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    writer = ActivationStoreWriter(tmp_path, D, rows_per_shard=4)
    writer.add_document(torch.arange(4), torch.arange(4), torch.ones(4, D))

    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        writer.add_document(torch.arange(4), torch.arange(4), torch.ones(4, D))
    assert len(ActivationStore(tmp_path)) == 4
    assert listing(tmp_path) == ["activations-00000.safetensors", "manifest.json"]


def test_overwrite_replaces_a_store_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, documents(LENGTHS), rows_per_shard=3)
    (tmp_path / "notes.txt").write_text("mine")
    store = write(tmp_path, documents([7]), overwrite=True)
    assert len(store) == 4
    assert listing(tmp_path) == ["activations-00000.safetensors", "manifest.json", "notes.txt"]


def test_overwrite_leaves_a_foreign_manifest_alone(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(ValueError, match="not the manifest of a store"):
        ActivationStoreWriter(tmp_path, D, overwrite=True)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"name": "a web app"}


def test_bad_documents_are_refused_and_change_nothing(tmp_path: Path) -> None:
    with ActivationStoreWriter(tmp_path, D) as writer:
        for positions, activations, message in (
            ([0, 1], torch.zeros(1, D), r"activations must be floats of shape \(2, 5\)"),
            ([0], torch.zeros(1, D + 1), r"activations must be floats of shape \(1, 5\)"),
            ([0], torch.zeros(1, D, dtype=torch.long), "activations must have a floating-point dtype"),
            ([3], torch.zeros(1, D), r"positions must be in \[0, 3\)"),
            ([-1], torch.zeros(1, D), r"positions must be in \[0, 3\)"),
            ([0.5], torch.zeros(1, D), "positions must have an integer dtype"),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                writer.add_document([1, 2, 3], positions, activations)
        with pytest.raises(ValueError, match="token_ids must be integers"):
            writer.add_document([[1, 2]], [0], torch.zeros(1, D))
    assert (len(ActivationStore(tmp_path)), ActivationStore(tmp_path).n_documents) == (0, 0)
    with pytest.raises(ValueError, match="closed"):
        writer.add_document([1], [0], torch.zeros(1, D))


def test_bad_writers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        ActivationStoreWriter(tmp_path, D, torch.float64)
    with pytest.raises(ValueError, match="n_features must be an integer >= 1, got 0"):
        ActivationStoreWriter(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_verify_names_missing_truncated_and_corrupt_shards(tmp_path: Path) -> None:
    store = write(tmp_path, documents(LENGTHS), rows_per_shard=7)
    names = [shard["file"] for shard in store.shards]
    flipped = bytearray((tmp_path / names[1]).read_bytes())
    flipped[-1] ^= 1
    (tmp_path / names[1]).write_bytes(flipped)
    assert [problem.split(":")[0] for problem in store.verify(progress=False)] == [names[1]]
    (tmp_path / names[2]).unlink()
    (tmp_path / names[4]).write_bytes(b"short")
    problems = store.verify(progress=False)
    assert [problem.split(":")[0] for problem in problems] == [names[1], names[2], names[4]]
    assert [word in problem for word, problem in zip(("corrupt", "missing", "5 bytes"), problems)] == [True] * 3


def test_opening_what_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        ActivationStore(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        ActivationStore(tmp_path)
    manifest = tmp_path / "manifest.json"
    for content, message in (
        ('{"format": "mfa_ker', r"manifest\.json: not JSON"),
        ("[]", "not the manifest"),
        ('{"format": "other"}', "not the manifest"),
        ('{"format": "mfa_kernels.activations", "version": 99}', "format version 99"),
        ('{"format": "mfa_kernels.activations", "version": 1}', "lacks"),
    ):
        manifest.write_text(content)
        with pytest.raises(ValueError, match=message):
            ActivationStore(tmp_path)


def test_opening_names_the_shard_that_is_missing_or_cut_off(tmp_path: Path) -> None:
    store = write(tmp_path, documents(LENGTHS))
    path = tmp_path / store.shards[1]["file"]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"activations-00001\.safetensors.*truncated"):
        ActivationStore(tmp_path)
    path.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match=r"activations-00001\.safetensors: not a readable shard"):
        ActivationStore(tmp_path).tensor()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"activations-00001\.safetensors"):
        ActivationStore(tmp_path)


def test_a_shard_of_another_store_is_noticed(tmp_path: Path) -> None:
    store = write(tmp_path / "a", documents(LENGTHS), rows_per_shard=7)
    other = write(tmp_path / "b", documents(LENGTHS), rows_per_shard=7, dtype=torch.float16)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = other.shards[0]["bytes"]
    del manifest["checksum"]  # as of an earlier version
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "b" / other.shards[0]["file"]).replace(tmp_path / "a" / store.shards[0]["file"])
    with pytest.raises(ValueError, match=r"activations-00000\.safetensors: shape, dtype"):
        ActivationStore(tmp_path / "a").rows(torch.tensor([0]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("known", [False, True], ids=["from the first document", "rewound"])
@pytest.mark.parametrize("rows_per_shard", [3, 7, 1000])
def test_a_writer_goes_on_after_any_document(tmp_path: Path, rows_per_shard: int, known: bool) -> None:
    docs = documents(LENGTHS)
    write(tmp_path / "whole", docs, rows_per_shard=rows_per_shard)
    for cut in range(len(docs) + 1):
        folder = tmp_path / f"cut {cut}"
        writer = ActivationStoreWriter(folder, D, rows_per_shard=rows_per_shard)
        first, rows = 0, 0
        for i, document in enumerate(docs[:cut]):
            writer.progress = {"document": i, "rows": writer._rows}
            writer.add_document(*document, source=f"doc {i}")
        del writer
        writer = ActivationStoreWriter(folder, D, rows_per_shard=rows_per_shard, resume=True)
        if known and writer.progress:
            first, rows = writer.progress["document"], writer.progress["rows"]
            writer.rewind(first, rows)
        writer.progress = {}
        for i, document in enumerate(docs[first:], first):
            writer.add_document(*document, source=f"doc {i}")
        writer.close()
        assert contents(folder) == contents(tmp_path / "whole"), cut


def test_what_a_writer_cannot_go_on_with(tmp_path: Path) -> None:
    docs = documents(LENGTHS)
    folder = tmp_path / "s"
    writer = ActivationStoreWriter(folder, D, rows_per_shard=7, meta={"a": (1, 2)})
    for document in docs[:5]:
        writer.add_document(*document)
    on_disk = len(ActivationStore(folder))
    del writer
    for options, message in (
        ({"n_features": 6}, "n_features = 6, there 5"),
        ({"dtype": torch.float16}, "dtype = 'torch.float16', there 'torch.float32'"),
        ({"meta": {"a": (1, 3)}}, r"a = \[1, 3\], there \[1, 2\]"),
        ({"rows_per_shard": 8}, "rows_per_shard = 8, there 7"),
        ({"rows_per_shard": 6}, "rows_per_shard = 6, there 7"),
    ):
        chosen = {"n_features": D, "rows_per_shard": 7, "meta": {"a": (1, 2)}, **options}
        with pytest.raises(ValueError, match=f"resume: .* was written with other settings: here {message}"):
            ActivationStoreWriter(folder, resume=True, **chosen)
    again = ActivationStoreWriter(folder, D, rows_per_shard=7, meta={"a": (1, 2)}, resume=True)
    for documents_, rows in ((0, on_disk + 1), (-1, 0), (99, 0)):
        with pytest.raises(ValueError, match=rf"\[0, {on_disk}\], what .* holds, got {documents_} and {rows}"):
            again.rewind(documents_, rows)
    for document in docs:
        again.add_document(*document)
    again.close()
    with pytest.raises(ValueError, match="is complete"):
        ActivationStoreWriter(folder, D, rows_per_shard=7, meta={"a": (1, 2)}, resume=True)


def test_a_folder_has_one_writer_and_any_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    docs = documents(LENGTHS)
    with ActivationStoreWriter(tmp_path, D, rows_per_shard=7) as writer:
        writer.add_document(*docs[3])
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(TimeoutError, match=f"{tmp_path}: another process.* is writing to this folder"):
                ActivationStoreWriter(tmp_path, D, rows_per_shard=7, **options)
        assert torch.equal(ActivationStore(tmp_path).tensor(), docs[3][2][:28])
        assert ActivationStore(tmp_path).verify(progress=False) == []
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ActivationStoreWriter(tmp_path, D)
    with pytest.raises(ValueError, match="is complete"):
        ActivationStoreWriter(tmp_path, D, rows_per_shard=7, resume=True)
    writer = ActivationStoreWriter(tmp_path, D, overwrite=True)  # those that were refused hold nothing
    writer.close()
    assert len(write(tmp_path, docs, overwrite=True)) == sum(len(d[2]) for d in docs)


def test_of_writers_in_several_threads_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    opened, outcomes = threading.Barrier(4), []

    def work(number: int) -> None:
        try:
            writer: ActivationStoreWriter | None = ActivationStoreWriter(tmp_path, D, rows_per_shard=3, overwrite=True)
        except TimeoutError:
            writer = None
        opened.wait()  # all have tried before one ends
        if writer is not None:
            for _ in range(10):
                writer.add_document(range(4), range(4), torch.full((4, D), float(number)), source=str(number))
            writer.close()
            outcomes.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (number,) = outcomes
    store = ActivationStore(tmp_path)
    assert store.complete
    assert torch.equal(store.tensor(), torch.full((40, D), float(number)))


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_writer_whose_folder_was_taken_away_stops(tmp_path: Path, replaced: bool) -> None:
    """`rm -r` takes the lock along: the next writer makes one of its own."""
    folder = tmp_path / "s"
    writer = ActivationStoreWriter(folder, D, rows_per_shard=4)
    writer.add_document(range(6), range(6), torch.zeros(6, D))
    shutil.rmtree(folder)
    if replaced:
        write(folder, documents(LENGTHS))
    message = rf"{folder}: another process has changed or removed manifest\.json"
    with pytest.raises(RuntimeError, match=message):
        writer.add_document(range(6), range(6), torch.zeros(6, D))
    with pytest.raises(RuntimeError, match=message):
        writer.close()
    if replaced:
        assert torch.equal(ActivationStore(folder).tensor(), torch.cat([d[2] for d in documents(LENGTHS)]))
    else:
        assert not folder.exists()


def test_an_overwrite_that_is_cut_off_leaves_a_store_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, documents(LENGTHS), rows_per_shard=3)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ActivationStoreWriter(tmp_path, D, rows_per_shard=7, overwrite=True)
    assert len(listing(tmp_path)) > 10, "shards of the old store are left"
    assert (len(ActivationStore(tmp_path)), ActivationStore(tmp_path).complete) == (0, False)
    store = write(tmp_path, documents([7]), resume=True)
    assert torch.equal(store.tensor(), documents([7])[0][2])
    assert listing(tmp_path) == ["activations-00000.safetensors", "manifest.json"]


def test_without_a_manifest_shards_are_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "activations-00007.safetensors").write_text("mine")
    write(tmp_path, documents([7]), overwrite=True)
    assert (tmp_path / "activations-00007.safetensors").read_text() == "mine"


def test_a_relative_folder_is_that_of_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    (document,) = documents([9])
    with ActivationStoreWriter("store", D, rows_per_shard=2) as writer:
        monkeypatch.chdir(tmp_path / "elsewhere")
        writer.add_document(*document)
    monkeypatch.chdir(tmp_path)
    store = ActivationStore("store")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(store.tensor(), document[2])
    assert not any((tmp_path / "elsewhere").iterdir())


def test_what_is_no_store_is_named(tmp_path):
    with ActivationStoreWriter(tmp_path / "store", 2) as writer:
        with pytest.raises(TypeError, match="source must be a string, got 3"):
            writer.add_document([1], [0], torch.ones(1, 2), source=3)
        writer.add_document([1], [0], torch.ones(1, 2))
    store = ActivationStore(tmp_path / "store")
    for wrong in (None, 3, "", b"store"):
        with pytest.raises(TypeError, match="folder must be a path"):
            ActivationStore(wrong)
    with pytest.raises(TypeError, match="folder must be a path, got a store, which is open already"):
        ActivationStore(store)
    for wrong in (3, [1], {"a": torch.ones(2)}, {"a": {1}}, {"a": float("nan")}):
        with pytest.raises(TypeError, match="meta must "):
            ActivationStoreWriter(tmp_path / "other", 2, meta=wrong)
    assert not (tmp_path / "other").exists()
    for call in (store.tensor, lambda dtype: store.rows([0], dtype)):
        with pytest.raises(TypeError, match="dtype must be a floating-point torch.dtype, got 'float32'"):
            call("float32")
