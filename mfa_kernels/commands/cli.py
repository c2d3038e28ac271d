"""The command line, mfa-kernels: demo, doctor, tune, harvest, fit, encode, evaluate, localize, explore, report, ..."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mfa_kernels
from mfa_kernels.commands.options import parser
from mfa_kernels.common import places
from mfa_kernels.common.files import check_writable
from mfa_kernels.common.progress import quiet
from mfa_kernels.common.sharing import local_name, shareable
from mfa_kernels.common.wording import of_error, told_warnings

# Imports above are quick, because only `main` can answer Ctrl-C in one line; slow ones are in functions.
if TYPE_CHECKING:
    import torch

    from mfa_kernels import MFA
    from mfa_kernels.data import ActivationStore
    from mfa_kernels.fitting import FitReport


INTERRUPTED = 130
"""The exit status after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; errors of the user are one line, without a traceback."""
    arguments = argparse.Namespace(command="", options={})
    name = "mfa-kernels"
    with _interruptions() as interruptions:
        try:
            parser().parse_args(argv, arguments)
            name = f"{name} {arguments.command}"
            _import(arguments)
            interruptions.has_begun = True
            with quiet(arguments.quiet), told_warnings(arguments.command, arguments.options):
                status = _RUN[arguments.command](arguments) or 0
            if interruptions.came and not status:
                raise KeyboardInterrupt
            return status
        except KeyboardInterrupt:
            pass
        except Exception as error:
            if not interruptions.came:  # else it is what other code has made of Ctrl-C
                if not isinstance(error, ValueError | TypeError | IndexError | RuntimeError | OSError):
                    raise
                print(f"{name}: {of_error(error, arguments.options)}", file=sys.stderr)
                return 2 if isinstance(error, _Incomplete) else 1
        # A fit comes here if Ctrl-C came before its first state (in K-means), or while the mixture was saved.
        hint = "; --resume goes on with what was written" if _is_begun(arguments) else ""
        print(f"{name}: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED


def _is_begun(arguments: argparse.Namespace) -> bool:
    """True where there is something to --resume."""
    if arguments.command == "fit" and arguments.checkpoint is not None:
        fits = _fits(arguments, arguments.layer or [None])
        return any((Path(own["checkpoint"]) / str(places.CHECKPOINT.file)).exists() for own in fits.values())
    if arguments.command == "harvest":
        from mfa_kernels.data import ActivationStore

        with suppress(OSError, ValueError):
            store = ActivationStore(arguments.out)
            return bool(len(store)) and not store.complete
    return False


def _import(arguments: argparse.Namespace) -> None:
    """Imports the slow packages now, so that none is imported once the work has begun."""
    if arguments.command != "doctor":  # which reports packages that are missing
        import mfa_kernels.mixture.mfa  # noqa: F401
    if arguments.command in ("demo", "explore", "harvest", "localize", "report", "steer") or getattr(
        arguments, "text", None
    ):
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


class _Interruptions:
    """The state of Ctrl-C: `came` is True after one, `has_begun` once the work has begun."""

    came = False
    has_begun = False


@contextmanager
def _interruptions() -> Iterator[_Interruptions]:
    """Notes each Ctrl-C, because other code may take the exception for an error, and continue.

    Before the work has begun, Ctrl-C ends the process at once: an exception in the middle of an import would leave half
    a module behind, or be swallowed.
    """
    found = _Interruptions()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        if not found.has_begun:
            os.write(2, b"mfa-kernels: interrupted\n")
            os._exit(INTERRUPTED)
        found.came = True
        signal.default_int_handler(number, frame)

    # A handler of another program, or none, as in the background, is left alone. Threads have no handlers.
    own = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if own:
        signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        if own:
            signal.signal(signal.SIGINT, before)


class _Incomplete(ValueError):
    """Something that the command line has to say is missing: exit status 2, as from argparse."""


def _check_outputs(
    arguments: argparse.Namespace,
    outputs: Sequence[tuple[str, Path, places.Kind]],
    inputs: Sequence[Path | str] = (),
    texts: Sequence[str] = (),
) -> None:
    """Raises, before the work, where an output cannot be written, or would replace a thing without --overwrite.

    Args:
        arguments: those of the command.
        outputs: for each, its option, its path and its kind; --overwrite, and --resume for kinds that can be resumed,
            allow a thing to be there.
        inputs, texts: as for `places.check_not_read`.
    """
    places.check_apart(outputs)
    for option, path, kind in outputs:
        goes_on = kind in (places.STORE, places.CHECKPOINT, places.CURVE) and hasattr(arguments, "resume")
        places.check_not_read(path, kind, option, inputs, texts)
        if path.is_file() if kind.file else path.is_dir():
            names = ("folder", "file") if kind.file else ("file", "folder")
            raise ValueError(f"{option} must name a {names[0]}, {path} is a {names[1]}")
        files = [path / name for name in _TOLD_BY.get(kind.what, (kind.file,))] if kind.file else [path]
        there = next((file for file in files if file.exists()), None)
        if there is not None and not (arguments.overwrite or (goes_on and arguments.resume)):
            ways = "--overwrite begins anew" if kind is places.CHECKPOINT else "--overwrite replaces it"
            if goes_on and kind is not places.CURVE:
                ways = f"--resume goes on with it, {ways}"
            elif kind is places.MIXTURE and getattr(arguments, "resume", False):
                ways += " (together with --resume)"
            raise FileExistsError(f"{option}: {there} is there already: {ways}, or name another place")
        if there is None or arguments.overwrite:  # else it is read, and what is wrong with it is said then
            places.check_place(path, kind, option)
        check_writable(files[0], option)


_TOLD_BY = {places.MIXTURE.what: ("config.json", "model.safetensors")}
"""Files of a folder that are not replaced by accident, for kinds with more than one such file."""


def _text_files(arguments: argparse.Namespace) -> list[Path]:
    """Returns the paths of --text; raises where there is nothing to read."""
    from mfa_kernels.data.text import check_files

    check_files(arguments.text)
    return [Path(path) for path in arguments.text]


def _store(folder: Path) -> ActivationStore:
    """Returns the store to read; raises where it is empty."""
    from mfa_kernels.data import ActivationStore

    store = ActivationStore(folder)
    if not len(store):
        raise ValueError(f"store: {folder} holds no activations")
    return store


def _device(name: str | None) -> torch.device:
    """Returns the device of a name; None: a GPU if there is one. Under torchrun, "cuda" is this process's own."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    full = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        return torch.empty(0, device=full).device  # making a tensor tells if the device is there
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def _demo(arguments: argparse.Namespace) -> None:
    from mfa_kernels.commands import demo
    from mfa_kernels.common.locks import alone

    kinds = {
        "activations": places.STORE,
        "mfa": places.MIXTURE,
        **dict(zip(demo.FILES, (places.CURVE, places.SCORES, places.PAGE, places.FIGURE, places.FIGURE))),
    }
    outputs = [("--out", arguments.out / name, kind) for name, kind in kinds.items()]
    _check_outputs(arguments, outputs, texts=arguments.text)
    _text_files(arguments)
    same = ("out", "small", "model", "layer", "tokens", "components", "rank", "epochs", "alpha", "kl", "component")
    options = demo.Options(
        **{name: getattr(arguments, name) for name in same},
        text=tuple(arguments.text), prompts=tuple(arguments.prompt) if arguments.prompt else None,
        device=_device(arguments.device),
    )  # fmt: skip
    demo.check(options)
    with alone(arguments.out):  # two at once would mix what they write
        demo.run(options)


