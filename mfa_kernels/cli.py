"""The command line: mfa-kernels demo, doctor, tune, harvest, fit, encode, evaluate, steer, convert."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfa_kernels import __version__, tuning
from mfa_kernels.files import check_writable
from mfa_kernels.functional import PRECISIONS
from mfa_kernels.progress import quiet

if TYPE_CHECKING:
    import torch

    from mfa_kernels import MFA
    from mfa_kernels.data import ActivationStore
    from mfa_kernels.fitting import FitReport
    from mfa_kernels.sharded import ShardedMFA


INTERRUPTED = 130
"""The exit status after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status. Errors of the user's are one line, without a traceback."""
    arguments = _parser().parse_args(argv)
    try:
        with quiet(arguments.quiet), _interruptions() as came:
            status = arguments.run(arguments) or 0
        if came and not status:
            raise KeyboardInterrupt
        return status
    except (ValueError, TypeError, IndexError, RuntimeError, OSError) as error:
        print(f"mfa-kernels {arguments.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, _Incomplete) else 1
    except KeyboardInterrupt:
        # Of a fit, what Ctrl-C came too early for: K-means, or the saving of the mixture.
        goes_on = arguments.command == "harvest" or getattr(arguments, "checkpoint", None) is not None
        hint = "; --resume goes on with what was written" if goes_on else ""
        print(f"mfa-kernels {arguments.command}: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Notes each Ctrl-C, as the exception alone may be taken for an error by somebody's code, which then goes on."""
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    # Ignored, as in the background, or somebody else's: it is left to them. Threads have no handlers.
    own = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if own:
        signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        if own:
            signal.signal(signal.SIGINT, before)


class _Incomplete(ValueError):
    """The command line leaves open what nothing else says: exit status 2, as for what argparse finds missing."""


def _check_mixture_folder(folder: Path, overwrite: bool) -> None:
    """`_check_out` of a folder for a mixture."""
    for name in ("config.json", "model.safetensors"):
        _check_out(folder / name, (folder / name).exists(), overwrite)


def _check_out(path: Path, there: bool, overwrite: bool) -> None:
    """Before the work: that nothing is replaced which nobody gave up, and that the place can be written to.

    Args:
        path: of a file, or of the first file in a folder.
        there: whether that holds something.
        overwrite: whether it may be replaced.
    """
    if there and not overwrite:
        raise FileExistsError(
            f"{path} is there already: --overwrite replaces it (after --resume too), or name another place"
        )
    check_writable(path, "--out")


def _layer(text: str) -> int | str:
    """An index, or a module path."""
    from mfa_kernels.models import index_in

    index = index_in(text)
    return text if index is None else index


class _Store(argparse.Action):
    """A positional argument that `_Integers` may have found already: argparse would set it to None again."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is not None:
            namespace.store = values


class _Integers(argparse.Action):
    """One or more integers. A last value that is none of them is the store: `-K 256 store` is what people type."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = list(values)
        if len(found) > 1 and namespace.store is None and not found[-1].lstrip("+-").isdecimal():
            namespace.store = Path(found.pop())
        try:
            setattr(namespace, self.dest, [int(value) for value in found])
        except ValueError:
            raise argparse.ArgumentError(self, f"expected integers, got {' '.join(found)}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mfa-kernels", description="Mixtures of factor analyzers over activations.")
    parser.add_argument("--version", action="version", version=f"mfa_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=_Defaults)
        sub.set_defaults(run=run)
        sub.add_argument("-q", "--quiet", action="store_true", help="no progress bars; there are none in a log either")
        return sub

    demo = command("demo", _demo, "harvest, fit, look and steer, on the model that ships with the package or on yours")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that is written")
    _overwrite(demo, "a demonstration that is there")
    _language_model(demo, layer_default="the middle one")
    demo.add_argument("--text", nargs="+", default=[], help="files or folders to read; the standard library's sources")
    demo.add_argument("--tokens", type=int, default=200_000, help="activations to fit on; a tenth more is held out")
    _size(demo, 256)
    demo.add_argument("--epochs", type=int, default=10)
    demo.add_argument("--alpha", type=float, default=0.3, help="how far steering moves toward the region")
    demo.add_argument("-k", "--component", type=int, help="region to steer toward; without it, one is chosen")
    demo.add_argument("--prompt", nargs="+", help="prompts to steer")
    demo.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1: for larger models than the small one")

    command("doctor", _doctor, "what is built, what is missing, what runs where")

    tune = command(
        "tune", tuning.main, "measure launch configurations of the GPU kernels on this GPU, keep the fastest"
    )
    tuning.add_arguments(tune)

    harvest = command("harvest", _harvest, "run texts through a language model, keep a layer's activations")
    _language_model(harvest)
    harvest.add_argument("--text", nargs="+", required=True, help="files or folders to read")
    harvest.add_argument("--out", type=Path, required=True, help="folder of the store")
    harvest.add_argument("--max-tokens", type=int, help="activations to keep")
    harvest.add_argument("--context", type=int, default=256, help="tokens per window")
    harvest.add_argument("--batch-size", type=int, default=16, help="windows per forward pass")
    harvest.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    _overwrite(harvest, "a store that is there")
    harvest.add_argument("--resume", action="store_true", help="go on with a store that was cut off")
    _where(harvest)

    fit = command(
        "fit",
        _fit,
        "fit mixtures to the activations of a store; or, while a language model reads --text, in one pass over it and "
        "without a store. Several layers or sizes are as many mixtures. Of a store, under torchrun: by all its "
        "processes, each on a GPU of its own where there are some",
    )
    fit.add_argument(
        "store", type=Path, nargs="?", action=_Store, help="folder of the store; without it, --text is read"
    )
    fit.add_argument(
        "--out", type=Path, required=True,
        help="folder of the mixture; of several, one folder each in it, such as layer2-K512-R10 or, of a store, "
        "K512-R10; so with --checkpoint and --log",
    )  # fmt: skip
    _overwrite(fit, "a mixture that is there")
    fit.add_argument("-K", "--components", nargs="+", action=_Integers, help="regions; with --start, its own")
    fit.add_argument(
        "-R", "--rank", nargs="+", action=_Integers, help="local directions per region: 10, or those of --start"
    )
    fit.add_argument("--start", help="a mixture to go on from, a folder or hub id, instead of K-means")
    harvested = fit.add_argument_group("without a store")
    harvested.add_argument("--model", help="a Hugging Face id or folder; without it, the small model of the package")
    harvested.add_argument("--layer", type=_layer, nargs="+", help="indices or module paths of layers")
    harvested.add_argument("--text", nargs="+", help="files or folders to read")
    harvested.add_argument("--max-tokens", type=int, help="activations to fit to")
    harvested.add_argument("--context", type=int, default=256, help="tokens per window")
    harvested.add_argument("--windows", type=int, default=16, help="of them per forward pass")
    fit.add_argument("--noise", choices=("shared", "per_component"), help="shared, or that of --start")
    fit.add_argument("--init", choices=("pca", "random"), default="pca", help="loadings to start from")
    fit.add_argument(
        "--method",
        choices=("auto", "em", "online", "sgd"),
        default="auto",
        help="auto: online where a pass makes 100 steps, else em; see mfa_kernels.fit",
    )
    fit.add_argument("--epochs", type=int, default=10, help="passes over the store, at most")
    fit.add_argument("--polish", type=int, default=0, help="epochs of sgd after em or online, of a store")
    fit.add_argument("--batch-size", type=int, default=1024, help="of sgd and online")
    fit.add_argument("--lr", type=float, default=1e-2, help="learning rate of sgd; see mfa_kernels.fit")
    fit.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help="of the rate of sgd")
    fit.add_argument("--held-out", type=float, default=0.05, help="share of the rows that the best state is chosen by")
    fit.add_argument("--eval-every", type=int, metavar="STEPS", help="between looks at them; see mfa_kernels.fit")
    fit.add_argument("--patience", type=int, default=5, help="looks without a gain, after which to stop; 0: never")
    fit.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of the parameters")
    fit.add_argument("--precision", choices=PRECISIONS, default="exact", help="of the mixture")
    fit.add_argument("--seed", type=int, default=0)
    _where(fit)
    fit.add_argument(
        "--log", type=Path,
        help="JSONL file of the curve; a folder of them, of several. Likelihoods and gain are in nats per token, "
        "memory in bytes: docs/fitting.md says of each number what it is",
    )  # fmt: skip
    fit.add_argument("--checkpoint", type=Path, help="folder of what is needed to go on after a crash")
    fit.add_argument("--checkpoint-seconds", type=float, default=60.0, help="between checkpoints, at least")
    fit.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint; from the beginning where there is none yet"
    )
    fit.add_argument(
        "--shard-components",
        action="store_true",
        help="for a mixture too large for one device: each process holds some of the regions, and reads all rows; not "
        "by sgd",
    )

    encode = command(
        "encode",
        _encode,
        "write the codes of a store's activations to one file of tensors: offsets (N + 1), components (P), "
        "responsibilities (P), latents (P, R), dropped (N); the pairs of token n are [offsets[n], offsets[n + 1])",
    )
    _mixture(encode)
    encode.add_argument("store", type=Path)
    encode.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    _overwrite(encode, "a file that is there")
    encode.add_argument("--top-k", type=int, default=8, help="components per token")
    _where(encode)

    evaluate = command("evaluate", _evaluate, "likelihood, reconstruction and live regions on a store")
    _mixture(evaluate)
    evaluate.add_argument("store", type=Path)
    _where(evaluate)

    steer = command("steer", _steer, "generate text from a steered model")
    _mixture(steer)
    steer.add_argument("prompt")
    _language_model(steer, "the one the mixture was fitted to", "the one the mixture was fitted to")
    steer.add_argument("-k", "--component", type=int, help="region; without it, the responsibility-weighted mixture")
    steer.add_argument("--alpha", type=float, default=0.3, help="how far toward the region")
    steer.add_argument("--latents", type=float, nargs="+", metavar="Z", help="an offset inside the region, R numbers")
    steer.add_argument("--positions", choices=("all", "prompt", "generated", "last"), default="all")
    steer.add_argument("--gate", type=float, metavar="T", help="act only where the region's responsibility exceeds T")
    steer.add_argument("--norm", choices=("keep",), help="give each steered activation back the norm it had")
    steer.add_argument(
        "--live", action="store_true", help="stream the text, and read commands from standard input meanwhile"
    )
    steer.add_argument("--max-new-tokens", type=int, default=64)
    steer.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    steer.add_argument("--seed", type=int, default=0)
    _where(steer)

    convert = command("convert", _convert, "between a mixture's folder and the paper's own checkpoint format")
    convert.add_argument("input", type=Path, help="a checkpoint file of the paper's code, or a mixture's folder")
    convert.add_argument("output", type=Path, help="the other one")
    _overwrite(convert, "what is there")
    convert.add_argument("--eps-floor", type=float, help="noise floor of a checkpoint that does not say it")
    convert.add_argument("--format", type=int, choices=(1, 2), default=1, help="of the checkpoint written")
    return parser


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, [], False) else super()._get_help_string(action)


