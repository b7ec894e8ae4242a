"""The command line, with a fake model; with the bundled one where it is in the tree."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from PIL import Image

import mmdlm
from mmdlm.cli import commands
from mmdlm.cli import main as cli
from mmdlm.cli import names as known

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "mmdlm" / "checkpoints" / "emoji"


ANSWER, EDIT, CHAT = ([command, "--model", "m"] for command in ("answer", "edit", "chat"))


class FakeModel:
    """Draws one plain color that depends on all that an image may depend on."""

    def __init__(self) -> None:
        self.defaults = SimpleNamespace(text_to_image=SimpleNamespace(num_inference_steps=4))
        self.calls: list[dict[str, object]] = []
        self.loaded: tuple[object, ...] = ()
        self.prompt_template = SimpleNamespace(need=lambda task: None)

    def with_generation(self, **options: object) -> FakeModel:
        self.decoded = options
        return self

    def set_progress_bar_config(self, *, desc: str, leave: bool, disable: bool) -> None:
        self.shows = not disable

    def __call__(self, prompts: list[str], **options: Any) -> SimpleNamespace:
        if self.shows:
            print("drawing", file=sys.stderr)
        *_, last = self.draw_trajectory(prompts, **options)
        return SimpleNamespace(images=last)

    def draw_trajectory(
        self,
        prompts: list[str],
        *,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        negative_prompt: str | None,
        height: int | None,
        width: int | None,
        think: bool,
        generator: list[torch.Generator],
    ) -> Iterator[list[Image.Image]]:
        self.calls.append(
            {"prompts": prompts, "steps": num_inference_steps, "scale": guidance_scale}
        )
        for prompt in prompts:
            if "too long" in prompt:
                raise ValueError(f"prompt {prompt!r} is too long; use fewer words")
        steps = num_inference_steps or self.defaults.text_to_image.num_inference_steps
        assert len(generator) == len(prompts)
        for _ in range(steps):
            colors = [torch.randint(0, 256, (3,), generator=one).tolist() for one in generator]
            size = (width or 8, height or 8)
            yield [
                Image.new("RGB", size, (color[0], color[1], len(prompt) % 256))
                for color, prompt in zip(colors, prompts, strict=True)
            ]

    def caption(
        self,
        image: list[Image.Image],
        *,
        num_inference_steps: int | None,
        generator: list[torch.Generator],
    ) -> list[str]:
        assert [one.initial_seed() for one in generator] == [0] * len(image)
        self.calls.append({"images": len(image)})
        return [f"an image {one.width} wide" for one in image]

    def infill(
        self,
        texts: list[str],
        *,
        image: Image.Image | None,
        num_inference_steps: int | None,
        generator: list[torch.Generator],
    ) -> list[str]:
        assert len(generator) == len(texts)
        return [text.replace("[MASK]", "dark" if image is None else "seen") for text in texts]

    def inpaint(
        self,
        image: Image.Image,
        mask: Image.Image,
        prompt: str,
        *,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        generator: torch.Generator,
        strength: float,
    ) -> Image.Image:
        self.calls.append({"strength": strength})
        result = image.convert("RGB")
        result.paste((0, 0, 255), mask=mask)
        return result

    def edit(
        self,
        image: list[Image.Image],
        instruction: str,
        *,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        image_guidance_scale: float | None,
        generator: torch.Generator,
    ) -> Image.Image:
        self.calls.append(
            {"scales": (guidance_scale, image_guidance_scale), "steps": num_inference_steps}
        )
        return image[-1].point(lambda level: 255 - level)

    def answer(
        self, questions: list[str], images: list[list[Image.Image]] | None, **options: object
    ) -> list[str]:
        self.calls.append(options)
        shown = images or [[]] * len(questions)
        return [f"{text} {len(some)}" for text, some in zip(questions, shown, strict=True)]

    def chat(
        self, messages: list[dict[str, str]], images: list[Image.Image], **options: object
    ) -> str:
        self.calls.append(options)
        if "too long" in messages[-1]["content"]:
            raise ValueError("the prompt is too long; shorten it")
        said = " | ".join(message["content"].replace("\n", "/") for message in messages)
        return f"[{said}] {len(images)}"

    def complete(self, texts: list[str], **options: object) -> list[str]:
        self.calls.append(options)
        return [" and so on"] * len(texts)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeModel:
    """A fake behind every name but "missing"; the current folder is an empty one."""
    fake = FakeModel()

    def load(
        name_or_path: str,
        *,
        device: str | None,
        revision: str | None,
        dtype: torch.dtype | None,
        quantization: str | None,
        adapter: str | None,
        image_tokenizer: str | None,
        task: str,
    ) -> FakeModel:
        fake.loaded = (dtype, quantization, adapter, image_tokenizer)
        fake.placed = (device, revision)
        if name_or_path == "missing":
            raise ValueError("no model 'missing'; give a bundled name (emoji) or a folder")
        return fake

    monkeypatch.setattr(mmdlm, "load", load)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def image(model: FakeModel) -> str:
    Image.new("RGB", (8, 8), (255, 0, 0)).save("image.png")
    return "image.png"


def files() -> set[str]:
    return set(os.listdir())


def test_draw_writes_the_image(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["draw", "red heart", "-o", "heart.png"]) == 0
    assert capsys.readouterr().out == "heart.png\n"
    assert files() == {"heart.png"}
    with Image.open("heart.png") as drawn:
        assert drawn.size == (8, 8)


def test_options_of_loading_reach_it(model: FakeModel) -> None:
    assert cli.main(["draw", "heart", "-o", "a.png"]) == 0
    assert model.loaded == (None, None, None, None)
    given = ["--dtype", "bfloat16", "--quantization", "4bit", "--adapter", "a/b"]
    assert cli.main(["draw", "x", "-o", "a.png", *given, "--image-tokenizer", "c/d"]) == 0
    assert model.loaded == (torch.bfloat16, "4bit", "a/b", "c/d")
    assert model.placed == (None, None)
    assert cli.main(["draw", "x", "-o", "a.png", "--device", "cuda:1", "--revision", "v2"]) == 0
    assert model.placed == ("cuda:1", "v2")


def test_options_reach_the_model_and_none_leaves_its_defaults(model: FakeModel) -> None:
    assert cli.main(["draw", "heart", "-o", "a.png"]) == 0
    assert cli.main(["draw", "heart", "-o", "a.png", "--steps", "7", "--guidance-scale", "3"]) == 0
    assert model.calls == [
        {"prompts": ["heart"], "steps": None, "scale": None},
        {"prompts": ["heart"], "steps": 7, "scale": 3.0},
    ]


def test_output_is_a_function_of_inputs_and_seed(model: FakeModel) -> None:
    for name, seed in [("a.png", "1"), ("b.png", "1"), ("c.png", "2")]:
        assert cli.main(["draw", "heart", "-o", name, "--seed", seed]) == 0
    a, b, c = (Path(name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b
    assert a != c


def test_several_images_are_numbered(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["draw", "heart", "-o", "heart.webp", "--num-images", "3"]) == 0
    names = ["heart-1.webp", "heart-2.webp", "heart-3.webp"]
    assert files() == set(names)
    assert capsys.readouterr().out.split() == names


def test_each_of_several_images_is_that_of_a_seed_of_its_own(
    model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["draw", "heart", "-o", "all.png", "--num-images", "3", "--seed", "7"]) == 0
    for number, seed in enumerate(("7", "8", "9"), start=1):
        assert cli.main(["draw", "heart", "-o", "one.png", "--seed", seed]) == 0
        assert Path("one.png").read_bytes() == Path(f"all-{number}.png").read_bytes()
    last = str(2**63 - 1)
    assert cli.main(["draw", "heart", "-o", "one.png", "--seed", last]) == 0
    capsys.readouterr()
    assert cli.main(["draw", "heart", "-o", "x.png", "--seed", last, "--num-images", "2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"take one up to {2**63 - 2}" in error
    with pytest.raises(SystemExit):
        cli.main(["draw", "--help"])
    assert "out-1.png has the --seed N, out-2.png" in " ".join(capsys.readouterr().out.split())


def test_animation_shows_each_step_and_ends_in_the_image(model: FakeModel) -> None:
    draw = ["draw", "heart", "--num-images", "2", "--steps", "5"]
    assert cli.main([*draw, "-o", "with.png", "--animate", "heart.gif"]) == 0
    assert cli.main([*draw, "-o", "without.png"]) == 0
    assert Path("with-1.png").read_bytes() == Path("without-1.png").read_bytes()
    with Image.open("heart.gif") as animation:
        assert animation.n_frames == 5
        assert animation.size == (16, 8)


def test_caption_of_one_image_is_the_caption(
    image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["caption", image]) == 0
    assert capsys.readouterr().out == "an image 8 wide\n"


def test_captions_of_many_images_name_them_and_run_in_groups(
    model: FakeModel, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    count = commands.CAPTIONS_AT_ONCE + 1
    assert cli.main(["caption", *[image] * count]) == 0
    assert capsys.readouterr().out == f"{image}\tan image 8 wide\n" * count
    assert model.calls == [{"images": commands.CAPTIONS_AT_ONCE}, {"images": 1}]


def test_infill_prints_the_text(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["infill", "woman [MASK] skin tone"]) == 0
    assert capsys.readouterr().out == "woman dark skin tone\n"


def test_infill_may_look_at_a_image(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["infill", "woman [MASK] skin tone", "--image", image]) == 0
    assert capsys.readouterr().out == "woman seen skin tone\n"


def test_a_terminal_gets_a_bar_and_the_same_image(
    model: FakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["draw", "heart", "-o", "a.png"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["draw", "heart", "-o", "b.png"]) == 0
    assert "drawing" in capsys.readouterr().err
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_box_and_mask_say_the_same(image: str) -> None:
    mask = Image.new("1", (8, 8))
    mask.paste(1, (2, 0, 8, 4))
    mask.save("mask.png")
    inpaint = ["inpaint", image, "--prompt", "heart"]
    assert cli.main([*inpaint, "-o", "a.png", "--box", "2,0,8,4"]) == 0
    assert cli.main([*inpaint, "-o", "b.png", "--mask", "mask.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    with Image.open("a.png") as painted:
        assert painted.getpixel((2, 0)) == (0, 0, 255)
        assert painted.getpixel((1, 0)) == (255, 0, 0)


def test_inpaint_needs_no_prompt(image: str) -> None:
    assert cli.main(["inpaint", image, "-o", "a.png", "--box", "2,0,8,4"]) == 0
    with Image.open("a.png") as painted:
        assert painted.getpixel((2, 0)) == (0, 0, 255)


def test_edit_writes_the_image(image: str, model: FakeModel) -> None:
    edit = [*EDIT, image, "--prompt", "make it blue", "-o", "a.png"]
    assert cli.main([*edit, "--image-guidance-scale", "4", "--steps", "3"]) == 0
    assert model.calls == [{"scales": (None, 4.0), "steps": 3}]
    with Image.open("a.png") as edited:
        assert edited.getpixel((0, 0)) == (0, 255, 255)


def test_a_size_reaches_the_model(model: FakeModel) -> None:
    assert cli.main(["draw", "heart", "-o", "a.png", "--height", "4", "--width", "12"]) == 0
    with Image.open("a.png") as drawn:
        assert drawn.size == (12, 4)


def test_answer_prints_the_answer(
    image: str, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*ANSWER, "what?", "--image", image, "--image", image]) == 0
    assert capsys.readouterr().out == "what? 2\n"
    options = ["--max-new-tokens", "9", "--block-length", "3", "--temperature", "0.5", "--no-think"]
    options += ["--stop", "."]
    assert (
        cli.main(
            [
                "answer",
                "--model",
                "other",
                "what?",
                *options,
                "--guidance-scale",
                "2",
                "--steps",
                "4",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == "what? 0\n"
    given = {name: value for name, value in model.calls[-1].items() if name != "generator"}
    assert given == {
        "num_inference_steps": 4,
        "max_new_tokens": 9,
        "stop": ["."],
        "block_length": 3,
        "temperature": 0.5,
        "guidance_scale": 2.0,
        "think": False,
    }
    assert model.calls[0]["think"] is model.calls[0]["max_new_tokens"] is None


def test_how_fast_to_decode(model: FakeModel) -> None:
    assert cli.main([*ANSWER, "what?"]) == 0
    assert set(model.decoded.values()) == {None}
    options = ["--cache", "dual", "--cache-refresh", "4", "--threshold", "0.9", "--distinct"]
    assert cli.main([*ANSWER, "what?", *options]) == 0
    given = {"cache": "dual", "cache_refresh": 4, "threshold": 0.9, "distinct": True}
    assert {name: one for name, one in model.decoded.items() if one is not None} == given


def test_how_to_sample_as_published_code_does(model: FakeModel) -> None:
    options = ["--order", "margin", "--schedule", "cosine", "--reproduce", "dream"]
    assert cli.main([*ANSWER, "what?", *options, "--published-defects"]) == 0
    assert {name: one for name, one in model.decoded.items() if one is not None} == {
        "order": "margin",
        "schedule": "cosine",
        "reproduce": "dream",
        "published_defects": True,
    }


def test_complete_prints_the_whole_text(
    model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["complete", "once upon a time"]) == 0
    assert capsys.readouterr().out == "once upon a time and so on\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-16"])
def test_texts_are_utf_8_whatever_the_console_says(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    asked = io.BytesIO("caf\u00e9 \u2192 [MASK]\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(asked, encoding=encoding))
    assert cli.main(["infill", "-"]) == 0
    assert out.getvalue().decode() == "caf\u00e9 \u2192 dark\n"


def test_bytes_that_are_no_text_are_refused_in_a_chat(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"red \xff heart\n")))
    assert cli.main(CHAT) == 2
    assert "half a character at place 4" in capsys.readouterr().err


def piped(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_chat_over_a_pipe_remembers_what_was_said(
    image: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "a", "", f"/image {image}", "b", "/new", "c", "/quit", "d")
    assert cli.main([*CHAT, "--system", "s"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "[s | a] 0",
        "[s | a | [s | a] 0 | <image>/b] 1",
        "[s | c] 0",
    ]


def test_images_stand_where_the_message_says(
    image: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, f"/image {image}", f"/image {image}", "is <image> in <image>?", "b")
    assert cli.main([*CHAT]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "[is <image> in <image>?] 2"
    assert second.endswith("| b] 2")


@pytest.mark.parametrize(
    "line, says",
    [
        ("/image missing.png", "missing.png"),
        ("/image", "there are /image PATH, /new and /quit"),
        ("/image one.png", "1x1 pixels is too small to be seen"),
        ("/quti", "there is no command '/quti'"),
        ("too long", "shorten it"),
    ],
)
def test_a_line_that_fails_ends_a_pipe_but_not_a_conversation(
    model: FakeModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    says: str,
) -> None:
    Image.new("RGB", (1, 1)).save("one.png")
    piped(monkeypatch, "a", line, "b")
    assert cli.main([*CHAT]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("[a] 0\n", 1)
    assert says in shown.err

    typed = iter(["a", line, "", "b"])

    def reads(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", reads)
    assert cli.main([*CHAT]) == 0
    shown = capsys.readouterr()
    assert shown.out == "[a] 0\n[a | [a] 0 | b] 0\n"
    assert says in shown.err


def test_a_task_that_the_family_lacks_is_refused_before_its_weights_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmdlm.pipeline import loading

    monkeypatch.setattr(loading, "_load_denoiser", lambda *_: pytest.fail("weights were read"))
    assert cli.main(["chat", "--model", "emoji"]) == 2
    assert "(mmdlm) was not trained for chat; it is for caption, text" in capsys.readouterr().err
    assert cli.main(["chat"]) == 2  # no bundled model talks
    assert "--model" in capsys.readouterr().err


DRAW = ["draw", "heart", "-o", "out.png"]
INPAINT = ["inpaint", "image.png", "--prompt", "heart", "-o", "out.png"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["draw", " ", "-o", "out.png"], "empty"),
        (["draw", "too long", "-o", "out.png"], "too long"),
        ([*DRAW, "--stepz", "3"], "--stepz"),
        ([*DRAW, "--step", "3"], "--step"),
        ([*DRAW, "--steps", "0"], "'0'"),
        ([*DRAW, "--steps", "many"], "'many'"),
        ([*DRAW, "--seed", "-1"], "'-1'"),
        ([*DRAW, "--guidance-scale", "nan"], "'nan'"),
        ([*DRAW, "--model", "missing"], "'missing'"),
        ([*DRAW, "--animate", "out.mp4"], ".gif"),
        ([*DRAW[:3], "out.gif", "--animate", "out.gif"], "two different files"),
        (["draw", "heart", "-o", "out"], "'out.png'"),
        (["draw", "heart", "-o", "out.txt"], "'out.png'"),
        (["draw", "heart", "-o", "nowhere/out.png"], "nowhere"),
        (["draw", "heart", "-o", "nowhere/"], "there is no folder 'nowhere/'; create it"),
        (["draw", "heart", "-o", "folder.png"], "is a folder"),
        (["draw", "@words.txt", "-o", "out.png"], "which cannot be read (no such file"),
        (["draw", "@text.png", "-o", "out.png", "--animate", "a.gif", "--steps"], "--steps"),
        (["draw", "@latin.txt"], "'latin.txt' is no text in UTF-8 (at byte 3); save it as UTF-8"),
        (["draw", "@blank.txt"], "'blank.txt' has no text in it"),
        (
            ["draw", "red", "-o", "out.png", "heart"],
            "the argument 'heart' there; put",
        ),
        (["draw", "red", "blue", "--animate", "a.gif"], "shows the images of one prompt"),
        (["draw", *["a"] * 11, "--num-images", "1000"], "11,000 images are too many"),
        (["infill", "a [MASK]", "", "b"], "empty"),
        (["caption", "empty"], "the folder 'empty' has no image files; they end in .png"),
        (["caption", "@blank.txt"], "has no text in it"),
        (["caption", "http://127.0.0.1:1/a.png"], "cannot be fetched"),
        (["train", "--config", "x.yaml"], "runs from a checkout (git clone, then make install)"),
        (["eval"], "python -m eval.run --config FILE"),
        (["modles"], "did you mean models?"),
        (["completion", "fish"], "invalid choice: 'fish'"),
        (["draw", "red \udcff heart", "-o", "out.png"], "half a character at place 4"),
        ([*DRAW, "--negative-prompt", "\ud83d"], "half a character at place 0"),
        (["caption", "missing.png"], "missing.png"),
        (["caption", "image.png", "text.png"], "text.png"),
        (["caption", "image.png", "cut.png"], "cut.png"),
        (["caption", "folder.png"], "folder.png"),
        ([*DRAW, "--negative-prompt", "-"], "'-' is no text, and this one is not read from"),
        ([*ANSWER, "a", "--image", "data:image/png;base64,AA"], "is a URL"),
        (["caption", "noise.png", "--max-pixels", "9"], "noise.png' is too large: 64 x 64"),
        (["draw", "heart", "-o", "out.png", "--height", "0"], "'0'"),
        ([*ANSWER, " "], "empty"),
        ([*ANSWER, "a", "--image", "missing.png"], "missing.png"),
        ([*ANSWER, "a", "--max-new-tokens", "0"], "'0'"),
        ([*ANSWER, "a", "--temperature", "hot"], "'hot'"),
        (["complete", ""], "empty"),
        ([*EDIT, "image.png", "-o", "out.png"], "--prompt"),
        (
            [*EDIT, "missing.png", "-o", "out.png", "--prompt", "x"],
            "missing.png",
        ),
        ([*EDIT, "image.png", "-o", "out", "--prompt", "x"], "'out.png'"),
        ([*CHAT, "--system", " "], "empty"),
        ([*CHAT, "hello"], "hello"),
        (["convert", "in", "out", "--image-codes", "5"], "--image-codes goes only with --from"),
        (["convert", "in", "out", "--no-shift"], "--no-shift goes only with --from"),
        (["convert", "in", "out", "--mask-token", "x"], "--mask-token goes only with --from"),
        (["convert", "out", "--from", "missing", "--to", "llada"], "does not go with --from"),
        (["infill", ""], "empty"),
        (["infill", "[MASK]", "--image", "missing.png"], "missing.png"),
        (INPAINT, "--mask"),
        ([*INPAINT, "--mask", "missing.png"], "missing.png"),
        ([*INPAINT, "--mask", "black.png"], "no hole"),
        ([*INPAINT, "--mask", "dark.png"], "no hole"),
        ([*INPAINT, "--mask", "small.png"], "4 x 4"),
        ([*INPAINT, "--mask", "layer.png"], "layer.png' is transparent in part"),
        ([*INPAINT, "--mask", "black.png", "--box", "0,0,1,1"], "not allowed with"),
        ([*INPAINT, "--box", "0,0,9,9"], "8 x 8"),
        ([*INPAINT, "--box", "4,4,4,8"], "no hole"),
        ([*INPAINT, "--box", "1,2,3"], "x0,y0,x1,y1"),
        ([*INPAINT[:3], "", "-o", "out.png", "--box", "0,0,1,1"], "empty"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    image: str, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    Path("folder.png").mkdir()
    Path("text.png").write_text("not an image")
    Path("latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    Path("blank.txt").write_text("\n \n")
    Path("empty").mkdir()
    content = Image.effect_noise((64, 64), 50)
    content.save("noise.png")
    Path("cut.png").write_bytes(Path("noise.png").read_bytes()[:600])
    Image.new("L", (8, 8)).save("black.png")
    Image.new("L", (8, 8), 127).save("dark.png")
    Image.new("L", (4, 4), 255).save("small.png")
    layer = Image.new("RGBA", (8, 8))
    layer.paste("white", (0, 0, 2, 2))
    layer.save("layer.png")
    before = files()

    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("mmdlm: ")
    assert shown.err.count("\n") == 1
    assert says in shown.err
    assert files() == before


def test_errors_that_need_no_model_come_before_it_is_loaded(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmdlm, "load", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main(["draw", "heart", "-o", "nowhere/out.png"]) == 2
    assert cli.main(["caption", image, "missing.png"]) == 2
    assert cli.main([*INPAINT, "--box", "0,0,9,9"]) == 2


def test_full_disk_leaves_the_previous_image(
    model: FakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out.png").write_bytes(b"previous")

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert cli.main(DRAW) == 2
    assert "no space left on device" in capsys.readouterr().err
    assert files() == {"out.png"}
    assert Path("out.png").read_bytes() == b"previous"


def test_interrupt_is_quiet(
    model: FakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeModel, "__call__", interrupt)
    assert cli.main(DRAW) == 130
    assert capsys.readouterr().err == "mmdlm: interrupted\n"
    assert files() == set()


def test_our_own_mistakes_are_not_hidden(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeModel, "__call__", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(DRAW)


def shell(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmdlm.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_from_a_shell(tmp_path: Path) -> None:
    wrong = shell("draw", "heart", "-o", "out.txt", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("mmdlm: ")
    version = shell("--version", cwd=tmp_path)
    assert (version.returncode, version.stdout) == (0, f"mmdlm {mmdlm.__version__}\n")


def test_help_is_instant_because_torch_stays_out(tmp_path: Path) -> None:
    start = time.perf_counter()
    assert shell("--help", cwd=tmp_path).returncode == 0
    seconds = time.perf_counter() - start
    assert seconds < 5  # 0.1 s on an idle machine; torch alone takes longer than this
    loaded = subprocess.run(
        [sys.executable, "-c", "import mmdlm.cli.main, sys; print('torch' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout == "False\n"


@pytest.mark.slow
@pytest.mark.skipif(not BUNDLED.is_dir(), reason="no bundled model in this tree")
def test_the_bundled_model_draws_describes_and_mends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--steps", "4", "--seed", "3"]
    assert cli.main(["draw", "red heart", "-o", "a.png", "--animate", "a.gif", *few]) == 0
    assert cli.main(["draw", "red heart", "-o", "b.png", *few]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    capsys.readouterr()
    assert cli.main(["caption", "a.png", *few]) == 0
    assert capsys.readouterr().out.strip()
    box = ["--box", "0,0,64,32", "--prompt", "blue heart"]
    assert cli.main(["inpaint", "a.png", *box, "-o", "c.png", *few]) == 0
    capsys.readouterr()
    assert cli.main(["infill", "woman [MASK] [MASK] skin tone", *few]) == 0
    filled = capsys.readouterr().out.strip()
    assert filled.startswith("woman ")
    assert "[MASK]" not in filled


def test_kinds_of_quantization_are_those_that_there_are() -> None:
    from mmdlm.models.quantization import KINDS

    assert set(known.QUANTIZATIONS) == set(KINDS)


def test_names_are_those_of_a_decoding() -> None:
    from mmdlm.pipeline.presets import PresetName
    from mmdlm.pipeline.sampler_names import CacheName, OrderName, ScheduleName

    assert get_args(CacheName) == known.CACHES
    assert get_args(OrderName) == known.ORDERS
    assert get_args(ScheduleName) == known.SCHEDULES
    assert get_args(PresetName) == known.PRESETS


OWN_PARTS = """
from dataclasses import dataclass

