import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images: ECLIPSE_RAY_DATA, else ../shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ECLIPSE_RAY_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set ECLIPSE_RAY_DATA to run this test")
    return folder
