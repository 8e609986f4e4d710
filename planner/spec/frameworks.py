"""Other frameworks that plans are made for, and the version of each whose facts are known here."""

from typing import Literal, get_args

FrameworkName = Literal["verl", "openrlhf"]
FRAMEWORKS: tuple[FrameworkName, ...] = get_args(FrameworkName)
VERSIONS: dict[FrameworkName, str] = {"verl": "0.9.1", "openrlhf": "0.11.2"}