def _size(parser: argparse.ArgumentParser, components: int) -> None:
    parser.add_argument("-K", "--components", type=int, default=components, help="regions")
    parser.add_argument("-R", "--rank", type=int, default=10, help="local directions per region")


def _language_model(
    parser: argparse.ArgumentParser,
    layer_default: str | None = None,
    model_default: str = "the small model of the package",
) -> None:
    parser.add_argument("--model", help=f"a Hugging Face id or folder; without it, {model_default}")
    note = f"; without it, {layer_default}" if layer_default else ""
    parser.add_argument(
        "--layer", type=_layer, required=layer_default is None, help=f"index or module path of a layer{note}"
    )


def _overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def _mixture(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mfa", help="folder or hub id of the mixture")


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:1; without it, a GPU where there is one")


def _device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU where there is one. Under torchrun, "cuda" is this process's own."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    full = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        return torch.empty(0, device=full).device  # a name alone does not say whether it is there
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def _demo(arguments: argparse.Namespace) -> None:
    from mfa_kernels import demo
    from mfa_kernels.locks import alone

    _check_mixture_folder(arguments.out / "mfa", arguments.overwrite)
    for name in ("activations/manifest.json", *demo.FILES):
        _check_out(arguments.out / name, (arguments.out / name).exists(), arguments.overwrite)
    options = demo.Options(
        out=arguments.out,
        model=arguments.model,
        layer=arguments.layer,
        text=tuple(arguments.text),
        tokens=arguments.tokens,
        components=arguments.components,
        rank=arguments.rank,
        epochs=arguments.epochs,
        alpha=arguments.alpha,
        component=arguments.component,
        prompts=tuple(arguments.prompt or demo.PROMPTS),
        device=_device(arguments.device),
    )
    with alone(arguments.out):  # two at once would mix what they write
        demo.run(options)


def _doctor(arguments: argparse.Namespace) -> None:
    from mfa_kernels.doctor import report

    lines = report()
    width = max(len(what) for what, _ in lines)
    for what, state in lines:
        print(f"{what:<{width}}  {state}")


def _harvest(arguments: argparse.Namespace) -> None:
    import torch

    from mfa_kernels import harvest
    from mfa_kernels.models import load_language_model

    model, tokenizer = load_language_model(arguments.model)
    store = harvest(
        model, tokenizer, [Path(path) for path in arguments.text], arguments.layer, arguments.out,
        max_tokens=arguments.max_tokens, context=arguments.context, batch_size=arguments.batch_size,
        dtype=getattr(torch, arguments.dtype), overwrite=arguments.overwrite, resume=arguments.resume,
        device=_device(arguments.device),
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
    if arguments.out.exists() and not arguments.out.is_dir():  # now, not when the mixture is there
        raise ValueError(f"--out must be a folder, {arguments.out} is a file")
    _begin(arguments)
    fits = _fits(arguments, arguments.layer if harvested else [None])
    folders = {name: arguments.out / name if len(fits) > 1 else arguments.out for name in fits}
    for name, folder in folders.items():
        _check_mixture_folder(folder, arguments.overwrite)
        log = fits[name].get("log")
        if log is not None and log.is_file() and not (arguments.overwrite or arguments.resume):
            raise FileExistsError(f"--log: {log} is there already: --overwrite replaces it, or name another place")
    device = _device(arguments.device)
    missing = list(fits)
    interrupted = False
    with _processes(device) as first:
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
    if interrupted:
        lost = "".join(f", {folders[name]} missing" for name in missing)
        print(f"mfa-kernels fit: interrupted: what is saved is the best so far{lost}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _begin(arguments: argparse.Namespace) -> None:
    """Puts the mixture to go on from where its name was, and its numbers where there were none."""
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


def _told(report: FitReport) -> str:
    """What a fit came to, in a few words."""
    if report.held_out_nll is None:
        return "the last state, as nothing was held out"
    return (
        f"held-out negative log-likelihood {report.held_out_nll:.3f} nats per token (held out by {report.held_out_by})"
    )


def _fit_to_store(
    arguments: argparse.Namespace, fits: dict[str, dict[str, Any]], device: torch.device
) -> Iterator[tuple[str, Any]]:
    from mfa_kernels import fit
    from mfa_kernels.data import ActivationStore

    store = ActivationStore(arguments.store)
    if not store.complete:
        print(f"mfa-kernels fit: {store!r}: harvest --resume would bring the rest", file=sys.stderr)
    kept = ("model", "tokenizer", "model_fingerprint", "layer")
    extra: dict[str, Any] = {key: _shareable(key, store.meta[key]) for key in kept if key in store.meta}
    most = max(own["n_components"] for own in fits.values())
    if most > len(store):  # now, not when the others are done
        raise ValueError(f"--components must be at most the {len(store):,} rows of {arguments.store}, got {most}")
    for name, own in fits.items():
        mfa: Any
        if arguments.shard_components:
            mfa = _fit_sharded(arguments, store, device, own)
            mfa.local.extra.update(extra)
        else:
            mfa = fit(store, device=device, **own, **_fit_options(arguments))
            mfa.extra.update(extra)
        yield name, mfa
        if mfa.fit_report.interrupted:
            break


def _fit_sharded(
    arguments: argparse.Namespace, store: ActivationStore, device: torch.device, own: dict[str, Any]
) -> ShardedMFA:
    from mfa_kernels.fitting import fit_sharded

    options = _fit_options(arguments)
    if (options.pop("init"), options.pop("polish")) != ("pca", 0):
        raise ValueError("--shard-components starts from --init pca, and goes without --polish")
    del options["schedule"], options["lr"]
    options["noise"] = options["noise"] or "shared"
    return fit_sharded(store, device=device, **own, **options)


def _fit_while_harvesting(
    arguments: argparse.Namespace, fits: dict[str, dict[str, Any]], device: torch.device
) -> Iterator[tuple[str, Any]]:
    from mfa_kernels import fit_many, stream
    from mfa_kernels.models import load_language_model, origin, resolve_layer

    model, tokenizer = load_language_model(arguments.model)
    model.to(device)
    batches = stream(
        model, tokenizer, [Path(path) for path in arguments.text], arguments.layer, max_tokens=arguments.max_tokens,
        context=arguments.context, batch_size=arguments.windows, seed=arguments.seed,
    )  # fmt: skip
    mixtures = fit_many(batches, fits, **_fit_options(arguments))
    for name, mfa in mixtures.items():
        layer, _ = resolve_layer(model, fits[name]["layer"])
        mfa.extra |= {**origin(model, tokenizer), "layer": layer}
    yield from mixtures.items()


def _fits(arguments: argparse.Namespace, layers: Sequence[int | str | None]) -> dict[str, dict[str, Any]]:
    """By name, what each fit has of its own."""
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
    """What all fits have."""
    import torch

    names = (
        "method", "noise", "init", "start", "epochs", "polish", "batch_size", "lr", "schedule", "held_out",
        "eval_every", "precision", "seed", "checkpoint_seconds", "resume",
    )  # fmt: skip
    options = {name: getattr(arguments, name) for name in names}
    return {**options, "patience": arguments.patience or None, "dtype": getattr(torch, arguments.dtype)}


@contextmanager
def _processes(device: torch.device) -> Iterator[bool]:
    """Joins the processes that torchrun has started, if it has: whether this is the first."""
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
    from mfa_kernels import MFA
    from mfa_kernels.codes import write_codes
    from mfa_kernels.data import ActivationStore

    _check_out(arguments.out, arguments.out.exists(), arguments.overwrite)
    inputs = [path.resolve() for path in (arguments.store, Path(arguments.mfa))]
    if any(parent in inputs for parent in arguments.out.resolve().parents):
        raise ValueError(f"--out must not be in a folder that is read, got {arguments.out}")
    device = _device(arguments.device)
    mfa, store = MFA.from_pretrained(arguments.mfa, device=device), ActivationStore(arguments.store)
    _note_differences(arguments, mfa, store)
    done = write_codes(mfa, store, arguments.out, arguments.top_k)
    print(f"codes of {done.tokens:,} tokens in {arguments.out}: {done.pairs:,} active pairs of a token and a component")
    if done.without:
        print(f"{done.without:,} of them have no density under the mixture, and no component")


def _evaluate(arguments: argparse.Namespace) -> None:
    from mfa_kernels import MFA
    from mfa_kernels.data import ActivationStore
    from mfa_kernels.evaluation import evaluate, score_table

    mfa = MFA.from_pretrained(arguments.mfa, device=_device(arguments.device))
    store = ActivationStore(arguments.store)
    _note_differences(arguments, mfa, store)
    print(score_table(evaluate(mfa, store), mfa.n_components, f"activations of {arguments.store}"))
    if mfa.fit_report is not None and (fitted := mfa.fit_report.described().get("fitted")):
        print(f"The mixture was fitted: {fitted}")


def _steer(arguments: argparse.Namespace) -> None:
    import torch

    from mfa_kernels import MFA, steer
    from mfa_kernels.models import continuation
    from mfa_kernels.steering import live

    device = _device(arguments.device)
    mfa = MFA.from_pretrained(arguments.mfa, device=device)
    layer = mfa.extra.get("layer") if arguments.layer is None else arguments.layer
    if layer is None:
        raise _Incomplete("--layer: the mixture does not say which layer it was fitted to; name one")
    if arguments.gate is not None and arguments.component is None:
        raise ValueError("--gate needs --component, whose responsibility it looks at")
    gate = None if arguments.gate is None else (arguments.component, arguments.gate)
    latents = None if arguments.latents is None else torch.tensor(arguments.latents)
    model, tokenizer = _load_the_model_of(mfa, arguments)
    model.to(device)
    with steer(
        model, mfa, layer, arguments.component, arguments.alpha, latents,
        positions=arguments.positions, gate=gate, norm=arguments.norm,
    ) as handle:  # fmt: skip
        options = (arguments.prompt, arguments.max_new_tokens, arguments.temperature, arguments.seed)
        if arguments.live:
            live.stream(model, tokenizer, handle, arguments.component, *options)
        else:
            print(arguments.prompt + continuation(model, tokenizer, *options))


def _load_the_model_of(mfa: MFA, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer: --model, or what the mixture was fitted to. Which it is, and why, goes to standard error."""
    from mfa_kernels.models import fingerprint, load_language_model, remembered_model
    from mfa_kernels.sharing import local_name, shareable

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
        model, tokenizer = load_language_model(name, tokenizer=tokenizer)
    except (OSError, ValueError) as error:
        if arguments.model is not None:
            raise
        reason = str(error).strip().splitlines()[0]
        raise _Incomplete(
            f"--model: {own}, which the mixture was fitted to, cannot be loaded ({reason}); name another"
        ) from error
    expected, found = mfa.extra.get("model_fingerprint"), fingerprint(model)
    if isinstance(expected, str) and expected != found:
        print(
            f"mfa-kernels steer: {name} is of another architecture or size than the model that the mixture was fitted "
            f"to (fingerprint {found}, there {expected:.16})",
            file=sys.stderr,
        )
    return model, tokenizer


def _note_differences(arguments: argparse.Namespace, mfa: MFA, store: ActivationStore) -> None:
    """Says on standard error where a store is of another model or layer than the mixture was fitted to."""
    for what, name in (("model", "model"), ("model_fingerprint", "a model with the fingerprint"), ("layer", "layer")):
        own, given = (_shareable(what, place.get(what)) for place in (mfa.extra, store.meta))
        if None not in (own, given) and own != given:
            print(
                f"mfa-kernels {arguments.command}: the mixture is of {name} {own}, {arguments.store} of {given}",
                file=sys.stderr,
            )


def _shareable(what: str, said: Any) -> Any:
    """What a mixture or a store says of itself, models and tokenizers by the name that they may be told of."""
    from mfa_kernels.sharing import shareable

    return shareable(said) if what in ("model", "tokenizer") and isinstance(said, str) and said else said


def _convert(arguments: argparse.Namespace) -> None:
    from mfa_kernels import MFA

    if not arguments.input.exists():
        raise FileNotFoundError(f"input: {arguments.input} does not exist")
    if arguments.input.is_dir():
        _check_out(arguments.output, arguments.output.exists(), arguments.overwrite)
    else:
        _check_mixture_folder(arguments.output, arguments.overwrite)
    if arguments.input.is_dir():
        MFA.from_pretrained(arguments.input).to_reference_checkpoint(arguments.output, format=arguments.format)
    else:
        mfa = MFA.from_reference_checkpoint(arguments.input, eps_floor=arguments.eps_floor)
        mfa.save_pretrained(arguments.output)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
