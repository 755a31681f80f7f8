"""Job files: YAML to job specs, with the file and line of everything that is wrong."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, cast

import yaml
from pydantic import ValidationError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from dantegpu.cli.errors import UsageProblem
from dantegpu.contracts.rest.base import FieldProblem, field_problems
from dantegpu.contracts.rest.spec import MAX_JOBS_PER_CALL, JobSpec, fill_env

MAX_FILE_BYTES: Final = 1 << 20
_ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "commands": ("run",),
    "env": ("envs",),
    "gpu": ("accelerators", "gpus"),
    "cpu": ("cpus",),
    "memory": ("mem",),
}
"""The other words that the model accepts: an error names the field, the file may hold one of these."""


@dataclass(frozen=True, slots=True)
class FileProblem:
    """One thing that is wrong in a file. Lines and columns begin at 1."""

    file: str
    line: int
    column: int
    field: str
    message: str
    expected: str | None = None
    nearest: str | None = None

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: "
        name = f"{self.field}: " if self.field else ""
        more = f" (expected {self.expected})" if self.expected and self.expected not in self.message else ""
        return where + name + self.message + more

    def as_detail(self) -> dict[str, Any]:
        """For `--json`."""
        shown = asdict(self) | {"text": str(self)}
        return {name: value for name, value in shown.items() if value is not None}


class JobFileInvalid(UsageProblem):
    """The file holds `problems`; nothing was submitted."""

    def __init__(self, file: str, problems: list[FileProblem]) -> None:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        super().__init__(
            f"{file}: {count}; nothing was submitted",
            code="job-file-invalid",
            details=[problem.as_detail() for problem in problems],
        )
        self.problems = problems


@dataclass(slots=True)
class _File:
    name: str
    problems: list[FileProblem] = field(default_factory=list[FileProblem])

    def add(self, node: Node | None, path: str, message: str, expected: str | None = None) -> None:
        line, column = _place(node)
        self.problems.append(FileProblem(self.name, line, column, path, message, expected))


def parse(text: str, name: str, environ: Mapping[str, str]) -> list[JobSpec]:
    """The jobs of a file, one per YAML document. `name` is what errors call it. Raises JobFileInvalid."""
    file = _File(name)
    specs: list[JobSpec] = []
    for node in _documents(text, file):
        spec = _spec(node, file, environ)
        if spec is not None:
            specs.append(spec)
    if not specs and not file.problems:
        file.add(None, "", "the file is empty", "a job such as `commands: [python train.py]`")
    if len(specs) > MAX_JOBS_PER_CALL:
        file.add(None, "", f"{len(specs)} jobs; at most {MAX_JOBS_PER_CALL} fit into one call")
    if file.problems:
        raise JobFileInvalid(name, sorted(file.problems, key=lambda problem: problem.line))
    return specs


def _documents(text: str, file: _File) -> Iterator[MappingNode]:
    """The mappings of the file. What is no YAML, or no mapping, is noted."""
    if len(text.encode(errors="replace")) > MAX_FILE_BYTES:
        file.add(None, "", f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")
        return
    try:
        nodes: list[Node | None] = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        message = f"this is not valid YAML: {error.problem or error.context}"
        if "'\\t'" in message:
            message += "; indent with spaces, not with tabs"
        file.problems.append(FileProblem(file.name, line, column, "", message))
        return
    except (yaml.YAMLError, RecursionError) as error:
        file.add(None, "", "this is not valid YAML: " + (str(error) or "nested too deeply").splitlines()[0])
        return
    for node in nodes:
        if node is None or (isinstance(node, ScalarNode) and node.tag.endswith(":null")):
            continue
        if not isinstance(node, MappingNode):
            file.add(node, "", "this is not a job", "fields such as `commands: [python train.py]`")
            continue
        yield node


def _spec(node: MappingNode, file: _File, environ: Mapping[str, str]) -> JobSpec | None:
    _note_doubles(node, "", file, set())
    # Noted already; what else is wrong is told in the same go.
    environ = dict(environ) | dict.fromkeys(_note_missing_env(node, file, environ), "")
    try:
        document = _constructed(node)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error) or "nested too deeply"
        mark = getattr(error, "problem_mark", None)
        line, column = (mark.line + 1, mark.column + 1) if mark else _place(node)
        file.problems.append(FileProblem(file.name, line, column, "", f"this cannot be read: {problem}"))
        return None
    try:
        return JobSpec.model_validate(fill_env(document, environ))
    except ValidationError as error:
        for found in field_problems(error.errors(include_url=False, include_input=False)):
            file.problems.append(_located(found, node, file.name))
    return None


def _constructed(node: MappingNode) -> dict[str, Any]:
    loader = yaml.SafeLoader("")
    try:
        return cast("dict[str, Any]", loader.construct_document(node))  # pyright: ignore[reportUnknownMemberType]
    finally:
        loader.dispose()


def _note_doubles(node: Node, path: str, file: _File, seen: set[int]) -> None:
    """A field that comes twice: YAML would silently take the last one."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, SequenceNode):
        for item in node.value:
            _note_doubles(item, path, file, seen)
    if not isinstance(node, MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name = str(key.value) if isinstance(key, ScalarNode) else ""
        inner = f"{path}.{name}" if path else name
        if name != "<<" and name in lines:
            file.add(key, inner, f"this field comes twice, first in line {lines[name]}")
        lines[name] = _place(key)[0]
        _note_doubles(value, inner, file, seen)


def _note_missing_env(node: MappingNode, file: _File, environ: Mapping[str, str]) -> list[str]:
    """`env: [HF_TOKEN]` means: the value that this shell has. Returns the names that it has not."""
    missing: list[str] = []
    for name in ("env", "envs"):
        value = _entry(node, name)
        if value is None or not isinstance(value[1], SequenceNode):
            continue
        for index, item in enumerate(value[1].value):
            text = str(item.value) if isinstance(item, ScalarNode) else ""
            if text and "=" not in text and text not in environ:
                near = difflib.get_close_matches(text, environ, n=1, cutoff=0.8)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                expected = f"{text} set in the environment of `dante submit`, or {text}=VALUE here"
                file.add(item, f"{name}.{index}", f"{text!r} is not set in your environment{hint}", expected)
                missing.append(text)
    return missing


def _located(problem: FieldProblem, root: MappingNode, file: str) -> FileProblem:
    line, column = _place(_find(root, problem.field))
    return FileProblem(file, line, column, problem.field, problem.message, problem.expected, problem.nearest)


def _find(root: MappingNode, path: str) -> Node:
    """The node that a field's path means: the key of a mapping's entry, the item of a list; the nearest that exists."""
    place: Node = root
    node: Node = root
    for part in path.split("."):
        if isinstance(node, MappingNode):
            entry = _entry(node, part) or next(
                (found for alias in _ALIASES.get(part, ()) if (found := _entry(node, alias))), None
            )
            if entry is None:
                break
            place, node = entry
        elif isinstance(node, SequenceNode) and part.isdecimal() and int(part) < len(node.value):
            place = node = node.value[int(part)]
        else:
            break
    return place


def _entry(node: MappingNode, name: str) -> tuple[Node, Node] | None:
    for key, value in node.value:
        if isinstance(key, ScalarNode) and str(key.value) == name:
            return key, value
    return None


def _place(node: Node | None) -> tuple[int, int]:
    """Line and column, from 1."""
    mark = node.start_mark if node is not None else None
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
