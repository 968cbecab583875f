"""The name of a run, which is that of its folder."""

from typing import Annotated

from pydantic import Field

LONGEST_NAME = 128
NAME_FORM = f"1 to {LONGEST_NAME} letters, digits, '.', '_' or '-', of which the first is a letter or digit"
RunName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=LONGEST_NAME,
        # Editors show this keyword in place of the pattern, and so does config.messages.
        json_schema_extra={"patternErrorMessage": NAME_FORM},
    ),
]
