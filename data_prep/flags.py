"""Settings of a preparation as flags of the command line, over those of a file."""

import json
from dataclasses import make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from cyclopts import Parameter
from pydantic import ValidationError

from data_prep.settings import PrepSettings
from pipeline.config.load import load_config
from pipeline.errors import UsageError

if TYPE_CHECKING:

    class PrepFlags:
        """Every field of `PrepSettings`; None where a flag was not given."""

else:
    # Made from the section, so that no setting is ever without its flag. It has no defaults of its
    # own: a flag that was not given must not hide what the file says.
    PrepFlags = make_dataclass(
        "PrepFlags",
        [
            (
                name,
                Annotated[
                    Optional[field.annotation],  # noqa: UP045 - the operand is no plain type
                    Parameter(help=f"{field.description} [default: {field.default}]"),
                ],
                None,
            )
            for name, field in PrepSettings.model_fields.items()
        ],
        namespace={"__module__": __name__},
        frozen=True,
        kw_only=True,
    )


def settings_from(flags: PrepFlags | None, config: Path | None) -> PrepSettings:
    """What a preparation is told by flags, and by a file where there is no flag.

    Raises:
        UsageError: A flag has no sense, or there is no such file.
        ConfigError: Anything in the file is wrong.
    """
    given: dict[str, Any] = {}
    if flags is not None:
        values = ((name, getattr(flags, name)) for name in PrepSettings.model_fields)
        given = {name: value for name, value in values if value is not None}
    if config is not None:
        overrides = [f"{name}={json.dumps(value)}" for name, value in given.items()]
        return load_config(config, PrepSettings, overrides).config
    try:
        return PrepSettings(**given)
    except ValidationError as error:
        raise UsageError(
            "; ".join(_in_words(one["loc"], one["msg"], one["input"]) for one in error.errors()),
            remedy="See `jepa prep run --help`.",
        ) from error


def _in_words(place: tuple[int | str, ...], message: str, value: object) -> str:
    message = message.removeprefix("Value error, ")
    if not place:
        return message
    lower = message[0].lower() + message[1:]
    return f"--{str(place[0]).replace('_', '-')}: {lower}, got {value}"
