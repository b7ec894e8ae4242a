"""Conversations: their forms, what of them is learned, how they end, and what cannot be used."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.shards.loader import build_loader
from data_pipelines.shards.shards import Sample, expand_urls, read_shard, write_shard
from data_pipelines.sources.conversations import Conversation, apply_chat_template
from data_pipelines.sources.end_of_text import FilledTail, FixedTail, NoTail, RandomTail, Tail
from data_pipelines.sources.messages import Message, messages_of
from data_pipelines.sources.source import Source, encode_array
from data_pipelines.sources.vision_samples import Eye, attach_vision
from data_pipelines.write_shards import conversations as write_conversations
from mmdlm.core.sequence import Batch, Sequence
from mmdlm.templates.auto import LAYOUTS
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.templates.text_codec import TextCodec
from tests.data_pipelines.tiny_vision import SQUARE, adapter, plain
from tests.templates.tiny import ids_of, targets_of, words_of

SAID = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e")]
TALK = [{"role": role, "content": text} for role, text in SAID]
PAIR = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def spoken(
    conversation: Conversation,
    content: Any,
    family: str = "llada",
    *,
    length: int = 400,
    seed: int = 0,
    eye: Eye | None = None,
    prompt_template: PromptTemplate | None = None,
    **fields: bytes,
) -> tuple[Sequence, TextCodec]:
    words = words_of(family)
    given = {"messages": content} if isinstance(content, list) else content
    sample: Sample = {"__key__": "k", "__url__": "x.tar", "json": json.dumps(given).encode()}
    sample |= {name.replace("_", "."): value for name, value in fields.items()}
    sources = apply_chat_template(
        [Source("x.tar", conversation)],
        prompt_template or LAYOUTS[family],
        words,
        length=length,
        packed=False,
    )
    (source,) = attach_vision(sources, None)
    through = source.to_sequence
    if eye is not None:
        from data_pipelines.sources.vision_samples import Through

        through = Through(through.seeing, eye)
    generator = torch.Generator().manual_seed(seed)
    sequence = through(sample, words.vocabulary, tokenizer=words.tokenizer, generator=generator)
    return sequence, words


def learned(sequence: Sequence, words: TextCodec) -> str:
    """Its text, targets in brackets, images as their slots, ends of text as $."""
    parts = []
    for segment in sequence.segments:
        if segment.views is not None:
            parts.append(f"<{len(segment.ids)}>")
            continue
        text = words.tokenizer.decode(segment.ids).replace("<|endoftext|>", "$")
        parts.append(f"[{text}]" if bool(segment.target.all()) and text else text)
    return "".join(parts)


def short(sequence: Sequence, words: TextCodec) -> str:
    """The same with LLaDA's markers as single letters."""
    text = learned(sequence, words)
    text = re.sub(r"<\|start_header_id\|>(\w)\w*<\|end_header_id\|>\n\n", r"\1:", text)
    return text.replace("<|startoftext|>", "^").replace("<|eot_id|>", ".")


NONE = Conversation(tail=NoTail())


# ---- forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"messages": PAIR},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": " yes\n"}]},
        {"prompt": "hi", "completion": "yes"},
        {"prompt": PAIR[:1], "completion": PAIR[1:]},
        {"messages": [*PAIR, {"role": "user", "content": "never answered"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, PAIR[1]]},
    ],
)
def test_every_form_is_one_conversation(content: dict[str, Any]) -> None:
    question, answer = messages_of(content)
    assert question == Message("user", "hi")
    assert (answer.role, answer.text.strip()) == ("assistant", "yes")
    assert short(*spoken(NONE, content)) == "^u:hi.a:[yes.]"


def test_a_system_message_is_added_where_there_is_none() -> None:
    system = Conversation(tail=NoTail(), system="Z")
    assert short(*spoken(system, PAIR)) == "^s:Z.u:hi.a:[yes.]"
    assert "Z" not in short(*spoken(system, TALK))


def test_images_stand_where_they_are_mentioned() -> None:
    first = [{"type": "text", "text": "x "}, {"type": "image"}, {"type": "text", "text": "?"}]
    content = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "<image>\nz"},
        {"role": "assistant", "content": "w"},
    ]
    fields = {"0.png": plain(1), "1.png": plain(2)}
    sequence, words = spoken(NONE, content, "llada_v", eye=Eye(SQUARE), **fields)
    assert short(sequence, words).split("user.", 1)[-1].endswith("u:x <4>?.a:[y.]u:<4>\nz.a:[w.]")