def _doctor(arguments: argparse.Namespace) -> None:
    from mfa_kernels.commands.doctor import report

    lines = report()
    width = max(len(what) for what, _ in lines)
    for what, state in lines:
        print(f"{what:<{width}}  {state}")
    if arguments.check:
        _check_kernels(arguments.device)


def _check_kernels(device: str) -> None:
    from mfa_kernels.commands import check_kernels

    reason = check_kernels.nothing_to_check(device)
    if reason is not None:
        print(f"\nno kernels to check: {reason}")
        return
    print()
    findings = []
    for finding in check_kernels.run_all(device):
        findings.append(finding)
        print(f"{finding.family}: {finding.seconds:.1f} s", file=sys.stderr)
    print(check_kernels.table(findings))
    refused = [finding.family for finding in findings if not finding.passed]
    if refused:
        raise ValueError(f"refused: {', '.join(refused)}; plain PyTorch serves them")


def _tune(arguments: argparse.Namespace) -> None:
    from mfa_kernels.commands import tune

    tune.main(arguments)


def _harvest(arguments: argparse.Namespace) -> None:
    import torch

    from mfa_kernels.data.language_model import load_language_model

    if arguments.overwrite and arguments.resume:
        raise ValueError("--resume goes on with what is there, --overwrite replaces it: give one of them")
    device, texts = _device(arguments.device), _text_files(arguments)
    _check_outputs(arguments, [("--out", arguments.out, places.STORE)], texts=arguments.text)
    model, tokenizer = load_language_model(arguments.model, _dtype(arguments.model_dtype))
    store = mfa_kernels.harvest(
        model, tokenizer, texts, arguments.layer, arguments.out,
        max_tokens=arguments.max_tokens, context=arguments.context, batch_size=arguments.batch_size,
        dtype=getattr(torch, arguments.dtype), overwrite=arguments.overwrite, resume=arguments.resume,
        device=device,
    )  # fmt: skip
    print(f"{len(store):,} activations of width {store.n_features} in {arguments.out}")


