"""The notebooks' own modules, for tests; without their extra, what imports this is skipped."""

import sys
from pathlib import Path

import pytest

COURSE = Path(__file__).parent.parent / "notebooks"
sys.path.insert(0, str(COURSE))
try:
    import checks
    import course
    import grade
    import run
except ModuleNotFoundError as error:
    if error.name.startswith("tinydance"):
        raise
    pytest.skip(f"{error}: pip install -e .[notebooks]", allow_module_level=True)

__all__ = ["COURSE", "checks", "course", "grade", "run"]
