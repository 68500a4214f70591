"""What the sections of a config are made of: strict models, and numbers and paths that refuse what a user cannot have meant."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def refuse_bool(value: object) -> object:
    # pydantic reads True as 1; `save_steps: true` is a mistake, not a 1.
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


Count = Annotated[int, BeforeValidator(refuse_bool), Field(ge=1)]
Number = Annotated[float, BeforeValidator(refuse_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


def _refuse_no_path(value: object) -> object:
    # An empty path is the folder one happens to be in.
    if value == "":
        raise ValueError("a path is expected, not an empty text; name a folder, or leave the key out")
    if "\0" in str(value):
        raise ValueError("no path has a NUL character; name a folder")
    return value


Folder = Annotated[Path, BeforeValidator(_refuse_no_path)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