def _fit(arguments: argparse.Namespace) -> int:
    harvested = arguments.text is not None
    if harvested == (arguments.store is not None):
        raise ValueError("a store or --text: one of them, and not both, says what to fit to")
    for option in ("model", "layer", "max_tokens"):
        if not harvested and getattr(arguments, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} goes with --text, not with a store")
    if harvested and arguments.layer is None:
        raise ValueError("--text needs --layer")
    if harvested and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("--text is read by one process: several can fit to a store, which harvest writes")
    if harvested and arguments.shard_components:
        raise ValueError("--shard-components goes with a store, not with --text")
    if harvested and (arguments.method not in ("auto", "online") or arguments.polish):
        raise ValueError("--method em, truncated or sgd, and --polish, go with a store: --text is read once")
    if arguments.out.exists() and not arguments.out.is_dir():  # now, not when the mixture is there
        raise ValueError(f"--out must be a folder, {arguments.out} is a file")
    if arguments.resume and arguments.checkpoint is None:
        raise ValueError("--resume needs --checkpoint, the folder to go on from")
    inputs = [place for place in (arguments.store, arguments.start) if place is not None]
    _begin(arguments)
    fits = _fits(arguments, arguments.layer if harvested else [None])
    folders = {name: arguments.out / name if len(fits) > 1 else arguments.out for name in fits}
    device = _device(arguments.device)
    kinds = {"checkpoint": places.CHECKPOINT, "log": places.CURVE}
    outputs = [(f"--{key}", own[key], kind) for own in fits.values() for key, kind in kinds.items() if key in own]
    outputs += [("--out", folder, places.MIXTURE) for folder in folders.values()]
    _check_outputs(arguments, outputs, inputs, arguments.text or ())
    if harvested:
        _text_files(arguments)
    missing = list(fits)
    interrupted = False
    with _processes(device) as first:
        if first and arguments.overwrite and not arguments.resume:
            _clear_checkpoints(fits)
        try:
            for name, mfa in (_fit_while_harvesting if harvested else _fit_to_store)(arguments, fits, device):
                if first or arguments.shard_components:  # then each process has a part
                    mfa.save_pretrained(folders[name])
                if first:
                    print(f"{_told(mfa.fit_report)}; saved in {folders[name]}", flush=True)
                missing.remove(name)
                interrupted = interrupted or mfa.fit_report.interrupted
        except KeyboardInterrupt:
            if len(missing) == len(fits):
                raise
            interrupted = True
    if first and not missing:
        _tell_what_is_next(folders, arguments.store)
    if interrupted:
        lost = "".join(f", {folders[name]} missing" for name in missing)
        print(f"mfa-kernels fit: interrupted: what is saved is the best so far{lost}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _tell_what_is_next(folders: Mapping[str, Path], store: Path | None) -> None:
    """Prints the commands that look at a mixture; of several, at the first."""
    mfa = shlex.quote(str(next(iter(folders.values()))))
    rows = "STORE" if store is None else shlex.quote(str(store))
    commands = {
        f"explore {mfa} {rows}": "its regions in the browser, and steering that streams",
        f"report {mfa} {rows} --out regions.html": "the same as one page to share",
        f"evaluate {mfa} {rows}": "how well it fits",
        f"steer {mfa} 'Once upon a time' -k 0": "text toward a region",
    }
    width = max(map(len, commands))
    print("Next:")
    for command, what in commands.items():
        print(f"  mfa-kernels {command:<{width}}  # {what}")


def _begin(arguments: argparse.Namespace) -> None:
    """Loads the mixture of --start, and takes numbers from it that the command line does not give."""
    if arguments.start is not None:
        from mfa_kernels import MFA

        arguments.start = start = MFA.from_pretrained(arguments.start)
        arguments.components, arguments.rank = (
            arguments.components or [start.n_components],
            arguments.rank or [start.rank],
        )
        arguments.noise = arguments.noise or start.noise
    if arguments.components is None:
        raise _Incomplete("-K: say how many regions, or --start, whose regions to go on from")
    arguments.rank = arguments.rank or [10]


def _clear_checkpoints(fits: dict[str, dict[str, Any]]) -> None:
    """Removes the checkpoints that --overwrite gives up."""
    from mfa_kernels.fitting.checkpoint import clear

    for own in fits.values():
        if "checkpoint" in own:
            clear(own["checkpoint"])


def _told(report: FitReport) -> str:
    """Returns the result of a fit in a few words."""
    if report.held_out_nll is None:
        return "the last state, as nothing was held out"
    return (
        f"held-out negative log-likelihood {report.held_out_nll:.3f} nats per token (held out by {report.held_out_by})"
    )


def _fit_to_store(
    arguments: argparse.Namespace, fits: dict[str, dict[str, Any]], device: torch.device
) -> Iterator[tuple[str, Any]]:
    from mfa_kernels import fit

    store = _store(arguments.store)
    if not store.complete:
        print(f"mfa-kernels fit: {store!r}: harvest --resume would bring the rest", file=sys.stderr)
    kept = ("model", "tokenizer", "model_fingerprint", "layer")
    extra: dict[str, Any] = {key: _shareable(key, store.meta[key]) for key in kept if key in store.meta}
    most = max(own["n_components"] for own in fits.values())
    if most > len(store):  # now, not when the others are done
        raise ValueError(f"--components must be at most the {len(store):,} rows of {arguments.store}, got {most}")
    options, spread = _fit_options(arguments), arguments.shard_components
    if spread and (options["init"], options["polish"]) != ("pca", 0):
        raise ValueError("--shard-components starts from --init pca, and goes without --polish")
    for name, own in fits.items():
        mfa: Any = fit(store, split="components" if spread else "rows", device=device, **own, **options)
        (mfa.local if spread else mfa).extra.update(extra)
        yield name, mfa
        if mfa.fit_report.interrupted:
            break


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)


