"""Calls of tools and their results, as text: a model that is trained here reads and writes it.

A call is `<tool_call>{"name": ..., "arguments": ...}</tool_call>` in an answer, a result is
`<tool_response>...</tool_response>` in a message of the user, and the tools stand in the system
message between `<tools>` and `</tools>`: the marks of Hermes and of Qwen's chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mmdlm.templates.conversation import ASSISTANT, SYSTEM, USER

CALLS = ("tool_calls", "function_call")  # of a message
TOOLS = ("tools", "functions")  # beside the messages
CALLING = frozenset({"function_call", "tool_call"})  # roles, as LLaMA-Factory has them
RESULTS = frozenset({"tool", "function", "observation", "ipython", "function_response"})
CALL, RESULT = "tool_call", "tool_response"
OFFER = """You may call the functions that are listed below. To call one, write
<tool_call>
{"name": NAME, "arguments": OBJECT}
</tool_call>"""


def uses_tools(content: Any, messages: list[Any]) -> bool:
    """Return whether a conversation has calls, results or tools that `in_words` would rewrite."""
    return bool(offered(content)) or any(
        isinstance(one, Mapping)
        and (_role(one) in RESULTS | CALLING or any(one.get(key) for key in CALLS))
        for one in messages
    )


def in_words(content: Any, messages: list[Any]) -> list[Any]:
    """Return messages whose calls and results are text, with the tools in a system message.

    Results in a row become one message of the user.

    Raises ValueError: a call or the list of tools cannot be read.
    """
    said: list[Any] = []
    results: dict[str, str] = {}  # the last message of results
    for message in messages:
        if not isinstance(message, Mapping):
            said.append(message)
        elif _role(message) in RESULTS:
            text = _marked(RESULT, _text_of(message))
            if said and said[-1] is results:
                results["content"] += f"\n{text}"
            else:
                said.append(results := {"role": USER, "content": text})
        elif _role(message) in CALLING:
            said.append({"role": ASSISTANT, "content": _calls(parsed_json(_text_of(message)))})
        elif calls := next((message[key] for key in CALLS if message.get(key)), None):
            spoken = _text_of(message)
            text = "\n".join(part for part in (spoken, _calls(calls)) if part)
            rest = {key: value for key, value in message.items() if key not in (*CALLS, "value")}
            said.append({**rest, "content": text})
        else:
            said.append(message)
    if tools := offered(content):
        said = _with_system(said, f"{OFFER}\n{_marked('tools', _lines(tools))}")
    return said


def offered(content: Any) -> list[Any]:
    """Return the tools beside the messages of a conversation, a list that may be a JSON text.

    Anything else is no list of tools, and stays a column that is not used.
    """
    if not isinstance(content, Mapping):
        return []
    given = next((content[key] for key in TOOLS if content.get(key)), None)
    if isinstance(given, str):
        with suppress(ValueError):
            given = parsed_json(given)
    return given if isinstance(given, list) else []


def parsed_json(text: str) -> Any:
    """Return the value of a JSON text; ValueError for none."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"its tools or calls are no JSON ({error})") from None


def _calls(given: Any) -> str:
    calls = given if isinstance(given, list) else [given]
    return "\n".join(_marked(CALL, _json(_call(one))) for one in calls)


def _call(given: Any) -> dict[str, Any]:
    """Return the name and arguments of a call, in the form of OpenAI or without its wrapping."""
    inner = given.get("function") if isinstance(given, Mapping) else None
    call = inner if isinstance(inner, Mapping) else given
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise ValueError("a call of a tool has no name")
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        with suppress(json.JSONDecodeError, RecursionError):  # a text that a model wrote stays so
            arguments = json.loads(arguments)
    return {"name": call["name"], "arguments": {} if arguments is None else arguments}


def _with_system(messages: list[Any], text: str) -> list[Any]:
    first = messages[0] if messages else None
    if isinstance(first, Mapping) and _role(first) in (SYSTEM, "developer"):
        return [{"role": SYSTEM, "content": f"{_text_of(first)}\n\n{text}"}, *messages[1:]]
    return [{"role": SYSTEM, "content": text}, *messages]


def _role(message: Mapping[str, Any]) -> str:
    return str(message.get("role", message.get("from")))


def _text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message; its pieces joined, where it has such."""
    given = message.get("content", message.get("value"))
    if isinstance(given, list):
        texts = [one.get("text") for one in given if isinstance(one, Mapping)]
        if len(texts) < len(given) or not all(isinstance(text, str) for text in texts):
            raise ValueError("a message of tools has a piece that is no text")
        given = "".join(map(str, texts))
    if given is not None and not isinstance(given, str):
        return _json(given)
    return (given or "").strip()


def _marked(name: str, text: str) -> str:
    opened = f"<{name}>"
    return text if text.startswith(opened) else f"{opened}\n{text}\n</{name}>"


def _lines(tools: list[Any]) -> str:
    return "\n".join(map(_json, tools))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
