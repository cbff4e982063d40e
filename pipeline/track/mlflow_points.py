"""Numbers and names as MLflow takes them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mlflow.entities import Metric


def points(values: Mapping[str, Any], seconds: float, step: int) -> Iterator[Metric]:
    """Points without those that are no finite number, which some servers refuse."""
    for name, value in values.items():
        if isinstance(value, int | float) and math.isfinite(value):
            yield Metric(mlflow_name(name), float(value), round(seconds * 1000), step)


def mlflow_name(name: str) -> str:
    """A name with the characters that MLflow allows."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)[:250]
