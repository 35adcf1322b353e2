"""How a request from flags or a YAML file becomes a validated config, and its faults one line."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from p4dprep.errors import RequestError

Config = TypeVar("Config", bound=BaseModel)


def validated(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a config.

    Raises:
        RequestError: naming each wrong field, its value's fault and, for an unknown field, the known ones.
    """
    try:
        return config_class(**values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        known = f" (fields: {', '.join(config_class.model_fields)})" if "Extra inputs" in faults else ""
        raise RequestError(f"the request is not valid: {faults}{known}") from None
