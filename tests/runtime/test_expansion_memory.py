"""What expanding takes beyond its result, as the system counts it in a fresh process."""

from __future__ import annotations

import sys

import pytest

MEASURE = """
import sys
import numpy as np
from regrow_runtime import Adapter, BasisCache, Coefficients, Target
from regrow_format.methods import get_method

def rss(kind):
    for line in open('/proc/self/status'):
        if line.startswith(kind):
            return int(line.split()[1]) * 1024

def adapter(k, storage):
    targets = tuple(Target(f'layer.{i:02}', 768, 768) for i in range(24))
    config = {'k': k, 'l': k, 'rank': 8, 'c': 1.0, 'shared': True}
    constants = nola.constants(config, targets)
    values = {}
    for name, shape in nola.layout(config, targets).items():
        ones = np.ones(shape, np.float32)
        values[name] = Coefficients.store(ones, constants[name], storage)
        del ones
    return Adapter('nola', config, 7, 'sha256:x', targets, values, storage)

nola = get_method('nola')
nola.expand(adapter(8, sys.argv[2]), BasisCache(0))  # makes what stays for the whole process
user = adapter(int(sys.argv[1]), sys.argv[2])
open('/proc/self/clear_refs', 'w').write('5')  # the peak is from now on
before = rss('VmRSS')
found = nola.expand(user, BasisCache(0))
peak = rss('VmHWM') - before
parts = [parts for kinds in found.values() for parts in kinds.values()]
print(peak - sum(array.nbytes for one in parts for array in one.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("storage", ["int4", "fp16"])
@pytest.mark.parametrize("k", [100, 1000, 60_000])
def test_expanding_takes_less_than_32_mb_over_its_result(python, k, storage):
    found = python(MEASURE, str(k), storage)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 32e6
