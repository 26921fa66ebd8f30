#!/usr/bin/env python3
"""Sets up the project's environment, if that is not done yet, and runs a command in it.

    python3 run.py papermill nbs/train.ipynb out.ipynb -p depth 8
    python3 run.py test                    every check: see CHECKS below
    python3 run.py jupyter lab             any other command
    python3 run.py --gpu COMMAND ...       the same with faiss-gpu instead of faiss-cpu

Needs only Python 3.11 or newer. The environment is the folder .venv; it is made again when pyproject.toml or
constraints.txt change. Everything is installed at the versions of constraints.txt.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")

# Name, command, and the folder that the command must leave as it is (None: it may write). Notebooks run one after the
# other per core, so every process gets one thread.
CLUSTERS = [f"tests/test_{name}.py" for name in ("distributed", "sharded", "sweeps")]
CHECKS = [
    ("the package is what the notebooks export", ["nbdev_export"], "hiernb"),
    ("the notebooks are clean", ["nbdev_clean"], "nbs"),
    ("the README is what nbs/index.ipynb says", [sys.executable, "scripts/readme.py"], "README.md"),
    ("lint", ["ruff", "check", "."], None),
    ("the notebooks run (nbdev_test)", ["nbdev_test", "--n_workers", "2"], None),
    ("pytest", ["pytest", "-q", "-n", "2", "tests", *(f"--ignore={path}" for path in CLUSTERS)], None),
    ("pytest of ranks and of clusters, which need both cores", ["pytest", "-q", *CLUSTERS], None),
    ("the site builds: no broken link, no error among the outputs", [sys.executable, "scripts/site.py"], None),
]


def ready_mark(extra: str) -> str:
    "Changes whenever the environment has to be made again."
    recipe = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    return f"{extra} {sys.version_info[:2]} {hashlib.sha256(recipe).hexdigest()}"


@contextlib.contextmanager
def locked():
    "One set-up at a time, also when two commands are started at once."
    with open(ROOT / ".venv.lock", "w") as f:
        if os.name != "nt":
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def set_up(extra: str) -> None:
    "Makes .venv and installs the project into it; does nothing if that is done already."
    stamp = VENV / "ready"
    with locked():
        if stamp.is_file() and stamp.read_text() == ready_mark(extra):
            return
        print(f"Setting up {VENV} (once; a few minutes) ...", flush=True)
        stamp.unlink(missing_ok=True)
        if not (BIN / "python").exists() and not (BIN / "python.exe").exists():
            shutil.rmtree(VENV, ignore_errors=True)
            venv.create(VENV, with_pip=True)
        pip = [str(BIN / "python"), "-m", "pip", "--disable-pip-version-check"]
        other = "faiss-cpu" if extra == "gpu" else "faiss-gpu"  # both are the module `faiss`; only one may be there
        subprocess.run([*pip, "uninstall", "-q", "-y", other], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        subprocess.run([*pip, "install", "-q", "-c", "constraints.txt", "-e", f".[dev,{extra}]"], check=True, cwd=ROOT)
        stamp.write_text(ready_mark(extra))


def environment(**more: str) -> dict[str, str]:
    "The variables of a command in the environment."
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    return os.environ | {"PATH": path, "VIRTUAL_ENV": str(VENV), "TOKENIZERS_PARALLELISM": "false"} | more


def fingerprint(name: str) -> str:
    "Content of a file, or of all files of a folder that are source."
    path = ROOT / name
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".py", ".ipynb"))
    return hashlib.sha256(b"".join(p.relative_to(ROOT).as_posix().encode() + p.read_bytes() for p in files)).hexdigest()


def test() -> int:
    "Runs every check and says which failed."
    env = environment(HF_HUB_OFFLINE="1", MPLBACKEND="agg", OMP_NUM_THREADS="1", PYTHONHASHSEED="0")
    failed = []
    for name, command, unchanged in CHECKS:
        print(f"--- {name}: {Path(command[0]).name} {' '.join(command[1:])}", flush=True)
        command = [str(BIN / "python"), *command[1:]] if command[0] == sys.executable else command
        before, start = unchanged and fingerprint(unchanged), time.monotonic()
        code = subprocess.run([shutil.which(command[0], path=env["PATH"]) or command[0], *command[1:]], cwd=ROOT, env=env).returncode
        if unchanged and fingerprint(unchanged) != before:
            print(f"{command[0]} changed {unchanged}: look at `git diff {unchanged}` and commit what is right.")
            code = 1
        if code:
            failed.append(name)
        print(f"--- {'FAILED' if code else 'ok'} after {time.monotonic() - start:.0f} s\n", flush=True)
    print("Failed: " + "; ".join(failed) if failed else "All checks passed.", flush=True)
    return bool(failed)


def main(args: list[str]) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036  (this file is run by whatever Python there is)
        sys.exit(f"run.py needs Python 3.11 or newer; this is {sys.version.split()[0]}")
    extra = "gpu" if args[:1] == ["--gpu"] else "cpu"
    args = args[extra == "gpu" :]
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    set_up(extra)
    if args == ["test"]:
        return test()
    env = environment()
    found = shutil.which(args[0], path=env["PATH"])
    if found is None:
        sys.exit(f"{args[0]}: no such command in {BIN} or on the PATH")
    return subprocess.run([found, *args[1:]], env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
