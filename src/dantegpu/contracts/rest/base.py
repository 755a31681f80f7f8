"""What all models of the REST API share: strict requests, lenient responses, pages, and readable field errors."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from dantegpu.domain.ids import Id, InvalidId
from dantegpu.domain.units import MAX_AMOUNT_UDGPU

MAX_PAGE_LIMIT = 500
DEFAULT_PAGE_LIMIT = 50

type Timestamp = AwareDatetime
"""RFC 3339 with a zone; the platform always answers in UTC."""

type Udgpu = Annotated[int, Field(ge=-MAX_AMOUNT_UDGPU, le=MAX_AMOUNT_UDGPU)]
"""Money: micro-$dGPU, an integer. 1,000,000 are one $dGPU."""


def field_error(kind: str, message: str, **context: str) -> PydanticCustomError:
    """An error of one field. `context` may hold `expected` (what would be right) and `nearest` (a known name).

    Braces in `message` stay as they are: pydantic only replaces names that the context holds.
    """
    return PydanticCustomError(cast(Any, kind), cast(Any, message), cast("dict[str, Any]", context) or None)


def id_field(kind: type[Id]) -> BeforeValidator:
    """Accepts the text form of one kind of id."""

    def check(value: object) -> object:
        if isinstance(value, str):
            try:
                kind.parse(value)
            except InvalidId as error:
                raise field_error("invalid_id", str(error), expected=f"{kind.prefix}_...") from error
        return value

    return BeforeValidator(check)


class Request(BaseModel):
    """A request body. Unknown fields are errors that name the nearest known one."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    not_supported_yet: ClassVar[Mapping[str, str]] = {}
    """Fields that users of similar systems know and this platform refuses by name: field -> what it would do."""

    @model_validator(mode="wrap")
    @classmethod
    def _name_unknown_fields(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, Mapping):
            return handler(data)
        document = cast("Mapping[object, object]", data)
        known = cls.known_fields()
        unknown = [key for key in document if key not in known]
        if not unknown:
            return handler(data)
        errors = [cls._unknown(key, document[key], known) for key in unknown]
        try:
            handler({key: value for key, value in document.items() if key in known})
        except ValidationError as error:
            errors += [_again(line) for line in error.errors(include_url=False)]
        raise ValidationError.from_exception_data(cls.__name__, errors)

    @classmethod
    def known_fields(cls) -> frozenset[str]:
        aliases = {field.alias for field in cls.model_fields.values() if field.alias}
        return frozenset(cls.model_fields) | aliases

    @classmethod
    def _unknown(cls, key: object, value: object, known: Iterable[str]) -> InitErrorDetails:
        name = str(key)[:80]
        if name in cls.not_supported_yet:
            text = f"{name!r} is not supported yet ({cls.not_supported_yet[name]}); remove it"
            return {"type": field_error("not_supported_yet", text), "loc": (name,), "input": value}
        close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
        expected = ", ".join(cls.model_fields)
        context = {"expected": f"one of {expected}"} | ({"nearest": close[0]} if close else {})
        hint = f"; did you mean {close[0]!r}?" if close else f"; known fields are {expected}"
        return {"type": field_error("unknown_field", f"unknown field{hint}", **context), "loc": (name,), "input": value}


def _again(line: Mapping[str, Any]) -> InitErrorDetails:
    """A line of a ValidationError in the form in which it can be raised again."""
    context = {key: value for key, value in _context(line).items() if isinstance(value, str)}
    return {
        "type": field_error(line["type"], line["msg"].removeprefix("Value error, "), **context),
        "loc": line["loc"],
        "input": line["input"],
    }


def _context(line: Mapping[str, Any]) -> dict[str, Any]:
    """`ctx` of an error line, with `expected` and `nearest` of one of the domain's own errors."""
    context = dict(line.get("ctx") or {})
    cause = context.get("error")
    for name in ("expected", "nearest"):
        value = getattr(cause, name, None)
        if isinstance(value, str):
            context[name] = value
    return context


class Response(BaseModel):
    """A response body. A client ignores fields that a newer platform adds."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class Page(Response):
    """One page of a list."""

    next_cursor: str | None = Field(default=None, description="Ask again with `?cursor=`; null: this is the last page")


class FieldProblem(Response):
    """One field of a request that is wrong."""

    field: str = Field(description="Path of the field, such as `resources.gpu` or `jobs.3.env`")
    message: str
    expected: str | None = Field(default=None, description="What would be right")
    nearest: str | None = Field(default=None, description="The known name closest to what came")


_WORDING = {
    "missing": "this field is required",
    "json_invalid": "this is not valid JSON",
    "string_type": "this must be a text; in YAML, put it into quotes",
    "value_error": "",
}


def field_problems(errors: Iterable[Mapping[str, Any]], skip: int = 0) -> list[FieldProblem]:
    """Pydantic's error lines, for people. `skip` leaves out the first parts of each path (such as FastAPI's `body`)."""
    return [_problem(line, skip) for line in errors]


def _problem(line: Mapping[str, Any], skip: int) -> FieldProblem:
    context = _context(line)
    path = [str(part) for part in line["loc"][skip:] if not str(part).startswith("function-")]
    message = str(context["error"]) if isinstance(context.get("error"), Exception) else str(line["msg"])
    return FieldProblem(
        field=".".join(path),
        message=_WORDING.get(line["type"]) or message,
        expected=context.get("expected") if isinstance(context.get("expected"), str) else None,
        nearest=context.get("nearest"),
    )


class Problem(Response):
    """Every error of the API: RFC 9457 problem details (`application/problem+json`)."""

    type: str = Field(description="Stable: `https://dantegpu.dev/problems/<code>`; programs compare `code`")
    code: str = Field(description="Stable and kebab-case: `job-not-found`, `insufficient-funds`, ...")
    title: str
    status: int
    detail: str = Field(description="For people: what happened, what it means, what to do next")
    instance: str = Field(default="", description="The path that was asked for")
    request_id: str = ""
    errors: list[FieldProblem] = Field(default_factory=list[FieldProblem])
    params: dict[str, str] = Field(default_factory=dict, description="Machine-readable parts of `detail`")