def _fit_while_harvesting(
    arguments: argparse.Namespace, fits: dict[str, dict[str, Any]], device: torch.device
) -> Iterator[tuple[str, Any]]:
    from mfa_kernels import fit_many, stream
    from mfa_kernels.data.language_model import load_language_model, origin, resolve_layer

    model, tokenizer = load_language_model(arguments.model, _dtype(arguments.model_dtype))
    model.to(device)
    batches = stream(
        model, tokenizer, [Path(path) for path in arguments.text], arguments.layer, max_tokens=arguments.max_tokens,
        context=arguments.context, batch_size=arguments.windows, seed=arguments.seed,
    )  # fmt: skip
    try:
        mixtures = fit_many(batches, fits, **_fit_options(arguments))
    except (TypeError, ValueError, RuntimeError) as error:
        (name, *others) = fits
        if others or not str(error).startswith(f"{name}: "):
            raise
        raise type(error)(str(error).removeprefix(f"{name}: ")) from error  # of one fit, a name says nothing
    for name, mfa in mixtures.items():
        layer, _ = resolve_layer(model, fits[name]["layer"])
        mfa.extra |= {**origin(model, tokenizer), "layer": layer}
    yield from mixtures.items()


def _fits(arguments: argparse.Namespace, layers: Sequence[int | str | None]) -> dict[str, dict[str, Any]]:
    """Returns the own options of each fit, by its name."""
    twice = next((layer for layer in layers if list(layers).count(layer) > 1), None)
    if twice is not None:
        raise ValueError(f"--layer must name each layer once, got {twice} twice")
    fits = {}
    for layer, components, rank in product(layers, arguments.components, arguments.rank):
        name = f"K{components}-R{rank}"
        own: dict[str, Any] = {"n_components": components, "rank": rank}
        if layer is not None:
            name = f"layer{layer}-{name}" if isinstance(layer, int) else f"{layer}-{name}"
            own["layer"] = layer
        fits[name] = own
    for name, own in fits.items():
        several = len(fits) > 1
        if arguments.checkpoint is not None:
            own["checkpoint"] = arguments.checkpoint / name if several else arguments.checkpoint
        if arguments.log is not None:
            own["log"] = arguments.log / f"{name}.jsonl" if several else arguments.log
    return fits


