"""C++ that is built at its first use for this machine's processor and called through ctypes."""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

# -O3 takes five times as long to build what is then as fast.
FLAGS = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native", "-std=c++17"]
FLAGS += ["-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]


def load(source: Path) -> ctypes.CDLL | None:
    """The library made of `source`, a .cpp file, and the headers beside it; None on Windows, and,
    with one line in the log, where it cannot be built."""
    if sys.platform == "win32":
        return None
    try:
        return ctypes.CDLL(str(build(source)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning(
            "%s not built, using plain torch (slower): %s", source.name, str(reason).strip()[:300]
        )
        return None


def build(source: Path) -> Path:
    """Compiles for this processor, or finds what an earlier process compiled."""
    compiler = os.environ.get("CXX", "g++")
    files = [source, *sorted(source.parent.glob("*.h"))]
    made_of = [*(f.read_text() for f in files), compiler, *FLAGS, processor()]
    name = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pytitans"
    library = folder / f"{source.stem}-{name}.so"
    if not library.exists():
        logger.info("building %s, once for this machine: %s", source.name, library)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "library.so"
            command = [compiler, *FLAGS, str(source), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(library)  # in one step: another process may be doing the same
    return library


def processor() -> str:
    """What -march=native depends on: a cache directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x for x in lines if x.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()
