"""Arrow extension types in Parquet files: no such type is ever built, and known ones are read as plain values.

Arrow builds the types when it opens a file, and a type that is registered in this process may unpickle its
metadata while being built. So the key that makes a column an extension is renamed in the footer before Arrow reads
it. Files that are written have the key again.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.datasets.arrays import Layout, Order, order_of, to_pixels
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.table import EXTENSION, MUTED, OF_EXTENSION, extension_of
from eclipse_ray.errors import InputError

# Types that Arrow itself builds without running code.
_PLAIN = ("arrow.json", "arrow.uuid", "arrow.bool8")
# Types whose metadata is JSON, by what it says of the shape.
_FIXED = ("arrow.fixed_shape_tensor", "ray.data.arrow_tensor", "ray.data.arrow_tensor_v2")
_ARRAYS = tuple(f"datasets.features.features.Array{axes}DExtensionType" for axes in (2, 3, 4, 5))
_VARIABLE = ("arrow.variable_shape_tensor", "ray.data.arrow_variable_shaped_tensor")
_OTHER = ("pandas.period", "pandas.interval")


class Tensors(NamedTuple):
    """What a column of tensors says of them: their shape, None in it or for all of it where each has its own.

    `permutation` brings the stored axes into their order, None if they are in order.
    """

    shape: tuple[int | None, ...] | None
    permutation: tuple[int, ...] | None


def muted(footer: bytes) -> bytes:
    """Return the footer of a Parquet file so changed that Arrow reads every column as plain values."""
    for form, replacement in zip(_forms(EXTENSION), _forms(MUTED), strict=True):
        footer = footer.replace(form, replacement)
    return footer


def refuse_unknown(where: str, schema: pa.Schema, columns: Sequence[str] | None) -> None:
    """Raise InputError for a column that is to be read (None: all) of a type that may have to be unpickled."""
    for column in schema:
        for field in _fields(column) if columns is None or column.name in columns else ():
            name = extension_of(field)
            safe = name in ("", *_PLAIN) or (name in (*_FIXED, *_ARRAYS, *_VARIABLE, *_OTHER) and _is_json(field))
            if not safe:
                raise InputError(
                    f"{where}: column {column.name!r} is of the Arrow extension type {name}, which may run code "
                    "when read; write it again as a plain column, or leave out all extra columns with --set "
                    "data.extra_columns=drop"
                )


def tensors_of(where: str, field: pa.Field) -> Tensors | None:
    """Return what a muted column says of its tensors, None if it holds none. Raises InputError for damage."""
    name = extension_of(field)
    if name not in (*_FIXED, *_ARRAYS, *_VARIABLE):
        return None
    said = json.loads(field.metadata.get(OF_EXTENSION) or b"{}")
    try:
        own = said.get("permutation") if isinstance(said, dict) else None
        permutation = None if own is None else tuple(int(axis) for axis in own)
        if permutation is not None and any(permutation[axis] != place for place, axis in enumerate(permutation)):
            # Arrow 26 writes the inverse of what its specification says, and reads neither.
            raise ValueError(f"axes in the order {list(permutation)} are ambiguous; write them in order")
        if name in _VARIABLE:
            return Tensors(None, permutation)
        sizes = said["shape"] if isinstance(said, dict) else said[0] if name in _ARRAYS else said
        shape = tuple(None if size is None else int(size) for size in sizes)
        if permutation is not None and sorted(permutation) != list(range(len(shape))):
            raise ValueError(f"{permutation} is no order of {len(shape)} axes")
        return Tensors(shape, permutation)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{where}: column {field.name!r} holds tensors of an unknown shape: {error}") from error


def order_of_tensors(tensors: Tensors) -> Order | None:
    """Return the order of axes of images that are tensors of one shape, None for other tensors."""
    if tensors.shape is None:
        return None
    shape = [8 if size is None else size for size in tensors.shape]
    axes = tensors.permutation or range(len(shape))
    return order_of((1, *(shape[axis] for axis in axes)), np.dtype(np.uint8)) if len(shape) in (2, 3) else None


def check_images(where: str, field: pa.Field, tensors: Tensors) -> None:
    """Raise InputError unless the tensors of a column can be images: of uint8, with axes that are those of one."""
    kind = field.type.field("data").type if pa.types.is_struct(field.type) else field.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    if kind != pa.uint8() or (tensors.shape is not None and order_of_tensors(tensors) is None):
        raise InputError(_misfit(where, field.name, f"tensors of {kind} {tensors.shape or ''}".rstrip()))


def images_of(where: str, field: pa.Field, column: pa.Array, tensors: Tensors, start: int) -> list[bytes]:
    """Return a column of tensors as PNG, b"" for an empty cell. Raises InputError for what is no image."""
    encoded = []
    for row, cell in enumerate(column, start):
        values = _values(cell, tensors)
        if values is None or not values.size:
            encoded.append(b"")
            continue
        order = order_of((1, *values.shape), values.dtype) if values.ndim in (2, 3) else None
        if order is None or values.dtype != np.uint8:
            raise InputError(_misfit(where, field.name, f"{values.dtype} {values.shape} in row {row}"))
        encoded.append(encode_image(to_pixels(where, values[None], Layout(order, 255))[0], "png"))
    return encoded


def _values(cell: pa.Scalar, tensors: Tensors) -> NDArray[Any] | None:
    """Return one tensor in its order of axes, flat if its number of values does not fit its shape."""
    if not cell.is_valid:
        return None
    shape: Sequence[int | None] | None = tensors.shape
    if shape is None:
        shape, cell = cell["shape"].as_py() or [], cell["data"]
    values = cell.values
    while values is not None and pa.types.is_nested(values.type):
        values = values.flatten()
    flat: NDArray[Any] = np.empty(0, np.uint8) if values is None else values.to_numpy(zero_copy_only=False)
    try:
        array = flat.reshape([-1 if size is None else size for size in shape])
        return array if tensors.permutation is None else array.transpose(tensors.permutation)
    except ValueError:
        return flat


def _misfit(where: str, column: str, found: str) -> str:
    return (
        f"{where}: column {column!r} holds {found}, expected images of uint8 as (H, W, 3), (3, H, W) or (H, W); "
        "write it again so, or name another column with --set data.image_column=NAME"
    )


def _fields(field: pa.Field) -> Iterator[pa.Field]:
    yield field
    for place in range(field.type.num_fields):
        yield from _fields(field.type.field(place))


def _is_json(field: pa.Field) -> bool:
    try:
        json.loads(field.metadata.get(OF_EXTENSION) or b"{}")
    except (ValueError, RecursionError):
        return False
    return True


def _forms(text: bytes) -> list[bytes]:
    # `text` as it is, and in base64 for each of its three possible offsets in the groups of three bytes. Arrow
    # stores the types of columns in base64.
    forms = [text]
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + text)
        forms.append(encoded[-(-8 * shift // 6) : 8 * (shift + len(text)) // 6])
    return forms