def _fit_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that all fits share."""
    import torch

    names = (
        "method", "noise", "init", "start", "epochs", "polish", "batch_size", "lr", "schedule", "held_out",
        "eval_every", "precision", "seed", "checkpoint_seconds", "resume",
    )  # fmt: skip
    options = {name: getattr(arguments, name) for name in names}
    return {**options, "patience": arguments.patience or None, "dtype": getattr(torch, arguments.dtype)}


@contextmanager
def _processes(device: torch.device) -> Iterator[bool]:
    """Joins the processes that torchrun has started, if any; yields True in the first process."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield True
        return
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield dist.get_rank() == 0
    dist.destroy_process_group()  # after an error, the others may be waiting for this process to end


def _encode(arguments: argparse.Namespace) -> None:
    from mfa_kernels.evaluation.codes import write_codes

    _check_outputs(arguments, [("--out", arguments.out, places.CODES)], [arguments.store, arguments.mfa])
    device = _device(arguments.device)
    mfa, store = mfa_kernels.MFA.from_pretrained(arguments.mfa, device=device), _store(arguments.store)
    _note_differences(arguments, mfa, store)
    done = write_codes(mfa, store, arguments.out, arguments.top_k)
    print(f"codes of {done.tokens:,} tokens in {arguments.out}: {done.pairs:,} active pairs of a token and a component")
    if done.without:
        print(f"{done.without:,} of them have no density under the mixture, and no component")


def _evaluate(arguments: argparse.Namespace) -> None:
    from mfa_kernels.evaluation import evaluate, score_table

    mfa = mfa_kernels.MFA.from_pretrained(arguments.mfa, device=_device(arguments.device))
    store = _store(arguments.store)
    _note_differences(arguments, mfa, store)
    print(score_table(evaluate(mfa, store), mfa.n_components, f"activations of {arguments.store}"))
    if mfa.fit_report is not None and (fitted := mfa.fit_report.described().get("fitted")):
        print(f"The mixture was fitted: {fitted}")


