"""What all sections share, and the types of their fields."""

import os
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, lt=2**31)]
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Minutes = Annotated[float, Field(gt=0, le=525_600)]  # a year
Place = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


def _check_base_url(url: str) -> str:
    if not _is_base_url(url):
        raise ValueError(f"rollout.servers = {url!r}: must be the URL of a server, such as http://127.0.0.1:8000")
    return url


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port is not None
    except ValueError:  # a port that is none
        return False
    more = parts.path.strip("/") or parts.query or parts.fragment or parts.username
    return parts.scheme in ("http", "https") and named and not more


BaseURL = Annotated[str, AfterValidator(_check_base_url)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
