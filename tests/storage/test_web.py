"""Files on a web server, which breaks answers: each part that is read of an open file is asked for again."""

import importlib
import io
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.storage import retries
from eclipse_ray.storage.retries import Patience
from eclipse_ray.storage.store import Store
from tests.datasets.helpers import noise, table_of, tar
from tests.storage.proxy import Fault, FaultProxy

IMAGES = noise(40)
LABELS = np.arange(40) % 4


class Web(ThreadingHTTPServer):
    """Sends the files of `folder`, whole or in parts; `parts` says whether it knows about parts at all."""

    daemon_threads = True
    folder: Path
    parts = True


class Answer(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        file = self.server.folder / self.path.partition("?")[0].strip("/")
        file = file / "index.html" if file == self.server.folder else file
        if not file.is_file():
            self.send_error(404)
            return
        data, status = file.read_bytes(), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.server.parts:
            data, status = data[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None], 206
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes" if self.server.parts else "none")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def web(tmp_path, monkeypatch) -> Iterator[Web]:
    monkeypatch.setattr(retries, "PATIENCE", Patience(tries=5, seconds=60, first_wait=0.001))
    with Web(("127.0.0.1", 0), Answer) as server:
        server.folder = tmp_path
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def broken(web) -> Iterator[FaultProxy]:
    with FaultProxy(web.server_port) as proxy:
        yield proxy
        proxy.shutdown()


SAVERS = {
    "npz": lambda file: np.savez(file, images=IMAGES, labels=LABELS),
    "npy": lambda file: np.save(file, IMAGES),
    "pt": lambda file: torch.save(torch.from_numpy(IMAGES), file),
    "parquet": lambda file: pq.write_table(table_of(IMAGES, LABELS, classes=list("abcd")), file),
    "tar": lambda file: tar(
        file, *((f"{n:02d}.png", encode_image(image, "png")) for n, image in enumerate(IMAGES))
    ),
}


@pytest.mark.parametrize("suffix", SAVERS)
def test_a_file_is_read_through_answers_that_break_off(suffix, web, broken, tmp_path):
    file = tmp_path / f"set.{suffix}"
    SAVERS[suffix](file)
    broken.faults += [
        Fault("cut", r"^Range: bytes", times=2),
        Fault("reset", r"^Range: bytes", times=1),
        Fault("error", r"^Range: bytes", times=1),
    ]
    found = load_images(f"{broken.url}/{file.name}", DataConfig())
    assert np.array_equal(found.images, IMAGES)
    assert broken.fired == {"cut": 2, "reset": 1, "error": 1}


def test_an_open_file_gives_any_part_and_a_server_that_never_answers_whole_is_named(web, broken, tmp_path):
    content = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "set.bin").write_bytes(content)
    with Store(broken.url).open("set.bin") as file:
        assert file.seek(-5, io.SEEK_END) == 299_995
        assert file.read() == content[-5:]
        file.seek(100)
        assert file.read(1000) == content[100:1100]
        assert file.read() == content[1100:]
        broken.faults.append(Fault("cut", r"^Range: bytes", times=99))
        file.seek(0)
        with pytest.raises(StorageError, match=r"/set.bin: could not read it: 5 tries"):
            file.read()


def test_an_address_that_does_not_name_a_file_says_what_to_do(web, tmp_path):
    SAVERS["npz"](tmp_path / "set.npz")
    for page in ("set", "index.html"):
        (tmp_path / page).write_text("<!DOCTYPE html>a list of files")
    url = f"http://127.0.0.1:{web.server_port}"
    for name in ("", "/", "/set", "/set/", "/*.npz"):
        with pytest.raises(InputError, match="names no file, and a web server cannot list a folder; name one"):
            open_source(f"{url}{name}", DataConfig())
    with pytest.raises(InputError, match=r"/set.npz\?download=true: .*cut off the \?"):
        open_source(f"{url}/set.npz?download=true", DataConfig())
    assert open_source(f"{url}/set.npz", DataConfig()).images == 40


def test_hugging_face_that_cannot_be_reached_or_named_is_one_sentence(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(retries, "PATIENCE", Patience(tries=3, seconds=60, first_wait=0.001))
    hub.HfFileSystem.clear_instance_cache()
    try:
        with pytest.raises(StorageError, match=r"foo/bar: could not read it: 3 tries .*ConnectError"):
            Store("hf://datasets/foo/bar").exists()
        with pytest.raises(InputError, match=r"hf://foo: is no location of this kind"):
            Store("hf://foo").exists()
    finally:
        hub.HfFileSystem.clear_instance_cache()


def test_a_server_that_knows_no_parts_sends_the_whole(web, tmp_path):
    web.parts = False
    SAVERS["npz"](tmp_path / "set.npz")
    with Store(f"http://127.0.0.1:{web.server_port}").open("set.npz") as file:
        assert file.read() == (tmp_path / "set.npz").read_bytes()
