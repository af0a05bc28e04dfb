"""Put-if-absent between processes, clean-up by another run, full disks, and complete listings on a local disk."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.storage import local
from eclipse_ray.storage.store import Store
from tests.storage.servers import race


def test_put_if_absent_between_processes_has_one_winner(tmp_path):
    race(str(tmp_path), 16, "fork")
    assert os.listdir(tmp_path) == ["claim"]


@pytest.mark.parametrize("operation", ["create", "write"])
def test_write_survives_another_runs_clean_up(tmp_path, operation, monkeypatch):
    """The clean-up of another run deletes the first temporary file."""
    swept = []
    original = local._write_temporary

    def write_temporary(path, data):
        original(path, data)
        if not swept:
            swept.append(path)
            os.unlink(path)

    monkeypatch.setattr(local, "_write_temporary", write_temporary)
    store = Store(str(tmp_path))
    getattr(store, operation)("data/x", b"1")
    assert len(swept) == 1
    assert store.read("data/x") == b"1"
    assert os.listdir(tmp_path / "data") == ["x"]


def test_listing_follows_links_but_not_in_circles(tmp_path):
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.png").write_bytes(b"12")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "src")
    (tmp_path / "src" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "src" / "a" / "loop").symlink_to(tmp_path / "src")
    (tmp_path / "src" / "a" / "self").symlink_to(tmp_path / "src" / "a")
    (tmp_path / "src" / "a" / "file.png").symlink_to(tmp_path / "other" / "1.png")
    (tmp_path / "src" / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "src" / "a" / "gone.png").symlink_to(tmp_path / "nothing")
    found = list(Store(str(tmp_path / "src")).list())
    # The link to a missing file is listed, so that reading it fails and it does not silently vanish.
    assert [entry.key for entry in found] == ["a/file.png", "a/gone.png", "linked/1.png"]
    assert (found[0].size, found[2].size) == (2, 2)


def test_listing_is_in_the_order_of_keys_and_streams(tmp_path):
    keys = ["a-b/1", "a.b", "a/x", "a/y/z", "a0", "b/é", "b/z", "z"]
    store = Store(str(tmp_path))
    for key in reversed(keys):
        store.write(key, b"")
    assert [entry.key for entry in store.list()] == sorted(keys)
    listing = store.list()
    assert next(listing).key == "a-b/1"
    store.delete("z")
    assert "z" not in [entry.key for entry in listing]


@pytest.fixture
def forbidden(tmp_path, monkeypatch):
    """A folder `secret` with a file `x`, neither of which may be read, as it is for anyone but root."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/x").write_bytes(b"1")

    def refusing(real):
        def call(path, *arguments, **options):
            if "/secret" in str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *arguments, **options)

        return call

    for name in ("scandir", "stat"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(local, "_File", refusing(local._File))


READS = {
    "read": lambda store: store.read("secret/x"),
    "part": lambda store: store.read_range("secret/x", 0, 1),
    "open": lambda store: store.open("secret/x"),
    "entry": lambda store: store.entry("secret/x"),
    "exists": lambda store: store.exists("secret/x"),
    "is a file": lambda store: Store(store.path("secret/x")).is_file(),
    "list": lambda store: list(store.list()),
    "list below": lambda store: list(store.list("secret")),
}


@pytest.mark.parametrize("reading", READS.values(), ids=READS)
def test_what_may_not_be_read_is_one_sentence_and_not_absent(tmp_path, forbidden, reading):
    with pytest.raises(StorageError, match=r"secret.*: not allowed to read it \(EACCES.*grant read permission"):
        reading(Store(str(tmp_path)))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file here fails when it is read")
@pytest.mark.parametrize("size", [-1, 1])
def test_a_disk_that_fails_while_a_file_is_read_is_named(size):
    with (
        Store("/proc/self").open("mem") as file,
        pytest.raises(StorageError, match=r"/mem: could not read it \(EIO"),
    ):
        file.read(size)


@pytest.mark.parametrize(
    ("key", "words"),
    [("loop/x", "lead in a circle|a part of this path|is a link to"), ("n" * 300, "too long to name a file")],
)
def test_a_name_that_cannot_be_is_named(tmp_path, key, words):
    (tmp_path / "loop").symlink_to("loop")
    store = Store(str(tmp_path))
    for call in (store.read, store.entry, store.exists, store.delete, lambda each: store.write(each, b"")):
        with pytest.raises(InputError, match=words):
            call(key)
    with pytest.raises(InputError, match="loop: its links lead in a circle"):
        list(store.list())


def test_a_file_in_place_of_a_folder_is_not_a_lost_race(tmp_path):
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(InputError):
        Store(str(tmp_path)).create("data/x", b"1")


LIMITED = """
import resource, sys
from eclipse_ray.storage.store import Store
from eclipse_ray.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    getattr(Store(sys.argv[1]), sys.argv[2])("data/x", bytes(2 << 20))
except StorageError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize("operation", ["create", "write"])
def test_a_file_that_may_not_grow_leaves_nothing_behind(tmp_path, operation):
    command = [sys.executable, "-c", LIMITED, str(tmp_path), operation]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "EFBIG" in done.stdout
    assert str(tmp_path / "data/x") in done.stdout
    assert os.listdir(tmp_path / "data") == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1 << 20


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 8 MB; the test is skipped if this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(store: Store, most: int) -> tuple[int, str]:
    """Create objects of 1 MiB until the store refuses; return their number and the error message."""
    for number in range(most):
        try:
            store.create(f"data/{number}", bytes(1 << 20))
        except StorageError as error:
            return number, str(error)
    pytest.fail(f"{most} MiB fit: no fault fired")


def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(small_disk):
    store = Store(str(small_disk))
    written, error = fill(store, 9)
    assert 4 <= written <= 8, "the disk did not fill as it should"
    assert "ENOSPC" in error
    assert f"data/{written}" in error
    assert sorted(os.listdir(small_disk / "data")) == sorted(map(str, range(written)))
    store.delete("data/0")
    assert store.create(f"data/{written}", bytes(1 << 20))


@pytest.mark.parametrize(("code", "words"), [(errno.EROFS, "EROFS"), (errno.ENOSPC, "ENOSPC")])
def test_a_refusing_disk_is_one_sentence(tmp_path, monkeypatch, code, words):
    fired = []

    def replace(source, target):
        fired.append(target)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StorageError, match=words):
        Store(str(tmp_path)).write("data/x", b"1")
    assert len(fired) == 1
    assert os.listdir(tmp_path / "data") == []


def test_a_disk_without_hard_links_is_refused_unless_there_is_one_writer(tmp_path, monkeypatch):
    fired = []

    def link(source, target):
        fired.append(target)
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StorageError, match="hard links"):
        Store(str(tmp_path)).probe()
    assert fired
    alone = Store(str(tmp_path), single_writer=True)
    alone.probe()
    assert alone.create("x", b"1")
    assert not alone.create("x", b"2")


def test_a_trial_of_a_folder_leaves_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_bytes(b"1")
    before = sorted(tmp_path.rglob("*"))
    for name in ("there", "full", "new/a/b"):
        Store(str(tmp_path / name)).require_writable()
        assert sorted(tmp_path.rglob("*")) == before
