"""Messages of the command line: in the words of its options, on one line, bars only on a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from mfa_kernels import fit
from mfa_kernels.commands import cli
from mfa_kernels.commands.cli import main
from mfa_kernels.commands.options import parser
from mfa_kernels.common.progress import of_libraries, quiet
from mfa_kernels.common.wording import in_options, of_error, told_warnings
from mfa_kernels.data.language_model import continuation, load_language_model
from mfa_kernels.fitting.notices import warn

OPTIONS = {"components": "-K/--components", "overwrite": "--overwrite", "resume": "--resume", "out": "--out"}
OPTIONS |= {"text": "--text", "mfa": "mfa", "seed": "--seed"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("n_components must be an integer >= 1, got 0", "-K/--components must be an integer >= 1, got 0"),
        ("n_components = 9 needs at least as many rows", "-K/--components = 9 needs at least as many rows"),
        ("n_clusters must be at most 3", "-K/--components must be at most 3"),
        ("K4-R2: n_components must be 3", "K4-R2: -K/--components must be 3"),
        ("folder_or_hub_id must be a folder", "mfa must be a folder"),
        ("a/b: give another, or overwrite=True", "a/b: give another, or --overwrite"),
        ("resume = True goes on", "--resume goes on"),
        ("resume: x is of a fit: here seed = 1, there 0; n_components = 4, there 8",
         "--resume: x is of a fit: here --seed = 1, there 0; -K/--components = 4, there 8"),
        ("texts[0] must be a text", "--text must be a text"),
        ("'x': no such file or folder (a text itself is given in a list)", "'x': no such file or folder"),
        ("rank must be 3", "rank must be 3"),  # of a command that has no such option
        ("store/seed must be read", "store/seed must be read"),
        ("one\n\n  two", "one two"),
    ],
)  # fmt: skip
def test_arguments_are_called_by_their_options(message, expected) -> None:
    assert in_options(message, OPTIONS) == expected


def test_errors_of_the_system_have_no_number(tmp_path) -> None:
    for mistake in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(OSError, match="Errno") as error:
            mistake.read_text()
        told = of_error(error.value, OPTIONS)
        assert told.startswith(f"{mistake}: ")
        assert "Errno" not in told
    assert of_error(PermissionError(13, "out: x cannot be written (so)"), OPTIONS) == "--out: x cannot be written (so)"
    assert of_error(ValueError(), OPTIONS) == "ValueError"


def test_every_option_that_is_translated_to_is_one(capsys) -> None:
    parsed = parser().parse_args(["fit", "store", "--out", "x", "-K", "3"])
    assert parsed.options["components"] == "-K/--components"
    assert parsed.options["max_tokens"] == "--max-tokens"
    assert parsed.options["store"] == "store"


def test_the_exit_statuses_are_in_the_help(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for words in ("Exit status: 0 ", "; 1 when", "; 2 when", "; 130 after Ctrl-C"):
        assert words in told


def test_what_python_is_told_the_command_line_is_not(tmp_path, capsys) -> None:
    (tmp_path / "file.pt").write_text("")
    assert main(["evaluate", str(tmp_path / "file.pt"), "store"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("mfa-kernels evaluate: mfa must be a folder")
    assert "`mfa-kernels convert` reads the paper's .pt files" in said


# Warnings


def test_warnings_of_ours_are_one_line(capsys) -> None:
    before = warnings.showwarning
    with told_warnings("fit", OPTIONS):
        fit(torch.cat([torch.zeros(300, 4), torch.randn(20, 4)]), 40, 1, epochs=0, held_out=0, progress=False)
        warn("fit: interrupted; the mixture is the best so far")
    assert warnings.showwarning is before
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("mfa-kernels fit: ") and "fit: fit:" not in line for line in lines)
    assert not any("interrupted" in line for line in lines), "the command says so itself, with what is saved"


def test_warnings_of_others_are_theirs(capsys) -> None:
    with pytest.warns(UserWarning, match="somebody else's") as caught, told_warnings("fit", OPTIONS):
        warnings.warn("somebody else's", stacklevel=1)
    assert caught[0].filename == __file__
    assert capsys.readouterr().err == ""


# Ctrl-C


@pytest.mark.parametrize("caught", ["pass", "raise RecursionError from None", "raise"])
def test_ctrl_c_while_python_imports(tmp_path, caught) -> None:
    """One line and 130, whatever is imported then, and whatever that makes of it."""
    (tmp_path / "torch.py").write_text(
        f"import time\ntry:\n print('importing', flush=True)\n time.sleep(30)\nexcept KeyboardInterrupt:\n {caught}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[2])])}
    program = (
        "import sys; sys.argv[0] = 'mfa-kernels'; from mfa_kernels.commands.cli import main; sys.exit(main(['doctor']))"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "mfa-kernels: interrupted\n")


def test_the_command_lines_module_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv[0] = 'mfa-kernels'; import mfa_kernels.commands.cli; "
        "print([n for n in ('torch', 'numpy', 'transformers') if n in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_importing_the_package_registers_the_operators() -> None:
    code = "import mfa_kernels, torch; print(torch.ops.mfa_kernels.log_prob.default.name())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "mfa_kernels::log_prob\n"


def test_what_the_package_holds_comes_with_its_first_use() -> None:
    code = (
        "import sys; sys.argv[0] = 'mfa-kernels'; import mfa_kernels as m; assert 'torch' not in sys.modules; "
        "print(m.MFA.__module__, m.Code.__module__, m.functional.__name__, m.fit.__module__, hasattr(m, 'nothing'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [
        "mfa_kernels.mixture.mfa", "mfa_kernels.mixture.codes", "mfa_kernels.functional",
        "mfa_kernels.fitting.fit", "False",
    ]  # fmt: skip


def test_ctrl_c_that_an_import_turns_into_an_error(monkeypatch, capsys) -> None:
    def report() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ImportError("half a module") from None

    monkeypatch.setattr("mfa_kernels.commands.doctor.report", report)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["doctor"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "mfa-kernels doctor: interrupted\n"


# Loading


def test_loading_a_model_shows_bars_where_ours_are_shown(monkeypatch, capsys) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    load_language_model()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    seen = []
    for asked in (False, True):
        with quiet(asked), of_libraries():
            seen.append((logging.is_progress_bar_enabled(), are_progress_bars_disabled()))
        assert logging.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
    assert seen == [(True, False), (False, True)]
    logging.disable_progress_bar()
    try:
        for asked in (False, True):
            with quiet(asked), of_libraries():
                assert not logging.is_progress_bar_enabled()
            assert not logging.is_progress_bar_enabled(), "whoever has switched them off has them off"
    finally:
        logging.enable_progress_bar()


def test_a_download_of_a_mixture_shows_bars_where_ours_are_shown(monkeypatch, tmp_path) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    from mfa_kernels import MFA

    seen = []

    def download(source, name, **_):
        seen.append(are_progress_bars_disabled())
        return tmp_path / name

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    MFA(3, 4, 1).save_pretrained(tmp_path)
    MFA.from_pretrained("maker/mixture")
    assert seen == [True, True]
    assert not are_progress_bars_disabled()


@pytest.mark.more
@pytest.mark.parametrize("chosen", ["0", "1"])
def test_who_has_decided_on_bars_hears_nothing_of_it(chosen) -> None:
    code = (
        "from huggingface_hub.utils import are_progress_bars_disabled as hidden; from mfa_kernels.models import *; "
        "before = hidden(); load_language_model(); print(before == hidden())"
    )
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": chosen}
    out = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", code], capture_output=True, text=True, env=environment
    )
    assert out.stdout == "True\n"
    assert "progress bars" not in out.stderr


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        (3, TypeError, "name must be the name or the folder of a model, got 3"),
        (
            "{}/mixture",
            ValueError,
            "name must be the name or the folder of a language model, .*/mixture holds a mixture",
        ),
        (Path("no/such/folder"), FileNotFoundError, "name: there is no folder no/such/folder"),
        ("{}/empty", OSError, r"name: '.*/empty' cannot be loaded \([^\n]*\)$"),
    ],
)
def test_a_model_that_is_none(tmp_path, name, error, told) -> None:
    fit(torch.randn(20, 4), 2, 1, epochs=0, progress=False).save_pretrained(tmp_path / "mixture")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=told):
        load_language_model(name.format(tmp_path) if isinstance(name, str) else name)


# Steering


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"seed": 10**20}, "seed must be an integer <="),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"new_tokens": 0}, "new_tokens must be an integer >= 1"),
        ({"prompt": 3}, "prompt must be a string"),
    ],
)
def test_how_a_continuation_is_sampled_is_checked(arguments, told) -> None:
    model, tokenizer = load_language_model()
    with pytest.raises((ValueError, TypeError), match=told):
        continuation(model, tokenizer, **{"prompt": "def", "new_tokens": 1, **arguments})


def test_steering_that_leaves_what_floats_can_hold_is_an_error(tmp_path, capsys) -> None:
    mfa = fit(torch.randn(400, 256), 2, 1, epochs=0, progress=False)
    mfa.extra = {"model": "tiny_lm", "layer": "model.layers.2"}
    mfa.save_pretrained(tmp_path)
    command = ["steer", str(tmp_path), "def", "-k", "1", "--max-new-tokens", "2", "--alpha"]
    for alpha in ("1e30", "1e38"):
        assert main([*command, alpha]) == 1
        out, error = capsys.readouterr()
        assert out == ""
        assert "makes steered activations whose squared norm is not finite in torch.float32" in error
    assert main([*command, "0.5"]) == 0
    assert "layer" not in capsys.readouterr().err
    for layer in ("2", "model.layers.2", "-3"):
        assert main([*command, "0.5", "--layer", layer]) == 0
        assert "is of layer" not in capsys.readouterr().err
    assert main([*command, "0.5", "--layer", "1"]) == 0
    told = "mfa-kernels steer: the mixture is of layer model.layers.2, --layer names model.layers.1"
    assert told in capsys.readouterr().err
