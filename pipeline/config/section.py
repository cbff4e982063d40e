"""The base of every configuration section: strict, frozen, documented field by field."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a run's configuration, defined in the file that it configures.

    Unknown keys are errors, values are not coerced across types (an integer is accepted as a
    float), and the sentence under each field is its documentation in `jepa config schema`.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    keys_are_in: ClassVar[str] = "`jepa config schema` lists every key"
    """What a message about a wrong file says of where its keys are explained."""
    has_shipped_files: ClassVar[bool] = True
    """Whether a file of `pipeline/configs` may be meant by a path that is not there."""
