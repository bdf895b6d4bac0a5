"""Conversations as text, through the tokenizer's chat template, cut into prompt and continuations as TRL does it.

    chat_pair(row, "pairs.jsonl:1", tokenizer)       # row["prompt"] = [{"role": "user", "content": "Hello"}], ...

Beside its messages a row may have what the template takes, as TRL's rows have it: `tools` (JSON schemas), `documents` and
`chat_template_kwargs`; and `system`, text that goes before the messages as a turn of that role. A table has messages as JSON
text. Content is text, or a list of parts `{"type": "text", "text"}`.

The prompt ends where the template lets the model speak, found in tokens: what the prompt alone and the prompt with its
answers begin with. The text keeps the template's own bos, and `expunge.ids` adds no second one.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from expunge.data.clock import templates_told
from expunge.errors import ExpungeError
from expunge.ids import common_length, encode

log = logging.getLogger("expunge")

Message = Mapping[str, Any]
OURS = ("tokenize", "add_generation_prompt", "continue_final_message", "conversation", "return_dict", "return_tensors")
"""Arguments of `apply_chat_template` that a row may not set."""
FIELDS = ("prompt", "chosen", "rejected", "completion", "messages")
"""What may be a list of messages."""
BESIDE = ("system", "tools", "documents", "chat_template_kwargs")
"""What a row of messages may have beside them."""
WRITTEN = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content)['"]\s*:.*\}\s*\]\s*""", re.DOTALL)


def with_messages(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row, messages that stand in it as JSON text as lists. ExpungeError where they are text of another form."""
    found = dict(row)
    for field in FIELDS:
        if isinstance(text := row.get(field), str) and WRITTEN.fullmatch(text):
            try:
                found[field] = json.loads(text)
            except ValueError:
                raise ExpungeError(
                    f"{where}: field {field!r} is text of messages that is not JSON; write it as JSON, or as JSON lines"
                ) from None
    return found


def say_unread(row: Mapping[str, Any]) -> None:
    """Say, once, that a row of plain text has beside it what goes through a chat template alone."""
    for name in BESIDE:
        if row.get(name):
            _warn(f"rows of plain text have {name!r} beside it, which only a chat template takes: it is left out")


def chat_pair(row: Mapping[str, Any], where: str, tokenizer: Any) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of a row of messages; without `prompt` it is the turns that both sides begin with.

    Raises ExpungeError for what is no conversation, and for a turn of which the template makes nothing.
    """
    template = Template.of(row, where, tokenizer)
    chosen, rejected = (template.turns(row.get(side), side) for side in ("chosen", "rejected"))
    if "prompt" in row:
        turns = template.opened(template.turns(row["prompt"], "prompt"))
    else:
        chosen, rejected = template.opened(chosen), template.opened(rejected)
        shortest = min(len(chosen), len(rejected))
        cut = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest - 1)
        turns, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        if not any(turn["role"] != "system" for turn in turns):
            raise ExpungeError(f"{where}: chosen and rejected share no first message; there is no prompt")
    return template.cut(turns, {"chosen": chosen, "rejected": rejected})  # type: ignore[return-value]


def chat_text(row: Mapping[str, Any], where: str, tokenizer: Any) -> tuple[str, str]:
    """(prompt, completion) of a row with these two as messages, or ("", text) of a conversation under `messages`."""
    template = Template.of(row, where, tokenizer)
    if "messages" in row:
        turns = template.opened(template.turns(row["messages"], "messages"))
        text = template.render(turns)
        template.check_said(turns, [place for place, turn in enumerate(turns) if _asked(turn)], "messages", text)
        return "", text
    turns, completion = (template.turns(row.get(field), field) for field in ("prompt", "completion"))
    return template.cut(template.opened(turns), {"completion": completion})  # type: ignore[return-value]


