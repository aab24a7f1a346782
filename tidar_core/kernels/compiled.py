"""Library of the kernels in C, compiled for the processor that runs them.

Where does a process get the C kernels from?

The first process on a machine compiles the sources beside this file with the machine's C compiler, which takes seconds.
Later ones load the library from the user's cache. Its name holds a digest of sources, compiler and processor, so a
library of another processor is never loaded. Without a compiler there are no C kernels: see `library`.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

__all__ = ["build", "compiler_here", "library", "load", "needed_library", "words_together"]

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
SOURCES = (
    "numbers.h", "tiles.h", "kernels.h", "product_form.h", "product_inputs.h", "product_sums.h", "attention_rows.h",
    "attention_part.h", "products.c", "layer.c", "attention.c", "layers.c", "drafts.c", "loss.c", "gradients.c",
    "mask_attention.c",
)  # fmt: skip
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
COMPILERS = ("cc", "gcc", "clang")
SECONDS = 120
"""Time that a compiler may take."""
P, N, B, X = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
PRODUCT = (P, P, N, N, P, N, P, B, P)
MASKS = (*5 * (P,), *5 * (N,), P, P, *6 * (N,), B)
SIGNATURES = {
    "product_fp32": PRODUCT,
    "product_bf16": PRODUCT,
    "product_int4": PRODUCT,
    "product_int8": (P, P, *PRODUCT[1:]),
    "add_product": (P, N, N, P, N, P, N, B),
    "linked_drafts": (P, P, P, P, P, N, N, N, N, B, P),
    "low_rank": (P, P, N, N, N, P, P, N, N, N, B),
    "add_rms_norm": (P, P, P, B, X, N, N, B, P, P),
    "rotate_and_store": (P, P, P, P, P, P, N, N, N, N, N, N, X, B),
    "silu_mul": (P, N, N, B, P),
    "likeliest": (P, N, N, N, N, B, P),
    "losses_forward": (P, P, P, P, N, N, X, X, B, P, P, P, P),
    "losses_backward": (P, P, P, P, N, N, X, X, B, P, P, P, P),
    "rms_norm_gradient": (P, P, P, X, N, N, B, P),
    "silu_mul_gradient": (P, P, N, N, B, P),
    "rotate": (P, N, P, P, N, N, N, X, B, P),
    "mask_attention": (*MASKS, P, P),
    "mask_attention_gradient": (*MASKS, *6 * (P,)),
    "layers": (P, N, N, P, P, P, N, P, N, P),
    "paged_attention": (P, P, P, N, N, P, N, P, N, N, P, P, N, N, N, N, N, B, P),
}
"""Types of the arguments of each function; no function returns anything."""


@cache
def library() -> ctypes.CDLL | None:
    """The C kernels; None, with one line in the log, where they cannot be had.

    They need Linux and a C compiler: the one that CC names, or cc, gcc or clang.
    """
    if platform.system() != "Linux":
        return None
    try:
        return load(_compiled())
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1])
        logger.warning("no C kernels, work on the CPU is slower: %s", reason)
        return None


def compiler_here() -> str | None:
    """Path of the C compiler: the one that CC names, or cc, gcc or clang."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", ""), *COMPILERS))), None)


def load(path: Path) -> ctypes.CDLL:
    """The C kernels of a file that `build` made; OSError if it cannot be loaded."""
    found = ctypes.CDLL(str(path))
    found.start()
    for name, types in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    return found


def build(compiler: str, path: Path, *flags: str) -> None:
    """Compile the C kernels into a file, which appears whole or not at all, whoever else compiles it.

    Raises subprocess.SubprocessError where the compiler fails.

    flags  given to the compiler after `FLAGS`
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        units = [HERE / source for source in SOURCES if source.endswith(".c")]
        objects = [Path(folder, unit.name).with_suffix(".o") for unit in units]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda unit, made: _call(compiler, *FLAGS, *flags, "-c", unit, "-o", made), units, objects))
        # Not linked to an OpenMP of its own: it would keep threads beside torch's.
        _call(compiler, "-shared", *objects, "-lm", "-o", Path(folder, path.name))
        Path(folder, path.name).replace(path)


def needed_library() -> ctypes.CDLL:
    """The C kernels, of a caller that has seen that there are some."""
    found = library()
    assert found is not None, "there are no C kernels here"
    return found


def words_together() -> int:
    """Divisor of the words of 32 bits that `products.c` reads for each output channel; 16 with matrix instructions."""
    return ctypes.c_int.in_dll(needed_library(), "words_together").value


def _compiled() -> Path:
    """Path of the library; compiles it if it is not in the cache."""
    compiler = compiler_here()
    if compiler is None:
        raise OSError("no C compiler was found; install gcc, or name a compiler in CC")
    path = _folder() / f"kernels-{_digest(compiler)}.so"
    if not path.exists():
        build(compiler, path)
    return path


def _call(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)


def _folder() -> Path:
    """Folder of this user's compiled kernels; the system's temporary folder where there is no home to write to."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    for place in (Path(cache_home).expanduser(), Path(tempfile.gettempdir(), f"tidar-{os.getuid()}")):
        folder = place / "tidar"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise OSError("no folder of this user's to keep the compiled kernels in; set XDG_CACHE_HOME")


def _digest(compiler: str) -> str:
    """Digest of all that the library's code follows from."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update((HERE / source).read_bytes())
    made = Path(compiler).resolve()
    digest.update(f"{made} {made.stat().st_size} {made.stat().st_mtime_ns} {FLAGS}".encode())
    about = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    digest.update(
        "\n".join(line for line in about.splitlines() if line.startswith(("model", "flags", "Feat"))).encode()
    )
    return digest.hexdigest()[:16]
