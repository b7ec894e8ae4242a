"""What users call on a model: draw, caption, answer, chat, complete, infill, inpaint and edit.

All are one loop: a task is only the choice of which tokens of a document are targets. How a family
of models lays that document out is its `PromptTemplate`'s; nothing here knows one family from
another.
"""

from __future__ import annotations

import math
from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast, overload

import torch
from PIL import Image
from torch import Tensor, nn

from mmdlm.core.sampling.generators import Generators
from mmdlm.models.compilation import Mode, compile_layers
from mmdlm.pipeline.engine import Engine
from mmdlm.pipeline.generation_config import CacheName, GenerationConfig
from mmdlm.pipeline.generation_run import GenerationRun, with_generated
from mmdlm.pipeline.inputs import (
    ImageLike,
    generation_config_with,
    hole_of,
    images_of,
    images_of_each,
    load_image,
    negatives_of,
    with_places,
)
from mmdlm.pipeline.limits import MOST_IMAGES
from mmdlm.templates.conversation import Message, check_messages, turns_of
from mmdlm.templates.infill import filled_text
from mmdlm.templates.prompt_template import Codes, TaskPrompt
from mmdlm.vision.frame import Frame


@dataclass(frozen=True, eq=False)
class Model(Engine):
    """A denoiser with the tokenizers that lead into its vocabulary and out of it.

    denoiser         a Transformer, or anything that keeps the contract
    text_tokenizer   with an end of text, which is the vocabulary's eos
    image_tokenizer  None for a model of text alone, or one whose image tokenizer is elsewhere
    text_slots       tokens of text of every document the model was trained on, end included;
                     None: texts have the length they need
    max_length       longest document the denoiser takes, in tokens
    defaults         steps, temperatures and guidance where a call does not give them
    device           where the tensors of a call are put; that of the denoiser
    prompt_template           how its family lays out documents, with its chat template and special
                              ids
    packed           what is kept of the denoiser's weights from call to call, in the order that is
                     fastest on a CPU; None: it is made, and takes as much memory as they do
    origin           where the weights were read from; None: from no folder

    What the family was not trained for raises ValueError that says what it is for.

    Images are Pillow images, paths of image files, or tensors [3, H, W] in [-1, 1]. Without a
    generator each call uses a fresh one of seed 0: the same inputs give the same output. A list of
    generators, one for each output of a call, makes each output what it is alone, whatever the
    others are. A generator of another device seeds one there.
    """

    def with_generation(
        self,
        *,
        cache: CacheName | None = None,
        cache_refresh: int | None = None,
        threshold: float | None = None,
        factor: float | None = None,
        entropy_bound: float | None = None,
        in_order: bool | None = None,
        distinct: bool | None = None,
        compile: bool | Mode = False,
    ) -> Model:
        """This model, with all its tasks decoded faster.

        What is computed less often, or fewer times, costs some exactness:

        cache          what a step remembers of the steps before: "prefix" and "dual" for text in
                       blocks, "delayed" for text, "stable" for images
        cache_refresh  compute all anew every so many steps; 1 is exact
        threshold      commit every token of at least this probability: fewer steps
        factor         the same, but the more tokens at once the surer each has to be
        entropy_bound  the same, by entropies, in nats, which then are the order as well
        in_order       of the tokens so found sure, those that stand in the order before all others:
                       for texts that are written from left to right
        distinct       of several sure tokens of one word the first alone: fewer words twice

        And what does not:

        compile        hand the layers to torch.compile, those of this model too: the first calls
                       say so, and take minutes. Or a mode of it: "reduce-overhead" records CUDA
                       graphs

        See `mmdlm.pipeline.generation_config.GenerationConfig`; what is not given stays as it is.
        """
        defaults = self.defaults.in_each_task(
            cache=cache,
            cache_refresh=cache_refresh,
            threshold=threshold,
            factor=factor,
            entropy_bound=entropy_bound,
            in_order=in_order,
            distinct=distinct,
            order=None if entropy_bound is None else "entropy",
            order_temperature=None if entropy_bound is None else 0.0,
        )
        if compile:
            assert isinstance(self.denoiser, nn.Module)
            compile_layers(self.denoiser, mode="default" if compile is True else compile)
        return replace(self, defaults=defaults)

    # --- images ---------------------------------------------------------------------------------

    @overload
    def caption(  # type: ignore[overload-overlap]  # a path is a string, and so a sequence of paths
        self,
        image: ImageLike,
        *,
        num_inference_steps: int | None = None,
        generator: Generators | None = None,
    ) -> str: ...

    @overload
    def caption(
        self,
        image: abc.Sequence[ImageLike],
        *,
        num_inference_steps: int | None = None,
        generator: Generators | None = None,
    ) -> list[str]: ...

    @torch.no_grad()
    def caption(
        self,
        image: ImageLike | abc.Sequence[ImageLike],
        *,
        num_inference_steps: int | None = None,
        generator: Generators | None = None,
    ) -> str | list[str]:
        """Describe an image, or several in one pass.

        Raises ValueError for an image that cannot be read, or fewer than one step.
        """
        self.prompt_template.require("caption", self.text_tokenizer)
        images, single = images_of(image)
        generation_config = generation_config_with(
            self.defaults.caption, num_inference_steps=num_inference_steps
        )
        if not images:
            return []
        codec = self.codec
        length = self.text_slots or min(self.defaults.max_text_tokens, self.longest_text + 1)
        task_prompts = [
            self.fitting(self.prompt_template.caption_prompt(codec, seen, length=length), length)
            for (seen,) in self.look([[load_image(one)] for one in images], "caption")
        ]
        captions = [
            text.strip() for text in self.written(task_prompts, generation_config, generator)
        ]
        return captions[0] if single else captions

    @torch.no_grad()
    def text_to_image(
        self,
        prompt: str | abc.Sequence[str],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | abc.Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        think: bool = False,
        generator: Generators | None = None,
    ) -> list[Image.Image]:
        """Draw images of a prompt, or of several: all those of the first prompt come first.

        negative_prompt  what to stay away from: it takes the place of the absent prompt in
                         guidance; None or "": no words at all
        height, width    in pixels, for a model that draws in several sizes; None: its own
        think            first write what is to be drawn, where the model was trained to

        Raises ValueError for an empty or too long prompt, or a number out of range.
        """
        generation_run = self._drawing(
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            size=(height, width),
            think=think,
            generator=generator,
        )
        codes = self.codes(generation_run, generation_run.run())
        return self.decode(codes, generation_run.grid, alone=generation_run.alone)

    def draw_trajectory(
        self,
        prompt: str | abc.Sequence[str],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | abc.Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        think: bool = False,
        generator: Generators | None = None,
    ) -> Iterator[list[Image.Image]]:
        """The images of `text_to_image` after each denoising step; the last are its result.

        Codes that are still masked show as grey tiles. Bad arguments raise at the call.
        """
        generation_run = self._drawing(
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            size=(height, width),
            think=think,
            generator=generator,
        )
        return self.frames(generation_run)

    @torch.no_grad()
    def inpaint(
        self,
        image: ImageLike,
        mask: Image.Image | Tensor,
        prompt: str = "",
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Image.Image:
        """Draw a part of an image anew, so that the whole shows the prompt.

        mask    white (a tensor: 1, or True) where the image is to be repainted, of its size, and
                nowhere transparent
        prompt  "": whatever fits the rest of the image

        A code is drawn anew when any pixel of its cell is masked; pixels outside the mask come back
        exactly as they were, on the image's own size. An image of another shape than the model's
        is set on white. Raises ValueError for a mask without a hole or of another size.
        """
        self.prompt_template.require("inpaint", self.text_tokenizer)
        original = load_image(image, whole=True)
        hole = hole_of(mask, original.size)  # [H, W] bool
        generation_config = generation_config_with(
            self.defaults.inpaint,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale if prompt.strip() else 1.0,  # there is nothing to follow
        )
        tokenizer = self.need_images()
        canvas = self.prompt_template.canvas(
            original.size, edge=tokenizer.image_size, task="inpaint"
        )
        frame = Frame.within(canvas, original.size)
        known = self.encode([frame.place(original)], "inpaint")[0]
        open_ = frame.cells(hole, tokenizer.downsampling).flatten()
        codes = replace(known, open=open_)
        generation_run = self.generation_run(
            [self.prompt_template.image_prompt(self.codec, prompt, image=codes)],
            generation_config=generation_config,
            generator=generator,
            grid=codes.grid,
        )
        drawn = self.decode(self.codes(generation_run, generation_run.run()), codes.grid)[0]
        return Image.composite(frame.take(drawn), original, Image.fromarray(hole.numpy()))

    @torch.no_grad()
    def edit(
        self,
        image: ImageLike | abc.Sequence[ImageLike],
        instruction: str,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Image.Image:
        """Draw an image anew as an instruction says: "make it night".

        image                 one image, or several where the model edits one by the others
        guidance_scale        how strongly to follow the instruction; 1 is off
        image_guidance_scale  how strongly to stay with the image; 1 is off

        The result has the size at which the model sees the (last) image.
        """
        self.prompt_template.require("edit", self.text_tokenizer)
        if not instruction.strip():
            raise ValueError(f"instruction {instruction!r} is empty; say what is to change")
        generation_config = generation_config_with(
            self.defaults.edit, num_inference_steps=num_inference_steps
        )
        scales = generation_config.guidance_scale
        words, image_scale = scales if isinstance(scales, tuple) else (scales, 1.0)
        generation_config = replace(
            generation_config,
            guidance_scale=(
                words if guidance_scale is None else guidance_scale,
                image_scale if image_guidance_scale is None else image_guidance_scale,
            ),
        )
        opened = [load_image(one) for one in images_of(image)[0]]
        if not opened:
            raise ValueError("there is no image to edit; give one")
        sources = self.encode(opened, "edit")
        grid = sources[-1].grid
        blank = Codes.blank(self.codec, grid, drawn=True)
        generation_run = self.generation_run(
            [
                self.fitting(
                    self.prompt_template.edit_prompt(
                        self.codec, instruction, sources=tuple(sources), image=blank
                    )
                )
            ],
            generation_config=generation_config,
            generator=generator,
            grid=grid,
        )
        return self.decode(self.codes(generation_run, generation_run.run()), grid)[0]

    # --- text -------------------------------------------------------------------------------------

    @overload
    def answer(
        self,
        question: str,
        image: ImageLike | abc.Sequence[ImageLike] | None = None,
        *,
        num_inference_steps: int | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        guidance_scale: float | None = None,
        think: bool | None = None,
        generator: Generators | None = None,
    ) -> str: ...

    @overload
    def answer(
        self,
        question: list[str] | tuple[str, ...],
        image: abc.Sequence[ImageLike | abc.Sequence[ImageLike] | None] | None = None,
        *,
        num_inference_steps: int | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        guidance_scale: float | None = None,
        think: bool | None = None,
        generator: Generators | None = None,
    ) -> list[str]: ...

    def answer(
        self,
        question: str | list[str] | tuple[str, ...],
        image: ImageLike | abc.Sequence[ImageLike | abc.Sequence[ImageLike] | None] | None = None,
        *,
        num_inference_steps: int | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        guidance_scale: float | None = None,
        think: bool | None = None,
        generator: Generators | None = None,
    ) -> str | list[str]:
        """Answer a question, at will about an image or several; or several questions in one pass.

        image  one image or several; for several questions, a list with one of these (or None) for
               each. They stand where the question says `<image>`, or else before it

        The other options are those of `chat`.
        """
        self.prompt_template.require("answer", self.text_tokenizer)
        single = isinstance(question, str)
        questions = [question] if isinstance(question, str) else list(question)
        for one in questions:
            if not one.strip():
                raise ValueError(f"question {one!r} is empty; ask something")
        images = images_of_each(image, single=single, count=len(questions), what="questions")
        conversations = [
            [{"role": "user", "content": with_places(text, len(some))}]
            for text, some in zip(questions, images, strict=True)
        ]
        answers = self._replies(
            conversations,
            images,
            num_inference_steps=num_inference_steps,
            max_new_tokens=max_new_tokens,
            block_length=block_length,
            temperature=temperature,
            guidance_scale=guidance_scale,
            think=think,
            generator=generator,
        )
        return answers[0] if single else answers

    @overload
    def chat(
        self,
        messages: abc.Sequence[Message],
        images: ImageLike | abc.Sequence[ImageLike] | None = None,
        *,
        num_inference_steps: int | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        guidance_scale: float | None = None,
        think: bool | None = None,
        generator: Generators | None = None,
    ) -> str: ...

    @overload
    def chat(
        self,
        messages: abc.Sequence[abc.Sequence[Message]],
        images: abc.Sequence[abc.Sequence[ImageLike]] | None = None,
        *,
        num_inference_steps: int | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        guidance_scale: float | None = None,
        think: bool | None = None,
        generator: Generators | None = None,
    ) -> list[str]: ...

    @torch.no_grad()
    def chat(
        self,
        messages: abc.Sequence[Message] | abc.Sequence[abc.Sequence[Message]],
        images: ImageLike
        | abc.Sequence[ImageLike]
        | abc.Sequence[abc.Sequence[ImageLike]]
        | None = None,
        *,
        num_inference_steps: int | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        guidance_scale: float | None = None,
        think: bool | None = None,
        generator: Generators | None = None,
    ) -> str | list[str]:
        """The assistant's next turn in a conversation, or in several of any lengths in one pass.

        messages        [{"role": "user", "content": "What is this? <image>"}, ...]; roles are
                        system (first, or not at all), user and assistant
        images          one for each `<image>`, in that order; for several conversations, a list of
                        images for each
        max_new_tokens  room for the answer; what follows its end is dropped
        block_length    answer left to right, so many tokens at a time
        guidance_scale  how strongly to follow the conversation; 1 is off
        think           give reasons first, or not, where the model was trained for either; None: as
                        the conversation has it

        Where num_inference_steps is not given, the model's own number of tokens per step is kept.
        """
        self.prompt_template.require("chat", self.text_tokenizer)
        single = not (
            isinstance(messages, list | tuple)
            and len(messages) > 0
            and isinstance(messages[0], list | tuple)
        )
        conversations = cast(
            "list[abc.Sequence[Message]]", [messages] if single else list(messages)
        )
        given = images_of_each(
            images, single=single, count=len(conversations), what="conversations"
        )
        answers = self._replies(
            conversations,
            given,
            num_inference_steps=num_inference_steps,
            max_new_tokens=max_new_tokens,
            block_length=block_length,
            temperature=temperature,
            guidance_scale=guidance_scale,
            think=think,
            generator=generator,
        )
        return answers[0] if single else answers

    @overload
    def complete(
        self,
        text: str,
        *,
        num_inference_steps: int | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        guidance_scale: float | None = None,
        generator: Generators | None = None,
    ) -> str: ...

    @overload
    def complete(
        self,
        text: list[str] | tuple[str, ...],
        *,
        num_inference_steps: int | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        guidance_scale: float | None = None,
        generator: Generators | None = None,
    ) -> list[str]: ...

    @torch.no_grad()
    def complete(
        self,
        text: str | list[str] | tuple[str, ...],
        *,
        num_inference_steps: int | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        guidance_scale: float | None = None,
        generator: Generators | None = None,
    ) -> str | list[str]:
        """What follows the beginning of a text, or of several in one pass; options as in `chat`."""
        self.prompt_template.require("complete", self.text_tokenizer)
        texts, single = ([text], True) if isinstance(text, str) else (list(text), False)
        length = self._new_tokens(max_new_tokens)
        generation_config = self.writing(
            self.defaults.complete,
            length,
            num_inference_steps=num_inference_steps,
            block_length=block_length,
            temperature=temperature,
            guidance_scale=guidance_scale,
        )
        if not texts:
            return []
        for one in texts:
            if not one.strip():
                raise ValueError(f"text {one!r} is empty; give it a beginning")
        task_prompts = [
            self.fitting(
                self.prompt_template.completion_prompt(self.codec, one, length=length), length
            )
            for one in texts
        ]
        rows = self.generated(task_prompts, generation_config, generator)
        completions = [
            self.prompt_template.completion(self.codec, one, ids)
            for one, ids in zip(texts, rows, strict=True)
        ]
        return completions[0] if single else completions

    @overload
    def infill(
        self,
        text: str,
        *,
        image: ImageLike | None = None,
        num_inference_steps: int | None = None,
        generator: Generators | None = None,
    ) -> str: ...

    @overload
    def infill(
        self,
        text: list[str] | tuple[str, ...],
        *,
        image: ImageLike | None = None,
        num_inference_steps: int | None = None,
        generator: Generators | None = None,
    ) -> list[str]: ...

    @torch.no_grad()
    def infill(
        self,
        text: str | list[str] | tuple[str, ...],
        *,
        image: ImageLike | None = None,
        num_inference_steps: int | None = None,
        generator: Generators | None = None,
    ) -> str | list[str]:
        """Fill the holes of a text, or of several in one pass.

        text   `[MASK]` is a hole of one token, `[MASK:3]` one of three; a word is one or a few
               tokens, and a token brings its own space: "woman [MASK:3] skin tone"
        image  an image that the text describes, the same for all texts

        Nothing but the holes changes, down to line ends and indentation, and none of them ends the
        text. Names of special tokens in it are letters. Raises ValueError for a text
        without a hole or longer than the model's.
        """
        self.prompt_template.require("infill", self.text_tokenizer)
        texts, single = ([text], True) if isinstance(text, str) else (list(text), False)
        generation_config = generation_config_with(
            self.defaults.infill, num_inference_steps=num_inference_steps
        )
        if not texts:
            return []
        codec = self.codec
        for one in texts:
            codec.parse_infill_template(one)  # bad holes are found before an image is looked at
        seen = None
        if image is None:
            generation_config = replace(
                generation_config, guidance_scale=1.0
            )  # there is nothing to follow
        else:
            seen = self.look([[load_image(image)]], "infill")[0][0]
        task_prompts = [
            self.fitting(self.prompt_template.infill_prompt(codec, one, image=seen))
            for one in texts
        ]
        rows = self.generated(
            task_prompts,
            generation_config,
            generator,
            suppress_tokens=self.prompt_template.stop_ids(codec),
        )
        filled = [
            filled_text(
                text, ids[task_prompt.open], decode=partial(self.prompt_template.continued, codec)
            )
            for text, task_prompt, ids in zip(texts, task_prompts, rows, strict=True)
        ]
        return filled[0] if single else filled

    # --- what tasks have in common ----------------------------------------------------------------

    @torch.no_grad()
    def _replies(
        self,
        conversations: abc.Sequence[abc.Sequence[Message]],
        given: list[list[ImageLike]],
        *,
        num_inference_steps: int | None,
        max_new_tokens: int | None,
        block_length: int | None,
        temperature: float | None,
        guidance_scale: float | None,
        think: bool | None,
        generator: Generators | None,
    ) -> list[str]:
        """The assistant's next turn in each conversation; all prompts are context."""
        length = self._new_tokens(max_new_tokens)
        generation_config = self.writing(
            self.defaults.answer,
            length,
            num_inference_steps=num_inference_steps,
            block_length=block_length,
            temperature=temperature,
            guidance_scale=guidance_scale,
        )
        if not conversations:
            return []
        for conversation, some in zip(conversations, given, strict=True):
            check_messages(conversation, len(some))
        opened = [[load_image(one) for one in some] for some in given]
        images = self.look(opened, "answer")
        codec = self.codec
        task_prompts = [
            self.fitting(
                self.prompt_template.chat_prompt(
                    codec,
                    self.prompt_template.thinking(turns_of(conversation, some), think),
                    length=length,
                ),
                length,
            )
            for conversation, some in zip(conversations, images, strict=True)
        ]
        return [
            text.strip()
            for text in self.written(
                task_prompts,
                generation_config,
                generator,
                suppress_tokens=self.prompt_template.suppress_tokens(codec),
            )
        ]

    def _drawing(
        self,
        prompt: str | abc.Sequence[str],
        *,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        negative_prompt: str | abc.Sequence[str] | None,
        num_images_per_prompt: int,
        size: tuple[int | None, int | None],
        think: bool,
        generator: Generators | None,
    ) -> GenerationRun:
        """Text is context, all codes are targets."""
        self.prompt_template.require("text_to_image", self.text_tokenizer)
        tokenizer = self.need_images()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("there is no prompt; give at least one")
        for one in prompts:
            if not one.strip():
                raise ValueError(f"prompt {one!r} is empty; say in words what to draw")
        if isinstance(num_images_per_prompt, bool) or not 1 <= num_images_per_prompt <= MOST_IMAGES:
            raise ValueError(
                f"num_images_per_prompt must be at least 1, and at most {MOST_IMAGES}, got "
                f"{num_images_per_prompt!r}"
            )
        generation_config = generation_config_with(
            self.defaults.text_to_image,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        against = negatives_of(
            negative_prompt, count=len(prompts), guided=generation_config.guidance_scale != 1.0
        )
        height, width = self.prompt_template.drawn_size(
            size, edge=tokenizer.image_size, cell=tokenizer.downsampling
        )
        grid = height // tokenizer.downsampling, width // tokenizer.downsampling
        codes = Codes.blank(self.codec, grid, drawn=True)
        if think:
            if any(negative.strip() for negative in against):
                raise ValueError(
                    f"negative_prompt {negative_prompt!r} has no place where the model thinks "
                    "before it draws; leave out one of both"
                )
            each = [one for one in prompts for _ in range(num_images_per_prompt)]
            task_prompts = self._reasoned(each, codes, generator)
        else:
            task_prompts = [
                self.fitting(
                    self.prompt_template.image_prompt(
                        self.codec, one, image=codes, negative=negative
                    )
                )
                for one, negative in zip(prompts, against, strict=True)
                for _ in range(num_images_per_prompt)
            ]
        return self.generation_run(
            task_prompts, generation_config=generation_config, generator=generator, grid=grid
        )

    @torch.no_grad()
    def _reasoned(
        self, prompts: list[str], codes: Codes, generator: Generators | None
    ) -> list[TaskPrompt]:
        """Write what is to be drawn -> the tasks to draw it."""
        task_prompts = [
            self.fitting(self.prompt_template.thinking_prompt(self.codec, one, grid=codes.grid))
            for one in prompts
        ]
        room = max(
            int(segment.target.sum())
            for task_prompt in task_prompts
            for segment in task_prompt.sequence.segments
        )
        generation_config = self.writing(
            self.defaults.answer,
            room,
            num_inference_steps=None,
            block_length=None,
            temperature=None,
            guidance_scale=None,
        )
        generation_run = self.generation_run(
            task_prompts, generation_config=generation_config, generator=generator
        )
        return [
            self.fitting(
                self.prompt_template.image_prompt_after_thinking(
                    self.codec, with_generated(task_prompt.sequence, ids), image=codes
                )
            )
            for task_prompt, ids in zip(task_prompts, generation_run.run().cpu(), strict=True)
        ]

    def writing(
        self,
        generation_config: GenerationConfig,
        length: int,
        *,
        num_inference_steps: int | None,
        block_length: int | None,
        temperature: float | None,
        guidance_scale: float | None,
    ) -> GenerationConfig:
        """The decoding of `length` tokens; its steps per token stay where they are not given."""
        if num_inference_steps is None:
            usual = self.defaults.max_new_tokens
            num_inference_steps = math.ceil(generation_config.num_inference_steps * length / usual)
            blocks = math.ceil(length / (block_length or generation_config.block_length or length))
            num_inference_steps = max(num_inference_steps, blocks)
        return generation_config_with(
            generation_config,
            num_inference_steps=num_inference_steps,
            block_length=block_length,
            temperature=temperature,
            guidance_scale=guidance_scale,
        )

    def _new_tokens(self, max_new_tokens: int | None) -> int:
        length = self.defaults.max_new_tokens if max_new_tokens is None else max_new_tokens
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(
                f"max_new_tokens must be a whole number of at least 1, got {max_new_tokens!r}"
            )
        self.check_new_tokens(length)  # before as many are laid out
        return length
