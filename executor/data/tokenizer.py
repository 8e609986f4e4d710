"""A model's tokenizer."""

from pathlib import Path
from typing import Any

from planner.spec.errors import UserError
from planner.spec.wording import reason_of


def tokenizer_of(path: Path, role: str = "actor") -> Any:
    """Load a role's tokenizer, from tokenizer.json where there is one: that file is complete, and
    AutoTokenizer would replace parts of it by the usual ones of the model type."""
    if not any(
        (path / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        raise UserError(
            f"{role}: {path} holds no tokenizer (tokenizer.json); save the tokenizer beside the "
            "model"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = reason_of(error)
        raise UserError(
            f"{role}: the tokenizer in {path} cannot be loaded ({reason}); save it anew"
        ) from None
