"""Other frameworks that plans are made for, and the version of each whose facts are known here."""

from typing import Literal, get_args

FrameworkName = Literal["verl", "openrlhf", "areal", "skyrl"]
FRAMEWORKS: tuple[FrameworkName, ...] = get_args(FrameworkName)
VERSIONS: dict[FrameworkName, str] = {
    "verl": "0.9.1",
    "openrlhf": "0.11.2",
    "areal": "1.0.4",
    "skyrl": "0.3.0",
}