def _localize(arguments: argparse.Namespace) -> None:
    from mfa_kernels.common.checks import check_choice
    from mfa_kernels.evaluation import comparison, tasks

    if (arguments.task is None) == (arguments.pairs is None):
        raise _Incomplete("say which pairs: --task mcqa, --task ravel, or --pairs FILE")
    if arguments.pairs is not None and (arguments.variable is not None or arguments.at is not None):
        raise ValueError("--variable and --at go with --task; a file says the variable and the site itself")
    if arguments.json is not None:
        _check_outputs(arguments, [("--json", arguments.json, places.RESULTS)], [arguments.mfa, arguments.pairs or ""])
    methods = arguments.methods or [
        method for method in comparison.METHODS if arguments.store is not None or method not in comparison.FITTED
    ]
    for method in methods:
        check_choice(method, comparison.METHODS, "methods")
        if arguments.store is None and method in comparison.FITTED:
            raise _Incomplete(f"--store: {method} is fitted to activations; name their store")
    if arguments.pairs is not None:
        pairs = tasks.read_pairs(arguments.pairs)
    else:
        chosen = {name: getattr(arguments, name) for name in ("variable", "at")}
        make = tasks.mcqa_pairs if arguments.task == "mcqa" else tasks.ravel_pairs
        wanted = {name: value for name, value in chosen.items() if value is not None}
        pairs = make(count=4 * arguments.count, **wanted)
    mfa = mfa_kernels.MFA.from_pretrained(arguments.mfa, device=_device(arguments.device)).requires_grad_(False)
    layer = mfa.extra.get("layer") if arguments.layer is None else arguments.layer
    if layer is None:
        raise _Incomplete("--layer: the mixture does not say which layer it was fitted to; name one")
    store = None
    if arguments.store is not None:
        store = _store(arguments.store)
        _note_differences(arguments, mfa, store)
    clusters = mfa_kernels.kmeans(store, mfa.n_components, device=mfa.means.device) if "K-means" in methods else None
    baselines = comparison.Baselines(mfa, store, clusters)
    model, tokenizer = _load_the_model_of(mfa, arguments)
    model.to(_device(arguments.device)).eval()
    _note_layer(arguments.command, model, mfa, layer)
    task = tasks.prepare(model, tokenizer, pairs, count=arguments.count, at_least=arguments.at_least)
    if task.accuracy is not None:
        print(f"The model answers {task.accuracy:.0%} of the prompts right; {len(task.pairs)} pairs of such are taken.")
    found = comparison.compare(
        task.site(model, layer), task, baselines, methods,
        seeds=arguments.seeds, das=arguments.das, epochs=arguments.epochs, penalty=arguments.penalty,
    )  # fmt: skip
    print(comparison.table(found))
    if arguments.json is not None:
        comparison.write_results(arguments.json, found, task, layer)
        print(f"written: {arguments.json}")


def _explore(arguments: argparse.Namespace) -> None:
    if arguments.demo:
        if arguments.mfa is not None:
            raise ValueError("--demo looks at the folder demo: give it, or a mixture and a store")
        arguments.mfa, arguments.store = "demo/mfa", Path("demo/activations")
        if not arguments.store.is_dir():
            raise FileNotFoundError("--demo: there is no folder demo/activations here: run `mfa-kernels demo` first")
    if arguments.mfa is None or arguments.store is None:
        raise _Incomplete("name a mixture and a store, or give --demo")
    try:
        from mfa_kernels.explorer import server
    except ModuleNotFoundError as error:
        raise ValueError(f"explore needs {error.name}: pip install mfa_kernels[explore]") from error
    listening = server.bound(arguments.port)  # a port that is taken is told before the work
    try:
        server.serve(_explorer(arguments), listening, browser=not arguments.no_browser)
    finally:
        listening.close()


def _explorer(arguments: argparse.Namespace) -> Any:
    """Returns the `Explorer` of the mixture, the store and the model that the command names."""
    from mfa_kernels.explorer import Explorer
    from mfa_kernels.interpret.labels import LABELS, read_labels

    device = _device(arguments.device)
    mfa, store = mfa_kernels.MFA.from_pretrained(arguments.mfa, device=device), _store(arguments.store)
    _note_differences(arguments, mfa, store)
    path = arguments.labels
    if path is None and (Path(arguments.mfa) / LABELS).is_file():
        path = Path(arguments.mfa) / LABELS
    labels = {} if path is None else read_labels(path, mfa.n_components)
    model, tokenizer = _load_the_model_of(mfa, arguments)
    if model is not None:
        model.to(device)
    return Explorer(mfa, store, tokenizer, model, arguments.layer, labels=labels)


