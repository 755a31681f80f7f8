"""What of a job file is valid on its face, so that thousands that differ in nothing else are validated once."""

from dataclasses import dataclass
from typing import cast

from dantegpu.contracts.rest.spec import ENV_NAME, MAX_ARGUMENT_LENGTH, MAX_ARGUMENTS, MAX_ENV, NAME

PLAIN_TEXT_LENGTH = MAX_ARGUMENT_LENGTH // 4
"""Characters of which no encoding is too long for one argument."""


@dataclass(frozen=True, slots=True)
class PlainParts:
    """What a job has for itself; `common` is all the rest of its document, and `lines` names what it runs by."""

    lines: str
    run: list[str]
    name: str
    env: dict[str, str]
    common: dict[str, object]


def plain_parts(document: object) -> PlainParts | None:
    """The parts of a job file that are as valid as they can be; None when only JobSpec itself can tell.

    With any other valid `run`, `name` and `env`, the same `common` is valid too: whoever reads thousands of jobs that
    differ in nothing else validates it once.
    """
    if not isinstance(document, dict):
        return None
    common = dict(cast("dict[str, object]", document))
    runs = [(lines, common.pop(lines)) for lines in ("command", "commands") if lines in common]
    name, env = common.pop("name", ""), common.pop("env", {})
    if len(runs) != 1 or "registry_auth" in common or not isinstance(env, dict) or not isinstance(name, str):
        return None
    lines, run = runs[0]
    if not isinstance(run, list):
        return None
    run, env = cast("list[str]", run), cast("dict[str, str]", env)
    texts = [*run, *env.values()]
    if not 0 < len(run) <= MAX_ARGUMENTS or len(env) > MAX_ENV:
        return None
    if not all(type(text) is str and "\0" not in text for text in texts):
        return None
    if sum(map(len, texts)) > PLAIN_TEXT_LENGTH or (name and not NAME.fullmatch(name)):
        return None
    if not all(ENV_NAME.fullmatch(variable) for variable in env):
        return None
    return PlainParts(lines, run, name, env, common)
