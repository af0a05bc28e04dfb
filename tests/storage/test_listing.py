"""Listings of any length use one request per page, hold one page in memory, and end only where the store ends."""

import tracemalloc
from types import SimpleNamespace

import pytest

from eclipse_ray.errors import StorageError
from eclipse_ray.storage.s3 import S3Folder


class Pages:
    """Replaces a connected s3fs filesystem whose bucket has `count` objects."""

    def __init__(self, count: int, host: str = "s3.eu-north-1.amazonaws.com", **last_word: object) -> None:
        self.count = count
        self.calls = 0
        self.s3 = SimpleNamespace(meta=SimpleNamespace(endpoint_url=f"https://{host}"))
        self.last_word = last_word

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def call_s3(self, method: str, parameters: dict[str, str], Bucket: str) -> dict[str, object]:
        assert (method, Bucket, parameters["Prefix"]) == ("list_objects_v2", "bucket", "deep/folder/")
        start = int(parameters.get("ContinuationToken", 0))
        stop = min(start + 1000, self.count)
        keys = [{"Key": f"deep/folder/{i:07d}", "Size": i, "ETag": f'"{i}"'} for i in range(start, stop)]
        self.calls += 1
        more = {"IsTruncated": stop < self.count, "NextContinuationToken": str(stop)}
        return {"Contents": keys, **more, **self.last_word}


def test_thirty_thousand_keys_take_thirty_requests_and_a_page_of_memory():
    pages = Pages(30_000)
    tracemalloc.start()
    listed = sum(1 for entry in S3Folder(pages, "bucket/deep").walk("folder", hidden=False) if entry.size >= 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert listed == 30_000
    assert pages.calls == 30
    assert peak < 2 * 2**20


def test_keys_are_relative_to_the_store():
    entry = next(S3Folder(Pages(1), "bucket/deep").walk("folder", hidden=True))
    assert (entry.key, entry.version) == ("folder/0000000", "0")


@pytest.mark.parametrize("token", [None, "1000"])
def test_a_listing_that_does_not_say_how_it_goes_on_is_an_error(token):
    pages = Pages(5000, NextContinuationToken=token, IsTruncated=True)
    with pytest.raises(StorageError, match="goes on"):
        list(S3Folder(pages, "bucket/deep").walk("folder", hidden=False))
    assert pages.calls <= 3


class Backwards(Pages):
    """A store that does not list in sorted order."""

    def call_s3(self, method: str, parameters: dict[str, str], Bucket: str) -> dict[str, object]:
        page = super().call_s3(method, parameters, Bucket)
        return {**page, "Contents": page["Contents"][::-1]}


def test_a_store_with_an_order_of_its_own_is_put_in_order():
    pages = Backwards(2500, host="127.0.0.1:8333")
    assert [entry.size for entry in S3Folder(pages, "bucket/deep").walk("folder", False)] == list(range(2500))
    with pytest.raises(StorageError, match="lists folder/0000998 after folder/0000999"):
        list(S3Folder(Backwards(2500), "bucket/deep").walk("folder", False))
