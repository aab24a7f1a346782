"""The kernels, compiled for other processors than this one.

Matrix instructions are computed by plain C (`matrix_instructions.h`). The instructions of processors with shorter
registers are among this one's.
"""

import ctypes
import platform
from pathlib import Path

import attending
import pytest

from tidar_core.kernels import compiled

INSTRUCTIONS = Path(attending.__file__).with_name("matrix_instructions.h")
PROCESSORS = {
    "with matrix instructions": ("-include", str(INSTRUCTIONS)),
    "with registers of 8 numbers": ("-mno-avx512f",),
    "with registers of 4 numbers": ("-mno-avx",),
}


@pytest.fixture(scope="session", params=PROCESSORS)
def processor(request, tmp_path_factory):
    """Name of a processor, and its kernels."""
    compiler, flags = compiled.compiler_here(), PROCESSORS[request.param]
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("it takes a C compiler and an x86 processor")
    if "matrix" in request.param and "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("it takes a processor that multiplies pairs of bf16")
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    compiled.build(compiler, path, *flags)
    found = compiled.load(path)
    if "matrix" in request.param:
        ctypes.c_int.in_dll(found, "matrices").value = 1  # this processor refused
    return request.param, found
