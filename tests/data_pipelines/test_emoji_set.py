"""The emoji in three styles: icons from SVG, facts from Unicode data, edits and questions."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import emoji_set
from data_pipelines.shards.shards import read_shard
from data_pipelines.sources.emoji import caption_of, in_styles
from data_pipelines.sources.emoji_facts import Edit, edits_of, read_facts
from data_pipelines.sources.emoji_tasks import balanced, chats, edits, questions, split_edits
from data_pipelines.sources.icon_sets import PACKAGES, IconSet, read_icon_sets
from tests.data_pipelines.tiny_icons import NAMES, SQUARE, tiny_emoji, write_icons

pytest.importorskip("resvg_py")


@pytest.fixture
def icons(tmp_path) -> Path:
    """A folder as npm leaves it."""
    return write_icons(tmp_path)


class TestIcons:
    def test_an_icon_fills_its_square(self, icons):
        twemoji, fluent = read_icon_sets(icons)
        assert np.unique(
            np.asarray(twemoji.draw("\U0001f34e", size=16)).reshape(-1, 3), axis=0
        ).tolist() == [[0, 0, 255 - 9 * 2]]
        assert np.unique(
            np.asarray(fluent.draw("\U0001f34e", size=16)).reshape(-1, 3), axis=0
        ).tolist() == [[0, 255 - 9 * 2, 0]]

    def test_variation_selectors_do_not_matter(self, icons):
        (one, _) = read_icon_sets(icons)
        assert one.draw("\U0001f34e\ufe0f", size=8) is not None
        assert one.draw("\U0001f47e", size=8) is None

    def test_a_wide_icon_keeps_its_shape(self, icons):
        one = read_icon_sets(icons)[0]
        wide = replace(
            one,
            icons={
                "icon-2": {"body": SQUARE.format(color="#00f", side=16), "width": 32, "height": 16}
            },
        )
        pixels = np.asarray(wide.draw("\U0001f34e", size=32))
        assert (pixels[:4] == 255).all()
        assert (pixels[12:20, :12] == [0, 0, 255]).all()

    @pytest.mark.parametrize("name", ["chars", "icons", "info", "package"])
    def test_what_is_missing_or_damaged_is_named(self, icons, name):
        path = icons / "node_modules" / PACKAGES["fluent"] / f"{name}.json"
        path.write_text("[1")
        with pytest.raises(ValueError, match="fluent.* is no Iconify icon set"):
            read_icon_sets(icons)
        path.unlink()
        with pytest.raises(
            ValueError, match=f"{name}.json is missing; install .*npm install @iconify"
        ):
            read_icon_sets(icons)


class TestFacts:
    def test_what_unicode_data_says(self, icons):
        facts = {one.name: one for one in read_facts(icons, NAMES).values()}
        assert facts["woman firefighter"].people == 1
        assert facts["thumbs up"].people is None
        assert facts["red apple"].people == 0
        assert facts["red apple"].group == "food and drink"
        assert facts["thumbs up dark skin tone"].tones == ("dark",)
        assert [n for n, f in facts.items() if f.is_animal] == ["cat face"]

    def test_unknown_emoji_have_none(self, icons):
        assert read_facts(icons, {"\U0001f680": "rocket"}) == {}

    def test_missing_data_is_named(self, icons):
        (icons / "node_modules" / "emojibase-data" / "en" / "data.json").unlink()
        with pytest.raises(
            ValueError, match=r"data\.json is missing; .*npm install emojibase-data"
        ):
            read_facts(icons, NAMES)


class TestEdits:
    @pytest.mark.parametrize(
        "source, target, instruction",
        [
            ("thumbs up", "thumbs up dark skin tone", "make the skin tone dark"),
            ("thumbs up dark skin tone", "thumbs up", "remove the skin tone"),
            ("thumbs up dark skin tone", "thumbs up light skin tone", "make the skin tone light"),
            ("man red hair", "man dark skin tone red hair", "make the skin tone dark"),
            ("firefighter", "woman firefighter", "make it a woman"),
            ("woman firefighter", "man firefighter", "make it a man"),
            ("woman firefighter", "firefighter", "make it a person"),
            ("person walking", "woman walking", "make it a woman"),
            ("red apple", "green apple", "make it green"),
            ("one o\u2019clock", "two-thirty", "make it two-thirty"),
            ("person walking", "person walking facing right", "turn it to the right"),
        ],
    )
    def test_names_that_differ_in_one_thing(self, source, target, instruction):
        assert Edit(source, target, instruction) in edits_of([source, target])

    def test_names_that_differ_in_more_are_no_edit(self):
        assert edits_of(["red apple", "green book", "two hearts", "rocket"]) == []
        tones = "people holding hands dark skin tone light skin tone"
        assert edits_of([tones, "people holding hands"]) == []

    def test_styles_are_edits_both_ways(self, icons):
        some = tiny_emoji(icons)
        found = edits(some + in_styles(some, read_icon_sets(icons)))
        count = Counter(task.kind for task in found)
        assert count["edit/style"] == 3 * 2 * len(
            NAMES
        )  # some may be held out in a style: see below
        assert all(task.turns[1] == "<image>" and len(task.images) == 2 for task in found)

    def test_no_measured_pair_is_trained(self, icons):
        some = tiny_emoji(icons)
        found = edits(some + in_styles(some, read_icon_sets(icons)))
        learned, measured = split_edits(found, held_out=8)
        assert len(measured) == 8
        assert Counter(task.kind for task in measured) == dict.fromkeys({t.kind for t in found}, 2)
        assert not {t.images for t in learned} & {t.images for t in measured}
        assert split_edits(found[::-1], held_out=8)[1] == measured


class TestQuestions:
    def test_yes_and_no_come_equally_often(self, icons):
        tasks = questions(tiny_emoji(icons), at_most=100)
        answers = Counter((t.kind, t.turns[1]) for t in tasks)
        assert answers["question/animal", "yes"] == answers["question/animal", "no"] == 2
        assert answers["question/food", "yes"] == answers["question/food", "no"] == 4

    def test_without_facts_nothing_is_asked(self):
        assert questions(tiny_emoji(), at_most=100) == chats(tiny_emoji(), at_most=100) == []

    def test_a_chat_asks_three_things_about_one_image(self, icons):
        for task in chats(tiny_emoji(icons), at_most=100):
            assert len(task.images) == 1
            assert [m["role"] for m in task.messages] == ["user", "assistant"] * 3
            assert "".join(m["content"] for m in task.messages).count("<image>") == 1
            assert len(set(task.turns[::2])) == 3

    def test_balanced_keeps_so_many_of_a_kind(self, icons):
        tasks = questions(tiny_emoji(icons), at_most=100)
        assert max(Counter(t.kind for t in balanced(tasks, at_most=2)).values()) == 2


class TestStyles:
    def test_captions_name_the_style_but_for_the_font(self):
        assert caption_of("rocket", "noto") == "rocket"
        assert caption_of("rocket", "fluent") == "rocket in fluent style"

    def test_what_is_held_out_in_a_style_is_fixed(self, icons, monkeypatch):
        monkeypatch.setattr("data_pipelines.sources.emoji.HELD_OUT_IN_A_STYLE", 3)
        sets: list[IconSet] = read_icon_sets(icons)
        chosen = {one.key for one in in_styles(tiny_emoji(), sets) if one.held_out_style}
        again = {one.key for one in in_styles(tiny_emoji()[::-1], sets[::-1]) if one.held_out_style}
        assert len(chosen) == 3
        assert chosen == again


class TestJob:
    def test_writes_images_and_tasks_once(self, icons, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(emoji_set, "find_font", lambda: Path(__file__))
        monkeypatch.setattr(emoji_set, "draw_with_report", lambda font, size: (tiny_emoji(), []))
        monkeypatch.setattr("data_pipelines.sources.emoji.HELD_OUT_IN_A_STYLE", 2)
        monkeypatch.setattr(emoji_set, "MEASURED_EDITS", 4)
        out = tmp_path / "images"
        emoji_set.main(icons, out)
        index = json.loads((out / "index.json").read_text())
        counts = {name: sum(shards.values()) for name, shards in index["shards"].items()}
        assert counts["train"] == 3 * len(NAMES) - 2
        assert counts["held_out"] == 0
        assert counts["held_out_style"] == 2
        assert counts["tasks/held_out"] > 4
        tasks = list(read_shard(str(out / "tasks" / "train" / "000000.tar")))
        kept_away = {s["__key__"] for s in read_shard(str(out / "held_out_style" / "000000.tar"))}
        for sample in tasks:
            notes = json.loads(sample["json"])
            assert not kept_away & set(notes["images"])
            marks = sum(m["content"].count("<image>") for m in notes["messages"])
            assert marks == len(notes["images"]) == sum(name.endswith(".png") for name in sample)
        emoji_set.main(icons, out)
        assert "already written" in capsys.readouterr().out
