import io
import json
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.data import extensions

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import parquet
from eclipse_ray.datasets.formats import Source, open_source, read_labels, read_parts, refuse_repeated_ids
from eclipse_ray.datasets.images import decode_image
from eclipse_ray.datasets.memory import require_classes
from eclipse_ray.datasets.table import canonical_table, image_bytes, table_to_parquet
from eclipse_ray.errors import InputError
from tests.datasets.helpers import CONFIG, PNG, noise, read_all, read_rows, refused


def put(folder, table, name="x.parquet"):
    pq.write_table(table, folder / name)
    return str(folder)


@settings(max_examples=40)
@given(ids=st.lists(st.text(max_size=8), min_size=1, max_size=20, unique=True), data=st.data())
def test_canonical_tables_survive_the_file(tmp_path_factory, ids, data):
    folder = tmp_path_factory.mktemp("canonical")
    count = len(ids)
    encoded = data.draw(st.lists(st.binary(max_size=9), min_size=count, max_size=count))
    labels = data.draw(st.lists(st.none() | st.integers(0, 9), min_size=count, max_size=count))
    extras = pa.table({"weight": list(range(count)), "tags": [["a"]] * count})
    table = canonical_table(ids, encoded, labels, extras, [str(n) for n in range(10)])
    (folder / "a.parquet").write_bytes(table_to_parquet(table))
    again = read_all(str(folder))
    assert again.equals(table)
    assert open_source(str(folder), CONFIG).classes == [str(n) for n in range(10)]


def test_hugging_face_file_gets_ids_by_row(tmp_path):
    images = [{"bytes": PNG, "path": f"{n}.png"} for n in range(5)]
    put(tmp_path, pa.table({"img": images, "fine": pa.array(range(5), pa.int8())}))
    rows = read_all(tmp_path, image_column="img", label_column="fine").slice(3)
    assert rows["id"].to_pylist() == ["x.parquet#3", "x.parquet#4"]
    assert rows["label"].to_pylist() == [3, 4]
    assert rows["image"].to_pylist()[0] == {"bytes": PNG, "path": "3.png"}
    assert rows.column_names == ["id", "image", "label"]


STRUCT, LIST = pa.struct([("path", pa.string()), ("bytes", pa.binary())]), pa.list_(pa.string())


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), STRUCT])
def test_images_without_labels_of_which_one_is_missing(tmp_path, kind):
    image, path = ({"bytes": PNG, "path": "p"}, "p") if kind == STRUCT else (PNG, None)
    rows = read_all(put(tmp_path, pa.table({"image": pa.array([None, image], kind)})))
    assert rows.column_names == ["id", "image"]
    assert rows["image"].to_pylist() == [{"bytes": b"", "path": None}, {"bytes": PNG, "path": path}]


@settings(max_examples=40)
@given(start=st.integers(0, 40), length=st.integers(1, 40), group=st.integers(1, 17))
def test_any_row_range_across_row_groups(tmp_path_factory, start, length, group):
    folder = tmp_path_factory.mktemp("groups")
    stop = min(41, start + length)
    pq.write_table(
        canonical_table([str(n) for n in range(41)], [b"x"] * 41), folder / "a.parquet", row_group_size=group
    )
    rows = read_parts(Source(str(folder), "parquet", None, CONFIG), [("a.parquet", start, stop)])
    assert rows["id"].to_pylist() == [str(n) for n in range(start, stop)]


@pytest.mark.parametrize(
    ("columns", "settings", "words"),
    [
        ({"Images": [PNG], "label": [1]}, {}, ["Images, label", "data.image_column=Images"]),
        *(({"image": [PNG], "label": [label]}, {}, ["labels"]) for label in (1.5, [1, 2], ["a", "b"])),
        *(({"image": [PNG], "label": [label]}, {}, ["data.labels=none"]) for label in (None, True)),
        ({"image": [PNG], "label": [{"a": 1}]}, {}, ["whole numbers or names"]),
        ({"image": ["path.png"]}, {}, ["encoded images"]),
        ({"image": [PNG], "fine_label": [1]}, {"label_column": "fine"}, ["data.label_column=fine_label"]),
    ],
)
def test_columns_that_do_not_fit_say_what_to_do(tmp_path, columns, settings, words):
    refused(put(tmp_path, pa.table(columns)), *words, **settings)