from mmdlm.core.sampling.unmasking import UniformTransfer
from mmdlm.core.sampling.order import Order


@dataclass(frozen=True)
class Backwards(Order):
    def score(self, candidates, *, generator):
        return candidates.column.float()


@dataclass(frozen=True)
class Needs(Order):
    something: int

    def score(self, candidates, *, generator):
        return candidates.log_prob


class Slowly(UniformTransfer):
    pass
"""


@pytest.mark.skipif(not BUNDLED.is_dir(), reason="no bundled model in this tree")
def test_an_order_and_a_rule_of_ones_own_are_named_by_class_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_parts_of_cli.py").write_text(OWN_PARTS)
    text = ["infill", "woman [MASK] [MASK] skin tone", "--steps", "2"]
    said = []
    for order in ("left_to_right", "own_parts_of_cli.Backwards"):
        assert cli.main([*text, "--order", order, "--schedule", "own_parts_of_cli.Slowly"]) == 0
        said.append(capsys.readouterr().out)
    assert all(one.startswith("woman ") for one in said)
    assert cli.main(["draw", "red heart", "-o", "a.png", "--steps", "2", "--order", "random"]) == 0


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("backwards", "'backwards' is no Order that is known; give one of confidence"),
        ("nowhere.Order", "'nowhere.Order' cannot be imported (No module named 'nowhere')"),
        (
            "mmdlm.core.sampling.order.Rnadom",
            "'mmdlm.core.sampling.order.Rnadom' cannot be imported",
        ),
        (
            "mmdlm.core.sampling.unmasking.UniformTransfer",
            "'mmdlm.core.sampling.unmasking.UniformTransfer' is no Order",
        ),
        ("own_parts_of_cli.Needs", "'own_parts_of_cli.Needs' cannot be made without arguments"),
        (
            "mmdlm.core.sampling.order.Order",
            "'mmdlm.core.sampling.order.Order' cannot be made without arguments",
        ),
    ],
)
def test_what_is_no_order_is_named_before_a_model_is_loaded(
    order: str,
    message: str,
    model: FakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_parts_of_cli.py").write_text(OWN_PARTS)
    assert cli.main(["infill", "a [MASK]", "--order", order]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert model.loaded == ()


def test_places_for_images_are_counted_before_loading(
    model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*ANSWER, "in <image>?"]) == 2
    assert "1 <image> placeholder but was given 0 images" in capsys.readouterr().err
    assert model.loaded == ()


def test_families_are_those_that_there_are() -> None:
    from mmdlm.models.families.auto import FAMILIES

    assert set(known.FAMILY_NAMES) == {family.name for family in FAMILIES}


@pytest.mark.parametrize(
    "given, said",
    [
        (["draw", "heart", "-o", "x.png", "--Steps", "2"], "'--Steps'; did you mean --steps?"),
        (["draw", "heart", "-o", "x.png", "--guidance=2"], "did you mean --guidance-scale?"),
        (["draw", "heart", "-o", "x.png", "--zzz"], "unknown option '--zzz' (see 'mmdlm draw"),
        (["draw", "heart", "-o", ""], "-o/--output: a path is empty; name a file"),
        (
            ["draw", "heart", "-o", "x.png", "--num-images", "1000000000"],
            "1,000,000,000 images are too many; take at most 10,000",
        ),
        (
            ["draw", "heart", "-o", "x.png", "--steps", "1000000000"],
            "num_inference_steps must be at most 100,000, got 1000000000",
        ),
    ],
)
def test_numbers_that_would_take_for_ever_and_names_nearly_right(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(given) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


def test_more_new_tokens_than_the_model_takes(tiny_checkpoint: Path) -> None:
    model = mmdlm.load(tiny_checkpoint, device="cpu")
    with pytest.raises(ValueError, match="max_new_tokens is 1000000000, but the model takes"):
        model.complete("heart", max_new_tokens=10**9)
    with pytest.raises(ValueError, match=r"and at most 10000, got 10{9}$"):
        model.text_to_image("heart", num_images_per_prompt=10**9)
