"""What users call on a model: draw, caption, infill and inpaint.

All four are one loop over one layout, `begin image, codes, end image, text`: a task is only the
choice of which of its tokens are targets. What is not known (the picture of a text to be filled in,
the words of a picture to be mended) stands there as mask tokens.
"""

from __future__ import annotations

import re
from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from typing import overload

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.sampler import Sampler, SampleStep
from mmdlm.core.sequence import Batch, Segment, Sequence, collate, control_segment
from mmdlm.core.vocabulary import Modality
from mmdlm.decoding import Decoding, Defaults
from mmdlm.vision.image_tokenizer import ImageTokenizer
from mmdlm.vision.pixels import WHITE, open_image, to_image, to_pixels, to_rgb

SEED = 0  # of every call that is given no generator, so that its output can be had again
HOLE = re.compile(r"\[MASK(?::(\d+))?\]")
# What stands for codes that are still masked: tiles with a gap between them.
TILE, GAP = (216, 213, 208), (236, 234, 230)

ImageLike = Image.Image | str | PathLike[str] | Tensor


@dataclass(frozen=True, eq=False)
class Model:
    """A denoiser with the tokenizers that lead into its vocabulary and out of it.

    denoiser         a Transformer, or anything that keeps the contract
    text_tokenizer   with an end of text, which is the vocabulary's eos
    image_tokenizer  None for a model of text alone
    text_slots       tokens of text of every document the model was trained on, end included;
                     None: texts have the length they need
    max_length       longest document the denoiser takes, in tokens
    defaults         steps, temperatures and guidance where a call does not give them
    device           where the tensors of a call are put; that of the denoiser

    Pictures are Pillow images, paths of picture files, or tensors [3, H, W] in [-1, 1]. Without a
    generator each call uses a fresh one of seed 0: the same inputs give the same output. A
    generator of another device seeds one there.
    """

    denoiser: Denoiser
    text_tokenizer: PreTrainedTokenizerFast
    image_tokenizer: ImageTokenizer | None = None
    text_slots: int | None = None
    max_length: int = 2048
    defaults: Defaults = Defaults()
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        vocabulary, tokenizer = self.denoiser.vocabulary, self.text_tokenizer
        if tokenizer.eos_token_id != vocabulary.eos_id:
            has = (
                "no end of text (eos_token)"
                if tokenizer.eos_token_id is None
                else f"the end of text {tokenizer.eos_token!r} with id {tokenizer.eos_token_id}"
            )
            raise ValueError(
                f"the text tokenizer has {has}, but the model's end of text is id "
                f"{vocabulary.eos_id}; give it the tokenizer that it was trained with"
            )
        if len(tokenizer) > vocabulary.text[1]:
            raise ValueError(
                f"the text tokenizer has {len(tokenizer)} ids, but the model knows text ids up to "
                f"{vocabulary.text[1]} only; give it the tokenizer that it was trained with"
            )
        codes = 0 if self.image_tokenizer is None else self.image_tokenizer.codebook_size
        if codes != vocabulary.image_codes:
            raise ValueError(
                f"the image tokenizer has {codes} codes, but the model's vocabulary has "
                f"{vocabulary.image_codes}; give it the tokenizer that it was trained with"
            )
        if not isinstance(self.text_slots, int | None):
            raise ValueError(f"text_slots must be a whole number or None, got {self.text_slots!r}")
        if self._longest_text < 1:
            raise ValueError(
                f"text_slots {self.text_slots} and max_length {self.max_length} leave no room for "
                "text; at least one token and the end of text are needed"
            )

    # --- the tasks --------------------------------------------------------------------------------

    @overload
    def caption(  # type: ignore[overload-overlap]  # a path is a string, and so a sequence of paths
        self,
        image: ImageLike,
        *,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> str: ...

    @overload
    def caption(
        self,
        image: abc.Sequence[ImageLike],
        *,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[str]: ...

    @torch.no_grad()
    def caption(
        self,
        image: ImageLike | abc.Sequence[ImageLike],
        *,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> str | list[str]:
        """Describe a picture, or several in one pass.

        Raises ValueError for a picture that cannot be read, or fewer than one step.
        """
        images, single = _as_list(image)
        decoding = _with(self.defaults.caption, num_inference_steps=num_inference_steps)
        if not images:
            return []
        codes = self._encode([_open(one) for one in images])  # [N, K]
        slots = self.text_slots or min(self.defaults.max_text_tokens, self._longest_text + 1)
        text = self._unknown(slots)
        everything = torch.ones(slots, dtype=torch.bool)
        filling = self._filling(
            [self._document(one, text, write=everything) for one in codes],
            [self._document(self._unknown_codes(), text, write=everything)] * len(images),
            decoding=decoding,
            generator=generator,
        )
        captions = [self._text(ids) for ids in self._texts(filling, filling.run())]
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
        generator: torch.Generator | None = None,
    ) -> list[Image.Image]:
        """Draw pictures of a prompt, or of several: all those of the first prompt come first.

        negative_prompt  what to stay away from: it takes the place of the absent prompt in
                         guidance; None or "": no words at all

        Raises ValueError for an empty or too long prompt, or a number out of range.
        """
        filling = self._drawing(
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
        )
        return self._decode(self._codes(filling, filling.run()))

    def draw_trajectory(
        self,
        prompt: str | abc.Sequence[str],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | abc.Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | None = None,
    ) -> Iterator[list[Image.Image]]:
        """The pictures of `text_to_image` after each denoising step; the last are its result.

        Codes that are still masked show as grey tiles. Bad arguments raise at the call.
        """
        filling = self._drawing(
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
        )
        return self._frames(filling)

    @overload
    def infill(
        self,
        text: str,
        *,
        image: ImageLike | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> str: ...

    @overload
    def infill(
        self,
        text: list[str] | tuple[str, ...],
        *,
        image: ImageLike | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[str]: ...

    @torch.no_grad()
    def infill(
        self,
        text: str | list[str] | tuple[str, ...],
        *,
        image: ImageLike | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> str | list[str]:
        """Fill the holes of a text, or of several in one pass.

        text   `[MASK]` is a hole of one token, `[MASK:3]` one of three; a word is one or a few
               tokens, and a token brings its own space: "woman [MASK:3] skin tone"
        image  a picture that the text describes, the same for all texts

        Nothing but the holes changes, and none of them ends the text. Raises ValueError for a text
        without a hole or longer than the model's.
        """
        texts, single = ([text], True) if isinstance(text, str) else (list(text), False)
        decoding = _with(self.defaults.infill, num_inference_steps=num_inference_steps)
        if not texts:
            return []
        templates = [self._template(one) for one in texts]
        # A model of fixed slots has always seen a picture, be it a masked one.
        nothing = self._unknown_codes() if self._pictures and self.text_slots else None
        codes = nothing
        if image is None:
            decoding = replace(decoding, guidance_scale=1.0)  # there is nothing to follow
        else:
            codes, nothing = self._encode([_open(image)])[0], self._unknown_codes()
        texts_and_holes = [(self._closed(ids), hole) for ids, hole in templates]
        filling = self._filling(
            [self._document(codes, ids, write=_over(hole, ids)) for ids, hole in texts_and_holes],
            [self._document(nothing, ids, write=_over(hole, ids)) for ids, hole in texts_and_holes],
            decoding=decoding,
            generator=generator,
            suppressed=(self.denoiser.vocabulary.eos_id,),
        )
        rows = self._texts(filling, filling.run())
        filled = [
            self._text(row[: len(ids)]) for row, (ids, _) in zip(rows, templates, strict=True)
        ]
        return filled[0] if single else filled

    @torch.no_grad()
    def inpaint(
        self,
        image: ImageLike,
        mask: Image.Image | Tensor,
        prompt: str = "",
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Image.Image:
        """Draw a part of a picture anew, so that the whole shows the prompt.

        mask    white (a tensor: 1, or True) where the picture is to be repainted, of its size
        prompt  "": whatever fits the rest of the picture

        A code is drawn anew when any pixel of its cell is masked; pixels outside the mask come back
        exactly as they were, on the picture's own size. A picture that is not square is set on
        white for the model. Raises ValueError for a mask without a hole or of another size.
        """
        picture = _open(image)
        hole = _hole(mask, picture.size)  # [H, W] bool
        decoding = _with(
            self.defaults.inpaint,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale if prompt.strip() else 1.0,  # there is nothing to follow
        )
        tokenizer = self._need_pictures()
        frame = _Frame.within(tokenizer.image_size, picture.size)
        codes = self._encode([frame.place(picture)])[0]  # [K]
        paint = frame.cells(hole, tokenizer.downsampling).flatten()
        text = self._closed(self._prompt_ids(prompt))
        nothing = torch.full_like(text, self.denoiser.vocabulary.mask_id)
        # The rest of the picture stays in both branches: guidance is towards the words alone.
        filling = self._filling(
            [self._document(codes, text if prompt.strip() else nothing, paint=paint)],
            [self._document(codes, nothing, paint=paint)],
            decoding=decoding,
            generator=generator,
        )
        painted = frame.take(self._decode(self._codes(filling, filling.run()))[0])
        return Image.composite(painted, picture, Image.fromarray(hole.numpy()))

    # --- documents --------------------------------------------------------------------------------

    def _drawing(
        self,
        prompt: str | abc.Sequence[str],
        *,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        negative_prompt: str | abc.Sequence[str] | None,
        num_images_per_prompt: int,
        generator: torch.Generator | None,
    ) -> _Filling:
        """Text is context, all codes are targets."""
        self._need_pictures()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("there is no prompt; give at least one")
        for one in prompts:
            if not one.strip():
                raise ValueError(f"prompt {one!r} is empty; say in words what to draw")
        if isinstance(num_images_per_prompt, bool) or num_images_per_prompt < 1:
            raise ValueError(
                f"num_images_per_prompt must be at least 1, got {num_images_per_prompt!r}"
            )
        decoding = _with(
            self.defaults.text_to_image,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        against = self._negatives(negative_prompt, len(prompts), decoding)

        codes = self._unknown_codes()
        everything = torch.ones_like(codes, dtype=torch.bool)
        documents, opposite = [], []
        for one, negative in zip(prompts, against, strict=True):
            text = self._closed(self._prompt_ids(one))
            absent = (
                self._closed(self._prompt_ids(negative))
                if negative.strip()
                else torch.full_like(text, self.denoiser.vocabulary.mask_id)
            )
            documents += [self._document(codes, text, paint=everything)] * num_images_per_prompt
            opposite += [self._document(codes, absent, paint=everything)] * num_images_per_prompt
        return self._filling(documents, opposite, decoding=decoding, generator=generator)

    def _negatives(
        self, negative_prompt: str | abc.Sequence[str] | None, count: int, decoding: Decoding
    ) -> list[str]:
        """One negative prompt for each prompt; "" stands for none."""
        if negative_prompt is None or isinstance(negative_prompt, str):
            negatives = [negative_prompt or ""] * count
        else:
            negatives = list(negative_prompt)
        if len(negatives) != count:
            raise ValueError(
                f"{len(negatives)} negative prompts for {count} prompts; give one for all, or one "
                "for each"
            )
        if decoding.guidance_scale == 1.0 and any(one.strip() for one in negatives):
            raise ValueError(
                f"negative_prompt {negative_prompt!r} has no effect at guidance_scale 1, which is "
                "no guidance; raise it, for example to 3"
            )
        return negatives

    def _document(
        self,
        codes: Tensor | None,
        text: Tensor,
        *,
        paint: Tensor | None = None,
        write: Tensor | None = None,
    ) -> Sequence:
        """The one layout: `begin image, codes [K], end image, text [T]`, all of them ids.

        paint, write  bool, which codes and which text tokens are targets; None: none
        """
        vocabulary = self.denoiser.vocabulary
        written = _segment(Modality.TEXT, text, write)
        if codes is None:
            return Sequence((written,))
        begin, end = map(control_segment, vocabulary.image_markers)
        return Sequence((begin, _segment(Modality.IMAGE, codes, paint), end, written))

    def _filling(
        self,
        documents: list[Sequence],
        opposite: list[Sequence],
        *,
        decoding: Decoding,
        generator: torch.Generator | None,
        suppressed: tuple[int, ...] = (),
    ) -> _Filling:
        """Lay out the documents, and those of the other branch of guidance in rows as long."""
        vocabulary = self.denoiser.vocabulary
        length = max(map(len, documents + opposite))
        return _Filling(
            sampler=decoding.sampler(suppressed=suppressed),
            denoiser=self.denoiser,
            batch=collate(documents, vocabulary, length=length).to(self.device),
            unconditional=collate(opposite, vocabulary, length=length).to(self.device),
            generator=self._generator(generator),
        )

    def _generator(self, generator: torch.Generator | None) -> torch.Generator:
        if generator is None:
            return torch.Generator(self.device).manual_seed(SEED)
        if generator.device.type == self.device.type:
            return generator
        seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
        return torch.Generator(self.device).manual_seed(int(seed))

    # --- text -------------------------------------------------------------------------------------

    @property
    def _longest_text(self) -> int:
        """Most tokens of a text, its end not counted."""
        if self.text_slots is not None:
            return self.text_slots - 1
        return self.max_length - (self._code_count + 2 if self._pictures else 0) - 1

    def _prompt_ids(self, prompt: str) -> Tensor:
        """Text -> its ids, without an end."""
        ids = self.text_tokenizer.encode(prompt.strip(), add_special_tokens=False)
        return torch.tensor(self._checked(ids, prompt), dtype=torch.int64)

    def _template(self, text: str) -> tuple[Tensor, Tensor]:
        """Text with holes -> (ids, which of them are holes), both [T]."""
        ids: list[int] = []
        hole: list[bool] = []

        def add_words(piece: str) -> None:
            piece = piece.rstrip()  # the token after it brings its own space
            if piece.strip():
                added = self._continue(piece) if ids else self._start(piece)
                ids.extend(added)
                hole.extend([False] * len(added))

        end = 0
        for match in HOLE.finditer(text):
            add_words(text[end : match.start()])
            length = int(match[1] or 1)
            if length < 1:
                raise ValueError(
                    f"{match[0]} in {text!r} is a hole of no tokens; give it at least one"
                )
            length = min(length, self._longest_text + 1)  # enough to be refused below
            ids.extend([self.denoiser.vocabulary.mask_id] * length)
            hole.extend([True] * length)
            end = match.end()
        add_words(text[end:])
        if not any(hole):
            raise ValueError(
                f"text {text!r} has no hole; write [MASK] for each token to fill in, or [MASK:3] "
                "for three"
            )
        return torch.tensor(self._checked(ids, text)), torch.tensor(hole)

    def _start(self, piece: str) -> list[int]:
        return list(self.text_tokenizer.encode(piece.lstrip(), add_special_tokens=False))

    def _continue(self, piece: str) -> list[int]:
        """Ids of a piece in the middle of a text, where a tokenizer must not put a space first."""
        before = list(self.text_tokenizer.encode("\n", add_special_tokens=False))
        ids = list(self.text_tokenizer.encode("\n" + piece, add_special_tokens=False))
        return ids[len(before) :] if ids[: len(before)] == before else self._start(piece)

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if len(ids) > self._longest_text:
            raise ValueError(
                f"text {_shortened(text)!r} has {len(ids)} tokens, but this model takes at most "
                f"{self._longest_text}; shorten it"
            )
        return ids

    def _closed(self, ids: Tensor) -> Tensor:
        """Ids -> the same with the end of text, to the end of the slots where there are slots."""
        slots = self.text_slots or len(ids) + 1
        closed = torch.full((slots,), self.denoiser.vocabulary.eos_id)
        closed[: len(ids)] = ids
        return closed

    def _texts(self, filling: _Filling, ids: Tensor) -> list[Tensor]:
        """The text ids of each row [B, L] -> B times [T]."""
        text = filling.batch.of(Modality.TEXT)
        return [row[here].cpu() for row, here in zip(ids, text, strict=True)]

    def _text(self, ids: Tensor) -> str:
        """Ids up to the first end of text -> words."""
        ended = (ids == self.denoiser.vocabulary.eos_id).nonzero()
        stop = int(ended[0]) if len(ended) else len(ids)
        return str(self.text_tokenizer.decode(ids[:stop].tolist())).strip()

    # --- pictures ---------------------------------------------------------------------------------

    @property
    def _pictures(self) -> bool:
        return self.image_tokenizer is not None

    def _need_pictures(self) -> ImageTokenizer:
        if self.image_tokenizer is None:
            raise ValueError("this model knows text alone; take one with an image tokenizer")
        return self.image_tokenizer

    @property
    def _code_count(self) -> int:
        tokenizer = self._need_pictures()
        return (tokenizer.image_size // tokenizer.downsampling) ** 2

    def _unknown(self, count: int) -> Tensor:
        """[count] mask tokens."""
        return torch.full((count,), self.denoiser.vocabulary.mask_id)

    def _unknown_codes(self) -> Tensor:
        return self._unknown(self._code_count)

    def _encode(self, images: list[Image.Image]) -> Tensor:
        """Pictures -> ids of their codes [N, K]."""
        tokenizer = self._need_pictures()
        pixels = torch.stack(
            [to_pixels(image, tokenizer.image_size, fit=self.defaults.fit) for image in images]
        )
        return self.denoiser.vocabulary.image_ids(tokenizer.encode(pixels.to(self.device))).cpu()

    def _codes(self, filling: _Filling, ids: Tensor) -> Tensor:
        """Codes [B, K] of the rows [B, L]."""
        here = ids[filling.batch.of(Modality.IMAGE)]
        return self.denoiser.vocabulary.codes(here).view(len(ids), -1)

    def _decode(self, codes: Tensor) -> list[Image.Image]:
        """Codes [B, K] -> B pictures."""
        return [to_image(pixels) for pixels in self._need_pictures().decode(codes)]

    @torch.no_grad()
    def _frames(self, filling: _Filling) -> Iterator[list[Image.Image]]:
        """The pictures after each step, with tiles where codes are open."""
        tokenizer = self._need_pictures()
        blank = Image.new("RGB", (tokenizer.image_size, tokenizer.image_size), WHITE)
        paper = self._encode([blank])[0].to(self.device)  # decoding needs valid codes everywhere
        shown = filling.batch.of(Modality.IMAGE)
        for state in filling.trajectory():
            still_open = (~state.committed)[shown].view(len(state.ids), -1)  # [B, K]
            codes = self._codes(filling, state.ids)
            codes = torch.where(still_open, self.denoiser.vocabulary.codes(paper), codes)
            yield [
                _tiled(picture, cells.tolist(), tokenizer.downsampling)
                for picture, cells in zip(self._decode(codes), still_open, strict=True)
            ]


@dataclass(frozen=True)
class _Filling:
    """One run of the sampler, made ready."""

    sampler: Sampler
    denoiser: Denoiser
    batch: Batch
    unconditional: Batch
    generator: torch.Generator

    def run(self) -> Tensor:
        """[B, L] ids with the targets filled."""
        return self.sampler(
            self.denoiser,
            self.batch,
            generator=self.generator,
            unconditional=self.unconditional,
        ).ids

    def trajectory(self) -> Iterator[SampleStep]:
        return self.sampler.trajectory(
            self.denoiser,
            self.batch,
            generator=self.generator,
            unconditional=self.unconditional,
        )


# --- arguments ------------------------------------------------------------------------------------


def _with(
    decoding: Decoding,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> Decoding:
    """The decoding with what the caller gave; None leaves the default."""
    if num_inference_steps is not None:
        decoding = replace(decoding, num_inference_steps=num_inference_steps)
    if guidance_scale is not None:
        decoding = replace(decoding, guidance_scale=guidance_scale)
    return decoding


def _as_list(image: ImageLike | abc.Sequence[ImageLike]) -> tuple[list[ImageLike], bool]:
    """One picture or several -> (all of them, whether it was one)."""
    if isinstance(image, Tensor) and image.ndim == 4:
        return list(image), False
    if isinstance(image, Image.Image | str | PathLike | Tensor):
        return [image], True
    return list(image), False


def _open(image: ImageLike) -> Image.Image:
    """A picture in any accepted form -> RGB."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, Tensor):
        if image.is_floating_point() and image.numel() and not bool(image.abs().max() <= 1.001):
            raise ValueError(
                f"a picture's tensor has values from {image.min():.3g} to {image.max():.3g}; "
                "pixels lie in [-1, 1]"
            )
        if not image.is_floating_point():
            raise ValueError(f"a picture's tensor is {image.dtype}; pixels are floats in [-1, 1]")
        return to_image(image)
    if isinstance(image, str | PathLike):
        return open_image(image)
    raise ValueError(
        f"{type(image).__name__} is no picture; give a Pillow image, a path, or a tensor "
        "[3, H, W] in [-1, 1]"
    )


def _hole(mask: Image.Image | Tensor, size: tuple[int, int]) -> Tensor:
    """A mask for a picture of `size` (width, height) -> [H, W] bool, True where it is repainted."""
    if isinstance(mask, Image.Image):
        hole = torch.from_numpy(np.array(to_rgb(mask).convert("L")) >= 128)
    elif isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point()):
        hole = (mask if mask.ndim == 2 else mask.squeeze(0)).cpu() >= 0.5
    else:
        raise ValueError(
            f"{type(mask).__name__} is no mask; give a Pillow image, or a tensor [H, W] of bool or "
            "of floats in [0, 1]"
        )
    width, height = size
    if hole.shape != (height, width):
        shape = " x ".join(str(side) for side in reversed(hole.shape))
        raise ValueError(
            f"the mask is {shape} but the picture is {width} x {height}; give a mask of the "
            "picture's size"
        )
    if not bool(hole.any()):
        raise ValueError("the mask has no hole; make white what is to be drawn anew")
    return hole


def _segment(modality: Modality, ids: Tensor, target: Tensor | None) -> Segment:
    none = torch.zeros(ids.shape, dtype=torch.bool)
    return Segment(modality, ids, none if target is None else target)


def _over(hole: Tensor, ids: Tensor) -> Tensor:
    """[n] bool over the start of [m] ids -> [m] bool."""
    result = torch.zeros(ids.shape, dtype=torch.bool)
    result[: len(hole)] = hole
    return result


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "\N{HORIZONTAL ELLIPSIS}"


# --- a picture on the square of the tokenizer -----------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Where a picture of `size` lies, scaled as a whole, on a white square of `edge` pixels."""

    edge: int
    size: tuple[int, int]  # width, height
    left: int
    top: int
    width: int
    height: int

    @classmethod
    def within(cls, edge: int, size: tuple[int, int]) -> _Frame:
        longest = max(size)
        width, height = (max(1, round(side * edge / longest)) for side in size)
        return cls(edge, size, (edge - width) // 2, (edge - height) // 2, width, height)

    def place(self, picture: Image.Image) -> Image.Image:
        """The picture on the square."""
        square = Image.new("RGB", (self.edge, self.edge), WHITE)
        scaled = picture.resize((self.width, self.height), Image.Resampling.BICUBIC)
        square.paste(scaled, (self.left, self.top))
        return square

    def take(self, square: Image.Image) -> Image.Image:
        """The picture back from the square, in its own size."""
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        return square.crop(box).resize(self.size, Image.Resampling.BICUBIC)

    def cells(self, hole: Tensor, cell: int) -> Tensor:
        """Pixels of the picture [H, W] -> cells of the square, True where any pixel touches one."""
        rows = _touches(hole.shape[0], self.height, self.top, cell, self.edge // cell)
        columns = _touches(hole.shape[1], self.width, self.left, cell, self.edge // cell)
        return (rows @ hole.float() @ columns.T) > 0


def _touches(pixels: int, scaled: int, offset: int, cell: int, cells: int) -> Tensor:
    """[cells, pixels] float: 1 where a pixel of a scaled and shifted row overlaps a cell.

    In whole numbers, in units of 1 / pixels of a pixel of the square.
    """
    start = offset * pixels + torch.arange(pixels) * scaled
    edge = torch.arange(cells)[:, None] * cell * pixels
    return ((start < edge + cell * pixels) & (start + scaled > edge)).float()


def _tiled(picture: Image.Image, still_open: list[bool], cell: int) -> Image.Image:
    """The picture with a tile over each cell that is still open (raster order)."""
    pen = ImageDraw.Draw(picture)
    columns, gap = picture.width // cell, max(1, cell // 8)
    for k in (k for k, covered in enumerate(still_open) if covered):
        x, y = k % columns * cell, k // columns * cell
        pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=GAP)
        if cell > 2 * gap:
            pen.rectangle((x + gap, y + gap, x + cell - 1 - gap, y + cell - 1 - gap), fill=TILE)
    return picture