def _report(arguments: argparse.Namespace) -> None:
    wanted = {"--out": places.PAGE, "--json": places.TABLE, "--csv": places.LINES}
    paths = {option: getattr(arguments, option.removeprefix("--")) for option in wanted}
    outputs = [(option, path, wanted[option]) for option, path in paths.items() if path is not None]
    if not outputs:
        raise _Incomplete("say what to write: --out PAGE.html, --json FILE or --csv FILE")
    _check_outputs(arguments, outputs, [arguments.mfa, arguments.store])
    from mfa_kernels.explorer import tables
    from mfa_kernels.interpret.report import write_report

    explorer = _explorer(arguments)
    if arguments.out is not None:
        write_report(
            arguments.out, explorer.mfa, explorer.store, explorer.tokenizer, model=explorer.model,
            components=arguments.component or explorer.best(arguments.regions), assigned=explorer.assigned,
            labels=explorer.labels, figures=tables.has_figures(),
        )  # fmt: skip
    if arguments.json is not None:
        tables.write_json(explorer, arguments.json)
    if arguments.csv is not None:
        tables.write_csv(explorer, arguments.csv)
    for _, path, _ in outputs:
        print(f"written: {path}")


def _steer(arguments: argparse.Namespace) -> None:
    import torch

    from mfa_kernels.common.checks import check_component
    from mfa_kernels.data.language_model import continuation
    from mfa_kernels.steering import interactive

    device = _device(arguments.device)
    mfa = mfa_kernels.MFA.from_pretrained(arguments.mfa, device=device)
    layer = mfa.extra.get("layer") if arguments.layer is None else arguments.layer
    if layer is None:
        raise _Incomplete("--layer: the mixture does not say which layer it was fitted to; name one")
    if arguments.gate is not None and arguments.component is None:
        raise ValueError("--gate needs --component, whose responsibility it looks at")
    if arguments.component is not None:
        check_component(arguments.component, mfa.n_components)
    if arguments.latents is not None and len(arguments.latents) != mfa.rank:
        raise ValueError(f"--latents must be {mfa.rank} numbers, the rank of the mixture, got {len(arguments.latents)}")
    gate = None if arguments.gate is None else (arguments.component, arguments.gate)
    latents = None if arguments.latents is None else torch.tensor(arguments.latents)
    model, tokenizer = _load_the_model_of(mfa, arguments)
    model.to(device)
    _note_layer(arguments.command, model, mfa, layer)
    with mfa_kernels.steer(
        model, mfa, layer, arguments.component, arguments.alpha, latents,
        positions=arguments.positions, gate=gate, norm=arguments.norm,
    ) as handle, _finite(model, layer, arguments.alpha):  # fmt: skip
        options = (arguments.prompt, arguments.max_new_tokens, arguments.temperature, arguments.seed)
        if arguments.live:
            interactive.stream(model, tokenizer, handle, arguments.component, *options)
        else:
            print(arguments.prompt + continuation(model, tokenizer, *options))
        seen, steered, _ = handle.stats()
        if not steered:
            print(
                f"mfa-kernels steer: none of the {seen} tokens was steered: no position or gate let one",
                file=sys.stderr,
            )


def _note_layer(command: str, model: Any, mfa: MFA, layer: int | str) -> None:
    """Notes on standard error if another layer is taken than the mixture was fitted to."""
    from mfa_kernels.data.language_model import resolve_layer

    with suppress(ValueError, IndexError, TypeError):  # the mixture's may be a layer of another model
        own, given = (resolve_layer(model, name)[0] for name in (mfa.extra.get("layer", layer), layer))
        if own != given:
            print(f"mfa-kernels {command}: the mixture is of layer {own}, --layer names {given}", file=sys.stderr)


@contextmanager
def _finite(model: Any, layer: int | str, alpha: float) -> Iterator[None]:
    """Ends a generation whose steered activations have no finite norm, of which the model makes zeros or NaN.

    It waits for the device after every token, which `steer` itself does not.
    """
    from mfa_kernels.data.language_model import hidden_states, resolve_layer
    from mfa_kernels.ops.common.finite import finite_rows

    def check(module: Any, args: Any, output: Any) -> None:
        hidden = hidden_states(output)
        if not finite_rows(hidden.flatten(0, -2)).all():
            raise ValueError(
                f"--alpha {alpha:g} makes steered activations whose squared norm is not finite in {hidden.dtype}: no "
                "text comes of them"
            )

    hook = resolve_layer(model, layer)[1].register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


