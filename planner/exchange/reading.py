"""Keys of another framework's configuration, read one by one: a key that is not there, or of
another kind, is one line that names it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from planner.spec.errors import UserError
from planner.spec.files import shown

Kind = TypeVar("Kind", int, float, bool, str)
REQUIRED = object()


@dataclass(frozen=True)
class Settings:
    """A configuration of nested mappings. `notes` collects what its reader takes for granted."""

    data: Mapping[str, Any]
    framework: str
    notes: list[str] = field(default_factory=list)

    def get(self, path: str, kind: type[Kind], default: Any = REQUIRED) -> Kind:
        """The value at a path such as `data.train_batch_size`. Raises UserError where it is missing
        without a default, or of another kind."""
        section: Any = self.data
        for part in path.split("."):
            section = section.get(part) if isinstance(section, Mapping) else None
        if section is None:
            if default is REQUIRED:
                raise UserError(
                    f"the configuration has no {path}; is it one of {self.framework}, and whole?"
                )
            return default  # type: ignore[no-any-return]
        if kind is float and type(section) is int and abs(section) < 2**63:
            return kind(section)
        if not isinstance(section, kind) or (isinstance(section, bool) and kind is not bool):
            raise UserError(f"{path} = {shown(section)}: is no {kind.__name__}")
        return section

    def counted(self, path: str, default: Any = REQUIRED) -> int:
        """A whole number of 1 at least."""
        value = self.get(path, int, default)
        if value < 1:
            raise UserError(f"{path} = {value}: must be 1 at least")
        return value

    def refuse(self, path: str, kind: type[Kind], allowed: tuple[Any, ...], default: Any) -> None:
        """Raise UserError where a key has another value than these, whose plans are not known."""
        value = self.get(path, kind, default)
        if value not in allowed:
            known = " or ".join(map(str, allowed))
            raise UserError(f"{path} = {value}: only {known} can be imported")

    def note(self, text: str) -> None:
        self.notes.append(text)