def chat_prompt(row: Mapping[str, Any], where: str, tokenizer: Any, field: str = "prompt") -> str:
    """Messages as the text that the model continues: the start of an answer, or the rest of the one that is begun."""
    template = Template.of(row, where, tokenizer)
    return template.prompt(template.opened(template.turns(row[field], field)))


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template with what one row gives it beside messages. where: the row, for errors."""

    tokenizer: Any
    where: str
    system: str
    given: Mapping[str, Any]

    @classmethod
    def of(cls, row: Mapping[str, Any], where: str, tokenizer: Any) -> "Template":
        """Raises ExpungeError for columns of another form; JSON text in them, as tables have it, is read."""
        system = row.get("system") or ""
        if not isinstance(system, str):
            raise ExpungeError(f"{where}: field 'system' must be text, found {type(system).__name__}")
        given: dict[str, Any] = {name: _column(row, name, list, where) for name in ("tools", "documents")}
        more = _column(row, "chat_template_kwargs", dict, where) or {}
        if taken := [name for name in more if name in OURS or name in given]:
            raise ExpungeError(f"{where}: chat_template_kwargs sets {taken[0]!r}, which is not its to set; leave it out")
        return cls(tokenizer, where, system if system.strip() else "", given | more)

    def turns(self, value: Any, field: str) -> list[Message]:
        """The messages of a field, without keys that are null (tables have all keys in all messages)."""
        if not isinstance(value, list) or not value:
            raise ExpungeError(f"{self.where}: {field!r} must be a list of messages, as the row's other fields are")
        for message in value:
            fits = isinstance(message, dict) and isinstance(message.get("role"), str)
            if not fits or not ("content" in message or message.get("tool_calls")):
                raise ExpungeError(f"{self.where}: a message of {field!r} must be an object with 'role' and 'content'")
            if message["role"] != "tool" and _said(message.get("content")) is None:  # what a tool returns may be anything
                raise ExpungeError(
                    f"{self.where}: the content of a message of {field!r} must be text, or a list of parts "
                    '{"type": "text", "text": ...}'
                )
        return [{key: part for key, part in message.items() if part is not None or key == "content"} for message in value]

    def opened(self, turns: list[Message]) -> list[Message]:
        """The conversation with the row's system text before it."""
        if not self.system:
            return turns
        first: Message = {"role": "system", "content": self.system}
        if turns[0]["role"] == "system" and turns[0] != first:
            raise ExpungeError(f"{self.where}: a column 'system' beside a system message that says something else; keep one")
        return turns if turns[0] == first else [first, *turns]

    def prompt(self, turns: Sequence[Message]) -> str:
        """What the model continues."""
        role = turns[-1]["role"]
        if role not in ("user", "tool", "assistant"):
            raise ExpungeError(
                f"{self.where}: the prompt's last message has the role {role!r}; it must be user, tool or assistant"
            )
        begun = role == "assistant"
        text = self.render(turns, add_generation_prompt=not begun, continue_final_message=begun)
        before = turns[:-1] if begun else turns
        blank = [place for place, turn in enumerate(before) if _asked(turn) and _is_blank(turn.get("content"))]
        if blank:
            self.check_said(before, blank, "prompt", self.render(before))
        return text

    def cut(self, turns: list[Message], sides: Mapping[str, list[Message]]) -> tuple[str, ...]:
        """The prompt as text, and what each side adds to it."""
        start, own = self.prompt(turns), len(turns)
        ends = [self.render([*turns, *side]) for side in sides.values()]
        for (name, side), end in zip(sides.items(), ends, strict=True):
            self.check_said([*turns, *side], [own + i for i, turn in enumerate(side) if _asked(turn)], name, end, own)
        cut = min(common_length(start, end) for end in ends)
        if cut < len(start):  # a template may end a prompt with more than an answer begins with
            cut = self._token_cut(start, ends, cut)
        for name, end in zip(sides, ends, strict=True):
            if not end[cut:].strip():
                raise ExpungeError(f"{self.where}: {name!r} adds nothing to the prompt")
        return start[:cut], *(end[cut:] for end in ends)

    def _token_cut(self, start: str, ends: Sequence[str], cut: int) -> int:
        """At most `cut`: where the prompt's tokens end that each conversation begins with. A half of a token is none."""
        wholes = [encode(self.tokenizer, end) for end in ends]

        def shared(text: str) -> int:
            ids = encode(self.tokenizer, text)
            return min(common_length(ids, whole) for whole in wholes)

        most = shared(start)
        while cut and shared(start[:cut]) > most:
            cut -= 1
        return cut

    def check_said(self, turns: Sequence[Message], places: Sequence[int], field: str, text: str, first: int = 0) -> None:
        """Raise ExpungeError for a turn at one of `places` of which the template makes nothing, neither text nor tool calls.

        text: of all turns. first: where those of `field` begin.
        """
        for place in places:
            turn = turns[place]
            try:
                bare = self.render([*turns[:place], {"role": turn["role"], "content": ""}, *turns[place + 1 :]])
            except ExpungeError:  # a template that refuses an empty turn has been given another
                continue
            if "".join(text.split()) == "".join(bare.split()):
                calls = ", and the chat template does not show its tool calls" if turn.get("tool_calls") else ""
                raise ExpungeError(
                    f"{self.where}: message {place - first + 1} of {field!r} is an empty turn: its content is blank{calls}; "
                    "give it text, or leave the row out"
                )

    def render(self, turns: Sequence[Message], **options: bool) -> str:
        """The template's text of `turns`. Where it would print a null or a list of parts as Python writes them, or fail on
        one, it is given the text in it, of a null ""."""
        if self.tokenizer is None:
            raise ExpungeError(f"{self.where}: a conversation needs the model's chat template: give the tokenizer")
        if not self.tokenizer.chat_template:
            raise ExpungeError(
                f"{self.where}: a conversation, but the model's tokenizer has no chat template; give text instead"
            )

        for name in ("tools", "documents"):
            if self.given[name] and name not in self.tokenizer.get_chat_template(tools=self.given["tools"]):
                _warn(f"the model's chat template does not read {name!r}: what rows have under it is left out")

        def apply(messages: Sequence[Message]) -> str:
            with templates_told():
                return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **self.given, **options)

        try:
            if all(isinstance(turn.get("content"), str) for turn in turns):
                return apply(turns)
            plain = [{**turn, "content": _plain(turn.get("content"))} for turn in turns]
            parts = [str(turn["content"]) for turn in turns if isinstance(turn.get("content"), list)]
            return _tried(lambda: apply(turns), lambda: apply(plain), parts)
        except Exception as error:  # jinja's own, and whatever a template raises
            reason = str(error).strip().split("\n")[0]
            raise ExpungeError(f"{self.where}: the model's chat template refuses the conversation ({reason})") from None