def _load_the_model_of(mfa: MFA, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Returns model and tokenizer: those of --model or of the mixture; notes the choice on standard error."""
    from mfa_kernels.data.language_model import fingerprint, from_pretrained, load_language_model, remembered_model, why

    said = mfa.extra.get("model")
    own, problem, local = None, "", local_name(said)
    if local is None:
        try:
            own = remembered_model(said)
        except ValueError as error:
            problem = str(error)
    tokenizer = None
    if arguments.model is not None:
        name, note = arguments.model, "as --model says"
        if local is not None and shareable(name) != said:
            note += f"; the mixture is of the local model {local!r}"
        elif own not in (None, name):
            note += f"; the mixture is of {own}"
    elif local is not None:
        raise _Incomplete(f"--model: the mixture is of the local model {local!r}; name its folder with --model")
    elif own is None:
        raise _Incomplete(f"--model: {arguments.mfa} leaves open which model to steer ({problem}); name it")
    else:
        name, note = own, "which the mixture was fitted to"
        tokenizer = mfa.extra.get("tokenizer", said)
    print(f"model {name}, {note}", file=sys.stderr)
    if tokenizer is not None:
        try:
            tokenizer = remembered_model(tokenizer)
        except ValueError:
            print(f"tokenizer of the model; the mixture is of {tokenizer}", file=sys.stderr)
            tokenizer = own
    try:
        if getattr(arguments, "no_model", False):
            return None, from_pretrained("AutoTokenizer", tokenizer or name, "model")
        model, tokenizer = load_language_model(name, tokenizer=tokenizer)
    except (OSError, ValueError) as error:
        if arguments.model is not None:
            raise
        reason = why(error.__cause__ or error)
        raise _Incomplete(
            f"--model: {own}, which the mixture was fitted to, cannot be loaded ({reason}); name another"
        ) from error
    expected, found = mfa.extra.get("model_fingerprint"), fingerprint(model)
    if isinstance(expected, str) and expected != found:
        print(
            f"mfa-kernels {arguments.command}: {name} is of another architecture or size than the model that the "
            f"mixture was fitted to (fingerprint {found}, there {expected:.16})",
            file=sys.stderr,
        )
    return model, tokenizer


def _note_differences(arguments: argparse.Namespace, mfa: MFA, store: ActivationStore) -> None:
    """Notes on standard error if a store is of another model or layer than the mixture was fitted to."""
    for what, name in (("model", "model"), ("model_fingerprint", "a model with the fingerprint"), ("layer", "layer")):
        own, given = (_shareable(what, place.get(what)) for place in (mfa.extra, store.meta))
        if None not in (own, given) and own != given:
            print(
                f"mfa-kernels {arguments.command}: the mixture is of {name} {own}, {arguments.store} of {given}",
                file=sys.stderr,
            )


def _shareable(what: str, said: Any) -> Any:
    """Returns an entry of a mixture's or a store's facts, models and tokenizers by their shareable names."""
    return shareable(said) if what in ("model", "tokenizer") and isinstance(said, str) and said else said


def _convert(arguments: argparse.Namespace) -> None:
    if not arguments.input.exists():
        raise FileNotFoundError(f"input: {arguments.input} does not exist")
    is_folder = arguments.input.is_dir()
    if is_folder and arguments.eps_floor is not None:
        raise ValueError(f"--eps-floor goes with a checkpoint of the paper's code, {arguments.input} is a folder")
    if not is_folder and arguments.format is not None:
        raise ValueError(f"--format goes with a mixture's folder, {arguments.input} is a file")
    _check_outputs(
        arguments, [("output", arguments.output, places.PAPER if is_folder else places.MIXTURE)], [arguments.input]
    )
    if is_folder:
        mixture = mfa_kernels.MFA.from_pretrained(arguments.input)
        mixture.to_reference_checkpoint(arguments.output, format=arguments.format or 1)
    else:
        mixture = mfa_kernels.MFA.from_reference_checkpoint(arguments.input, eps_floor=arguments.eps_floor)
        mixture.save_pretrained(arguments.output)
    print(f"written: {arguments.output}")


_RUN: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "demo": _demo, "doctor": _doctor, "tune": _tune, "harvest": _harvest, "fit": _fit, "encode": _encode,
    "evaluate": _evaluate, "localize": _localize, "explore": _explore, "report": _report, "steer": _steer,
    "convert": _convert,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