def test_codes_are_read_for_a_model_of_codes() -> None:
    content = [{"role": "user", "content": "<image>\nwhat?"}, PAIR[1]]
    codes = {"codes_npy": encode_array(np.arange(6, dtype=np.uint16).reshape(2, 3))}
    sequence, words = spoken(NONE, content, "mmada", **codes)
    first = len(words.tokenizer)
    assert ids_of(sequence)[2:8] == list(range(first, first + 6))
    drawn = [PAIR[0], {"role": "assistant", "content": "<image>"}]
    sequence, words = spoken(Conversation(), drawn, "mmada", **codes)
    taught = targets_of(sequence)
    assert [ids_of(sequence)[i] for i in taught] == list(range(first, first + 6))


def test_codes_of_another_grid_than_the_models_are_refused() -> None:
    words = replace(words_of("mmada"), grid=(2, 2))
    of_mmada = NONE.templated(LAYOUTS["mmada"], words, length=99)
    content = {"messages": [{"role": "user", "content": "<image>"}, PAIR[1]]}

    def sequence(side: int) -> Sequence:
        codes = encode_array(np.zeros((side, side), np.uint16))
        sample = {"json": json.dumps(content).encode(), "codes.npy": codes}
        options: dict[str, Any] = {"tokenizer": words.tokenizer, "generator": torch.Generator()}
        return of_mmada.sequence(sample, [], words.vocabulary, **options)

    assert len(sequence(2)) > 4
    with pytest.raises(ValueError, match=r"codes.npy has 3 x 3 codes, .*\(mmada\) has 2 x 2"):
        sequence(3)


def test_prompts_are_dropped_where_a_image_is_drawn() -> None:
    """As often as is said, and as the other branch of guidance leaves them out."""
    codes = {"codes_npy": encode_array(np.arange(4, dtype=np.uint16))}
    drawn = [PAIR[0], {"role": "assistant", "content": "<image>"}]
    drop = Conversation(drop_prompt=0.25)
    found = [spoken(drop, drawn, "mmada", seed=seed, **codes) for seed in range(80)]
    texts = [learned(sequence, words).split("<|soi|>")[0] for sequence, words in found]
    assert set(texts) == {"<|t2i|><|startoftext|>hi$", "<|t2i|><|startoftext|>$"}
    assert 8 < texts.count("<|t2i|><|startoftext|>$") < 34
    whole, _ = spoken(Conversation(drop_prompt=1.0, tail=NoTail()), PAIR)
    assert ids_of(whole) == ids_of(spoken(NONE, PAIR)[0])
    with pytest.raises(ValueError, match="drop_prompt is 2"):
        Conversation(drop_prompt=2.0)


def test_without_a_template() -> None:
    plain_text = Conversation(template=False, tail=NoTail())
    assert learned(*spoken(plain_text, PAIR)) == "hi[yes$]"
    with pytest.raises(ValueError, match="5 messages are not one question and its answer"):
        spoken(plain_text, TALK)


def test_spaces_are_kept_where_a_text_goes_on_and_dropped_in_a_conversation() -> None:
    code = [{"role": "user", "content": "def f:\n"}, {"role": "assistant", "content": "  yes\n"}]
    plain_text = Conversation(template=False, tail=NoTail())
    assert learned(*spoken(plain_text, code)) == "def f:\n[  yes\n$]"
    assert "[yes" in learned(*spoken(NONE, code))


def test_answers_that_think_are_asked_to() -> None:
    content = [PAIR[0], {"role": "assistant", "content": "<think> hm </think> yes"}, *PAIR]
    asked = short(*spoken(Conversation(tail=NoTail(), thinking=True), content, "llada_v"))
    assert "u:hi /think.a:[<think> hm </think> yes.]u:hi.a:[yes.]" in asked
    assert "/think." not in short(*spoken(NONE, content, "llada_v"))


def test_a_drawing_that_was_thought_about_is_asked_for_once() -> None:
    content = [PAIR[0], {"role": "assistant", "content": "<think> x </think><image>"}]
    codes = {"codes_npy": encode_array(np.arange(4, dtype=np.uint16))}
    sequence, words = spoken(Conversation(thinking=True), content, "mmada", **codes)
    text = learned(sequence, words)
    assert "You should first think out a more detailed version" in text
    assert text.count("You should first think") == 1


# ---- what is learned -----------------------------------------------------------------------------


def test_every_answer_the_last_or_one_at_random() -> None:
    every = "^s:S.u:a.a:[b.]u:c.a:[d e.]"
    last = "^s:S.u:a.a:b.u:c.a:[d e.]"
    first = "^s:S.u:a.a:[b.]"
    assert short(*spoken(NONE, TALK)) == every
    assert short(*spoken(Conversation(answers="last", tail=NoTail()), TALK)) == last
    one = Conversation(answers="one", tail=NoTail())
    drawn = [short(*spoken(one, TALK, seed=seed)) for seed in range(60)]
    assert set(drawn) == {first, last}
    assert 15 < drawn.count(first) < 45
    assert drawn == [short(*spoken(one, TALK, seed=seed)) for seed in range(60)]


