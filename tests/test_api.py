"""What `import graphfuse` gives."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["lazy.materialised", "ops.rms_norm"])
def test_reaches_its_modules_by_name(name):
    subprocess.run([sys.executable, "-c", f"import graphfuse; graphfuse.{name}"], check=True)