@pytest.mark.parametrize(("stored", "kind"), [(["a"], "list"), ({"a": 1}, "struct"), (b"\xff", "binary")])
def test_ids_that_are_no_text_are_named_with_their_type(tmp_path, stored, kind):
    url = put(tmp_path, pa.table({"id": [stored], "image": [PNG]}))
    refused(url, f"x.parquet: column 'id' holds {kind}", "expected text", "rename the column", reading=True)
    with pytest.raises(InputError, match="column 'id' holds"):
        refuse_repeated_ids(open_source(url, CONFIG))


def test_paths_of_images_that_are_no_text_are_named(tmp_path):
    url = put(tmp_path, pa.table({"image": [{"bytes": PNG, "path": ["a"]}]}))
    refused(url, "column 'image.path' holds list", reading=True)


UNREAD = [pa.nulls(2), pa.array([True, False]), pa.array([{"a": 1}, {"a": 2}]), pa.array([0.5, 1.5])]


@pytest.mark.parametrize("label", UNREAD)
def test_a_column_of_labels_that_is_not_read_may_be_left_out_or_replaced(tmp_path, label, capsys):
    url = put(tmp_path, pa.table({"image": [PNG] * 2, "label": label, "label_id": [1, 0], "n": [7, 8]}))
    table = read_all(url, labels="none")
    assert table.column_names == ["id", "image", "label_id", "n"]
    assert "left out" not in capsys.readouterr().err
    assert read_all(url, label_column="label_id", extra_columns="drop")["label"].to_pylist() == [1, 0]
    assert "left out" not in capsys.readouterr().err
    table = read_all(url, label_column="label_id")
    assert (table.column_names, table["label"].to_pylist()) == (["id", "image", "label", "n"], [1, 0])
    said = f"{url}: column 'label' is left out, because column 'label_id' takes its name"
    assert said in capsys.readouterr().err
    # Nor do names of classes in the footers matter, which would contradict each other.
    for number, names in enumerate((["x", "y"], ["y", "x"])):
        one = canonical_table([f"{number}"], [PNG], [5], None, names)
        (tmp_path / f"{number}.parquet").write_bytes(table_to_parquet(one))
    assert open_source(f"{url}/?.parquet", DataConfig(labels="none")).classes is None


def test_a_column_whose_name_the_images_take_is_left_out_and_said(tmp_path, capsys):
    url = put(tmp_path, pa.table({"img": [PNG], "image": ["0.png"]}))
    assert image_bytes(read_all(url, image_column="img")) == [PNG]
    assert "column 'image' is left out, because column 'img' takes its name" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["labels", "targets", "fine_label", "Class"])
def test_a_column_that_may_hold_the_labels_is_named(tmp_path, name, capsys):
    url = put(tmp_path, pa.table({"image": [PNG] * 2, "target": [{"a": 1}] * 2, "box": [1, 2], name: [1, 0]}))
    source = open_source(url, CONFIG)
    said = f"{url}: read without labels; {name!r} may hold them: --set data.label_column={name}"
    assert said in capsys.readouterr().err
    with pytest.raises(InputError, match=rf"has no labels .* with --set data\.label_column={name}, sort"):
        require_classes(url, source)
    config = DataConfig(label_column=name)
    assert require_classes(url, open_source(url, config)).tolist() == [1, 0]
    open_source(url, DataConfig(labels="none"))
    assert "may hold" not in capsys.readouterr().err


