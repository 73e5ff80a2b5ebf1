from pathlib import Path

import pytest


@pytest.fixture()
def shared_data() -> Path:
    path = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the shared data sets are not beside the repository")
    return path
