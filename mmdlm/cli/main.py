"""Run the command line: draw, caption, inpaint, edit, infill, answer, chat, complete and convert.

    mmdlm draw "red heart" "blue heart"
    mmdlm draw @prompts.txt -o drawings --num-images 4
    mmdlm draw "red heart" -o heart.png --animate heart.gif
    mmdlm caption heart.png
    mmdlm inpaint heart.png --box 0,0,64,32 --prompt "blue heart" -o half.png
    mmdlm infill "woman [MASK] [MASK] skin tone"
    mmdlm answer "What is on the table?" --image room.png --model GSAI-ML/LLaDA-V
    mmdlm chat --model GSAI-ML/LLaDA-8B-Instruct
    mmdlm convert GSAI-ML/LLaDA-8B-Instruct llada-here

What the user got wrong ends in one sentence on stderr and exit status 2, and it is looked for
before the slow work starts. Output files appear whole or not at all. torch and Pillow are imported
where they are used, so that `mmdlm --help` is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mmdlm.cli.chat_session import forgive_encodings
from mmdlm.cli.image_files import sentence
from mmdlm.cli.parser import build_parser, explain_unknown, with_dashes

USER_ERROR = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for a user's error, 130 when interrupted."""
    forgive_encodings()
    try:
        parser = build_parser()
        given = with_dashes(sys.argv[1:] if arguments is None else arguments)
        options, unknown = parser.parse_known_args(given)
        if unknown and not getattr(options, "takes_anything", False):
            raise ValueError(explain_unknown(unknown[0], options.command, parser))
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader left (mmdlm caption ... | head): not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"mmdlm: {sentence(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("mmdlm: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