def test_missing_ids_are_refused(tmp_path):
    url = put(tmp_path, pa.table({"id": ["a", None], "image": [PNG, PNG]}))
    refused(url, "empty cells", reading=True)


def test_damaged_names_of_classes_are_passed_over(tmp_path):
    table = pa.table({"image": [PNG], "label": [1]}).replace_schema_metadata({b"huggingface": b"{"})
    assert open_source(put(tmp_path, table), CONFIG).classes is None


class Canary(pa.ExtensionType):
    """An extension type whose reader must never run."""

    built = 0

    def __init__(self):
        super().__init__(pa.binary(), "eclipse.canary")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        cls.built += 1
        return cls()


@pytest.mark.parametrize("padding", range(6))
def test_unknown_extension_types_are_never_built_and_named_or_left_out(tmp_path, padding):
    extension = Canary()
    column = pa.ExtensionArray.from_storage(extension, pa.array([b"x"], pa.binary()))
    # Each padding shifts the mark to another offset in its base64 form.
    url = put(tmp_path, pa.table({"image": [PNG], "p" * (padding + 1): column}))
    pa.register_extension_type(extension)
    before = Canary.built
    try:
        message = (
            f"column '{'p' * (padding + 1)}' is of the Arrow extension type eclipse.canary, which may run code"
        )
        refused(url, message)
        with pytest.raises(InputError, match=message):
            read_parts(Source(url, "parquet", None, CONFIG), [("x.parquet", 0, 1)])
        kept = read_all(url, extra_columns="drop")
        assert kept.column_names == ["id", "image"]
        assert image_bytes(kept) == [PNG]
    finally:
        pa.unregister_extension_type("eclipse.canary")
    assert Canary.built == before


NOISE = noise(3, 5, 4, seed=5)


def as_extension(storage, name, metadata):
    """Return a column as a process stores it that knows the type."""
    said = {"ARROW:extension:name": name, "ARROW:extension:metadata": json.dumps(metadata)}
    return pa.table([storage], schema=pa.schema([pa.field("image", storage.type, metadata=said)]))


def ray_tensors(images):
    return pa.table({"image": extensions.ArrowTensorArray.from_numpy(images)})


def ray_first_version(images):
    values = pa.array([image.ravel().tolist() for image in images], pa.list_(pa.uint8()))
    return as_extension(values, "ray.data.arrow_tensor", images.shape[1:])


def ray_of_several_shapes(images):
    ragged = np.empty(len(images), object)
    ragged[:] = list(images)
    column = extensions.ArrowVariableShapedTensorArray.from_numpy(ragged)
    return pa.table({"image": column})


def arrow_tensors(images):
    return pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))})


def arrow_tensors_that_lie_as_columns(images):
    columns_first = np.ascontiguousarray(images.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    table = pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(columns_first)})
    assert table["image"].type.permutation == [1, 0, 2]
    return table


def hugging_face_arrays(images, height=None):
    rows = pa.array([image.tolist() for image in images], pa.list_(pa.list_(pa.list_(pa.uint8()))))
    shape = [height, *images[0].shape[1:]]
    return as_extension(rows, "datasets.features.features.Array3DExtensionType", [shape, "uint8"])


def hugging_face_arrays_of_one_height(images):
    return hugging_face_arrays(images, len(images[0]))


def read_pixels(url):
    return [decode_image(data, 10**6) for data in image_bytes(read_all(url))]


@pytest.mark.parametrize(
    "write",
    [
        ray_tensors,
        ray_first_version,
        ray_of_several_shapes,
        arrow_tensors,
        arrow_tensors_that_lie_as_columns,
        hugging_face_arrays_of_one_height,
        hugging_face_arrays,
    ],
)
def test_tensors_are_images_pixel_for_pixel(tmp_path, write):
    table = write(NOISE).append_column("label", [[2, 0, 1]])
    url = put(tmp_path, table)
    assert np.array_equal(read_pixels(url), NOISE)
    middle = read_rows(url, 1, 2)
    assert np.array_equal(decode_image(image_bytes(middle)[0], 10**6), NOISE[1])
    assert middle["label"].to_pylist() == [0]


