"""Every kind of file that the package reads: how one is made, and what is read from it, to be compared."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from mfa_kernels import MFA, fit, fit_many
from mfa_kernels.common.processes import ALONE
from mfa_kernels.data import ActivationStore, ActivationStoreWriter, read_texts
from mfa_kernels.fitting import checkpoint, fit_sharded, preparation
from mfa_kernels.fitting.sharded_checkpoint import ShardedCheckpoints
from mfa_kernels.mixture.fit_report import FitReport
from mfa_kernels.mixture.sharded import ShardedMFA
from mfa_kernels.ops.common import configs
from tests.fitting.planted import CutOff, draw, planted
from tests.helpers.mixtures import random_mfa

ROWS = draw(planted(2, 4, 1), 240)


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        make: writes a folder with it; of another seed, with other numbers of the same shapes.
        file: its name there, once it is made.
        read: all that is read from such a folder, bit for bit.
        sealed: whether a checksum covers it: else, what can be read after a change is an edit.
        through: all that happens when the folder is used; `read` where that is all.
    """

    make: Callable[[Path, int], None]
    file: Callable[[Path], Path]
    read: Callable[[Path], Any]
    sealed: bool = True
    through: Callable[[Path], Any] | None = None

    def use(self, folder: Path) -> Any:
        return (self.through or self.read)(folder)