def _tried(plain: Callable[[], str], filled: Callable[[], str], parts: Sequence[str]) -> str:
    """`plain()`, unless it fails, writes a null as the word None, or one of `parts` as it is: then `filled()`."""
    try:
        text = plain()
    except Exception:
        return filled()
    try:
        other = filled()
    except Exception:
        return text
    return other if text.count("None") > other.count("None") or any(part in text for part in parts) else text


def _said(content: Any) -> str | None:
    """The text of a message's content, "" of a null; None for what is no text."""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]
    if content is None:
        return ""
    return content if isinstance(content, str) else None


def _plain(content: Any) -> Any:
    """The text of it, or, of what a tool returned, the thing itself."""
    text = _said(content)
    return content if text is None else text


def _asked(turn: Message) -> bool:
    """A turn that must say something; a system message or what a tool returns may be empty."""
    return turn["role"] in ("user", "assistant")


def _is_blank(content: Any) -> bool:
    text = _said(content)
    return text is not None and not text.strip()


@cache
def _warn(message: str) -> None:
    """Once, not for every row."""
    log.warning("%s", message)


def _column(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A list or object of the row, or JSON text of one; None where it is empty."""
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise ExpungeError(f"{where}: field {name!r} is text that is not JSON") from None
    if value and not isinstance(value, kind):
        raise ExpungeError(
            f"{where}: field {name!r} must be {'a list' if kind is list else 'an object'}, or JSON text of one"
        )
    return value or None
