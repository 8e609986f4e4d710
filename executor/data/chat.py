"""Prompts as the model gets them: messages through its tokenizer's chat template, texts as they are
or, if asked for, as a user's message. Raises UserError, which names the row."""

from collections.abc import Sequence
from typing import Any

from executor.data.columns import Asked
from planner.spec.data import Data
from planner.spec.errors import UserError
from planner.spec.wording import reason_of

SYSTEM_ROLES = ("system", "developer")
OURS = ("conversation", "chat_template", "add_generation_prompt", "tokenize", "messages")


class Chat:
    """How the prompts of a job become text. `bare` counts the texts that went as they are to a
    model whose tokenizer has a template."""

    def __init__(self, data: Data, tokenizer: Any) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._wanted = data.template == "chat" or bool(data.system or data.template_args)
        self._template = getattr(tokenizer, "chat_template", None)
        self.bare = 0
        if self._wanted:
            self._check_template('data.template is "chat"')
            self._check_arguments()

    def _check_template(self, why: str) -> None:
        if not self._template:
            raise UserError(
                f"actor: {why}, and its tokenizer has no chat template; save one beside the model "
                "(chat_template.jinja), or give prompts that are texts"
            )

    def _check_arguments(self) -> None:
        for name in self._data.template_args:
            if name in OURS or name not in str(self._template):
                raise UserError(
                    f"data.template_args.{name}: the tokenizer's chat template asks for no such "
                    "argument; remove it or check its spelling"
                )

    def text(self, asked: Asked) -> tuple[str, bool]:
        """The text of a prompt, and whether a template made it: then it has all special tokens."""
        if isinstance(asked.prompt, str):
            if not self._wanted:
                self.bare += bool(self._template)
                return asked.prompt, False
            messages = [{"role": "user", "content": asked.prompt}]
        elif self._data.template == "none":
            raise UserError(
                f'{asked.where}: the prompt is a list of messages, and data.template is "none"; '
                'set it to "chat"'
            )
        else:
            self._check_template(f"{asked.where} is a list of messages")
            messages = asked.prompt
        return self._rendered(asked.where, self._with_system(messages)), True

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages after the job's system prompt, unless they have their own."""
        system = self._data.system
        if system is None or messages[0]["role"] in SYSTEM_ROLES:
            return messages
        return [{"role": "system", "content": system}, *messages]

    def _rendered(self, where: str, messages: Sequence[dict[str, Any]]) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._data.template_args
            )
        except Exception as error:  # whatever a template raises
            reason = reason_of(error, named=True)
            raise UserError(
                f"{where}: the tokenizer's chat template fails on the prompt ({reason}); mend the "
                "messages, or the template"
            ) from None
        if not isinstance(text, str) or not text:
            raise UserError(f"{where}: the tokenizer's chat template makes no text of the prompt")
        return text
