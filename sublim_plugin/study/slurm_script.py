"""The batch script's template, and options that may differ by the kind of work."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sublim_plugin.core.errors import InputError
from sublim_plugin.study.arrays import CHUNKS, WORKS, Work

SHIPPED = Path(__file__).with_name("slurm_template.sh")
REPORT = "report"
_PLACEHOLDER = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")
_WORD = re.compile(r"[a-z-]+")


def fill(template: str, name: str, values: Mapping[str, str]) -> str:
    """Put values in a template's {{placeholders}}; the shell's own $words stay as they are.

    Args:
        name: the template's file name, for errors.

    Raises:
        InputError: an unknown placeholder, or a template with neither command nor arguments.
    """
    found = list(_PLACEHOLDER.finditer(template))
    known = ", ".join(f"{{{{{key}}}}}" for key in values)
    for place in found:
        if place[1] not in values:
            line = template.count("\n", 0, place.start()) + 1
            raise InputError(f"{name}:{line}: unknown placeholder {place[0]}; there are {known}")
    if not {"command", "arguments"} & {place[1] for place in found}:
        raise InputError(
            f"{name}: neither {{{{command}}}} nor {{{{arguments}}}} is in it, so its jobs would"
            " make nothing; `sublim template slurm` prints one to start from"
        )
    return _PLACEHOLDER.sub(lambda place: values[place[1]], template)


def templates_of(given: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Name and text of the template for each kind of work and the report.

    Args:
        given: what --slurm-template was given, `FILE` or `WORK=FILE`.

    Raises:
        InputError: as `by_work`, or a file that cannot be read.
    """
    chosen = by_work(given, "--slurm-template", (*WORKS, REPORT))
    read = {}
    for work in (*WORKS, REPORT):
        path = Path(chosen.get(work) or chosen.get("") or SHIPPED)
        try:
            read[work] = (str(path), path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--slurm-template {path}: cannot be read ({error}); `sublim template slurm`"
                " prints one to start from"
            ) from error
    return read


def chunks_of(given: Sequence[str]) -> dict[Work, int]:
    """Cells in a task for each kind of work, from --chunk's `N` and `WORK=N`.

    Raises:
        InputError: as `by_work`, or no positive number.
    """
    chosen = by_work(given, "--chunk", WORKS)
    chunks = dict(CHUNKS)
    for work in WORKS:
        text = chosen.get(work, chosen.get(""))
        if text is not None:
            if not text.isdecimal() or int(text) < 1:
                raise InputError(f"--chunk {text}: expected a number of cells, 1 or more")
            chunks[work] = int(text)
    return chunks


def by_work(given: Sequence[str], option: str, works: Sequence[str]) -> dict[str, str]:
    """`VALUE` (under the key "") and `WORK=VALUE` of an option that may be repeated.

    Raises:
        InputError: no such kind of work, or a second value for the same one.
    """
    found: dict[str, str] = {}
    for text in given:
        word, equals, value = text.partition("=")
        if not equals or not _WORD.fullmatch(word):
            word, value = "", text
        if word and word not in works:
            raise InputError(
                f"{option} {text}: no kind of work is called '{word}'; there are {', '.join(works)}"
            )
        if word in found:
            raise InputError(f"{option}: given twice for {word or 'all work'}")
        found[word] = value
    return found