@pytest.mark.parametrize(
    "tail, ends",
    [(NoTail(), 0), (FixedTail(), 1), (FixedTail(3), 3), (FilledTail(), 12), (FilledTail(5), 5)],
)
def test_how_an_answer_ends(tail: Tail, ends: int) -> None:
    sequence, words = spoken(Conversation(tail=NoTail()), PAIR)
    whole, _ = spoken(Conversation(tail=tail), PAIR, length=len(sequence) + 12)
    assert len(whole) == len(sequence) + ends
    assert ids_of(whole)[len(sequence) :] == [words.vocabulary.eos_id] * ends
    assert len(targets_of(whole)) == 4 + ends  # y, e, s and the end of the turn
    exact, _ = spoken(Conversation(tail=tail), PAIR, length=len(sequence))
    assert len(exact) == len(sequence)


@pytest.mark.parametrize(
    "answer, bound",
    [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (15, 16), (16, 16), (17, 32), (33, 48), (48, 48)],
)
def test_random_lengths_end_at_a_round_number(answer: int, bound: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {RandomTail().count(answer=answer, room=999, generator=generator) for _ in range(400)}
    assert drawn == set(range(bound - answer + 1))


def test_a_filled_row_leaves_nothing_to_pack() -> None:
    words = words_of("llada")
    for tail, works in ((FilledTail(), False), (FilledTail(8), True), (RandomTail(), True)):
        source = Source("x", Conversation(tail=tail))
        if works:
            apply_chat_template([source], LAYOUTS["llada"], words, length=9, packed=True)
            continue
        with pytest.raises(ValueError, match="leaves nothing to pack"):
            apply_chat_template([source], LAYOUTS["llada"], words, length=9, packed=True)


WEIGHED = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "3", "weight": 0},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "2", "weight": 1},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "4", "train": False},
]