def test_what_hugging_face_writes_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    features = datasets.Features({"image": datasets.Array3D((5, 4, 3), "uint8"), "label": datasets.Value("int64")})
    rows = {"image": list(NOISE), "label": [1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    assert np.array_equal(read_pixels(f"{tmp_path}/x.parquet"), NOISE)


@pytest.mark.parametrize("write", [ray_of_several_shapes, hugging_face_arrays])
def test_tensors_of_several_sizes(tmp_path, write):
    images = [NOISE[0], NOISE[1, :3], NOISE[2, :4]]
    found = read_pixels(put(tmp_path, write(images)))
    assert [image.shape for image in found] == [(5, 4, 3), (3, 4, 3), (4, 4, 3)]
    assert all(map(np.array_equal, found, images))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (arrow_tensors(NOISE.transpose(0, 3, 1, 2)), NOISE),
        (ray_tensors(NOISE[..., 0]), np.repeat(NOISE[..., :1], 3, 3)),
    ],
)
def test_tensors_of_other_axes(tmp_path, table, expected):
    assert np.array_equal(read_pixels(put(tmp_path, table)), expected)


TURNED = NOISE.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1)
SHORT = pa.array([[1] * 60, [1] * 59], pa.list_(pa.uint8()))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (arrow_tensors(NOISE.astype(np.float32)), "tensors of float (5, 4, 3), expected images of uint8"),
        (arrow_tensors(NOISE[..., :2]), "tensors of uint8 (5, 4, 2)"),
        (as_extension(SHORT, "ray.data.arrow_tensor_v2", [5, 4, 3]), "uint8 (59,) in row 1"),
        (
            pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(TURNED)}),
            "axes in the order [2, 0, 1] are ambiguous; write them in order",
        ),
    ],
)
def test_tensors_that_are_no_images_are_named(tmp_path, table, words):
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError) as caught:
        read_all(tmp_path)
    assert "column 'image' " in str(caught.value)
    assert words in str(caught.value)


def test_a_missing_tensor_becomes_an_error_row(tmp_path):
    column = pa.array([NOISE[0].ravel().tolist(), None], pa.list_(pa.uint8()))
    url = put(tmp_path, as_extension(column, "ray.data.arrow_tensor", [5, 4, 3]))
    first, second = image_bytes(read_all(url))
    assert np.array_equal(decode_image(first, 10**6), NOISE[0])
    assert second == b""


def test_extra_columns_of_known_extension_types_survive_with_their_types(tmp_path):
    extras = {
        "meta": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None])),
        "key": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"a" * 16, b"b" * 16], pa.binary(16))),
        "flag": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0], pa.int8())),
        "map": extensions.ArrowTensorArray.from_numpy(NOISE[:2]),
    }
    url = put(tmp_path, pa.table({"image": [PNG, PNG], **extras}))
    (tmp_path / "y.parquet").write_bytes(table_to_parquet(read_all(url)))
    for name in ("x.parquet", "y.parquet"):
        found = pq.read_table(tmp_path / name)
        assert [found.schema.field(name).type for name in extras] == [column.type for column in extras.values()]
        assert all(found[name].combine_chunks().equals(column) for name, column in extras.items()), name


@pytest.mark.parametrize("said", [True, False])
def test_ids_that_are_uuids_become_text(tmp_path, said):
    names = [UUID(int=7), UUID(int=8)]
    column = pa.array([name.bytes for name in names], pa.binary(16))
    column = pa.ExtensionArray.from_storage(pa.uuid(), column) if said else column
    url = put(tmp_path, pa.table({"id": column, "image": [PNG, PNG]}))
    assert read_all(url)["id"].to_pylist() == [str(name) for name in names]
    refuse_repeated_ids(open_source(url, CONFIG))


