"""Runs the tests that depend on transformers under several of its versions: `make test-matrix`.

Each version gets a virtual environment that sees everything of this one but transformers and what that version brings,
so that only these are installed. The environments are deleted afterwards.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
# The floor of ComfyUI and of this pack, the last of 4.x, and whatever is newest.
VERSIONS = ("transformers==4.50.3", "transformers==4.57.6", "transformers")
TESTS = (
    "tests/kernels/test_segmentation.py",
    "tests/kernels/test_detection.py",
    "tests/nodes/test_masks.py",
    "tests/nodes/test_captions.py",
)
SHOW = "import transformers, huggingface_hub; print(transformers.__version__, huggingface_hub.__version__)"


def make_environment(folder: Path, requirement: str) -> Path:
    """A virtual environment over this one with that transformers; returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    own = sysconfig.get_paths()["purelib"]
    # addsitedir, not the bare path: this pack itself is installed through a .pth file of that folder.
    line = f"import site; site.addsitedir({own!r})\n"
    Path(paths["purelib"], "below.pth").write_text(line, encoding="utf-8")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--upgrade", "--no-warn-conflicts", requirement], check=True
    )
    return python


def main() -> int:
    """Print one line a version; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requirements", nargs="*", default=VERSIONS, help="what to install, for example transformers")
    results = []
    for requirement in parser.parse_args().requirements:
        with tempfile.TemporaryDirectory(prefix="concept-atelier-matrix-") as folder:
            python = make_environment(Path(folder), requirement)
            found = subprocess.run([python, "-c", SHOW], capture_output=True, text=True, check=True).stdout.split()
            done = subprocess.run([python, "-m", "pytest", "-q", *TESTS], cwd=PACK, check=False)
            results.append((done.returncode, "transformers {}, huggingface_hub {}".format(*found)))
    for code, versions in results:
        print("passed" if code == 0 else "FAILED", versions)
    return sum(code != 0 for code, _ in results)


if __name__ == "__main__":
    sys.exit(main())
