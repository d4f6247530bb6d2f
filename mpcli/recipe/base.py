"""The types every recipe section is made of."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A frozen part of a recipe: no unknown fields, no conversions, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )


def mistake(message: str, hint: str | None = None, field: str | None = None) -> PydanticCustomError:
    """What a validator raises: a message, its remedy, and the field to point at.

    Args:
        field: name of a field, or number of a list's item, within what is validated; dotted.
    """
    about = {"message": message, "hint": hint, "field": field}
    return PydanticCustomError("mistake", "{message}", about)


# Bounds that fp32 can hold: these numbers are used in it.
Positive = Annotated[float, Field(gt=0, le=1e30)]
NonNegative = Annotated[float, Field(ge=0, le=1e30)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]

_DURATION = r"([1-9][0-9]{0,11}) (step|epoch|minute)s?"


def _check_duration(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(_DURATION, value):
        raise mistake("expected a duration", "such as `500 steps`, `1 epoch` or `10 minutes`")
    return value


Duration = Annotated[
    str, BeforeValidator(_check_duration), Field(json_schema_extra={"pattern": f"^{_DURATION}$"})
]
"""`N steps`, `N epochs` or `N minutes` with a whole N >= 1."""


def _absolute(text: str) -> str:
    if not text or "\0" in text:
        raise mistake("expected a path")
    # Links may point elsewhere when the run is resumed: `runs/NAME/latest` will.
    return os.path.realpath(os.path.expanduser(text))  # noqa: PTH111 - `~nobody` stays


FolderPath = Annotated[str, AfterValidator(_absolute)]
"""A folder, made absolute against the launch directory, links followed; `~` is the user's."""

FilePath = Annotated[str, AfterValidator(_absolute)]
"""A file or a folder of files, made absolute as a `FolderPath` is."""

_HUB_NAME = r"([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*"


def _check_hub_name(name: str) -> str:
    if len(name) > 200 or not re.fullmatch(_HUB_NAME, name):
        raise mistake("expected a name on the Hugging Face hub", "such as `owner/name`")
    return name


HubName = Annotated[
    str, AfterValidator(_check_hub_name), Field(json_schema_extra={"pattern": f"^{_HUB_NAME}$"})
]
"""`owner/name` or `name` on the Hugging Face hub."""


class LocalOrHub(Section):
    """Something that lies in a local folder, or on the Hugging Face hub."""

    path: FolderPath | None = Field(default=None, description="the local folder")
    hub: HubName | None = Field(default=None, description="or its name on the Hugging Face hub")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if self.path is None and self.hub is None:
            raise mistake("neither `path` nor `hub` is set", "add `path: FOLDER` or `hub: NAME`")
        if self.path is not None and self.hub is not None:
            raise mistake("`path` and `hub` are both set", "remove one of them", "hub")
        return self


def check_once(names: tuple[str, ...]) -> tuple[str, ...]:
    """For an `AfterValidator` of a list: nothing stands in it twice."""
    for index, name in enumerate(names):
        if name in names[:index]:
            raise mistake(f"`{name}` is listed twice", "once is enough", str(index))
    return names


def parse_duration(text: str) -> tuple[int, Literal["step", "epoch", "minute"]]:
    """Split a validated `Duration` into its number and unit."""
    match = re.fullmatch(_DURATION, text)
    assert match is not None
    unit: Any = match.group(2)
    return int(match.group(1)), unit
