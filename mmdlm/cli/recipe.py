"""How recipes and jobs read their options, and what they say of a wrong one."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
from jsonargparse.typing import register_type

from mmdlm.cli.chat_session import forgive_encodings
from mmdlm.cli.recipe_files import check_recipes
from mmdlm.cli.settings import checked
from mmdlm.vision.known_names import nearest

# How jsonargparse says that there is no such option, in a file and on the command line.
STRANGE = re.compile(
    r"(?:(?:Group|Subcommand) '(?P<group>.+)' does not accept option|Option) '(?P<key>.+?)'"
    r"(?: is not accepted.*)?"
)
UNRECOGNIZED = re.compile(r"unrecognized arguments: (?P<dashes>-*)(?P<key>[^\s=]*).*")
NO_ATTRIBUTE = re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'")
MOST_LISTED = 16  # options that are named where none is near


class _Parser(jsonargparse.ArgumentParser):
    """One sentence on stderr and status 2, where jsonargparse prints usage and a tip as well."""

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Validate as jsonargparse does, and name the nearest option to an unknown one."""
        try:
            super().validate(*args, **kwargs)
            self._check_groups(args[0] if args else kwargs["namespace"])
        except KeyError as error:
            message = str(error.args[0]) if error.args else ""
            if (match := STRANGE.fullmatch(message)) is not None:
                parser = getattr(error, "subcommand_parser", self)
                group = "" if parser is not self else match["group"]
                error.args = (_no_option(parser, match["key"], group=group or ""),)
            raise

    def _check_groups(self, settings: jsonargparse.Namespace) -> None:
        """Raise TypeError for a single value in the place of a group of options."""
        for name in self.groups or ():
            if name not in settings:
                continue
            value = settings[name]
            if not isinstance(value, jsonargparse.Namespace | dict):
                inner = [one.dest for one in self._actions if one.dest.startswith(f"{name}.")]
                raise TypeError(
                    f"{name} is {value!r}, but it is a group of options: {', '.join(inner[:4])} ..."
                )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if (match := UNRECOGNIZED.fullmatch(message)) is not None:
            message = _no_option(self, match["key"], dashes=match["dashes"])
        sentence = _with_nearest_class(_one_line(message).removeprefix("error: "))
        print(f"{self.prog}: {sentence} (options: --help)", file=sys.stderr)
        sys.exit(2)


def run(job: Any) -> None:
    """Run a function, or one of a dict of functions by name, with its parameters as options.

    A dataclass is made of its options, and then called.

    `--config x.yaml` reads them from a file, later options win, `--print_config` shows the result.
    What the user can mend (ValueError) and what the system refuses (a full disk) end with status 2.
    """
    forgive_encodings()
    is_several = isinstance(job, dict)
    is_class = isinstance(job, type)
    jobs: Any = {name: _sane(one) for name, one in job.items()} if is_several else job
    try:
        check_recipes(sys.argv[1:])
        made = jsonargparse.auto_cli(
            jobs if is_several or is_class else _sane(job),
            as_positional=False,
            return_instance=is_class,
            parser_class=_Parser,
            allow_abbrev=False,
        )
        if is_class:
            checked({name: getattr(made, name) for name in inspect.signature(job).parameters})
            made()
    except (ValueError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _sane(job: Callable[..., None]) -> Callable[..., None]:
    """Return the job; it refuses to begin with settings that nobody can mean."""

    @functools.wraps(job)
    def begun(*args: Any, **kwargs: Any) -> None:
        given = inspect.signature(job).bind(*args, **kwargs)
        checked(given.arguments, of=inspect.signature(job))
        job(*args, **kwargs)

    return begun


def _no_option(
    parser: jsonargparse.ArgumentParser, key: str, *, group: str = "", dashes: str = ""
) -> str:
    """Say that a parser has no such option, and which one is nearest."""
    start = f"{group}." if group else ""
    actions = (one.dest for one in parser._actions if not one.dest.startswith(("help", "print_")))
    known = [one for one in actions if one.startswith(start)]
    whole = f"{start}{key}"
    same = [one for one in known if one.rpartition(".")[2] == whole.rpartition(".")[2]]
    near = same[0] if len(same) == 1 else nearest(whole, known)  # it lies in another group
    said = f"there is no option {dashes}{whole}"
    if near is not None:
        return f"{said}; did you mean {dashes}{near}?"
    places = (one.removeprefix(start).split(".")[0] for one in known)
    beside = [f"{start}{place}" for place in dict.fromkeys(places)]
    if len(beside) > MOST_LISTED:
        return said
    return f"{said}; there are {', '.join(dashes + one for one in beside)}"


def _with_nearest_class(message: str) -> str:
    """Add what is nearest in its module to a message about an unknown class path."""
    match = NO_ATTRIBUTE.search(message)
    if match is None or match["module"] not in sys.modules:
        return message
    near = nearest(match["name"], vars(sys.modules[match["module"]]))
    return message if near is None else f"{message}; did you mean {match['module']}.{near}?"


def _path(value: str) -> Path:
    """Read a path; ValueError for an empty one, which pathlib would take for the current folder."""
    if not str(value).strip():
        raise ValueError("a path is empty; name a file or a folder, or '.' for the current one")
    return Path(value)


register_type(Path, str, _path, type_check=isinstance, fail_already_registered=False)


def _one_line(message: object) -> str:
    return re.sub(r"\s+", " ", str(message)).strip()
