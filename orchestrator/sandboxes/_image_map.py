"""Image maps: an image that can be had stands for one that cannot, in a FROM line or as the prebuilt one.

The same for every sandbox that runs images: by the name that is meant, however it is written, and said in the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from orchestrator.dockerfile import expand, instructions

_FROM = re.compile(r"((?:--\S+\s+)*)(\S+)(?:\s+AS\s+(\S+))?", re.IGNORECASE)
Note = Callable[[str], None]


def mapped(image: str, image_map: Mapping[str, str], note: Note) -> str:
    """The image that is to be used for `image`; `note` is told when that is another one, and what matches nothing.

    >>> mapped("docker.io/library/debian", {"debian:latest": "mine", "ubuntu": "ours"}, print)
    the image mine stands for docker.io/library/debian (image map)
    the image map's ubuntu matches nothing: what is asked for is docker.io/library/debian
    'mine'
    """
    found = _mapped(image, image_map, note)
    _say_unmatched(image_map, [image], note)
    return found


def _say_unmatched(image_map: Mapping[str, str], images: Sequence[str], note: Note) -> None:
    meant = set(map(canonical, images))
    missed = [name for name in image_map if canonical(name) not in meant]
    if missed:
        asked = ", ".join(dict.fromkeys(images)) or "no image"
        verb = "matches" if len(missed) == 1 else "match"
        note(f"the image map's {', '.join(missed)} {verb} nothing: what is asked for is {asked}")


def _mapped(image: str, image_map: Mapping[str, str], note: Note) -> str:
    for name, local in image_map.items():
        if canonical(name) == canonical(image):
            note(f"the image {local} stands for {image} (image map)")
            return local
    return image


def canonical(image: str) -> str:
    """One of the names of an image: without the registry that is meant anyway, with its tag.

    >>> canonical("docker.io/library/debian"), canonical("ghcr.io/a/b@sha256:1")
    ('debian:latest', 'ghcr.io/a/b@sha256:1')
    """
    for prefix in ("docker.io/", "index.docker.io/", "library/"):
        image = image.removeprefix(prefix)
    return image if "@" in image or ":" in image.rpartition("/")[2] else f"{image}:latest"


def map_bases(
    text: str, image_map: Mapping[str, str], note: Note, path: object = "Dockerfile"
) -> tuple[str, tuple[str, ...]]:
    """A Dockerfile with the images of its FROM instructions mapped, and these images; `note` is told as in `mapped`.

    Raises `TaskError` for a line that is no instruction, in the file that is called `path`.

    >>> map_bases("FROM debian:12 AS base", {"debian:12": "mine"}, lambda said: None)
    ('FROM mine AS base', ('mine',))
    """
    arguments: dict[str, str] = {}
    stages: set[str] = {"scratch"}
    meant: list[str] = []
    bases: list[str] = []
    lines = text.split("\n")
    for found in instructions(text, path):
        if found.word == "ARG":
            name, _, default = found.rest.partition("=")
            arguments.setdefault(name.strip(), expand(default.strip("\"' "), arguments))
        if found.word != "FROM" or not (parts := _FROM.match(found.rest)):
            continue
        image = expand(parts[2], arguments)
        if image.lower() not in stages:
            meant.append(image)
            bases.append(_mapped(image, image_map, note))
            if bases[-1] != image:
                line = f"FROM {parts[1]}{bases[-1]}{found.rest[parts.end(2) :]}"
                lines[found.line - 1 : found.last] = [line, *[""] * (found.last - found.line)]
        if parts[3]:
            stages.add(parts[3].lower())
    _say_unmatched(image_map, meant, note)
    return "\n".join(lines), tuple(dict.fromkeys(bases))
