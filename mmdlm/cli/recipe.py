"""How every job of this folder reads its options and says what is wrong with them."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

import jsonargparse

from mmdlm.cli.chat_session import forgive_encodings


class _Parser(jsonargparse.ArgumentParser):
    """One sentence on stderr and status 2, where jsonargparse prints usage and a tip as well."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sentence = _one_line(message).removeprefix("error: ")
        print(f"{self.prog}: {sentence} (options: --help)", file=sys.stderr)
        sys.exit(2)


def run(job: Any) -> None:
    """Run a function, or one of a dict of functions by name, with its parameters as options.

    `--config x.yaml` reads them from a file, later options win, `--print_config` shows the result.
    What the user can mend (ValueError) and what the system refuses (a full disk) end with status 2.
    """
    forgive_encodings()
    try:
        jsonargparse.auto_cli(job, as_positional=False, parser_class=_Parser, allow_abbrev=False)
    except (ValueError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _one_line(message: object) -> str:
    return re.sub(r"\s+", " ", str(message)).strip()
