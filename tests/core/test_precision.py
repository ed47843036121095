"""Whichever interface allowed TF32, comparisons do without it and leave it as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest

ALLOWED = {
    "nothing": "pass",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "allow": "torch.backends.cuda.matmul.allow_tf32 = True",
    "newer": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "everywhere": "torch.backends.fp32_precision = 'tf32'",
}
SCRIPT = """
import warnings
warnings.simplefilter("error")
import torch
from koat.core.precision import exact_products
{allow}
matmul = torch.backends.cuda.matmul
def read():
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return matmul.fp32_precision
before = read()
try:
    with exact_products():
        assert getattr(matmul, "fp32_precision", "none") in ("none", "ieee")
        assert not matmul.allow_tf32
        raise KeyError
except KeyError:
    pass
assert read() == before, (before, read())
print(before)
"""


@pytest.mark.parametrize("allow", ALLOWED)
def test_products_are_exact_within_and_as_they_were_after(allow) -> None:
    if allow in ("newer", "everywhere"):
        torch = pytest.importorskip("torch", minversion="2.9", reason="the newer interface")
        assert hasattr(torch.backends, "fp32_precision")
    # In a process of its own: what one interface has set, the other refuses to read ever after.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(allow=ALLOWED[allow])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip() == "highest") == (allow == "nothing")
