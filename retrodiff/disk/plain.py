"""Values of any kind as JSON can hold them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from datetime import date, time
from typing import Any, cast

import numpy as np
from torch import Tensor

from retrodiff.text import escaped

DEEPEST = 64
DATES = ("datetime", "timedelta")


def plain_json(value: Any, depth: int = 0) -> Any:
    """The nearest value that JSON can hold.

    Dates become ISO text, NaN and infinities null, bytes hexadecimal text, numbers, arrays and
    tensors of numpy and torch plain numbers and lists; names that are not valid Unicode get
    backslash escapes; sets become lists; the rest becomes ``str(value)``.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, (np.ndarray, Tensor)):
        values: Any = value.detach().cpu() if isinstance(value, Tensor) else value
        values = values.astype(str) if str(values.dtype).startswith(DATES) else values
        return plain_json(values.tolist(), depth)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex()
    if depth >= DEEPEST and isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return f"(nested deeper than {DEEPEST} levels)"
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {plain_json(str(key)): plain_json(entry, depth + 1) for key, entry in items}
    if isinstance(value, (set, frozenset)):
        value = sorted(cast("set[Any]", value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain_json(entry, depth + 1) for entry in cast("list[Any]", value)]
    return plain_json(str(value), depth)