def bits(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (str(t.dtype), tuple(t.shape), t.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
            for name, t in sorted(tensors.items())}  # fmt: skip


def named(name: str) -> Callable[[Path], Path]:
    return lambda folder: folder / name


def with_suffix(suffix: str) -> Callable[[Path], Path]:
    return lambda folder: sorted(folder.rglob(f"*{suffix}"))[0]


# Stores


def make_store(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with ActivationStoreWriter(folder, 4, rows_per_shard=16, meta={"layer": 3, "model": "a/model"}) as writer:
        for number, length in enumerate((9, 20, 6)):
            rows = torch.randn(length - 1, 4, generator=generator)
            tokens = torch.randint(100, (length,), generator=generator)
            writer.add_document(tokens, torch.arange(1, length), rows, source=f"text {number}")


def read_store(folder: Path) -> Any:
    store = ActivationStore(folder)
    documents = [(store.source(i), store.document_tokens(i).tolist()) for i in range(store.n_documents)]
    places = [(store.document(i), store.position(i), store.context(i), store.token(i)) for i in range(len(store))]
    rows = bits({"rows": store.tensor(store.dtype), "some": store.rows(torch.arange(len(store))), "t": store.tokens})
    return store.meta, store.complete, store.progress, documents, places, rows


# Checkpoints of fits


def cut_off(work: Callable[[], Any], after: int) -> None:
    """Ends a fit after so many checkpoints."""
    whole, left = checkpoint.Checkpoints._publish, [after]

    def publish(self: Any, *args: Any) -> None:
        whole(self, *args)
        left[0] -= 1
        if not left[0]:
            raise CutOff

    with patch.object(checkpoint.Checkpoints, "_publish", publish):
        try:
            work()
        except CutOff:
            return
    raise AssertionError("the fit ended before")


OPTIONS: dict[str, Any] = {
    "rank": 1, "epochs": 2, "batch_size": 60, "progress": False, "checkpoint_seconds": 0, "eval_every": 1,
    "patience": None,
}  # fmt: skip
METHODS = {
    "sgd": lambda **options: fit(ROWS, 2, method="sgd", **OPTIONS, **options),
    "em": lambda **options: fit(ROWS, 2, method="em", **OPTIONS, **options),
    "online": lambda **options: fit(ROWS, 2, method="online", **OPTIONS, **options),
    "sharded": lambda **options: fit_sharded(ROWS, 2, method="online", **OPTIONS, **options),
}


def fitting(method: str) -> Callable[[Path, int], None]:
    def make(folder: Path, seed: int) -> None:
        cut_off(lambda: METHODS[method](checkpoint=folder, seed=seed), 3)

    return make


def fitting_many(folder: Path, seed: int) -> None:
    options = {**OPTIONS, "checkpoint": folder, "seed": seed}
    with patch.object(preparation, "LEAST_START_ROWS", 120):
        cut_off(lambda: fit_many(iter(ROWS.split(50)), {"a": {"n_components": 2}}, **options), 3)


SETTINGS: dict[tuple[str, int], Any] = {}  # of a fit that was made, for a reader to expect


def settings_of(folder: Path) -> Any:
    return json.loads((folder / checkpoint.FILE).read_text())["settings"]


def reading_state(kind: str) -> Callable[[Path], Any]:
    """The checkpoint as a fit reads it that has the settings of seed 0."""

    def read(folder: Path) -> Any:
        settings, folder = SETTINGS[kind, 0], folder / "a" if kind == "many" else folder
        if kind == "sharded":
            checkpoints: Any = ShardedCheckpoints(folder, 60, settings, 2, "shared", ALONE)
        else:
            checkpoints = checkpoint.Checkpoints(folder, 60, settings)
        state = checkpoints.load(folder)
        return state.stage, bits(state.tensors), repr(state.values), repr(state.report)

    return read


def going_on(method: str) -> Callable[[Path], Any]:
    """Returns the result of the fit."""

    def read(folder: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mfa = METHODS[method](resume=folder, seed=0)
        report = asdict(mfa.fit_report)
        for record in report["history"]:
            for name in ("seconds", "tokens_per_second", "memory"):
                record.pop(name, None)
        return bits(mfa.state_dict()), {**report, "seconds": None, "run": {**report["run"], "began": None}}

    return read


# Mixtures


def some_mixture(seed: int) -> MFA:
    mfa = random_mfa(3, 6, 2, noise_floor=0.25)
    with torch.no_grad():
        mfa.means += torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    mfa.extra = {"layer": 8}
    mfa.fit_report = FitReport(
        [{"step": 0, "epoch": 0, "train_nll": None, "seconds": 0.5}, {"step": 3, "train_nll": float("inf")}], "em", 3,
        1.5, 20, seconds={"em": 0.5}, prior_strength=3.0, held_out_by="row",
        run={
            "began": "2026-02-03T04:05:06Z", "settings": {"seed": seed, "method_asked": "auto"},
            "data": {"rows": 30, "n_features": 6, "fingerprint": "abc", "model": "a/model", "streamed": False},
            "versions": {"torch": "2.9"}, "machine": {"device": "cpu", "name": "A", "processes": 1, "threads": 2},
        },
    )  # fmt: skip
    return mfa


def make_mixture(folder: Path, seed: int) -> None:
    some_mixture(seed).save_pretrained(folder)


def read_mixture(folder: Path, load: Any = MFA.from_pretrained) -> Any:
    mfa = load(folder)
    report = mfa.fit_report  # what it says of the fit, and how it is printed
    facts = (
        mfa.noise,
        mfa.precision,
        mfa.noise_floor,
        mfa.extra,
        repr(report),
        report and f"{report}{report.held_out()}",
    )
    return facts, bits(mfa.tensors())


def read_spread_mixture(folder: Path) -> Any:
    def load(folder: Path) -> MFA:
        mfa = ShardedMFA.from_pretrained(folder)
        mfa.local.fit_report = mfa.fit_report
        return mfa.local

    return read_mixture(folder, load)


def make_reference(folder: Path, seed: int) -> None:
    some_mixture(seed).to_reference_checkpoint(folder / "mfa.pt", progress=False)


def make_old_reference(folder: Path, seed: int) -> None:
    """Writes it as torch before 1.6 did: without checksums."""
    make_reference(folder, seed)
    content = torch.load(folder / "mfa.pt", weights_only=True)
    torch.save(content, folder / "mfa.pt", _use_new_zipfile_serialization=False)


def read_reference(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_mixture(folder, lambda folder: MFA.from_reference_checkpoint(folder / "mfa.pt"))


# Others


def make_tuned(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"pairs": 16 << seed % 2, "features": 64, "warps": 4, "stages": 2}
    (folder / "a_gpu.json").write_text(json.dumps({"pairs/8/8": values, "gradient/16/8": values}))


def make_texts(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.json").write_text(json.dumps([{"text": f"one {seed}"}, "two", {"text": "three", "id": 3}]))


FITS = {
    name: (fitting_many if name == "many" else fitting(name), reading_state(name), name != "many" and going_on(name))
    for name in (*METHODS, "many")
}
KINDS: dict[str, Kind] = {
    "manifest": Kind(make_store, named("manifest.json"), read_store),
    "shard": Kind(make_store, named("activations-00000.safetensors"), read_store),
    **{
        f"{name} {what}": Kind(make, with_suffix(suffix), read, True, through or None)
        for name, (make, read, through) in FITS.items()
        for what, suffix in (("checkpoint", ".json"), ("state", ".safetensors"))
    },
    "config": Kind(make_mixture, named("config.json"), read_mixture, sealed=False),
    "weights": Kind(make_mixture, named("model.safetensors"), read_mixture),
    "weights, spread": Kind(make_mixture, named("model.safetensors"), read_spread_mixture),
    "reference": Kind(make_reference, named("mfa.pt"), read_reference),
    "old reference": Kind(make_old_reference, named("mfa.pt"), read_reference, sealed=False),
    "tuned": Kind(make_tuned, named("a_gpu.json"), lambda folder: configs.read(folder / "a_gpu.json"), sealed=False),
    "texts": Kind(
        make_texts, named("texts.json"), lambda folder: list(read_texts(folder / "texts.json")), sealed=False
    ),
}


def outcome(work: Callable[[], Any], folder: Path) -> tuple[str, Any]:
    """Returns "read" and the result, "refused" and the error that names a file, "unnamed", or "crashed"."""
    try:
        return "read", work()
    except (ValueError, OSError) as error:
        names = [path.name for path in folder.rglob("*") if not path.is_dir()]
        told = any(name in str(error) for name in names) or str(folder) in str(error)
        return "refused" if told else "unnamed", f"{type(error).__name__}: {error}"
    except Exception as error:  # what the tests are there to find
        return "crashed", f"{type(error).__name__}: {error}"