WEIGHED = table_to_parquet(canonical_table(["a"], [PNG], [0], pa.table({"weight": [1]})))
# The last one has a name of a column that is no text.
DAMAGED = (b"", b"PAR1", b"PAR1" + b"\0" * 40 + b"PAR1", b"x" * 100, WEIGHED.replace(b"weight", b"we\xa0ght"))


@pytest.mark.parametrize("content", DAMAGED)
def test_what_is_no_parquet_file_is_refused(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    refused(tmp_path, "x.parquet")


def test_real_cifar(shared_data):
    source = open_source(str(shared_data / "cifar10" / "test-*.parquet"), CONFIG)
    assert source.images == 10_000
    assert source.classes is not None
    assert source.classes[3] == "cat"
    rows = read_parts(source, [(source.parts[0].key, 1500, 1503)])
    assert rows["id"].to_pylist() == [f"test-00000-of-00001.parquet#{n}" for n in (1500, 1501, 1502)]
    assert decode_image(image_bytes(rows)[0], 10_000).shape == (32, 32, 3)


def test_hugging_face_datasets_reads_what_we_write(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    table = canonical_table(["a", "b"], [PNG, PNG], [1, 0], pa.table({"score": [0.5, 1.5]}), ["cat", "dog"])
    (tmp_path / "x.parquet").write_bytes(table_to_parquet(table))
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "*.parquet"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded.features["label"].names == ["cat", "dog"]
    assert loaded[0]["id"] == "a"
    assert loaded[1]["score"] == 1.5
    assert np.array_equal(np.asarray(loaded[0]["image"]), decode_image(PNG, 100))
    written = io.BytesIO()
    loaded.to_parquet(written)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "y.parquet").write_bytes(written.getvalue())
    back = read_all(str(tmp_path / "back"))
    assert back.drop_columns("image").equals(table.drop_columns("image"))
    assert image_bytes(back) == [PNG, PNG]


@pytest.mark.parametrize("first", [None, "0.png"])
def test_a_path_without_bytes_is_refused_by_column_and_row_wherever_it_is(tmp_path, first):
    rows = [{"bytes": PNG, "path": first}] * 3 + [{"bytes": None, "path": "/home/me/3.png"}]
    put(tmp_path, pa.table({"image": pa.array(rows, STRUCT)}))
    with pytest.raises(InputError, match=r"'image' holds a path \(/home/me/3\.png\) and no bytes in row 3; embed"):
        read_all(tmp_path)


def test_a_path_without_bytes_is_found_before_a_run_if_the_other_images_have_paths(tmp_path):
    rows = [{"bytes": PNG, "path": "0.png"}, None, {"bytes": None, "path": "2.png"}]
    refused(put(tmp_path, pa.table({"image": pa.array(rows, STRUCT)})), "(2.png) and no bytes in row 2")


@pytest.mark.parametrize(
    ("stored", "labels", "classes"),
    [
        (pa.array(["cat", "dog", None, "cat"]), [0, 1, None, 0], ["cat", "dog"]),
        (pa.array(["dog", "cat", "dog", "dog"]).dictionary_encode(), [1, 0, 1, 1], ["cat", "dog"]),
        (pa.array(["c10", "c2", "c1", "c2"], pa.large_string()), [2, 1, 0, 1], ["c1", "c2", "c10"]),
        (pa.array(["10", "2", None, "0"]), [10, 2, None, 0], None),
        (pa.array([0.0, None, float("nan"), 3.0], from_pandas=False), [0, None, None, 3], None),
        (pa.array([[4], [3], [0], [1]]), [4, 3, 0, 1], None),
        (pa.array([["cat"], ["dog"], ["cat"], ["ant"]]), [1, 2, 1, 0], ["ant", "cat", "dog"]),
        (pa.array(["0.0", "1.0", None, "10.00"]), [0, 1, None, 10], None),
        (pa.array(["A", "0", "B", "1.0"]), [2, 0, 3, 1], ["0", "1.0", "A", "B"]),
        (pa.array(["age=old", "age=young", "old", "age=old"]), [0, 1, 2, 0], ["age=old", "age=young", "old"]),
    ],
)
def test_labels_may_be_names_whole_floats_or_lists_of_one(tmp_path, stored, labels, classes):
    url = put(tmp_path, pa.table({"image": [PNG] * 4, "label": stored}), "a.parquet")
    source = open_source(url, CONFIG)
    assert (source.classes, read_all(url)["label"].to_pylist()) == (classes, labels)
    assert read_labels(source).tolist() == [-1 if label is None else label for label in labels]


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (pa.array(["a"]), pa.array(["b"], pa.large_string()), pa.string()),
        (pa.array(["a"], pa.string_view()), pa.array(["b"]).dictionary_encode(), pa.string()),
        (pa.array([b"a"], pa.binary_view()), pa.array([b"b"], pa.large_binary()), pa.binary()),
        (pa.array([1]).dictionary_encode(), pa.array([2]), pa.int64()),
        (pa.nulls(1), pa.array([2]), pa.int64()),
        (pa.array([2]), pa.nulls(1), pa.int64()),
        (pa.array([[]], pa.list_(pa.null())), pa.array([["b"]], pa.large_list(pa.large_string())), LIST),
        (
            pa.array([{"n": 1, "s": "a"}]),
            pa.array([{"s": "b", "n": 2}], pa.struct([("s", pa.large_string()), ("n", pa.int64())])),
            pa.struct([("n", pa.int64()), ("s", pa.string())]),
        ),
    ],
)
def test_an_extra_column_may_be_stored_in_two_ways(tmp_path, first, second, kind):
    for number, column in enumerate((first, second)):
        put(tmp_path, pa.table({"image": [PNG], "note": column}), f"{number}.parquet")
    table = read_all(tmp_path)
    assert (table["note"].to_pylist(), table.schema.field("note").type) == (
        [*first.to_pylist(), *second.to_pylist()],
        kind,
    )


