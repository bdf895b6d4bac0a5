"""Conversations as text, through the tokenizer's chat template, cut into prompt and continuations as TRL does it.

chat_pair(row, "pairs.jsonl:1", tokenizer)       # row["prompt"] = [{"role": "user", "content": "Hello"}], ...
"""

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.data.clock import templates_told
from expunge.data.tokenize import leading_tokens
from expunge.errors import ExpungeError

Message = Mapping[str, Any]


def chat_pair(row: Mapping[str, Any], where: str, tokenizer: Any) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of a row of messages; without `prompt` it is the turns that both sides begin with.

    The prompt ends where the template lets the model speak. Raises ExpungeError for what is no conversation.
    """
    chosen, rejected = (_messages(row.get(side), side, where) for side in ("chosen", "rejected"))
    if "prompt" in row:
        turns = _messages(row["prompt"], "prompt", where)
    else:
        shortest = min(len(chosen), len(rejected))
        cut = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest - 1)
        turns, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        if not turns:
            raise ExpungeError(f"{where}: chosen and rejected share no first message; there is no prompt")
    return _cut(turns, [chosen, rejected], where, tokenizer)  # type: ignore[return-value]


def chat_text(row: Mapping[str, Any], where: str, tokenizer: Any) -> tuple[str, str]:
    """(prompt, completion) of a row with these two as messages, or ("", text) of a conversation under `messages`."""
    if "messages" in row:
        return "", _render(_messages(row["messages"], "messages", where), where, tokenizer)
    turns, completion = (_messages(row.get(field), field, where) for field in ("prompt", "completion"))
    return _cut(turns, [completion], where, tokenizer)  # type: ignore[return-value]


def _cut(turns: Sequence[Message], sides: Sequence[Sequence[Message]], where: str, tokenizer: Any) -> tuple[str, ...]:
    """The prompt as text, and what each side adds to it."""
    start = chat_prompt(turns, where, tokenizer)
    ends = [_render([*turns, *side], where, tokenizer) for side in sides]
    # a template may end a prompt with more than an answer begins with
    cut = next((i for i, letters in enumerate(zip(start, *ends, strict=False)) if len(set(letters)) > 1), len(start))
    return start[:cut], *(end[cut:] for end in ends)


def chat_prompt(value: Any, where: str, tokenizer: Any) -> str:
    """Messages as the text that the model continues: the start of an answer, or the rest of the one that is begun."""
    turns = _messages(value, "prompt", where)
    role = turns[-1]["role"]
    if role not in ("user", "tool", "assistant"):
        raise ExpungeError(f"{where}: the prompt's last message has the role {role!r}; it must be user, tool or assistant")
    begun = role == "assistant"
    return _render(turns, where, tokenizer, add_generation_prompt=not begun, continue_final_message=begun)


def _messages(value: Any, field: str, where: str) -> Sequence[Message]:
    if not isinstance(value, list) or not value:
        raise ExpungeError(f"{where}: {field!r} must be a list of messages, as the row's other fields are")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ExpungeError(f"{where}: a message of {field!r} must be an object with 'role' and 'content'")
    return value


def _render(turns: Sequence[Message], where: str, tokenizer: Any, **options: bool) -> str:
    if tokenizer is None:
        raise ExpungeError(f"{where}: a conversation needs the model's chat template: give the tokenizer")
    if not tokenizer.chat_template:
        raise ExpungeError(f"{where}: a conversation, but the model's tokenizer has no chat template; give text instead")
    try:
        with templates_told():
            text = tokenizer.apply_chat_template(list(turns), tokenize=False, **options)
    except Exception as error:  # jinja's own, and whatever a template raises
        reason = str(error).strip().split("\n")[0]
        raise ExpungeError(f"{where}: the model's chat template refuses the conversation ({reason})") from None
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer.bos_token_id in leading_tokens(tokenizer):  # it is put before a text again
        text = text.removeprefix(bos)
    return text
