import io

import pytest

from eclipse_ray.storage.local import LocalFolder


@pytest.fixture
def ranges_read(monkeypatch) -> list[tuple[str, int, int]]:
    """The key and range of bytes of each read of a file on a disk through a Store."""
    ranges: list[tuple[str, int, int]] = []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            start = self.tell()
            count = super().readinto(buffer)
            ranges.append((self.key, start, start + count))
            return count

        def readall(self):
            start = self.tell()
            data = super().readall()
            ranges.append((self.key, start, start + len(data)))
            return data

    def opened(folder, key):
        file = Counting(folder.path(key))
        file.key = key
        return io.BufferedReader(file, 1)

    monkeypatch.setattr(LocalFolder, "open", opened)
    return ranges