def test_an_extra_column_of_tensors_has_one_shape_in_all_files(tmp_path):
    for number, shape in enumerate([(1, 2, 3), (1, 2, 3), (1, 3, 2)]):
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros(shape))
        put(tmp_path, pa.table({"image": [PNG], "depth": column}), f"{number}.parquet")
        if number < 2:
            assert read_all(tmp_path).num_rows == number + 1
    refused(tmp_path, '"shape":[2,3]', "in 0.parquet", '"shape":[3,2]', "in 2.parquet", "extra_columns=drop")
    assert read_all(tmp_path, extra_columns="drop").num_rows == 3


def test_names_of_classes_are_those_of_all_files(tmp_path):
    put(tmp_path, pa.table({"image": [PNG], "label": ["dog"]}), "a.parquet")
    put(tmp_path, pa.table({"image": [PNG], "label": ["cat"]}), "b.parquet")
    source = open_source(str(tmp_path), CONFIG)
    assert (source.classes, read_labels(source).tolist()) == (["cat", "dog"], [1, 0])
    put(tmp_path, pa.table({"image": [PNG], "label": [0]}), "c.parquet")
    refused(tmp_path, "labels of c.parquet are numbers, others are names, such as cat; write")


def test_a_wide_row_group_is_named_at_the_listing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parquet, "WIDE_GROUP", 20_000)
    table = pa.table({"image": [{"bytes": bytes([n]) * 5000, "path": None} for n in range(8)]})
    pq.write_table(table, tmp_path / "narrow.parquet", row_group_size=2, compression="none", use_dictionary=False)
    open_source(str(tmp_path), DataConfig())
    assert "row group" not in capsys.readouterr().err
    pq.write_table(table, tmp_path / "wide.parquet", compression="none", use_dictionary=False)
    open_source(str(tmp_path), DataConfig())
    found = capsys.readouterr().err
    assert "wide.parquet: one row group has 8 images and 0 MiB, which each worker reads up to" in found


