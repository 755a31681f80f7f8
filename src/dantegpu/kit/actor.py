"""Who asks: the principal of the call that is being served, from the gateway to the last service."""

from contextvars import ContextVar
from dataclasses import dataclass

from dantegpu.contracts.gen.dante.v1 import common_pb2
from dantegpu.domain.ids import MachineId, TeamId, UserId
from dantegpu.kit.errors import Forbidden, Unauthenticated

_Kind = common_pb2.Actor.Kind


@dataclass(frozen=True, slots=True)
class Actor:
    """The principal. `team_id` is the team it acts for: whose things it sees, whose wallet pays."""

    kind: "_Kind.ValueType"
    user_id: UserId | None = None
    team_id: TeamId | None = None
    role: str = ""
    operator: bool = False
    machine_id: MachineId | None = None
    scopes: frozenset[str] = frozenset()

    @property
    def is_service(self) -> bool:
        return self.kind == common_pb2.Actor.SERVICE

    @property
    def may_write(self) -> bool:
        return self.is_service or self.operator or self.role in ("owner", "member")

    def require_team(self) -> TeamId:
        """The acting team. Raises Unauthenticated when nobody is logged in."""
        if self.team_id is None:
            raise Unauthenticated("log in first: `dante login`, or send an API key")
        return self.team_id

    def require_writer(self) -> TeamId:
        """The acting team, when this actor may change its things. Raises Forbidden for viewers."""
        team_id = self.require_team()
        if not self.may_write:
            raise Forbidden("your role in this team is `viewer`: it may look but not change anything")
        return team_id

    def require_operator(self) -> None:
        if not (self.operator or self.is_service):
            raise Forbidden("only the platform's operator may do this")

    def require_service(self) -> None:
        if not self.is_service:
            raise Forbidden("only the platform's own services may call this")

    def to_proto(self) -> common_pb2.Actor:
        return common_pb2.Actor(
            kind=self.kind,
            user_id=str(self.user_id or ""),
            team_id=str(self.team_id or ""),
            role=self.role,
            operator=self.operator,
            machine_id=str(self.machine_id or ""),
            scopes=sorted(self.scopes),
        )

    @staticmethod
    def from_proto(actor: common_pb2.Actor) -> "Actor":
        return Actor(
            kind=actor.kind,
            user_id=UserId.parse(actor.user_id) if actor.user_id else None,
            team_id=TeamId.parse(actor.team_id) if actor.team_id else None,
            role=actor.role,
            operator=actor.operator,
            machine_id=MachineId.parse(actor.machine_id) if actor.machine_id else None,
            scopes=frozenset(actor.scopes),
        )


ANONYMOUS = Actor(common_pb2.Actor.ANONYMOUS)
SERVICE = Actor(common_pb2.Actor.SERVICE)

_current: ContextVar[Actor] = ContextVar("dante_actor", default=ANONYMOUS)


def current_actor() -> Actor:
    """The actor of the call being served (ANONYMOUS outside of one)."""
    return _current.get()


def set_current_actor(actor: Actor) -> None:
    _current.set(actor)
