"""Lay out conversations by the chat template of a text tokenizer, as transformers renders it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
)

from mmdlm.templates.prompt_template import Tool
from mmdlm.templates.segments import Piece
from mmdlm.templates.task_prompt import ImageInput, Turn
from mmdlm.templates.text_codec import TextCodec

# For a tokenizer without a template: `role, end of text, content, end of text`, turn after turn.
# It needs no token that a tokenizer may lack, and no message can end its own turn.
PLAIN = (
    "{%- for message in messages -%}"
    "{{- message['role'] + eos_token -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant' + eos_token -}}{%- endif -%}"
)
PRIVATE = range(0xF0000, 0xFFFFE)  # Unicode's private use plane A


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, applied to some turns.

    Special tokens are those that the template writes: their names in a message are letters. To tell
    them apart, the template is given one character, which no text has, in place of each name and of
    each image, and one at the end of what the assistant says.

    Attributes:
        turns: Of the conversation.
        codec: The tokenizer, which has a chat template.
        marks: What stands for what: such characters -> letters or an image.
        end: The one at the end of what the assistant says.
        tools: JSON schemas of what the assistant may call.
    """

    turns: tuple[Turn, ...]
    codec: TextCodec
    marks: dict[str, str | ImageInput]
    end: str
    tools: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(
        cls, codec: TextCodec, turns: tuple[Turn, ...], *, tools: tuple[Tool, ...] = ()
    ) -> ChatTemplate:
        """Choose the characters.

        Args:
            codec: The tokenizer.
            turns: Of the conversation.
            tools: JSON schemas, or functions whose docstrings say what they do.

        Returns:
            The template, ready to render.

        Raises:
            ValueError: If the chat template does not write tools, or a function has no docstring
                that a schema can be made of.
        """
        schemas = tuple(_schema(tool) for tool in tools)
        written = codec.tokenizer.get_chat_template(tools=[*schemas] or None)
        if schemas and "tools" not in written:
            raise ValueError(
                f"the chat template of the text tokenizer has no place for {len(schemas)} tools; "
                "leave them out, or take a model with tools"
            )
        texts = [part for turn in turns for part in turn.parts if isinstance(part, str)]
        texts += [text for turn in turns for text in _texts(turn.fields)] + [*_texts(schemas)]
        free = _unused([*texts, written])
        names = [name for name in special_names(codec.tokenizer) if any(name in t for t in texts)]
        images = [part for turn in turns for part in turn.parts if not isinstance(part, str)]
        marks = dict(zip(free, [*names, *images], strict=False))
        return cls(turns, codec, marks, next(free), schemas)

    def prompt(self) -> list[Piece]:
        """Return the conversation up to where the assistant's next turn begins."""
        return list(self._pieces(self._rendered(len(self.turns), asks=True)))

    def script(self, answers: Collection[int]) -> list[tuple[Piece, bool]]:
        """Return the conversation piece by piece, each with whether it is learned.

        An answer is learned from where the prompt that asks for it ends up to the special token
        that ends it. What follows the last of them is left out.

        Args:
            answers: Numbers of the turns that are learned.

        Returns:
            (piece, is learned) in order.

        Raises:
            ValueError: If the template shows the model another prompt than the one that asks for an
                answer, or does not end an answer with a special token.
        """
        whole = self._rendered(len(self.turns))
        pieces: list[tuple[Piece, bool]] = []
        done = 0
        for number in sorted(answers):
            asked = self._rendered(number, asks=True)
            if not whole.startswith(asked):
                raise ValueError(
                    f"the chat template lays out the messages before answer {number + 1} in "
                    "another way once it is given, so that the model would learn it under a prompt "
                    "that nobody asks with; learn the last answer only, or mend the template"
                )
            stop = self._end_of_turn(whole, len(asked))
            if stop is None:
                raise ValueError(
                    "the chat template ends an answer with no special token, so that a model "
                    "cannot learn where to stop; let it write eos_token or another one there"
                )
            pieces += [(piece, False) for piece in self._pieces(whole[done : len(asked)])]
            pieces += [(piece, True) for piece in self._pieces(whole[len(asked) : stop])]
            done = stop
        return pieces

    def end_of_turn(self) -> int | None:
        """Return the id of the special token that ends the last turn, which is the assistant's."""
        whole = self._rendered(len(self.turns))
        stop = self._end_of_turn(whole, 0)
        *_, last = [None, *self._pieces(whole[:stop])] if stop else [None]
        return last if isinstance(last, int) else None

    def _end_of_turn(self, text: str, start: int) -> int | None:
        """Find where the special token stops that ends what the assistant says from `start` on."""
        names = "|".join(map(re.escape, special_names(self.codec.tokenizer)))
        found = re.compile(rf"[^{self.end}]*{self.end}\s*({names})").match(text, start)
        return None if found is None else found.end()

    def _rendered(self, count: int, *, asks: bool = False) -> str:
        """Render the first turns; `asks`: and the header of the next one."""
        messages = [
            {"role": turn.role, "content": self._content(turn), **self._marked(turn.fields)}
            for turn in self.turns[:count]
        ]
        try:
            rendered = self.codec.tokenizer.apply_chat_template(
                messages,
                tools=self._marked([*self.tools]) or None,
                tokenize=False,
                add_generation_prompt=asks,
            )
        except TemplateError as error:
            reason = " ".join(str(error).split())
            roles = ", ".join(turn.role for turn in self.turns[:count])
            raise ValueError(
                f"the chat template of the text tokenizer refuses messages of {roles}: {reason}"
            ) from error
        return str(rendered)

    def _content(self, turn: Turn) -> str:
        """Return what is said, with marks in place of names of special tokens and of images."""
        text, rest = "", self.marks.items()
        for part in turn.parts:
            if not isinstance(part, str):
                part = next(mark for mark, image in rest if image is part)
            text += self._marked(part)
        return text + self.end if turn.role == "assistant" else text

    def _marked(self, value: Any) -> Any:
        """Return a text, or texts in lists and objects, with marks for names of special tokens."""
        if isinstance(value, str):
            for mark, name in self.marks.items():
                value = value.replace(name, mark) if isinstance(name, str) else value
            return value
        if isinstance(value, Mapping):
            return {key: self._marked(one) for key, one in value.items()}
        return [self._marked(one) for one in value] if isinstance(value, list | tuple) else value

    def _pieces(self, text: str) -> Iterator[Piece]:
        """Split rendered text into ids of special tokens, text and images."""
        tokenizer = self.codec.tokenizer
        names = special_names(tokenizer)
        pattern = "|".join(map(re.escape, [*names, *self.marks]))
        for piece in re.split(f"({pattern})", text.replace(self.end, "")):
            if piece in self.marks:
                yield self.marks[piece]
            elif piece in names:
                yield int(tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                yield piece


def _schema(tool: Tool) -> Mapping[str, Any]:
    """Return the JSON schema of a tool."""
    if isinstance(tool, Mapping):
        return tool
    try:
        schema: Mapping[str, Any] = get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the tool {tool!r} has no JSON schema ({reason})") from error
    return schema


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def end_of_turn(codec: TextCodec) -> int | None:
    """Return the id of the special token that ends an answer in the chat template, if any."""
    if codec.tokenizer.chat_template is None:
        return None
    turns = (Turn("user", ("-",)), Turn("assistant", ("-",)))
    return ChatTemplate.of(codec, turns).end_of_turn()


def special_names(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the names of the special tokens, longer ones first."""
    known = tokenizer.added_tokens_decoder.values()
    return sorted((token.content for token in known if token.special), key=len, reverse=True)


def _unused(texts: Sequence[str]) -> Iterator[str]:
    """Yield characters that are in none of the texts."""
    used = set().union(*texts)
    return (one for one in map(chr, PRIVATE) if one not in used)
