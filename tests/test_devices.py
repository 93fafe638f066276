import pathlib
import sys

import numpy as np
import pytest
import torch

from devices import peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("status", [None, "Name: python\n"])
def test_peak_memory_of_a_process(monkeypatch, status):
    """Not less than what it holds; also where the kernel gives no VmHWM."""
    held = np.ones(25_000_000)  # 200 MB
    if status:
        monkeypatch.setattr(pathlib.Path, "read_text", lambda path: status)
    assert held.nbytes < peak_memory(torch.device("cpu")) < 2**40
