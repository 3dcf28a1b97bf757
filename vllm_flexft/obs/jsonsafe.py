"""NaN and infinity in JSON: written as null, and named, so that they are never hidden."""

import math
from collections.abc import Mapping
from typing import Any


def flag_non_finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace every non-finite float of a flat mapping by None and name it under "non_finite".

    JSON has no NaN; readers that are strict about it reject the whole line, and a plain null
    would look like "not measured". `{"loss": nan}` becomes
    `{"loss": None, "non_finite": {"loss": "nan"}}`; finite mappings come back unchanged.
    """
    bad = {k: str(v) for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    if not bad:
        return dict(values)
    return {k: None if k in bad else v for k, v in values.items()} | {"non_finite": bad}
