"""Networks in from other projects and out to them; `load_encoder` is all that most need."""

from pipeline.exchange.load import load_encoder

__all__ = ["load_encoder"]