def write_groups(path, rows, group):
    """Write `rows` images of noise of 20 kB in row groups of `group`, and return the file's size."""
    noise = np.random.default_rng(1)
    images = [{"bytes": noise.bytes(20_000), "path": None} for _ in range(rows)]
    table = pa.table({"id": [f"i{row}" for row in range(rows)], "image": images, "label": [0] * rows})
    pq.write_table(table, path, row_group_size=group, write_batch_size=50)
    return path.stat().st_size


def read_shards(url, rows, shard):
    return [read_rows(url, start, min(rows, start + shard)) for start in range(0, rows, shard)]


# A short row group at the end of a shard is read for the next one too.
@pytest.mark.parametrize(("group", "allowed"), [(100, 1.6), (700, 1.1), (3000, 1.1)])
def test_shards_in_order_read_each_byte_of_a_file_once(tmp_path, ranges_read, group, allowed):
    size = write_groups(tmp_path / "a.parquet", 1500, group)
    tables = read_shards(str(tmp_path), 1500, 256)
    assert pa.concat_tables(tables)["id"].to_pylist() == [f"i{row}" for row in range(1500)]
    stored = pq.read_table(tmp_path / "a.parquet")["image"].to_pylist()
    assert image_bytes(pa.concat_tables(tables)) == [image["bytes"] for image in stored]
    assert size <= sum(stop - start for _, start, stop in ranges_read) < allowed * size


def test_a_few_rows_of_a_long_row_group_are_read_without_the_others(tmp_path, ranges_read):
    size = write_groups(tmp_path / "a.parquet", 1500, 1500)
    (table,) = read_shards(str(tmp_path), 16, 16)
    assert table["id"].to_pylist() == [f"i{row}" for row in range(16)]
    assert sum(stop - start for _, start, stop in ranges_read) < 0.5 * size


def test_two_workers_that_share_a_long_row_group_each_read_it_once(tmp_path, ranges_read, monkeypatch):
    size = write_groups(tmp_path / "a.parquet", 1500, 1500)
    for worker in (0, 1):
        monkeypatch.setattr(parquet, "_STREAMS", {})
        for start in range(100 * worker, 1500, 200):
            table = read_rows(tmp_path, start, start + 100)
            assert table["id"].to_pylist() == [f"i{row}" for row in range(start, start + 100)]
    assert sum(stop - start for _, start, stop in ranges_read) < 2.2 * size


def test_rows_of_a_long_row_group_in_any_order_and_by_threads(tmp_path):
    write_groups(tmp_path / "a.parquet", 600, 450)
    starts = np.random.default_rng(2).integers(0, 560, 30).tolist()

    def read(start):
        return read_parts(Source(str(tmp_path), "parquet", None, CONFIG), [("a.parquet", start, start + 40)])

    with ThreadPoolExecutor(4) as pool:
        found = [table["id"].to_pylist() for table in pool.map(read, starts)]
    assert found == [[f"i{row}" for row in range(start, start + 40)] for start in starts]


def test_a_file_that_is_replaced_is_not_read_on(tmp_path):
    write_groups(tmp_path / "a.parquet", 600, 600)
    read_shards(str(tmp_path), 100, 50)
    ids = [f"new{row}" for row in range(600)]
    images = [{"bytes": bytes([row % 256]) * 20_000, "path": None} for row in range(600)]
    (tmp_path / "a.parquet").unlink()
    pq.write_table(pa.table({"id": ids, "image": images}), tmp_path / "a.parquet", use_dictionary=False)
    table = read_parts(Source(str(tmp_path), "parquet", None, CONFIG), [("a.parquet", 100, 150)])
    assert table["id"].to_pylist() == ids[100:150]
