"""The compiler and the kernels' code, where this processor lacks what the code is for."""

import platform
import subprocess

import pytest

from tidar_core.kernels import compiled

pytestmark = pytest.mark.skipif(
    compiled.compiler_here() is None or platform.machine() != "x86_64", reason="it takes a C compiler for x86"
)


@pytest.mark.parametrize("unit", ["attention.c", "products.c"])
def test_the_compiler_takes_the_code_with_matrix_instructions(unit):
    """Plain C accepts more: such an instruction is no expression."""
    own = ("-mamx-tile", "-mamx-bf16", "-mavx512f", "-mavx512bf16", "-mavx512vl", "-mavx512bw")
    command = [compiled.compiler_here(), *compiled.FLAGS, *own, "-S", "-o", "/dev/null", compiled.HERE / unit]
    subprocess.run(command, check=True, capture_output=True, timeout=compiled.SECONDS)