def test_answers_with_weight_0_are_context_from_the_file_to_the_targets(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": WEIGHED}))
    write_conversations(str(tmp_path / "a.jsonl"), tmp_path / "out")
    (one,) = (sample for url in expand_urls(tmp_path / "out") for sample in read_shard(url))
    content = json.loads(one["json"])
    assert short(*spoken(NONE, content)) == "^u:1 + 1?.a:3.u:sure?.a:[2.]"
    for answers in ("one", "last"):
        drawn = Conversation(answers=answers, tail=NoTail())
        assert short(*spoken(drawn, content)) == "^u:1 + 1?.a:3.u:sure?.a:[2.]"


@pytest.mark.parametrize(
    "weight, says", [(0, "all its answers have weight 0"), (0.5, "the weight 0.5"), ("1", "'1'")]
)
def test_weights_that_mean_nothing(weight: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spoken(NONE, [PAIR[0], {**PAIR[1], "weight": weight}])


def test_names_of_special_tokens_are_letters_in_what_is_learned() -> None:
    named = "<|endoftext|> ends"
    pair = [{"role": "user", "content": named}, {"role": "assistant", "content": named}]
    for template in (True, False):
        sequence, words = spoken(Conversation(template=template, tail=NoTail()), pair)
        ends = [i for i in targets_of(sequence) if ids_of(sequence)[i] == words.vocabulary.eos_id]
        assert len(ends) == (0 if template else 1)


def test_a_conversation_of_millions_of_characters_is_not_tokenized() -> None:
    long = [PAIR[0], {"role": "assistant", "content": "word " * 1_000_000}]
    with pytest.raises(ValueError, match="characters of its messages do not fit in a row of 400"):
        spoken(NONE, long)
    cut, _ = spoken(Conversation(cut_long_answers=True, tail=NoTail()), long)
    assert len(cut) == 400


# ---- through shards -----------------------------------------------------------------------------


def talks(count: int) -> list[Sample]:
    return [
        {
            "__key__": f"{n:03d}",
            "json": json.dumps({"messages": [*TALK[:4], *PAIR[1:], *PAIR] + [PAIR[0]] * (n % 2)})
            .replace('"hi"', f'"question {n}"')
            .encode(),
        }
        for n in range(count)
    ]


def test_draws_resume_exactly(tmp_path: Path) -> None:
    """The turn and the tail of each conversation, in packed rows."""
    write_shard(tmp_path / "a.tar", talks(7))
    words = words_of("llada")
    source = Source(str(tmp_path), Conversation(answers="one", tail=RandomTail()))

    def loader() -> Any:
        sources = apply_chat_template([source], LAYOUTS["llada"], words, length=300, packed=True)
        return build_loader(
            attach_vision(sources, None),
            words.vocabulary,
            tokenizer=words.tokenizer,
            batch_size=2,
            length=300,
            packed=True,
            shuffle_buffer=4,
        )

    first = loader()
    batches = iter(first)
    before = [next(batches) for _ in range(5)]
    state = first.state_dict()
    expected = [next(batches) for _ in range(6)]
    again = loader()
    again.load_state_dict(state)
    continued = iter(again)

    def same(one: Batch, other: Batch) -> bool:
        return all(
            torch.equal(getattr(one, n), getattr(other, n)) for n in ("ids", "target", "document")
        )

    assert all(same(next(continued), batch) for batch in expected)
    assert not same(before[0], expected[0])


def test_an_answer_that_does_not_fit_is_a_broken_sample(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", talks(2))
    words = words_of("llada")
    sources = apply_chat_template(
        [Source(str(tmp_path), Conversation())], LAYOUTS["llada"], words, length=20, packed=False
    )
    options: dict[str, Any] = {"tokenizer": words.tokenizer, "batch_size": 1, "length": 20}
    batches = build_loader(attach_vision(sources, None), words.vocabulary, max_broken=0, **options)
    with pytest.raises(ValueError, match=r"sample 00.: \d+ tokens do not fit in a row of 20"):
        next(iter(batches))


def test_an_answer_may_be_cut_where_the_row_ends() -> None:
    cut = Conversation(cut_long_answers=True)
    whole, words = spoken(NONE, TALK)
    assert short(whole, words).endswith("a:[d e.]")
    for length, end in (
        (len(whole), "a:[d e.]"),
        (len(whole) - 1, "a:[d e]"),
        (len(whole) - 3, "a:[d]"),
    ):
        sequence, _ = spoken(cut, TALK, length=length)
        assert short(sequence, words).endswith(end)
        assert len(sequence) == length
    with_nothing_left, _ = spoken(cut, TALK, length=len(whole) - 4)
    assert len(with_nothing_left) == len(whole)  # the stream counts it
    dimple = LAYOUTS["dimple"]
    both, words = spoken(NONE, PAIR, "dimple", prompt_template=dimple)
    sequence, _ = spoken(cut, PAIR, "dimple", prompt_template=dimple, length=len(both) - 2)
    assert learned(sequence, words).endswith("[ye]")


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, says",
    [
        ({"texts": []}, "neither messages nor conversations, nor a prompt"),
        ([], "neither messages nor conversations"),
        (["x"], "a message is no object but 'x'"),
        ([{"role": "user"}], "no role and text"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "neither text nor image"),
        (PAIR[:1], "its 1 messages hold no answer"),
        (PAIR[1:], "starts with the assistant"),
        ([TALK[0], PAIR[1]], "starts with the assistant"),
        ([*PAIR, PAIR[1]], "message 3 is the second of the assistant in a row"),
        ([PAIR[0], {"role": "assistant", "content": " "}], "message 2, of the assistant, is empty"),
        ([{"role": "user", "content": ""}, PAIR[1]], "message 1, of the user, is empty"),
        ([{"role": "critic", "content": "x"}, *PAIR], "the role 'critic', not one of"),
        ([{"role": "user", "content": "<image>"}, PAIR[1]], "mention 1 images .* but it has 0"),
    ],
)
def test_conversations_that_cannot_be_used(content: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spoken(NONE, content)


def test_images_for_a_model_that_sees_none() -> None:
    content = [{"role": "user", "content": "<image>"}, PAIR[1]]
    with pytest.raises(ValueError, match=r"it has images \(png\), but this model \(llada\) sees"):
        spoken(NONE, content, png=plain(1))
    with pytest.raises(ValueError, match="no codes of them; data_pipelines.tokenize_images"):
        spoken(NONE, content, "mmada", png=plain(1))
    with pytest.raises(ValueError, match="mention 1 images .* but it has 2"):
        spoken(NONE, content, "llada_v", eye=Eye(SQUARE), **{"0.png": plain(1), "1.png": plain(1)})


def test_settings_without_meaning() -> None:
    with pytest.raises(ValueError, match="answers 'all' is not one of"):
        Conversation(answers="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens is 0"):
        FixedTail(0)


def test_a_model_with_eyes_looks_at_conversations(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", talks(1))
    words = words_of("llada")
    source = Source(str(tmp_path / "a.tar"), Conversation())
    spoken_ = apply_chat_template([source], LAYOUTS["llada"], words, length=9, packed=False)
    (through,) = attach_vision(spoken_, adapter())
    assert through.to_sequence.eye.tiling == SQUARE
